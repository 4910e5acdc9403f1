"""Random Label Heads: measure and control memorisation in PyTorch image classifiers."""

from typing import TYPE_CHECKING, Any

from rlp.errors import UserError

if TYPE_CHECKING:
    from rlp.models import RandomLabelHeads, attach
    from rlp.models.backbone import import_timm

__all__ = ["RandomLabelHeads", "UserError", "attach", "import_timm"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the heads, and with them torch, when they are first asked for: processes that only encode images import
    this package too."""
    if name in ("RandomLabelHeads", "attach"):
        from rlp import models

        return getattr(models, name)
    if name == "import_timm":
        from rlp.models.backbone import import_timm

        return import_timm
    raise AttributeError(f"module 'rlp' has no attribute '{name}'")
