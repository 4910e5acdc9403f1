"""Backbones, taps and random-label heads."""

from rlp.models.attach import attach
from rlp.models.backbone import build_model, default_taps
from rlp.models.heads import RandomLabelHeads, TapMetrics

__all__ = ["RandomLabelHeads", "TapMetrics", "attach", "build_model", "default_taps"]
