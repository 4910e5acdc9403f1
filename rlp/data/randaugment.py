"""RandAugment on the device: every image takes its own random operations, and a batch costs the same whatever they are.

Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", arXiv 1909.13719, in the
form of timm's ``rand-m{magnitude}-n{num_ops}-inc1`` with bilinear interpolation: its 15 operations on PIL images.
"""

from collections.abc import Sequence
from functools import lru_cache
import math

import torch
from torch import Tensor

from rlp.errors import UserError
from rlp.labels import random_labels
from rlp.philox import random_bits

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
"""timm's operations in timm's order; each round draws one of them uniformly."""

NONE = len(OPERATIONS)
"""Number of the operation that does nothing: a round is skipped with probability 1/2, timm's default."""

_GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
_BLENDED = ("Color", "Contrast", "Brightness", "Sharpness")
_NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
_TRUNCATION_SLACK = 2.0**-8  # PIL drops the fraction; float32 coordinates may leave a whole number just below itself


class RandAugment:
    """Apply ``num_ops`` rounds, each with probability 1/2 one of :data:`OPERATIONS`, to 8-bit images.

    The strength of an operation is fixed by ``magnitude``, its direction (rotate left or right, more or less
    contrast) is drawn with the operation, as in timm's ``rand-m{magnitude}-n{num_ops}-inc1``. At magnitude 10:
    30 degrees, a shear of 0.3, a shift by 0.45 of the side, a factor of 0.1 or 1.9 for colour, contrast, brightness
    and sharpness, 1 bit of posterize, the whole range solarized, 110 added below 128. Results equal PIL's to the bit,
    but for geometric operations, where single pixels may differ by 1. (PIL refuses to posterize to the 0 bits of
    timm's magnitude 10; one bit is kept here.)

    Every round does a fixed series of steps to the whole batch: one resampling by the map of each sample (rotation,
    shear, shift), one blend with each sample's black, grey or smoothed image, one look-up in each sample's table. What
    a sample did not draw is the identity for it. Nothing waits for the device, except that constants are brought to
    it when a new image size comes first.

    Every sample has its own random words from (seed, epoch, sample id): its result depends neither on its batch nor
    on the rank, and further rounds leave the earlier ones alone.

    Args:
        num_ops: rounds, at least 1.
        magnitude: 0 to 10. At 0 only AutoContrast, Equalize, Invert and Posterize change an image.
        seed: any integer in [0, 2^64).
        fill: red, green and blue in 0..255 for what comes in from outside; rounded.

    Raises:
        UserError: a number is out of its range; names ``data.randaugment``.
    """

    def __init__(
        self, num_ops: float, magnitude: float, seed: int, fill: Sequence[float] = (128.0, 128.0, 128.0)
    ) -> None:
        if not (num_ops >= 1 and float(num_ops).is_integer() and 0 <= magnitude <= 10):
            raise UserError(
                f"data.randaugment is {[num_ops, magnitude]}; expected two numbers: how many operations, a whole "
                "number from 1, and their magnitude from 0 to 10"
            )
        if len(fill) != 3:
            raise ValueError(f"fill has {len(fill)} numbers; expected 3, one for each of red, green and blue")
        self.num_ops, self.magnitude, self.seed = int(num_ops), float(magnitude), seed
        self.fill = tuple(min(255, max(0, round(value))) for value in fill)

    def draw(self, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Operation and direction of every round, both int64 ``[B, num_ops]``.

        The operation is a number into :data:`OPERATIONS`, or :data:`NONE`; the direction is 0 for timm's positive
        argument and 1 for its negative.
        """
        words = random_bits(self.seed, "randaugment", index, 3 * self.num_ops, epoch)
        words = words.unflatten(-1, (self.num_ops, 3))
        operation = random_labels(words[..., 0], NONE)
        skipped = random_labels(words[..., 2], 2).bool()
        return torch.where(skipped, NONE, operation), random_labels(words[..., 1], 2)

    def __call__(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Augment one batch; the input stays as it is.

        Args:
            image: uint8 ``[B, 3, H, W]``, any strides.
            index: int64 ``[B]`` sample ids, on the device of ``image``.
            epoch: integer in [0, 2^32).

        Returns:
            uint8 ``[B, 3, H, W]`` with the strides of ``image``.
        """
        operation, direction = self.draw(index, epoch)
        planes = image.to(torch.float32, memory_format=torch.contiguous_format)
        for number in range(self.num_ops):
            planes = apply_operation(planes, operation[:, number], direction[:, number], self.magnitude, self.fill)
        return torch.empty_like(image).copy_(planes)


def apply_operation(
    image: Tensor, operation: Tensor, direction: Tensor, magnitude: float, fill: tuple[int, ...]
) -> Tensor:
    """One operation for each image: a round of :class:`RandAugment`.

    Args:
        image: float32 ``[B, 3, H, W]``, contiguous, whole numbers in 0..255; stays as it is.
        operation, direction: int64 ``[B]`` each, as of :meth:`RandAugment.draw`.
        magnitude: 0 to 10.
        fill: red, green and blue in 0..255.

    Returns:
        float32 ``[B, 3, H, W]``, contiguous, whole numbers in 0..255.
    """
    image = _resample(image, operation, direction, magnitude, fill)
    image = _blend(image, operation, direction, magnitude)
    return _look_up(image, operation, magnitude)


# The steps: each is the identity for samples whose operation belongs to another. float32 holds whole numbers exactly,
# and the images keep to it from the first step to the last, as conversions cost as much as the steps.


def _resample(image: Tensor, operation: Tensor, direction: Tensor, magnitude: float, fill: tuple[int, ...]) -> Tensor:
    """Rotate, shear and shift. PIL fills where the source lies outside and else repeats the border's pixels."""
    grid, outside, variant, colour = _maps(*image.shape[-2:], magnitude, fill, image.device)
    chosen = variant[operation, direction]
    sampled = torch.nn.functional.grid_sample(
        image, grid[chosen], mode="bilinear", padding_mode="border", align_corners=False
    )
    sampled.add_(_TRUNCATION_SLACK).floor_()
    sampled = torch.where(outside[chosen][:, None], colour, sampled)
    return torch.where((chosen == 0)[:, None, None, None], image, sampled)


def _blend(image: Tensor, operation: Tensor, direction: Tensor, magnitude: float) -> Tensor:
    """Colour, contrast, brightness and sharpness: other + factor * (image - other), clipped, its fraction dropped."""
    is_color, is_contrast, _, is_sharpness = ((operation == _NUMBER[name])[:, None, None, None] for name in _BLENDED)
    factor = _factors(magnitude, image.device)[operation, direction][:, None, None, None]
    grey = _grey(image)
    count = grey.shape[-2] * grey.shape[-1]
    total = grey.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64).long()
    mean = (2 * total + count) // (2 * count)  # rounded, halves upwards
    flat = torch.where(is_contrast, mean, 0).float()  # brightness: black
    other = torch.where(is_sharpness, _smooth(image), torch.where(is_color, grey, flat))
    return (image - other).mul_(factor).add_(other).clamp_(0, 255).floor_()


def _look_up(image: Tensor, operation: Tensor, magnitude: float) -> Tensor:
    """Operations on values: autocontrast, equalize, invert, posterize, solarize and solarize-add."""
    batch = len(image)
    level = image.view(batch * 3, image.shape[-2] * image.shape[-1]).long()
    counts = torch.zeros(batch * 3, 256, dtype=torch.int32, device=image.device)
    counts.scatter_add_(1, level, counts.new_ones(()).expand_as(level))
    counts = counts.view(batch, 3, 256)
    table = _tables(magnitude, image.device)[operation][:, None]
    table = torch.where((operation == _NUMBER["AutoContrast"])[:, None, None], _autocontrast(counts), table)
    table = torch.where((operation == _NUMBER["Equalize"])[:, None, None], _equalize(counts), table)
    return table.view(batch * 3, 256).gather(1, level).view(image.shape)


def _grey(image: Tensor) -> Tensor:
    """PIL's conversion to "L", float32 ``[B, 1, H, W]``; all sums stay below 2^24 and are exact."""
    red, green, blue = image.split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471).add_(0x8000).div_(0x10000).floor_()


def _smooth(image: Tensor) -> Tensor:
    """PIL's filter SMOOTH: 3 x 3 ones with a 5 in the middle, over 13; the border's pixels stay."""
    height, width = image.shape[-2:]
    result = image.clone()
    if min(height, width) >= 3:
        rows = image[..., :-2] + image[..., 1:-1] + image[..., 2:]
        window = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]
        window.add_(image[..., 1:-1, 1:-1], alpha=4)
        # A multiple of 1/13 is never so near to a half that rounding errs.
        result[..., 1:-1, 1:-1] = window.div_(13).round_()
    return result


def _autocontrast(counts: Tensor) -> Tensor:
    """Tables that stretch the values of ``counts`` over 0..255: pixels per value in, float32 out, ``[B, 3, 256]``."""
    value = torch.arange(256, device=counts.device)
    present = counts > 0
    low = torch.where(present, value, 255).amin(-1, keepdim=True).double()
    high = torch.where(present, value, 0).amax(-1, keepdim=True).double()
    # float64, in this order, and divided (255 / x would multiply by the reciprocal), as PIL drops fractions
    scale = torch.full_like(low, 255).div_((high - low).clamp_(min=1))
    stretched = (value * scale).add_(-low * scale).clamp_(0, 255).floor_().float()
    return torch.where(high > low, stretched, value)


def _equalize(counts: Tensor) -> Tensor:
    """Tables that spread the values of ``counts`` evenly: pixels per value in, float32 out, ``[B, 3, 256]``."""
    value = torch.arange(256, device=counts.device)
    highest = torch.where(counts > 0, value, 0).amax(-1, keepdim=True)
    below = counts.cumsum(-1) - counts  # pixels with a lower value, int64
    step = below.gather(-1, highest) // 255
    spread = (below + step // 2) // step.clamp(min=1)
    return torch.where(step > 0, spread.clamp_(max=255), value).float()


# Constants of the operations, on the device. Kept, because a copy in every step would wait for the device.


@lru_cache(maxsize=8)
def _tables(magnitude: float, device: torch.device) -> Tensor:
    """Tables of all operations, float32 ``[16, 256]``; the identity for those that have none or need the image."""
    bits = max(1, 4 - int(magnitude / 10 * 4))
    threshold = 256 - min(256, int(magnitude / 10 * 256))
    add = min(128, int(magnitude / 10 * 110))
    value = torch.arange(256)
    tables = value.repeat(NONE + 1, 1)
    tables[_NUMBER["Invert"]] = 255 - value
    tables[_NUMBER["Posterize"]] = value & -(2 ** (8 - bits))
    tables[_NUMBER["Solarize"]] = torch.where(value < threshold, value, 255 - value)
    tables[_NUMBER["SolarizeAdd"]] = torch.where(value < 128, (value + add).clamp(max=255), value)
    return tables.float().to(device)


@lru_cache(maxsize=8)
def _factors(magnitude: float, device: torch.device) -> Tensor:
    """Factors of the blends, float32 ``[16, 2]``: operation, direction; 1 for what is no blend."""
    factors = torch.ones(NONE + 1, 2)
    for name in _BLENDED:
        factors[_NUMBER[name]] = torch.tensor([max(0.1, 1 + sign * (magnitude / 10 * 0.9)) for sign in (1, -1)])
    return factors.to(device)


@lru_cache(maxsize=8)
def _maps(
    height: int, width: int, magnitude: float, fill: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where each pixel comes from, for the identity and for the geometric operations in both directions.

    Returns:
        Coordinates for ``grid_sample``, float32 ``[11, H, W, 2]``; whether they lie outside, bool ``[11, H, W]``; the
        row in these two of every operation and direction, int64 ``[16, 2]``, 0 for the identity; the fill colour,
        float32 ``[3, 1, 1]``.
    """
    matrices: list[tuple[float, ...]] = [(1.0, 0.0, 0.0, 0.0, 1.0, 0.0)]
    variant = torch.zeros(NONE + 1, 2, dtype=torch.int64)
    for name in _GEOMETRIC:
        for direction, sign in enumerate((1, -1)):
            variant[_NUMBER[name], direction] = len(matrices)
            matrices.append(_matrix(name, sign, magnitude, height, width))
    # float64 and PIL's order of sums: whether a pixel is filled must not hang on rounding.
    x = torch.arange(width, dtype=torch.float64) + 0.5
    y = (torch.arange(height, dtype=torch.float64) + 0.5)[:, None]
    source_x = torch.stack([a * x + b * y + c for a, b, c, _, _, _ in matrices])
    source_y = torch.stack([d * x + e * y + f for _, _, _, d, e, f in matrices])
    outside = (source_x < 0) | (source_x >= width) | (source_y < 0) | (source_y >= height)
    grid = torch.stack([source_x * 2 / width - 1, source_y * 2 / height - 1], dim=-1)
    colour = torch.tensor(fill, dtype=torch.float32)[:, None, None]
    return grid.float().to(device), outside.to(device), variant.to(device), colour.to(device)


def _matrix(name: str, sign: int, magnitude: float, height: int, width: int) -> tuple[float, ...]:
    """(a, b, c, d, e, f): the pixel at (x, y) comes from (a x + b y + c, d x + e y + f); PIL's convention."""
    if name == "Rotate":
        radians = -math.radians(sign * (magnitude / 10 * 30) % 360)
        cos, sin = round(math.cos(radians), 15), round(math.sin(radians), 15)
        x, y = width / 2, height / 2
        return (cos, sin, -cos * x - sin * y + x, -sin, cos, sin * x - cos * y + y)
    shear, shift = sign * (magnitude / 10 * 0.3), sign * (magnitude / 10 * 0.45)
    return {
        "ShearX": (1.0, shear, 0.0, 0.0, 1.0, 0.0),
        "ShearY": (1.0, 0.0, 0.0, shear, 1.0, 0.0),
        "TranslateX": (1.0, 0.0, shift * width, 0.0, 1.0, 0.0),
        "TranslateY": (1.0, 0.0, 0.0, 0.0, 1.0, shift * height),
    }[name]
