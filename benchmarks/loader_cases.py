"""What `benchmarks.loader` compares, and what a contender is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.loader_sets import CROP_SIDE, ImageSet

Item = tuple[Tensor, Tensor, Tensor]
"""A batch: image uint8 [B, 3, H, W] of any strides, label int64 [B], index int64 [B], the samples' numbers."""
Epochs = Callable[[int], Iterator[Item]]
"""From the number of an epoch to its batches; every epoch is gone through to its end."""


@dataclass(frozen=True)
class Case:
    """What the batches of one comparison are.

    Attributes:
        key: short name.
        title: long name.
        images: name of the set.
        train: shuffled, without an incomplete last batch; otherwise every sample once.
        batch_size: samples.
        flip: mirror half of the images.
        padding: pixels of padding for a random crop of the image's own size.
        crop: side of a random resized crop (training) or of the middle (evaluation); 0 keeps images whole.
        start_up: starting is measured too.
    """

    key: str
    title: str
    images: str
    train: bool = True
    batch_size: int = 256
    flip: bool = False
    padding: int = 0
    crop: int = 0
    start_up: bool = False

    def bare(self) -> "Case":
        """The same with nothing done to the images."""
        return replace(self, flip=False, padding=0, crop=0)


CASES = (
    Case("a", "32 px raw, whole images", "small"),
    Case("b", "32 px raw, flip + crop with padding 4", "small", flip=True, padding=4, start_up=True),
    Case("c", "256 px JPEG, random resized crop to 224 + flip", "jpeg", True, 64, True, crop=CROP_SIDE, start_up=True),
    Case("d", "256 px raw, random resized crop to 224 + flip", "raw", True, 64, True, crop=CROP_SIDE),
    Case("e", "256 px JPEG, evaluation on the middle 224 px", "jpeg", False, 64, crop=CROP_SIDE),
)


@dataclass(frozen=True)
class Contender:
    """Who is measured.

    Attributes:
        name: in tables.
        build: from a case and its images to the batches of an epoch; imports what it needs, may raise anything.
        note: what to know about it.
        cases: keys of the cases that it serves.
        needs: modules without which it cannot run.
        is_ours: this project's.
        is_bare: leaves images as they are whatever the case.
        in_memory: reads the files when it is built and never again.
        start_only: only its start is measured.
        runs_ahead: works on for a moment when nobody asks for batches.
    """

    name: str
    build: Callable[[Case, ImageSet, torch.device], Epochs]
    note: str
    cases: str = "abcde"
    needs: tuple[str, ...] = ()
    is_ours: bool = False
    is_bare: bool = False
    in_memory: bool = False
    start_only: bool = False
    runs_ahead: bool = False

    def serves(self, case: Case) -> bool:
        """Whether it takes part in a case."""
        return case.key in self.cases and (case.start_up or not self.start_only)

    def task(self, case: Case) -> Case:
        """What it does in the case."""
        return case.bare() if self.is_bare else case

    def why_missing(self) -> str | None:
        """The reason when a module that it needs is not installed."""
        missing = [module for module in self.needs if find_spec(module) is None]
        return f"needs {', '.join(missing)}, which is not installed" if missing else None

    def import_needs(self) -> None:
        """Import them."""
        for module in self.needs:
            if module == "torchvision":  # a CUDA build of it does not import beside a torch without CUDA
                from rlp.models.backbone import import_timm

                import_timm()
            import_module(module)
