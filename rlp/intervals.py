"""How sure a mean over draws is."""

from collections.abc import Sequence
from dataclasses import dataclass
import math
import statistics


@dataclass(frozen=True)
class Interval:
    """A mean over draws and the interval around it; `low` and `high` are None when there is only one draw."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half_width(self) -> float | None:
        """Distance from the mean to either end, None without an interval."""
        return None if self.high is None else self.high - self.mean


def draw_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student-t interval of the mean over draws, `mean ± t · s / √n` with n - 1 degrees of freedom.

    The values are one number (κ, say) per draw, at one tap of one trained backbone. The interval is the spread
    over draws **only**: it says how far the mean would move with other random labels, and nothing of how far it
    would move with another seed of the backbone, which is usually more. A binomial interval over samples would be
    wrong, because the samples share one head. With one draw there is no spread to see: `low` and `high` are None.

    Args:
        values: one finite number per draw, at least one; a value that is not finite makes the mean NaN.
        level: coverage, between 0 and 1, e.g. 0.95.

    Raises:
        ValueError: no values, or a level outside (0, 1).
    """
    if not values:
        raise ValueError("draw_interval needs at least one value")
    if not 0 < level < 1:
        raise ValueError(f"draw_interval's level is {level}; expected a number between 0 and 1")
    count = len(values)
    if not all(math.isfinite(value) for value in values):
        return Interval(math.nan, None, None, count)
    mean = statistics.fmean(values)
    if count == 1:
        return Interval(mean, None, None, 1)
    half = student_t(level, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def student_t(level: float, freedom: int) -> float:
    """The t with `P(|T| <= t) = level` for Student's T with `freedom` >= 1 degrees (2.262 at 0.95 and 9).

    Bisection in the angle `atan(t / √freedom)`, in which the probability has a closed form for whole degrees.
    Written out so that an interval needs no SciPy.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _central_probability(angle: float, freedom: int) -> float:
    """`P(|T| <= √freedom · tan(angle))`, Abramowitz & Stegun (1964), 26.7.3 (odd) and 26.7.4 (even)."""
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
    series = math.sin(angle) * total
    return 2 / math.pi * (angle + series) if odd else series
