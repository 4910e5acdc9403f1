"""Colour jitter on the device: brightness, contrast, saturation and hue by a random amount of each sample's own."""

import math

import torch
from torch import Tensor

from rlp.errors import UserError
from rlp.philox import random_bits

_GREY_UNIT = 2**16  # grey values are summed in steps of 1 / 65536: 255 of these still fit float32


class ColorJitter:
    """Brightness, contrast, saturation and hue as torchvision's ``ColorJitter`` defines them on float images.

    The first three scale by a factor f, uniform in [max(0, 1 - amount), 1 + amount]: the image becomes f * image +
    (1 - f) * other, clamped to 0..255, where other is black, the mean of the grey image, and the grey image. The hue
    turns by a share of the circle that is uniform in [-hue, hue].

    The order is fixed: brightness, contrast, saturation, hue. torchvision shuffles it anew for each image; in a batch
    that would compute all four at each of four places.

    Every sample has its own random words from (seed, epoch, sample id): its result depends neither on its batch nor
    on the rank, and an amount of zero leaves the factors of the others alone. Nothing waits for the device.

    Args:
        brightness, contrast, saturation: largest change of the factor, at least 0; 0 leaves the step out.
        hue: largest turn as a share of the circle, 0 to 0.5; 0 leaves the step out.
        seed: any integer in [0, 2^64).

    Raises:
        UserError: an amount is out of its range; names ``data.color_jitter``.
    """

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float, seed: int) -> None:
        amounts = (brightness, contrast, saturation, hue)
        if not all(math.isfinite(amount) and amount >= 0 for amount in amounts) or hue > 0.5:
            raise UserError(
                f"data.color_jitter is {list(amounts)}; expected four numbers: brightness, contrast and saturation, "
                "each at least 0, and hue from 0 to 0.5"
            )
        self.brightness, self.contrast, self.saturation, self.hue, self.seed = *amounts, seed

    def factors(self, index: Tensor, epoch: int) -> Tensor:
        """Factors of brightness, contrast and saturation and the turn of the hue, float32 ``[B, 4]``."""
        words = random_bits(self.seed, "color_jitter", index, 4, epoch)
        ranges = [(max(0.0, 1 - most), 1 + most) for most in (self.brightness, self.contrast, self.saturation)]
        ranges.append((-self.hue, self.hue))
        columns = [
            low + (high - low) / 2**32 * word.double()
            for (low, high), word in zip(ranges, words.unbind(-1), strict=True)
        ]
        return torch.stack(columns, dim=-1).float()

    def __call__(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Jitter one batch; the input stays as it is.

        Args:
            image: float32 ``[B, 3, H, W]`` in 0..255, any strides.
            index: int64 ``[B]`` sample ids, on the device of ``image``.
            epoch: integer in [0, 2^32).

        Returns:
            float32 ``[B, 3, H, W]`` in 0..255; channels_last stays channels_last.
        """
        brightness, contrast, saturation, hue = self.factors(index, epoch)[:, :, None, None, None].unbind(1)
        if self.brightness:
            image = (image * brightness).clamp_(0, 255)
        if self.contrast:
            image = _blend(image, _mean(_grey(image)), contrast)
        if self.saturation:
            image = _blend(image, _grey(image), saturation)
        if self.hue:
            image = _turn_hue(image, hue[:, 0])
        return image


def _grey(image: Tensor) -> Tensor:
    """Luma ``[B, 1, H, W]`` with torchvision's weights."""
    red, green, blue = image[:, 0:1], image[:, 1:2], image[:, 2:3]
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _mean(grey: Tensor) -> Tensor:
    """Mean of each image ``[B, 1, 1, 1]``, of whole multiples of a unit, whose sum in float64 is exact.

    A sum that rounds would depend on its order, and so on the shape of the batch and the device.
    """
    total = grey.mul(_GREY_UNIT).round_().sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    return (total / (_GREY_UNIT * grey.shape[-2] * grey.shape[-1])).float()


def _blend(image: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (image * factor).add_(other * (1 - factor)).clamp_(0, 255)


def _turn_hue(image: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of ``[B, 3, H, W]`` by ``turn [B, 1, 1]`` in units of the circle; value and chroma stay.

    The hue in sixths of the circle, H in [0, 6), gives red = value - chroma * clip(2 - |H - 3|), and green and blue
    value - chroma * clip(|H - 2| - 1) and ... |H - 4|, each clipped to [0, 1]: the six cases of the usual HSV to RGB.
    """
    red, green, blue = image.unbind(1)
    value = image.amax(1)
    chroma = value - image.amin(1)
    divisor = torch.where(chroma == 0, 1.0, chroma)  # grey has no hue, and keeps its colour with any
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue / 6 + turn
    hue = (hue - hue.floor()).mul_(6)
    result = torch.empty_like(image)
    result[:, 0] = value - chroma * (2 - (hue - 3).abs()).clamp_(0, 1)
    result[:, 1] = value - chroma * ((hue - 2).abs() - 1).clamp_(0, 1)
    result[:, 2] = value - chroma * ((hue - 4).abs() - 1).clamp_(0, 1)
    return result
