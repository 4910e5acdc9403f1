"""Random Label Heads: measure and control memorisation in PyTorch image classifiers."""

from rlp.errors import UserError
from rlp.models import RandomLabelHeads, attach

__all__ = ["RandomLabelHeads", "UserError", "attach"]
__version__ = "0.1.0"
