"""Augmentation on the device, a function of (seed, epoch, sample id): flip, padded crop, cutout, normalisation."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rlp.errors import UserError
from rlp.labels import random_labels
from rlp.philox import random_bits

_DRAWS = ("flip", "shift_y", "shift_x", "cut_y", "cut_x")


class Augment:
    """Turn uint8 images into the network's float32 input.

    For training, in this order: mirror half of the images; normalise; pad by ``crop_padding`` pixels on each side and
    crop back at a uniform place; zero a square of ``cutout`` pixels a side around a uniform centre, clipped at the
    border (DeVries and Taylor, arXiv 1708.04552). The padding is zero after normalisation, like the square: it has
    the value of the mean. For evaluation only the normalisation.

    Every sample has its own random words from (seed, epoch, sample id), one for each decision: its result depends
    neither on its batch nor on the rank, and switching one augmentation on leaves the decisions of the others alone.

    Args:
        mean: three means of the pixels, in units where 255 is 1.
        std: three standard deviations in the same units, positive.
        flip: mirror left and right with probability 1/2.
        crop_padding: pixels of padding, 0 for no crop.
        cutout: side of the square in pixels, 0 for none.
        seed: any integer in [0, 2^64).
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], flip: bool, crop_padding: int, cutout: int, seed: int
    ) -> None:
        for key, value in (("data.mean", mean), ("data.std", std)):
            if len(value) != 3:
                raise UserError(f"{key} has {len(value)} numbers; expected 3, one for each of red, green and blue")
        if min(std) <= 0:
            raise UserError(f"data.std is {list(std)}; expected three positive numbers")
        for key, pixels in (("data.crop_padding", crop_padding), ("data.cutout", cutout)):
            if pixels < 0:
                raise UserError(f"{key} is {pixels}; expected a number of pixels, 0 for none")
        self.flip, self.crop_padding, self.cutout, self.seed = flip, crop_padding, cutout, seed
        self._mean = torch.tensor(mean, dtype=torch.float32).mul(255)[:, None, None]
        self._scale = torch.tensor(std, dtype=torch.float64).mul(255).reciprocal().float()[:, None, None]

    def __call__(self, image: Tensor, index: Tensor, epoch: int, train: bool) -> Tensor:
        """Augment and normalise one batch.

        Args:
            image: uint8 ``[B, 3, H, W]``, any strides.
            index: int64 ``[B]`` sample ids, on the device of ``image``.
            epoch: integer in [0, 2^32).
            train: False for the normalisation alone.

        Returns:
            float32 ``[B, 3, H, W]`` with channels_last strides.
        """
        image = image.contiguous(memory_format=torch.channels_last)
        if not (train and (self.flip or self.crop_padding or self.cutout)):
            return self._normalise(image)
        words = random_bits(self.seed, "augment", index, len(_DRAWS), epoch)
        word = dict(zip(_DRAWS, words.unbind(-1), strict=True))
        if self.flip:
            mirrored = random_labels(word["flip"], 2).bool()
            image = torch.where(mirrored[:, None, None, None], image.flip(-1), image)
        result = self._normalise(image)
        if self.crop_padding:
            result = _padded_crop(result, self.crop_padding, word["shift_y"], word["shift_x"])
        if self.cutout:
            rows = _interval(word["cut_y"], result.shape[-2], self.cutout)
            columns = _interval(word["cut_x"], result.shape[-1], self.cutout)
            result.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
        return result

    def _normalise(self, image: Tensor) -> Tensor:
        # Kept on the device of the images: a copy in every step would wait for the device.
        if self._mean.device != image.device:
            self._mean, self._scale = self._mean.to(image.device), self._scale.to(image.device)
        return image.float().sub_(self._mean).mul_(self._scale)


def _padded_crop(image: Tensor, padding: int, word_y: Tensor, word_x: Tensor) -> Tensor:
    """Pad ``[B, 3, H, W]`` with zeros and cut each image out again at an offset of 0 to 2 * padding either way."""
    height, width = image.shape[-2:]
    padded = functional.pad(image.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # a view: [B, offsets, offsets, 3, H, W]
    sample = torch.arange(len(image), device=image.device)
    offsets = 2 * padding + 1
    crop = windows[sample, random_labels(word_y, offsets), random_labels(word_x, offsets)]
    return crop.contiguous(memory_format=torch.channels_last)


def _interval(word: Tensor, length: int, side: int) -> Tensor:
    """True for the positions ``[B, length]`` in an interval of ``side`` around a uniform centre."""
    first = random_labels(word, length)[:, None] - side // 2
    position = torch.arange(length, device=word.device)
    return (position >= first) & (position < first + side)
