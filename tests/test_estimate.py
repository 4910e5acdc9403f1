"""Intervals: coverage on simulated studies, equality with an explicit bootstrap, components, degenerate data, AUROC."""

from collections.abc import Callable
import math
from typing import Any

import numpy as np
import pytest

from rlp.errors import UserError
from rlp.intervals import draw_interval, student_t
from rlp.measure.estimate import (
    Estimate,
    auroc_estimate,
    delta_estimate,
    kappa_estimate,
    mean_estimate,
    rademacher,
)

STUDIES = 300
Random = np.random.Generator


def study(random: Random, shape: tuple[int, int, int], **sd: float) -> list[np.ndarray]:
    """Values [K, N] by seed; ``sd`` names the effects: any of s(eed), k (draw), i (sample) and their interactions."""
    values = np.zeros(shape)
    for name, deviation in sd.items():
        cells = [size if letter in name else 1 for letter, size in zip("ski", shape, strict=True)]
        values = values + deviation * random.standard_normal(cells)
    return list(values)


# What varies, from nested seeds that share nothing to draws and samples that all seeds have in common.
MODELS: dict[str, tuple[tuple[int, int, int], dict[str, float]]] = {
    "nested": ((3, 5, 200), {"s": 0.05, "sk": 0.03, "ski": 0.5}),
    "seeds alone": ((3, 5, 200), {"s": 0.08, "ski": 0.1}),
    "seeds as noise": ((3, 5, 200), {"s": 0.03, "sk": 0.02, "ski": 0.4}),
    "no seeds": ((3, 5, 200), {"sk": 0.02, "si": 0.3, "ski": 0.5}),
    "noise": ((3, 5, 200), {"ski": 0.5}),
    "crossed": ((3, 5, 200), {"s": 0.02, "k": 0.02, "i": 0.3, "sk": 0.01, "si": 0.2, "ki": 0.2, "ski": 0.4}),
    "one seed": ((1, 5, 200), {"k": 0.03, "i": 0.3, "ki": 0.4}),
    "two seeds": ((2, 5, 200), {"s": 0.05, "k": 0.03, "i": 0.3, "ski": 0.4}),
    "one draw": ((3, 1, 200), {"s": 0.05, "i": 0.3, "ski": 0.4}),
}


def coverage(make: Callable[[Random], Estimate], truth: float, studies: int = STUDIES) -> float:
    random = np.random.default_rng(11)
    hits = 0
    for _ in range(studies):
        estimate = make(random)
        assert estimate.low is not None
        assert estimate.high is not None
        hits += estimate.low <= truth <= estimate.high
    return hits / studies


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("bernoulli", [False, True])
def test_intervals_cover_as_often_as_they_say(model: str, bernoulli: bool) -> None:
    shape, sd = MODELS[model]

    def make(random: Random) -> Estimate:
        values = study(random, shape, **sd)
        return mean_estimate([each > 0 for each in values] if bernoulli else values)

    assert 0.885 <= coverage(make, 0.5 if bernoulli else 0.0) <= 0.995  # .90 to .99 within three standard errors


@pytest.mark.parametrize("ragged", ["samples", "draws"])
def test_ragged_seeds_are_covered_too(ragged: str) -> None:
    shapes = [(1, 5, 120), (1, 5, 200), (1, 5, 90)] if ragged == "samples" else [(1, 4, 90), (1, 6, 90), (1, 5, 90)]

    def make(random: Random) -> Estimate:
        return mean_estimate([study(random, shape, s=0.05, sk=0.05, ski=0.5)[0] for shape in shapes])

    assert 0.885 <= coverage(make, 0.0) <= 0.995


@pytest.mark.parametrize("paired", [False, True])
def test_differences_are_covered(paired: bool) -> None:
    """What a network or a draw does to both groups cancels; of a pair also what the sample does."""

    def make(random: Random) -> Estimate:
        shape = (3, 5, 200)
        common, sample = study(random, shape, s=0.2, sk=0.1), study(random, shape, i=0.4)
        other = sample if paired else study(random, shape, i=0.4)
        shift = study(random, (3, 1, 1), s=0.1)
        members = [
            c + x + d + e > 0 for c, x, d, e in zip(common, sample, shift, study(random, shape, ski=1), strict=True)
        ]
        others = [c + x + e > 0 for c, x, e in zip(common, other, study(random, shape, ski=1), strict=True)]
        return delta_estimate(members, others, 2, paired=paired)

    assert 0.885 <= coverage(make, 0.0) <= 0.995


def test_pairs_are_narrower() -> None:
    random = np.random.default_rng(0)
    sample = study(random, (3, 5, 300), i=2.0)
    members, others = (
        [x + e > 0 for x, e in zip(sample, study(random, (3, 5, 300), ski=0.2), strict=True)] for _ in "ab"
    )
    joint, apart = (delta_estimate(members, others, 10, paired=paired) for paired in (True, False))
    assert joint.mean == pytest.approx(apart.mean)
    assert width(joint) < 0.5 * width(apart)
    swapped = [each[:, ::-1] for each in others]
    assert width(delta_estimate(members, swapped, 10, paired=True)) > 2 * width(joint)


def width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low


# The closed form against resamples that are really drawn.


def resampled_variances(values: np.ndarray, axes: tuple[int, ...], resamples: int = 20_000) -> float:
    """Variance of the mean when the units of ``axes`` of [S, K, N] are drawn again, and the others stay."""
    random = np.random.default_rng(3)
    weights = []
    for axis, size in enumerate(values.shape):
        counts = random.multinomial(size, np.full(size, 1 / size), resamples) if axis in axes else 1
        weights.append(np.broadcast_to(counts / size, (resamples, size)))
    return float(np.einsum("ski,rs,rk,ri->r", values, *weights, optimize=True).var())


def test_the_closed_form_is_the_limit_of_resampling() -> None:
    """By inclusion and exclusion of bootstraps of one, two and three levels, k/(k - 1) for each level."""
    values = np.array(study(np.random.default_rng(5), (4, 6, 12), s=0.3, k=0.3, i=0.5, sk=0.2, ki=0.4, ski=0.5))
    one = {axis: resampled_variances(values, (axis,)) for axis in range(3)}
    factor = {axis: size / (size - 1) for axis, size in enumerate(values.shape)}
    terms: dict[tuple[int, ...], float] = {(axis,): factor[axis] * one[axis] for axis in range(3)}
    for a, b in ((0, 1), (0, 2), (1, 2)):
        terms[a, b] = factor[a] * factor[b] * (resampled_variances(values, (a, b)) - one[a] - one[b])
    lower = sum(term / math.prod(factor[axis] for axis in axes) for axes, term in terms.items())
    terms[0, 1, 2] = math.prod(factor.values()) * (resampled_variances(values, (0, 1, 2)) - lower)
    variance = sum((-1) ** (len(axes) + 1) * term for axes, term in terms.items())
    seeds = sum((-1) ** (len(axes) + 1) * term for axes, term in terms.items() if 0 in axes)
    draws, samples = terms[1,], terms[2,]
    freedom = math.floor((draws + samples) ** 2 / (draws**2 / 5 + samples**2 / 11))
    assert seeds > 0
    assert variance > max(terms[axis,] for axis in range(3))  # so that no floor is tested here
    expected = math.sqrt(seeds * student_t(0.95, 3) ** 2 + (variance - seeds) * student_t(0.95, freedom) ** 2)
    assert width(mean_estimate(list(values))) / 2 == pytest.approx(expected, rel=0.05)


def test_seeds_of_one_number_are_students_t() -> None:
    means = [0.1, 0.4, 0.3, 0.25]
    estimate, known = mean_estimate([np.array([[value]]) for value in means]), draw_interval(means)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((known.mean, known.low, known.high))
    estimate = mean_estimate([np.array(means)[:, None]])  # draws of one network
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((known.mean, known.low, known.high))


def test_components_come_back() -> None:
    random = np.random.default_rng(2)
    estimate = mean_estimate(study(random, (40, 40, 100), s=0.3, k=0.1, sk=0.2, i=0.4, si=0.3, ski=0.5))
    assert estimate.sd_seed == pytest.approx(0.3, rel=0.3)
    assert estimate.sd_draw == pytest.approx(math.hypot(0.1, 0.2), rel=0.15)
    assert estimate.sd_sample == pytest.approx(math.sqrt(0.4**2 + 0.3**2 + 0.5**2), rel=0.1)
    ragged = [study(random, (1, 30 + s % 2, 100 + s), s=0.3, sk=0.2, ski=0.5)[0] for s in range(40)]
    for values in (ragged, [each[:30] for each in ragged]):
        estimate = mean_estimate(values)
        assert estimate.sd_seed == pytest.approx(0.3, rel=0.3)
        assert estimate.sd_draw == pytest.approx(0.2, rel=0.15)
        assert (estimate.draws, estimate.samples) == (30, 100)
    noise = mean_estimate(study(random, (5, 10, 100), ski=1.0))
    assert (noise.sd_seed or 0) < 0.05
    assert (noise.sd_draw or 0) < 0.1


def test_kappa_is_the_accuracy_over_chance() -> None:
    correct = np.random.default_rng(0).random((6, 50)) < 0.4
    estimate = kappa_estimate([correct], 10)
    assert estimate.mean == pytest.approx((10 * correct.mean() - 1) / 9)
    plain = mean_estimate([correct])
    assert width(estimate) == pytest.approx(width(plain) * 10 / 9)
    assert estimate.sd_sample == pytest.approx((plain.sd_sample or 0) * 10 / 9)
    assert (estimate.seeds, estimate.draws, estimate.samples) == (1, 6, 50)
    assert estimate.sd_seed is None


def test_seeds_weigh_the_same() -> None:
    assert mean_estimate([np.zeros((2, 3)), np.ones((5, 40))]).mean == 0.5


def test_a_single_unit_shows_no_spread() -> None:
    coin = np.random.default_rng(1).random((1, 40)) < 0.5
    one = kappa_estimate([coin], 2)
    assert (one.low, one.high, one.sd_seed, one.sd_draw) == (None, None, None, None)
    assert str(one).endswith("[no interval]")
    assert delta_estimate([coin], [coin[:, :7]], 2).low is None
    retrieval = mean_estimate([coin])
    assert retrieval.low is not None
    assert retrieval.sd_draw is None
    alone = mean_estimate([np.array([[1.0]])])
    assert (alone.low, alone.sd_seed, alone.sd_draw, alone.sd_sample) == (None, None, None, None)
    two = kappa_estimate([coin, ~coin], 2)
    assert two.low is not None
    assert two.sd_draw is None


@pytest.mark.parametrize(("right", "kappa"), [(True, 1.0), (False, -1 / 9)])
@pytest.mark.parametrize("shapes", [[(3, 7)], [(3, 7), (3, 7)], [(3, 7), (2, 5)]])
def test_all_right_or_all_wrong_has_no_width(right: bool, kappa: float, shapes: list[tuple[int, int]]) -> None:
    estimate = kappa_estimate([np.full(shape, right) for shape in shapes], 10)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((kappa, kappa, kappa), abs=1e-15)
    assert estimate.sd_sample == 0.0


def test_kappa_stays_within_what_can_be() -> None:
    nearly = np.ones((2, 10), bool)
    nearly[0, 0] = False
    estimate = kappa_estimate([nearly], 2)
    assert estimate.high == 1.0
    assert (estimate.low or 0) < 0.9


def test_many_samples_come_in_blocks() -> None:
    values = study(np.random.default_rng(0), (2, 3, 500_000), s=1.0, i=1.0, ski=1.0)
    small = mean_estimate([each[:, :1000] for each in values])
    assert width(mean_estimate(values)) == pytest.approx(width(small), rel=0.5)
    repeated = mean_estimate([np.tile(each[:, :1000], 500) for each in values])
    assert repeated.sd_sample == pytest.approx(small.sd_sample, rel=1e-2)


def test_the_rademacher_reading_says_what_it_bounds() -> None:
    correct = np.random.default_rng(0).random((8, 60)) < 0.7
    estimate, sentence = rademacher([correct])
    assert estimate.mean == pytest.approx(2 * correct.mean() - 1)
    assert estimate.low is not None
    for words in (
        "lower bound on the empirical Rademacher complexity",
        "on these fixed features",
        "no bound for the net",
    ):
        assert words in sentence


def test_dictionaries_and_text() -> None:
    estimate = kappa_estimate([np.random.default_rng(0).random((6, 50)) < 0.4], 10)
    assert Estimate.from_dict(estimate.as_dict()) == estimate
    assert str(estimate) == f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


ONE = np.zeros((2, 3), bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kappa_estimate([], 2), "no values"),
        (lambda: kappa_estimate([ONE], 1), "n is 1"),
        (lambda: kappa_estimate([ONE[0]], 2), r"seed 0 has values of shape \(3,\)"),
        (lambda: kappa_estimate([ONE, ONE[:, :0]], 2), r"seed 1 has values of shape \(2, 0\)"),
        (lambda: mean_estimate([np.array([[np.nan, 1.0]])]), "seed 0 has values that are not finite"),
        (lambda: mean_estimate([ONE], level=1.0), "level is 1.0"),
        (lambda: delta_estimate([ONE], [ONE, ONE], 2), "1 seeds of members and 2 of others"),
        (lambda: delta_estimate([ONE], [ONE[:1]], 2), "expected the same draws"),
        (lambda: delta_estimate([ONE], [ONE[:, :2]], 2, paired=True), "expected pairs of one shape"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# AUROC.


def test_auroc_counts_pairs_and_ties_half() -> None:
    random = np.random.default_rng(4)
    score, planted = random.integers(0, 6, 60).astype(float), random.random(60) < 0.3
    pairs = np.subtract.outer(score[planted], score[~planted])
    expected = (pairs > 0).mean() + (pairs == 0).mean() / 2
    estimate = auroc_estimate(score, planted)
    assert estimate.mean == pytest.approx(expected)
    assert estimate == auroc_estimate(score, planted)
    assert auroc_estimate(np.zeros(60), planted).mean == 0.5
    assert auroc_estimate(-score, planted).mean == pytest.approx(1 - expected)


@pytest.mark.parametrize(
    ("planted", "shift", "most"),
    [(8, 0.0, 0.995), (20, 1.0, 0.995), (50, 2.0, 0.995), (5, 2.0, 1.0), (10, 3.0, 1.0)],
)
def test_auroc_is_covered(planted: int, shift: float, most: float) -> None:
    """Few that are far above the rest too, where resamples alone reach too little towards 1/2."""
    truth = 0.5 * (1 + math.erf(shift / 2))  # of two normal distributions

    def make(random: Random) -> Estimate:
        score = np.concatenate([random.standard_normal(planted) + shift, random.standard_normal(150)])
        return auroc_estimate(score, np.arange(len(score)) < planted, resamples=200)

    assert 0.885 <= coverage(make, truth) <= most


def test_auroc_of_groups_apart_is_not_certain() -> None:
    estimate = auroc_estimate(np.arange(40.0), np.arange(40) >= 30)
    assert (estimate.mean, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(0.025 ** (1 / 10))
    mirrored = auroc_estimate(-np.arange(40.0), np.arange(40) >= 30)
    assert (mirrored.low, mirrored.mean, mirrored.high) == pytest.approx((0.0, 0.0, 1 - 0.025 ** (1 / 10)))
    assert auroc_estimate(np.arange(9.0), np.arange(9) == 4).low is None


@pytest.mark.parametrize(("planted", "which"), [(np.zeros(5, bool), "none"), (np.ones(5, bool), "all")])
def test_auroc_needs_both_kinds(planted: np.ndarray, which: str) -> None:
    with pytest.raises(UserError, match=f"{which} of the 5 scored samples are planted"):
        auroc_estimate(np.arange(5.0), planted)


def test_auroc_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="expected one of both for each sample"):
        auroc_estimate(np.arange(5.0), np.zeros(4, bool))
    with pytest.raises(ValueError, match="the score of sample 1 is not finite"):
        auroc_estimate(np.array([0.0, np.nan]), np.array([True, False]))
