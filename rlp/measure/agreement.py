"""How well scores of samples agree: rank correlations within a run, their bootstrap, and means over runs."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
import math
from typing import Any

import numpy as np
from tqdm import tqdm

from rlp.intervals import student_t
from rlp.measure.estimate import Estimate
from rlp.seeding import named_seed

RESAMPLES, LEVEL = 200, 0.95
MOST = 2000
"""Samples of a run that rank correlations are taken over, drawn at random where there are more."""

Row = dict[str, Any]
Columns = Mapping[str, np.ndarray]
Statistic = Callable[[np.ndarray, np.ndarray], float]


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's τ-b of two scores, float ``[N]``; NaN where one of them is constant."""
    from scipy.stats import kendalltau

    return float(kendalltau(a, b)[0])  # type: ignore[arg-type]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's ρ: the correlation of the ranks, ties counting as their mean; NaN where one is constant."""
    return pearson(ranks(a), ranks(b))


def ranks(values: np.ndarray) -> np.ndarray:
    """From 1 on, ties their mean."""
    from scipy.stats import rankdata

    return rankdata(values)


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation; NaN where one is constant."""
    a, b = a - a.mean(), b - b.mean()
    length = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / length) if length > 0 else float("nan")


def agreement_rows(runs: Sequence[Columns], seed: int = 0) -> list[Row]:
    """τ and ρ of every pair of scores that all runs have, mean over runs.

    Args:
        runs: scores of the members of each run by name, float ``[N]``; samples without one of the two are left out.
        seed: of the resamples and of the choice of samples.

    Returns:
        rows of ``a``, ``b``, ``kendall``, ``spearman`` (as :class:`Estimate` has them, or None), ``N``, ``runs``. For
        the intervals see :func:`over_runs`.
    """
    names = [name for name in runs[0] if all(name in columns for columns in runs)]
    chosen = [_some(columns, named_seed(seed, f"agreement {number}")) for number, columns in enumerate(runs)]
    rows = []
    for a, b in tqdm([*combinations(names, 2)], "agreement of scores", disable=None, leave=False):
        pairs = [_finite(columns[a], columns[b]) for columns in chosen]
        found: dict[str, Statistic] = {"kendall": kendall, "spearman": spearman}
        estimates = {name: over_runs(statistic, pairs, seed) for name, statistic in found.items()}
        shown = {name: estimate and estimate.as_dict() for name, estimate in estimates.items()}
        rows.append({"a": a, "b": b, **shown, "N": min(len(pair[0]) for pair in pairs), "runs": len(runs)})
    return rows


def _some(columns: Columns, seed: int) -> Columns:
    count = len(next(iter(columns.values())))
    if count <= MOST:
        return columns
    rows = np.random.default_rng(seed).choice(count, MOST, replace=False)
    return {name: values[rows] for name, values in columns.items()}


def _finite(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = np.isfinite(a) & np.isfinite(b)
    return a[both], b[both]


def over_runs(statistic: Statistic, pairs: Sequence[tuple[np.ndarray, np.ndarray]], seed: int) -> Estimate | None:
    """Mean of a statistic of two scores over runs; None where it does not exist in one of them.

    The interval is of the bootstrap over samples, within each run. What the values of several runs vary beyond that
    widens it by Student's t: few runs say little of the next one, and resampling them would hide it.
    """
    values = [statistic(a, b) if len(a) > 2 else float("nan") for a, b in pairs]
    if not np.isfinite(values).all():
        return None
    random = np.random.default_rng(seed)

    def resampled(a: np.ndarray, b: np.ndarray) -> float:
        rows = random.integers(len(a), size=len(a))
        return statistic(a[rows], b[rows])

    drawn = np.array([[resampled(a, b) for _ in range(RESAMPLES)] for a, b in pairs])
    mean, runs = float(np.mean(values)), len(pairs)
    ends = middle(drawn.mean(axis=0))
    if runs > 1:
        variance = max(0.0, np.var(values, ddof=1) - np.nanmean(np.nanvar(drawn, axis=1)))
        between = student_t(LEVEL, runs - 1) * math.sqrt(variance / runs)
        ends = mean + np.array([-1.0, 1.0]) * np.hypot(ends - mean, between)
    return correlation(mean, ends, runs, min(len(a) for a, _ in pairs))


def middle(drawn: np.ndarray) -> np.ndarray:
    """Ends of the middle 95% of finite numbers ``[B]``; NaN without any."""
    finite = drawn[np.isfinite(drawn)]
    return np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(finite) else np.full(2, np.nan)


def correlation(mean: float, ends: np.ndarray, seeds: int, samples: int) -> Estimate:
    """A correlation with its interval ``[2]``, cut at -1 and 1; without one where an end is not finite."""
    low, high = np.clip(ends, -1.0, 1.0).tolist() if np.isfinite(ends).all() else (None, None)
    return Estimate(
        mean=mean, low=low, high=high, sd_seed=None, sd_draw=None, sd_sample=None, seeds=seeds, draws=1, samples=samples
    )
