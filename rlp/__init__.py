"""Random Label Heads: measure and control memorisation in PyTorch image classifiers."""

from rlp.errors import UserError

__all__ = ["UserError"]
__version__ = "0.1.0"
