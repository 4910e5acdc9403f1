"""The interval over draws: the right quantiles, the right coverage, and none where there is nothing to see."""

import math

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from rlp.intervals import draw_interval, student_t

# Two-sided 95% and 99% points of Student's t, from printed tables (three decimals).
TABLE = {
    (0.95, 1): 12.706, (0.95, 2): 4.303, (0.95, 3): 3.182, (0.95, 4): 2.776, (0.95, 7): 2.365,
    (0.95, 9): 2.262, (0.95, 30): 2.042, (0.95, 120): 1.980, (0.99, 1): 63.657, (0.99, 5): 4.032, (0.99, 10): 3.169,
}  # fmt: skip


@pytest.mark.parametrize(("level", "freedom"), TABLE)
def test_student_t_agrees_with_printed_tables(level: float, freedom: int) -> None:
    assert student_t(level, freedom) == pytest.approx(TABLE[level, freedom], abs=6e-4)


def test_known_interval() -> None:
    interval = draw_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.1824 * math.sqrt(5 / 3) / 2
    assert interval.n == 4
    assert interval.mean == 2.5
    assert interval.low == pytest.approx(2.5 - half, abs=1e-4)
    assert interval.high == pytest.approx(2.5 + half, abs=1e-4)
    assert interval.half_width == pytest.approx(half, abs=1e-4)


def test_covers_the_true_mean_as_often_as_it_says() -> None:
    """5,000 sets of five normal values: 95% of the intervals hold the mean (a normal quantile would give 88%)."""
    values = np.random.default_rng(0).normal(0.3, 0.1, (5000, 5))
    intervals = [draw_interval(row) for row in values.tolist()]
    hits = sum(i.low <= 0.3 <= i.high for i in intervals if i.low is not None and i.high is not None)
    assert 0.94 < hits / 5000 < 0.96


def test_one_draw_has_no_interval() -> None:
    interval = draw_interval([0.4])
    assert (interval.mean, interval.low, interval.high, interval.half_width) == (0.4, None, None, None)


def test_equal_draws_have_an_interval_of_no_width() -> None:
    interval = draw_interval([0.25, 0.25, 0.25])
    assert (interval.low, interval.high) == (0.25, 0.25)


def test_a_value_that_is_not_finite_gives_no_number() -> None:
    interval = draw_interval([0.1, math.nan, 0.2])
    assert math.isnan(interval.mean)
    assert interval.low is None


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_refuses_a_level_outside_its_range(level: float) -> None:
    with pytest.raises(ValueError, match="level"):
        draw_interval([1.0, 2.0], level)


def test_refuses_no_values() -> None:
    with pytest.raises(ValueError, match="at least one"):
        draw_interval([])


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40), st.floats(0.5, 0.99))
def test_holds_the_mean_and_grows_with_the_level(values: list[float], level: float) -> None:
    narrow, wide = draw_interval(values, level), draw_interval(values, (1 + level) / 2)
    assert narrow.low is not None
    assert narrow.high is not None
    assert wide.low is not None
    assert narrow.low <= narrow.mean <= narrow.high
    assert wide.low <= narrow.low
