"""Where the pixels of a training image come from: random or central crop, mirror, padded crop; for all loaders alike.

Every decision is a function of (seed, epoch, sample id): it depends neither on the batch, nor on the worker or rank
that makes it, nor on which of the two implementations does: the one here for tensors on any device, or the compiled
one of :mod:`rlp.data.decode`. Both give the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rlp.errors import UserError
from rlp.labels import random_labels
from rlp.philox import random_bits

Interpolation = Literal["area", "bilinear"]

MOVES = "moves"
"""Stream of the words that decide on mirror and shift: :data:`MOVE_WORDS` of them for a sample."""
MOVE_WORDS = ("flip", "shift_y", "shift_x")


@dataclass(frozen=True)
class Geometry:
    """How images are cropped, resized and moved.

    Attributes:
        flip: mirror half of the training images left and right.
        crop_padding: in training, pad by so many pixels on each side and crop back at a uniform place; 0 for none.
        image_size: crop and resize to squares of so many pixels a side: in training a random resized crop (Szegedy et
            al., arXiv 1409.4842), in evaluation the middle; 0 keeps images as they are.
        crop_scale: smallest and largest share of the area in a random crop.
        center_ratio: side of the central crop over the shorter side.
        interpolation: ``area`` is OpenCV's INTER_AREA as in FFCV: the mean of the area when it shrinks, linear without
            antialiasing when it enlarges; ``bilinear`` is Pillow's and torchvision's default, antialiased.
        fill: value of the padding for red, green and blue, 0 to 255; None for the card's mean, rounded.
    """

    flip: bool = False
    crop_padding: int = 0
    image_size: int = 0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    center_ratio: float = 0.875
    interpolation: Interpolation = "area"
    fill: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        for key, pixels in (("image_size", self.image_size), ("crop_padding", self.crop_padding)):
            if pixels < 0:
                raise UserError(f"data.{key} is {pixels}; expected a number of pixels, 0 for none")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(f"data.crop_scale is {list(self.crop_scale)}; expected 0 < smallest <= largest <= 1")
        if not 0 < self.center_ratio <= 1:
            raise UserError(f"data.center_ratio is {self.center_ratio}; expected a number above 0 and up to 1")
        if self.interpolation not in get_args(Interpolation):
            names = ", ".join(get_args(Interpolation))
            raise UserError(f"data.interpolation is '{self.interpolation}'; expected one of {names}")

        if self.fill is not None and not (
            len(self.fill) == 3 and all(isinstance(value, int) and 0 <= value <= 255 for value in self.fill)
        ):
            raise UserError(f"fill is {self.fill}; expected three whole numbers from 0 to 255")

    @property
    def moves(self) -> bool:
        """Whether training images are mirrored or shifted."""
        return self.flip or self.crop_padding > 0


def fill_of(mean: Sequence[float]) -> tuple[int, int, int]:
    """The mean of the pixels (red, green, blue, 255 being 1) as pixel values."""
    red, green, blue = (min(255, max(0, round(255 * value))) for value in mean)
    return red, green, blue


def move(image: Tensor, index: Tensor, epoch: int, seed: int, geometry: Geometry, fill: Sequence[int]) -> Tensor:
    """Mirror and shift a batch as ``geometry`` says.

    Args:
        image: uint8 ``[B, H, W, 3]``.
        index: int64 ``[B]`` sample ids, on the device of ``image``.
        epoch: integer in [0, 2^32).
        seed: any integer in [0, 2^64).
        geometry: what is done; crops to a size are not done here.
        fill: three pixel values for the padding.

    Returns:
        uint8 ``[B, H, W, 3]``, contiguous; ``image`` itself when there is nothing to do.
    """
    if not geometry.moves:
        return image
    flip, shift_y, shift_x = random_bits(seed, MOVES, index, len(MOVE_WORDS), epoch).unbind(-1)
    if geometry.flip:
        image = torch.where(random_labels(flip, 2).bool()[:, None, None, None], image.flip(2), image)
    if geometry.crop_padding:
        image = _shift(image, geometry.crop_padding, shift_y, shift_x, fill)
    return image


def _shift(image: Tensor, padding: int, word_y: Tensor, word_x: Tensor, fill: Sequence[int]) -> Tensor:
    """Pad ``[B, H, W, 3]`` and cut each image out again at an offset of 0 to 2 * padding either way."""
    count, height, width, channels = image.shape
    padded = image.new_empty(count, height + 2 * padding, width + 2 * padding, channels)
    for channel, value in enumerate(fill):
        padded[..., channel] = value
    padded[:, padding : padding + height, padding : padding + width] = image
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # a view: [B, offsets, offsets, 3, H, W]
    sample = torch.arange(count, device=image.device)
    offsets = 2 * padding + 1
    cut = windows[sample, random_labels(word_y, offsets), random_labels(word_x, offsets)]
    return cut.permute(0, 2, 3, 1).contiguous()
