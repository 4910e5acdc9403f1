"""How sure a reading is: the hierarchical bootstrap over seed → draw → sample, in closed form.

A reading is a mean over networks (seeds), random labellings (draws) and samples. All three are resampled, because each
could have come out differently; the samples of one draw share one head, and all draws one network, so no interval here
is binomial. A mean is linear in the bootstrap's weights. The variance over *all* resamples is therefore a sum of mean
squares of the table seeds x draws x samples, and none has to be drawn: the result is exact, repeatable and fast.

Three corrections make the plain bootstrap right for few units:

- resampling k units makes the variance (k - 1)/k of what it should be: the sums of squares are divided by k - 1;
- resampling several levels at once counts what two of them share three times, and noise seven times (Owen, "The
  pigeonhole bootstrap", Annals of Applied Statistics 1, 2007): by inclusion and exclusion each share is
  counted once (Searle, Casella, McCulloch, "Variance Components", 1992);
- the ends lie Student's t away: with S - 1 degrees of freedom for the part of the variance that S seeds add, and for
  the rest with those of draws and samples (Satterthwaite, Biometrics Bulletin 2, 1946).

Simulated, 95% intervals cover 92% of the time (few seeds, which differ) to 99% (noise alone); a test holds them to it.
If nothing varies, all right or all wrong, the interval has no width: the data show no spread, which is no proof that
there is none.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import combinations
import math
from statistics import NormalDist
from typing import Any

import numpy as np

from rlp.errors import UserError
from rlp.intervals import student_t

RADEMACHER = (
    "Read at n = 2, 2·acc - 1 of fitted heads, in the mean over draws, is (in expectation over the random labels) a "
    "lower bound on the empirical Rademacher complexity of the heads' class on these fixed features and samples; it is "
    "no bound for the network as a whole, and nothing of the kind is claimed for n > 2."
)

_BLOCK = 1 << 20  # numbers centred at once
_MOST_FREEDOM = 500  # of Student's t, from where on it is normal to three digits
_SEED, _DRAW, _SAMPLE = 0, 1, 2

Terms = dict[tuple[int, ...], float]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean, its interval, and how much each level varies.

    Attributes:
        mean: every seed weighs the same, whatever its numbers of draws and samples.
        low, high: ends of the interval; None where nothing was resampled that could tell. With one seed the interval
            is about the draws and samples of that one network, with one draw about that labelling.
        sd_seed: standard deviation between networks, beyond what draws and samples explain; None with one seed.
        sd_draw: between draws of one network, beyond what samples explain; None with one draw.
        sd_sample: between samples within one draw; None with one sample.
        seeds, draws, samples: how many; of draws and samples the fewest of any seed.
        level: coverage that the interval aims at.
    """

    mean: float
    low: float | None
    high: float | None
    sd_seed: float | None
    sd_draw: float | None
    sd_sample: float | None
    seeds: int
    draws: int
    samples: int
    level: float = 0.95

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Estimate":
        """The estimate that :meth:`as_dict` described."""
        return cls(**fields)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.3f} [no interval]"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_estimate(values: Sequence[np.ndarray], *, level: float = 0.95) -> Estimate:
    """Mean of any numbers by draw and sample.

    Args:
        values: for each seed of the backbone an array [K, N] of finite numbers; numbers of draws and samples may
            differ. Where all are of one shape, row k is the same draw and column i the same sample in all of them.
            K = 1 also stands for a reading without draws, such as retrieval: its interval is over seeds and samples.
        level: coverage, between 0 and 1.

    Raises:
        ValueError: no values, not two dimensions, or a number that is not finite.
    """
    return _estimate([_checked(values)], level)


def share_estimate(holds: np.ndarray) -> Estimate:
    """Mean over samples of what holds or does not, or of shares, ``[N]``: :func:`mean_estimate`, its ends in [0, 1]."""
    return _clipped(mean_estimate([holds[None]]), 0.0, 1.0)


def kappa_estimate(correct: Sequence[np.ndarray], n: int, *, level: float = 0.95) -> Estimate:
    """κ = (n·acc - 1)/(n - 1), 0 at chance and 1 where every random label is right; see :func:`mean_estimate`.

    One draw of one network says nothing of other draws, so its κ has no interval.

    Args:
        correct: for each seed of the backbone whether draw k's head got sample i's label right, bool [K, N].
        n: number of random labels, at least 2.
        level: coverage, between 0 and 1.
    """
    _check_labels(n)
    estimate = without_single_draw(_estimate([_checked(correct)], level))
    return _clipped(_linear(estimate, n, -1, n - 1), -1 / (n - 1), 1.0)


def delta_estimate(
    members: Sequence[np.ndarray], others: Sequence[np.ndarray], n: int, *, paired: bool = False, level: float = 0.95
) -> Estimate:
    """Δ = κ(member) - κ(non-member), with what both have in common resampled together.

    Unpaired: two groups of samples [K, N] and [K, M] in one network. The network is one, so seeds are resampled
    jointly, and so are draws; samples are resampled in each group by itself.

    Paired (crossover): [K, N] and [K, N], where column i is one sample with one random label a draw, read in the
    network that trained on it and in the other one. Differences are taken first, so all that the sample and its
    labels do to both cancels; seeds (pairs of networks), draws and samples of the differences are resampled.

    Args:
        members: for each seed whether the label was right, bool [K, N].
        others: the same of non-members, in the order of ``members``.
        n: number of random labels, at least 2.
        paired: columns of both belong together.
        level: coverage, between 0 and 1.

    Raises:
        ValueError: the two do not fit together.
    """
    _check_labels(n)
    first, second = _checked(members), _checked(others)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} seeds of members and {len(second)} of others; expected the same seeds")
    for a, b in zip(first, second, strict=True):
        if len(a) != len(b) or (paired and a.shape != b.shape):
            what = "pairs of one shape" if paired else "the same draws"
            raise ValueError(f"members are {a.shape} and others {b.shape}; expected {what}")
    if paired:
        groups = [[np.subtract(a, b, dtype=np.float32) for a, b in zip(first, second, strict=True)]]
    else:
        groups = [first, second]
    return _linear(without_single_draw(_estimate(groups, level)), n, 0, n - 1)


def rademacher(correct: Sequence[np.ndarray], *, level: float = 0.95) -> tuple[Estimate, str]:
    """2·acc - 1 at n = 2, in the mean over draws, and the sentence that says what it bounds and what not.

    Args:
        correct: for each seed of the backbone bool [K, N], read with two random labels.
        level: coverage, between 0 and 1.
    """
    return kappa_estimate(correct, 2, level=level), RADEMACHER


def auroc_estimate(
    score: np.ndarray, planted: np.ndarray, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Probability that a planted sample scores higher than another, equal scores counting half.

    The interval is the bootstrap's over samples, drawn within planted and others apart: its percentiles, stretched
    from the normal distribution to Student's t of the smaller group. Near 0 and 1 few planted samples leave resamples
    too little spread on the side of 1/2 (simulated, 81% are covered): an end reaches at least as far as that of
    Newcombe (Statistics in Medicine 25, 2006, method 5). Where both groups are apart completely no
    resample differs; the end towards 1/2 is then that of Clopper and Pearson for the smaller group.

    Args:
        score: one finite number a sample, float [N].
        planted: which samples are planted, bool [N].
        resamples: how often samples are drawn again.
        seed: of these resamples.
        level: coverage, between 0 and 1.

    Returns:
        an estimate with ``samples`` N; without interval where one group has one sample.

    Raises:
        UserError: none or all of the samples are planted.
        ValueError: the shapes differ, or a score is not finite.
    """
    score, planted = np.asarray(score), np.asarray(planted, bool)
    if score.shape != planted.shape or score.ndim != 1:
        raise ValueError(f"score is {score.shape} and planted {planted.shape}; expected one of both for each sample")
    count = int(planted.sum())
    fewest = min(count, len(score) - count)
    if fewest == 0:
        which = "all" if count else "none"
        raise UserError(f"{which} of the {len(score)} scored samples are planted; expected some planted and some not")
    if not np.isfinite(score).all():
        raise ValueError(f"the score of sample {int(np.argmin(np.isfinite(score)))} is not finite; expected numbers")
    groups = _by_rank(score, planted)
    mean = _auroc(*groups)
    blank = Estimate(
        mean=mean, low=None, high=None, sd_seed=None, sd_draw=None, sd_sample=None,
        seeds=1, draws=1, samples=len(score), level=level,
    )  # fmt: skip
    if fewest == 1:
        return blank
    if mean in (0.0, 1.0):
        far = ((1 - level) / 2) ** (1 / fewest)
        return replace(blank, low=far, high=1.0) if mean else replace(blank, low=0.0, high=1 - far)
    random = np.random.default_rng(seed)
    drawn = [
        _auroc(*(ranks[random.integers(len(ranks), size=len(ranks))] for ranks in groups)) for _ in range(resamples)
    ]
    ends = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    stretch = _student_t(level, fewest - 1) / NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(fewest / (fewest - 1))
    low, high = (mean + (ends - mean) * stretch).tolist()
    low, high = min(low, _newcombe(mean, groups, level, 0.0)), max(high, _newcombe(mean, groups, level, 1.0))
    return _clipped(replace(blank, low=low, high=high), 0.0, 1.0)


def _by_rank(score: np.ndarray, planted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the planted and of the other samples among the distinct scores."""
    places = np.unique(score, return_inverse=True)[1]
    return places[planted], places[~planted]


def _auroc(planted: np.ndarray, others: np.ndarray) -> float:
    """The rank statistic of Mann and Whitney over its maximum, from whole numbers."""
    size = 1 + max(int(planted.max()), int(others.max()))
    above, equal = np.bincount(planted, minlength=size), np.bincount(others, minlength=size)
    below = np.cumsum(equal) - equal
    return float((above * (2 * below + equal)).sum()) / (2 * len(planted) * len(others))


def _newcombe(mean: float, groups: tuple[np.ndarray, np.ndarray], level: float, end: float) -> float:
    """The AUROC farthest from ``mean`` towards ``end`` that its own standard error still joins to it, by bisection."""
    sizes, z = [len(group) for group in groups], NormalDist().inv_cdf((1 + level) / 2)
    half = sum(sizes) / 2 - 1
    near, far = mean, end
    for _ in range(50):
        middle = (near + far) / 2
        pairs = 1 + half * ((1 - middle) / (2 - middle) + middle / (1 + middle))
        joined = abs(mean - middle) <= z * math.sqrt(middle * (1 - middle) * pairs / math.prod(sizes))
        near, far = (middle, far) if joined else (near, middle)
    return near


# From a table to an estimate.


def _checked(values: Sequence[np.ndarray]) -> list[np.ndarray]:
    arrays = [np.asarray(each) for each in values]
    if not arrays:
        raise ValueError("no values; expected an array of draws by samples for each seed")
    for number, array in enumerate(arrays):
        if array.ndim != 2 or not array.size:
            raise ValueError(f"seed {number} has values of shape {array.shape}; expected draws by samples, one or more")
        if array.dtype != bool and not np.isfinite(array).all():
            raise ValueError(f"seed {number} has values that are not finite; expected numbers")
    return arrays


def _check_labels(n: int) -> None:
    if n < 2:
        raise ValueError(f"n is {n}; expected at least 2 random labels")


def _estimate(groups: list[list[np.ndarray]], level: float) -> Estimate:
    """Mean of the first group, less that of a second one if there is one; a group has [K, N] for each seed."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a number between 0 and 1")
    seeds = len(groups[0])
    within = [_terms([group[s][None] for group in groups]) for s in range(seeds)]
    tables = _aligned(groups)
    terms = _terms(tables) if seeds > 1 else within[0]
    mean = sum(sign * float(np.mean([a.mean() for a in group])) for sign, group in zip((1, -1), groups, strict=False))
    half = _half_width(terms, tables, level)
    sizes = [a.shape for group in groups for a in group]
    return Estimate(
        mean=mean,
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
        sd_seed=_sd_seed(terms, within, tables) if seeds > 1 else None,
        sd_draw=_sd_draw(within, groups[0]),
        sd_sample=_sd_sample(groups),
        seeds=seeds,
        draws=min(draws for draws, _ in sizes),
        samples=min(samples for _, samples in sizes),
        level=level,
    )


def _aligned(groups: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Each group as one array [S, K, N], or [S, K, 1] of means where samples differ, or [S, 1, 1] where draws do."""
    if all(len({array.shape for array in group}) == 1 for group in groups):
        return [np.stack(group) for group in groups]
    means = [[array.mean(axis=1, dtype=np.float64) for array in group] for group in groups]
    if len({len(draws) for group in means for draws in group}) == 1:
        return [np.stack(group)[..., None] for group in means]
    return [np.array([draws.mean() for draws in group])[:, None, None] for group in means]


def _terms(tables: list[np.ndarray]) -> Terms:
    """For each level and interaction of levels, what its mean square adds to the variance of the mean of [S, K, N].

    The expectation of the term of T is the sum, over all interactions U that hold T, of U's variance over its number
    of cells. Levels with one unit are left out. Samples are those of each group, seeds and draws those of both.
    """
    means = [table.mean(axis=_SAMPLE, keepdims=True, dtype=np.float64) for table in tables]
    both = means[0] - means[1] if len(means) > 1 else means[0]
    coarse = [axis for axis in (_SEED, _DRAW) if both.shape[axis] > 1]
    subsets = [axes for count in range(len(coarse) + 1) for axes in combinations(coarse, count)]
    terms = {axes: float((_centred(both, axes) ** 2).sum()) / _cells(both.shape, axes) for axes in subsets if axes}
    for table, mean in zip(tables, means, strict=True):
        if table.shape[_SAMPLE] == 1:
            continue
        for block in _blocks(table):
            residual = block - mean
            for axes in subsets:
                fine = (*axes, _SAMPLE)
                square = float((_centred(residual, axes) ** 2).sum()) / _cells(table.shape, fine)
                terms[fine] = terms.get(fine, 0.0) + square
    return terms


def _centred(table: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """The interaction of seed and draw ``axes`` (samples are left as they are); averaged over the other of the two."""
    table = table.mean(axis=tuple(axis for axis in (_SEED, _DRAW) if axis not in axes), keepdims=True)
    for axis in axes:
        table = table - table.mean(axis=axis, keepdims=True)
    return table


def _cells(shape: tuple[int, ...], axes: Sequence[int]) -> int:
    """Degrees of freedom of an interaction times its number of cells."""
    return math.prod(shape[axis] * (shape[axis] - 1) for axis in axes)


def _blocks(table: np.ndarray) -> Iterator[np.ndarray]:
    """The table in float64, some samples at a time."""
    step = max(1, _BLOCK // math.prod(table.shape[:_SAMPLE]))
    for start in range(0, table.shape[_SAMPLE], step):
        yield table[..., start : start + step].astype(np.float64)


def _variance(terms: Terms) -> float:
    """Variance of the mean, each interaction counted once; at least what any one level shows."""
    return max(_once(terms), *(term for axes, term in terms.items() if len(axes) == 1))


def _once(terms: Terms, of: Collection[int] = ()) -> float:
    """Sum of the terms that hold all levels ``of``, by inclusion and exclusion."""
    return sum((-1) ** (len(axes) + 1) * term for axes, term in terms.items() if set(of) <= set(axes))


def _half_width(terms: Terms, tables: list[np.ndarray], level: float) -> float | None:
    """Standard error times Student's t, by level; None where no level has two units."""
    if not terms:
        return None
    units = {axis: max(table.shape[axis] for table in tables) for axis in (_SEED, _DRAW, _SAMPLE)}
    seeds = max(0.0, _once(terms, [_SEED]))
    rest = max(0.0, _variance(terms) - seeds)
    finer = {axes[0]: term for axes, term in terms.items() if axes in ((_DRAW,), (_SAMPLE,)) and term > 0.0}
    square = seeds * _student_t(level, units[_SEED] - 1) ** 2 if seeds else 0.0
    if finer:
        freedom = sum(finer.values()) ** 2 / sum(term**2 / (units[axis] - 1) for axis, term in finer.items())
        square += rest * _student_t(level, math.floor(freedom + 1e-9)) ** 2
    elif rest:
        square += rest * _student_t(level, units[_SEED] - 1) ** 2
    return math.sqrt(square)


@lru_cache(maxsize=1024)
def _student_t(level: float, freedom: int) -> float:
    return student_t(level, min(freedom, _MOST_FREEDOM))


# Components: the deviations of single units, by the method of moments, never below 0.


def _sd_seed(terms: Terms, within: list[Terms], tables: list[np.ndarray]) -> float:
    """What the means of seeds vary beyond what seeds have in common, and beyond their own draws and samples."""
    seeds, draws, samples = tables[0].shape
    variance = seeds * _once(terms, [_SEED])
    if samples == 1:  # a mean over samples that are the seed's own and still in it, and draws too if they are
        own = [] if draws == 1 else [_SAMPLE]
        variance -= float(np.mean([_once(each, own) for each in within]))
    return math.sqrt(max(0.0, variance))


def _sd_draw(within: list[Terms], arrays: list[np.ndarray]) -> float | None:
    variances = [
        len(array) * (terms[(_DRAW,)] - terms.get((_DRAW, _SAMPLE), 0.0))
        for terms, array in zip(within, arrays, strict=True)
        if len(array) > 1
    ]
    return math.sqrt(max(0.0, float(np.mean(variances)))) if variances else None


def _sd_sample(groups: list[list[np.ndarray]]) -> float | None:
    variances = [
        [float(array.var(axis=1, ddof=1, dtype=np.float64).mean()) for array in group if array.shape[1] > 1]
        for group in groups
    ]
    if not all(variances):
        return None
    return math.sqrt(sum(float(np.mean(each)) for each in variances))


def _linear(estimate: Estimate, times: int, plus: int, over: int) -> Estimate:
    """The estimate of ``(times · value + plus) / over``."""
    ends = {name: getattr(estimate, name) for name in ("mean", "low", "high")}
    spread = {name: getattr(estimate, name) for name in ("sd_seed", "sd_draw", "sd_sample")}
    changed = {name: None if value is None else (times * value + plus) / over for name, value in ends.items()}
    changed |= {name: None if value is None else times * value / over for name, value in spread.items()}
    return replace(estimate, **changed)


def _clipped(estimate: Estimate, lowest: float, highest: float) -> Estimate:
    """Without what cannot be."""
    if estimate.low is None or estimate.high is None:
        return estimate
    return replace(estimate, low=max(lowest, estimate.low), high=min(highest, estimate.high))


def without_single_draw(estimate: Estimate) -> Estimate:
    """One head on one network: its samples stand or fall together, so their spread is no interval."""
    alone = estimate.seeds == 1 and estimate.draws == 1
    return replace(estimate, low=None, high=None) if alone else estimate
