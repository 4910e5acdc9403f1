"""Whether a measure says which network generalises worse: granulated τ and partial correlations over runs.

Granulated τ is that of Jiang et al. (2020), "Fantastic generalization measures": runs are compared in pairs that differ
in one hyperparameter alone, since an average over all pairs hides where a measure fails. Networks that differ in their
model are never compared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
import math
from statistics import NormalDist
from typing import Any

import numpy as np

from rlp.intervals import student_t
from rlp.measure.agreement import LEVEL, RESAMPLES, Row, correlation, middle, pearson, ranks
from rlp.measure.estimate import Estimate

FEWEST, ENOUGH = 5, 8
"""Runs from which on there is a partial correlation, and from which on it has an interval."""


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run as a whole.

    Attributes:
        name: of its folder.
        seed: of the network.
        settings: every other setting, by ``section.key``.
        train_accuracy, gap: accuracy of members on their given labels, and how much of it is missing on non-members.
        values: of every measure, by name; of scores larger is more memorised, other numbers are as they are.
    """

    name: str
    seed: int
    settings: dict[str, Any]
    train_accuracy: float
    gap: float
    values: dict[str, float]

    @property
    def model(self) -> tuple[str, str]:
        """Networks that differ here are never compared."""
        return tuple(str(self.settings.get(f"model.{key}")) for key in ("name", "args"))  # type: ignore[return-value]


def pairs_by_setting(runs: Sequence[RunFacts]) -> dict[str, list[tuple[RunFacts, RunFacts]]]:
    """Pairs of runs of one seed and one model that differ in one setting, by that setting."""
    found: dict[str, list[tuple[RunFacts, RunFacts]]] = {}
    for a, b in combinations(runs, 2):
        if a.seed != b.seed or a.model != b.model:
            continue
        differing = [key for key in a.settings if a.settings[key] != b.settings.get(key)]
        if len(differing) == 1:
            found.setdefault(differing[0], []).append((a, b))
    return found


def granulated_rows(runs: Sequence[RunFacts], seed: int = 0) -> list[Row]:
    """For each measure the mean over settings of the τ of pairs that differ in that setting, and the worst setting.

    Measures that one of these runs lacks are left out. Intervals are of the bootstrap over the seeds of the pairs; with
    one seed there is none.
    """
    groups = pairs_by_setting(runs)
    paired = [run for pairs in groups.values() for pair in pairs for run in pair]
    seeds = sorted({run.seed for run in paired})
    rows = []
    for name in _shared(paired):

        def granulated(weights: Mapping[int, int], name: str = name) -> dict[str, float]:
            return {key: _sign_agreement(pairs, name, weights) for key, pairs in groups.items()}

        by_setting = granulated(dict.fromkeys(seeds, 1))
        random = np.random.default_rng(seed)

        def resampled(granulated: Any = granulated, random: Any = random) -> float:
            drawn = random.choice(seeds, len(seeds)).tolist()
            return float(np.nanmean(list(granulated({s: drawn.count(s) for s in seeds}).values())))

        mean = float(np.mean(list(by_setting.values())))
        count = sum(map(len, groups.values()))
        estimate = bootstrapped(mean, resampled, len(seeds), count, len(seeds)) if len(seeds) > 1 else None
        worst = min(by_setting, key=lambda key: by_setting[key])
        rows.append(
            {
                "measure": name,
                "granulated": mean,
                "interval": None if estimate is None or estimate.low is None else [estimate.low, estimate.high],
                "worst": worst,
                "worst_tau": by_setting[worst],
                "by_setting": by_setting,
                "pairs": count,
                "seeds": len(seeds),
                "chance": 0.0,
            }
        )
    return rows


def _shared(runs: Sequence[RunFacts]) -> list[str]:
    """Measures that all of the runs have: taps differ, and without wrong labels there is no AUROC of them."""
    names = dict.fromkeys(name for run in runs for name in run.values)
    return [name for name in names if all(math.isfinite(run.values.get(name, math.nan)) for run in runs)]


def _sign_agreement(pairs: Sequence[tuple[RunFacts, RunFacts]], name: str, weights: Mapping[int, int]) -> float:
    """Kendall's τ of a setting: share of pairs that measure and gap order alike, minus that ordered otherwise."""
    signs = [np.sign(a.values[name] - b.values[name]) * np.sign(a.gap - b.gap) * weights[a.seed] for a, b in pairs]
    total = sum(weights[a.seed] for a, _ in pairs)
    return float(np.sum(signs) / total) if total else float("nan")


def partial_rows(runs: Sequence[RunFacts], seed: int = 0) -> list[Row]:
    """Spearman's ρ of each measure and the gap, given train accuracy, over the runs of the most frequent model.

    Both are ranked, and what the rank of train accuracy explains linearly is taken off. The interval is of the
    bootstrap over runs, from :data:`ENOUGH` on: of five runs it covered 63% in simulations, of eight 95%. There are no
    rows with fewer than :data:`FEWEST` runs, and none of a measure that one of them lacks.
    """
    models = [run.model for run in runs]
    chosen = [run for run in runs if run.model == max(models, key=models.count)]
    if len(chosen) < FEWEST:
        return []
    rows = []
    for name in _shared(chosen):
        table = np.array([[run.values[name], run.gap, run.train_accuracy] for run in chosen])
        random = np.random.default_rng(seed)

        def resampled(table: np.ndarray = table, random: np.random.Generator = random) -> float:
            return partial_spearman(*table[random.integers(len(table), size=len(table))].T)

        mean = partial_spearman(*table.T)
        if np.isfinite(mean):
            estimate = bootstrapped(mean, resampled, len(chosen), len(chosen), len(chosen))
            if len(chosen) < ENOUGH:
                estimate = replace(estimate, low=None, high=None)
            rows.append({"measure": name, "partial": estimate.as_dict(), "runs": len(chosen), "chance": 0.0})
    return rows


def partial_spearman(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> float:
    """Correlation of the ranks of ``a`` and ``b`` without what the ranks of ``given`` explain; NaN if that is all."""
    ranked = [ranks(values) for values in (a, b, given)]
    centred = [values - values.mean() for values in ranked]
    base = centred[2] @ centred[2]
    left = [values - (values @ centred[2] / base if base > 0 else 0.0) * centred[2] for values in centred[:2]]
    if any(values @ values < 1e-9 * len(values) for values in left):
        return float("nan")
    return pearson(*left)


def bootstrapped(mean: float, resampled: Callable[[], float], seeds: int, samples: int, units: int) -> Estimate:
    """An estimate from the bootstrap over some units, two or more.

    Its interval is the middle 95% of resamples, stretched as far as Student's t of few units goes beyond the normal
    distribution. Resamples in which the statistic does not exist are left out. Where all are equal, as of three seeds
    that order every pair alike, they say nothing of the next one: no interval.
    """
    drawn = np.array([resampled() for _ in range(RESAMPLES)])
    ends = middle(drawn) if np.nanmin(drawn) < np.nanmax(drawn) else np.full(2, np.nan)
    stretch = student_t(LEVEL, units - 1) / NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt(units / (units - 1))
    return correlation(mean, mean + stretch * (ends - mean), seeds, samples)
