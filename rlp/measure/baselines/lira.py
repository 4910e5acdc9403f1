"""Likelihood-ratio membership inference: is the network as sure of a sample as networks that trained on it?

Carlini et al., "Membership inference attacks from first principles", S&P 2022, arXiv 2112.03570, algorithm 1. With
φ = log p/(1 - p) of the given class, shadows are copies of the run on random halves of members and non-members
together; each sample is in half of them. Normal distributions are fitted to φ of shadows with and without the sample:

- online: log N(φ; μ_in, σ_in²) - log N(φ; μ_out, σ_out²);
- offline, asking only shadows that never saw the sample: (φ - μ_out)/σ_out, in the order of the paper's 1 - P[Z > φ].

With fewer than 64 shadows, as there, σ is one for all samples: the deviations from each sample's mean, pooled. One
query a sample, the clean image; the paper also asks augmented ones.

The member side is told from the other by *whatever* differs between both. Where non-members are validation images
with true labels and members have wrong ones, that is not membership alone: set ``data.member_fraction``.

Cost: ``shadows`` times the run's training.
"""

from typing import Literal

import numpy as np

from rlp.errors import UserError
from rlp.measure.baselines.ensemble import lacking
from rlp.measure.baselines.interface import Finding, Findings, SampleScore, Subject
from rlp.measure.baselines.pool import Pool
from rlp.measure.baselines.retrain import AT_ONCE, retrain
from rlp.measure.estimate import Estimate, auroc_estimate
from rlp.measure.features import FeatureSet
from rlp.philox import random_bits
from rlp.seeding import named_seed

SHADOWS, OWN_SPREAD_FROM, FALSE_POSITIVES = 16, 64, 0.01
NAME = "lira"

_RESAMPLES = 1000
_SMALLEST = 1e-6  # of a standard deviation


def measure(
    subject: Subject,
    *,
    shadows: int = SHADOWS,
    mode: Literal["online", "offline"] = "online",
    epochs: int = 0,
    at_once: int = AT_ONCE,
) -> Findings:
    """Score ``lira`` of members and non-members; rows: AUC and true positives at 1% false ones, members against others.

    Controls: ``confidence`` ranks by φ alone (Yeom et al. 2018), ``untrained`` asks the network with fresh weights.

    Args:
        subject: the run; shadows train on halves of both of its groups, whichever samples the subject has.
        shadows: an even number, at least 4.
        mode: see above.
        epochs: of each shadow; 0 for the run's.
        at_once: shadows trained together.

    Raises:
        UserError: an odd number of shadows or too few, or no such mode.
    """
    if shadows < 4 or shadows % 2:
        raise UserError(f"LiRA with {shadows} shadows; expected an even number of at least 4")
    if mode not in ("online", "offline"):
        raise UserError(f"LiRA's mode is '{mode}'; expected online or offline")
    groups = list(subject.run.groups.values())
    pool = Pool.of(subject.run, groups)
    words = [random_bits(subject.seed, f"{g.split}.{g.name}.shadows", g.ids, shadows // 2).T for g in groups]
    subsets = halves(np.concatenate(words, axis=1))
    last = epochs or subject.run.config.train.epochs
    asked, seed = {"confidence": [last]}, named_seed(subject.seed, NAME)
    found = retrain(subject.run, pool, subsets, asked, seed=seed, epochs=last, at_once=at_once, what="shadow models")
    sets = (subject.members, subject.non_members)
    rows = pool.places(subject.members.ids, subject.non_members.ids)
    phi, inside = found["confidence"][:, 0].astype(np.float64), subsets
    score = [likelihood_ratio(confidence(s), phi[:, r], inside[:, r], mode) for s, r in zip(sets, rows, strict=True)]
    fresh = _untrained(subject)
    ratio = [likelihood_ratio(c, phi[:, r], inside[:, r], mode) for c, r in zip(fresh, rows, strict=True)]
    controls = {"confidence": [confidence(samples) for samples in sets], "untrained": ratio}
    settings = f"{mode}, {shadows} shadows, {last} epochs; non-members: {groups[1].origin}{lacking(subject.run)}"
    return Findings(scores=_scores(sets, score), rows=_rows(score, controls, settings, subject.seed))


def halves(words: np.ndarray) -> np.ndarray:
    """Pairs of complementary halves, bool ``[2P, N]``, from words ``[P, N]``: every sample is in half of them."""
    first = np.zeros(words.shape, bool)
    order = np.argsort(words, axis=1, kind="stable")
    np.put_along_axis(first, order[:, : words.shape[1] // 2], True, axis=1)
    return np.stack([first, ~first], axis=1).reshape(-1, words.shape[1])


def confidence(samples: FeatureSet) -> np.ndarray:
    """φ = log p/(1 - p) of the given class in the run's network, float64 ``[N]``."""
    return _confidence(samples.logits.double().numpy(), samples.given)


def likelihood_ratio(target: np.ndarray, shadows: np.ndarray, inside: np.ndarray, mode: str) -> np.ndarray:
    """The score of each sample, float64 ``[N]``.

    Args:
        target: φ in the network that is asked about, float ``[N]``.
        shadows: φ in each shadow, float ``[M, N]``.
        inside: which shadows trained on the sample, bool ``[M, N]``, some and not all for each sample.
        mode: ``online`` or ``offline``.
    """
    from scipy.stats import norm

    without = _gaussian(shadows, ~inside)
    if mode == "offline":
        return (target - without[0]) / without[1]
    return norm.logpdf(target, *_gaussian(shadows, inside)) - norm.logpdf(target, *without)


def true_positives(members: np.ndarray, others: np.ndarray, false: float = FALSE_POSITIVES) -> float:
    """Share of members above the threshold that at most ``false`` of the others exceed."""
    return float((members > np.sort(others)[len(others) - 1 - _allowed(len(others), false)]).mean())


def _allowed(others: int, false: float = FALSE_POSITIVES) -> int:
    """How many of the others may lie above the threshold."""
    return int(false * others)


def _gaussian(values: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the chosen values of each column; one deviation for all where there are few."""
    count = chosen.sum(axis=0)
    mean = np.where(chosen, values, 0.0).sum(axis=0) / count
    square = np.where(chosen, (values - mean) ** 2, 0.0).sum(axis=0)
    if len(values) >= OWN_SPREAD_FROM:
        spread = np.sqrt(square / np.maximum(1, count - 1))
    else:
        spread = np.full(len(mean), np.sqrt(square.sum() / (count - 1).sum()))
    return mean, np.maximum(spread, _SMALLEST)


def _confidence(logits: np.ndarray, given: np.ndarray) -> np.ndarray:
    from scipy.special import logsumexp

    rows = np.arange(len(logits))
    others = logits.copy()
    others[rows, given] = -np.inf
    return logits[rows, given] - logsumexp(others, axis=1)


def _untrained(subject: Subject) -> list[np.ndarray]:
    """φ of both groups in the network with fresh weights; of non-members it has to be taken now."""
    from rlp.measure.features import extract

    others = subject.non_members
    group = subject.run.groups["non-members"]
    chosen = group.of(group.view.ids[np.isin(group.ids, others.ids)])
    taps = list(others.features)
    fresh = extract(subject.run, chosen, taps=taps, seed=subject.seed, untrained=True)
    return [confidence(subject.untrained), confidence(fresh)]


def _scores(sets: tuple[FeatureSet, FeatureSet], score: list[np.ndarray]) -> tuple[SampleScore, ...]:
    return tuple(
        SampleScore(name=NAME, group=samples.group, ids=samples.ids, values=values)
        for samples, values in zip(sets, score, strict=True)
    )


def _rows(
    score: list[np.ndarray], controls: dict[str, list[np.ndarray]], settings: str, seed: int
) -> tuple[Finding, ...]:
    rows = []
    others = len(score[1])
    # Of equal distributions a member is above the k-th largest of n others with probability k/(n + 1).
    guessed = (_allowed(others) + 1) / (others + 1)
    for quantity, of, chance in (("AUC", _auc, 0.5), ("TPR at 1% FPR", _true_positives, guessed)):
        value = of(score[0], score[1], seed)
        rows.append(
            Finding(
                measure=NAME,
                quantity=quantity,
                value=value,
                non_members=None,
                chance=chance,
                controls={name: of(both[0], both[1], seed).mean for name, both in controls.items()},
                count=value.samples,
                settings=settings,
            )
        )
    return tuple(rows)


def _auc(members: np.ndarray, others: np.ndarray, seed: int) -> Estimate:
    is_member = np.arange(len(members) + len(others)) < len(members)
    return auroc_estimate(np.concatenate([members, others]), is_member, seed=seed)


def _true_positives(members: np.ndarray, others: np.ndarray, seed: int) -> Estimate:
    """With the bootstrap's percentiles over samples, members and others apart.

    Below 100 others no threshold has 1% of them above it, and resamples of the largest alone cover too seldom (66% with
    40 in simulations): there is no interval then.
    """
    random = np.random.default_rng(seed)

    def again(values: np.ndarray) -> np.ndarray:
        return values[random.integers(len(values), size=len(values))]

    drawn = [true_positives(again(members), again(others)) for _ in range(_RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist() if _allowed(len(others)) else (None, None)
    return Estimate(
        mean=true_positives(members, others), low=low, high=high, sd_seed=None, sd_draw=None, sd_sample=None,
        seeds=1, draws=1, samples=len(members) + len(others),
    )  # fmt: skip
