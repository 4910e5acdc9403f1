"""Augmentation on the device, a function of (seed, epoch, sample id): RandAugment, colour jitter, mean, cutout."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlp.data.color import ColorJitter
from rlp.data.geometry import fill_of
from rlp.data.randaugment import RandAugment
from rlp.errors import UserError
from rlp.labels import random_labels
from rlp.philox import random_bits


class Augment:
    """Turn the loaders' uint8 images, which are cropped and mirrored already, into the network's float32 input.

    For training, in this order: RandAugment; colour jitter; normalise; zero a square of ``cutout`` pixels a side around
    a uniform centre, clipped at the border (DeVries and Taylor, arXiv 1708.04552). For evaluation only the
    normalisation.

    Every sample has its own random words from (seed, epoch, sample id), one for each decision: its result depends
    neither on its batch nor on the rank, and switching one augmentation on leaves the decisions of the others alone.

    Args:
        mean: three means of the pixels, in units where 255 is 1.
        std: three standard deviations in the same units, positive.
        seed: any integer in [0, 2^64).
        cutout: side of the square in pixels, 0 for none.
        color_jitter: largest change of brightness, contrast, saturation and hue (:class:`rlp.data.color.ColorJitter`).
        randaugment: number of operations and magnitude (:class:`rlp.data.randaugment.RandAugment`); 0 operations: none.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        cutout: int = 0,
        color_jitter: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
        randaugment: Sequence[float] = (0, 0.0),
    ) -> None:
        for key, value in (("data.mean", mean), ("data.std", std)):
            if len(value) != 3:
                raise UserError(f"{key} has {len(value)} numbers; expected 3, one for each of red, green and blue")
        if min(std) <= 0:
            raise UserError(f"data.std is {list(std)}; expected three positive numbers")
        if cutout < 0:
            raise UserError(f"data.cutout is {cutout}; expected a number of pixels, 0 for none")
        self.cutout, self.seed = cutout, seed
        self._jitter = ColorJitter(*color_jitter, seed=seed) if any(color_jitter) else None
        operations, magnitude = randaugment
        self._randaugment = RandAugment(operations, magnitude, seed, fill_of(mean)) if operations else None
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
        if train and self._randaugment is not None:
            image = self._randaugment(image, index, epoch)
        result = image.float()
        if train and self._jitter is not None:
            result = self._jitter(result, index, epoch)
        result = self._normalise(result)
        if train and self.cutout:
            word_y, word_x = random_bits(self.seed, "cutout", index, 2, epoch).unbind(-1)
            rows = _interval(word_y, result.shape[-2], self.cutout)
            columns = _interval(word_x, result.shape[-1], self.cutout)
            result.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
        return result

    def _normalise(self, image: Tensor) -> Tensor:
        # Kept on the device of the images: a copy in every step would wait for the device.
        if self._mean.device != image.device:
            self._mean, self._scale = self._mean.to(image.device), self._scale.to(image.device)
        return image.sub_(self._mean).mul_(self._scale)


def _interval(word: Tensor, length: int, side: int) -> Tensor:
    """True for the positions ``[B, length]`` in an interval of ``side`` around a uniform centre."""
    first = random_labels(word, length)[:, None] - side // 2
    position = torch.arange(length, device=word.device)
    return (position >= first) & (position < first + side)
