"""From readings to a verdict: is the sign of a contrast the one that the papers report?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from rlp.measure.estimate import Estimate, delta_estimate, mean_estimate, without_single_draw
from rlp.reproduce.finding import Contrast, Selection
from rlp.reproduce.readings import (
    FRESH,
    MODE,
    PROTOCOL,
    TRAINING,
    Point,
    Values,
    accuracy,
    fresh_values,
    training_values,
)
from rlp.reproduce.study import Study

REPRODUCED, OPPOSITE, UNDECIDED = "sign reproduced", "not reproduced", "undecided"
ENOUGH = {"seeds": 3, "draws": 5}
"""What a verdict asks for; with less it is preliminary."""
CEILING = 0.99
"""κ from which on a reading has no room left."""

Places = dict[tuple[Selection, int], Point]
Tables = list[np.ndarray]


@dataclass(frozen=True)
class Shown:
    """One reading at one place of a contrast: its level, and what stands beside every number."""

    selection: Selection
    estimate: Estimate
    facts: dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """One contrast by one reading.

    Attributes:
        reading: what was read and how; :data:`own` tells whether it is the papers' way.
        quantity: ``κ``, ``Δ`` (members less non-members) or ``accuracy``.
        estimate: the contrast with its interval.
        verdict: :data:`REPRODUCED`, :data:`OPPOSITE` or :data:`UNDECIDED`; where no sign is claimed, what was seen.
        paired: the same samples are in all readings, so that their differences were taken sample by sample.
        points: the levels that the contrast is made of.
    """

    contrast: Contrast
    reading: str
    quantity: str
    estimate: Estimate
    verdict: str
    paired: bool
    points: list[Shown] = field(repr=False)

    @property
    def own(self) -> bool:
        """Whether this is the papers' own reading: their heads, or the class accuracy."""
        return self.reading not in FRESH


def weights(count: int) -> np.ndarray:
    """What each reading counts for: alone; the second less the first; or the rise of the fitted line, end to end."""
    if count == 1:
        return np.ones(1)
    place = np.linspace(0, 1, count)
    centred = place - place.mean()
    return centred / (centred**2).sum()


def decide(contrast: Contrast, estimate: Estimate) -> str:
    """The verdict on a contrast whose interval is known."""
    low, high = estimate.low, estimate.high
    if low is None or high is None:
        return UNDECIDED
    if contrast.expected == "chance":
        inside = -contrast.margin <= low and high <= contrast.margin
        outside = low > contrast.margin or high < -contrast.margin
        return REPRODUCED if inside else OPPOSITE if outside else UNDECIDED
    seen = "rises" if low > 0 else "falls" if high < 0 else UNDECIDED
    if contrast.expected == "open":
        return seen if seen == UNDECIDED else f"{seen} (no sign claimed)"
    return seen if seen == UNDECIDED else REPRODUCED if seen == contrast.expected else OPPOSITE


def judge(study: Study, contrast: Contrast, places: Places) -> list[Judged]:
    """A contrast by every reading that it can be judged on."""
    if contrast.of != "kappa":
        return [_judge_accuracy(study, contrast)]
    judged = []
    if not contrast.matched:  # training heads have been fitted to all samples
        for reading in TRAINING:
            judged += _judge_kappa(study, contrast, places, reading, partial(training_values, mode=MODE[reading]))
    for reading in FRESH:
        judged += _judge_kappa(study, contrast, places, reading, partial(fresh_values, protocol=PROTOCOL[reading]))
    return judged


def _judge_accuracy(study: Study, contrast: Contrast) -> Judged:
    tables = {
        selection: [accuracy(study, selection, seed, contrast.of) for seed in study.seeds]
        for selection in contrast.over
    }
    factors = weights(len(contrast.over))
    summed = [
        sum((w * tables[s][i] for w, s in zip(factors, contrast.over, strict=True)), np.zeros((1, 1)))
        for i in range(len(study.seeds))
    ]
    estimate = mean_estimate(summed)
    shown = [Shown(selection, mean_estimate(tables[selection]), {}) for selection in contrast.over]
    name = contrast.of.replace("_", " ")
    return Judged(contrast, name, "accuracy", estimate, decide(contrast, estimate), False, shown)


def _judge_kappa(
    study: Study, contrast: Contrast, places: Places, reading: str, read: Callable[..., Values]
) -> list[Judged]:
    """By the κ of members and, where there are non-members, by Δ too."""
    over = contrast.over
    values = {
        selection: [read(study, selection, seed, places[selection, seed]) for seed in study.seeds] for selection in over
    }
    by_seed = [[values[selection][i] for selection in over] for i in range(len(study.seeds))]
    paired = all(_same_samples(row) for row in by_seed)
    # Δ is near 0 without a penalty too, so that its being there says nothing of a claim about chance.
    kinds = ["κ"] if by_seed[0][0].others is None or contrast.expected == "chance" else ["κ", "Δ"]
    judged = []
    for quantity in kinds:
        estimate = _estimate([_combined(row, paired) for row in by_seed], quantity)
        points = [
            Shown(
                selection,
                _estimate([_combined([v], True) for v in values[selection]], quantity),
                _facts(values[selection]),
            )
            for selection in over
        ]
        judged.append(Judged(contrast, reading, quantity, estimate, decide(contrast, estimate), paired, points))
    return judged


def _facts(values: Sequence[Values]) -> dict[str, Any]:
    """Numbers as means over seeds; what is text, from the first."""
    first = values[0].facts
    numbers = {name: [v.facts[name] for v in values] for name in first}
    return {
        name: first[name] if isinstance(first[name], str | None) else float(np.mean(numbers[name])) for name in first
    }


def _same_samples(values: Sequence[Values]) -> bool:
    """Whether differences can be taken sample by sample."""
    if any(value.members.shape != values[0].members.shape for value in values):
        return False
    known = [value.ids for value in values]
    return all(
        one is not None and other is not None and all(map(np.array_equal, one, other)) for one, other in pairwise(known)
    )


def _combined(values: Sequence[Values], paired: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """The contrast's sum for one seed: of members, and of non-members, [K, N], or [K, 1] of means."""

    def total(parts: Sequence[np.ndarray]) -> np.ndarray:
        return _weighted(parts if paired else [part.mean(axis=1, keepdims=True) for part in parts])

    others = [value.others for value in values if value.others is not None]
    return total([value.members for value in values]), total(others) if others else None


def _weighted(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The contrast's sum of arrays of one shape."""
    return np.einsum("i,i...->...", weights(len(parts)), np.stack(parts))


def _estimate(sums: Sequence[tuple[np.ndarray, np.ndarray | None]], quantity: str) -> Estimate:
    if quantity == "κ":
        return without_single_draw(mean_estimate([members for members, _ in sums]))
    # delta_estimate turns shares into κ, which for two labels doubles them; these are κ already
    halves = [(members / 2, others / 2) for members, others in sums if others is not None]
    return delta_estimate([members for members, _ in halves], [others for _, others in halves], 2)


def remarks(study: Study, judged: Sequence[Judged]) -> list[str]:
    """What limits the verdicts, a sentence each."""
    found = []
    if len(study.seeds) < ENOUGH["seeds"] or study.draws < ENOUGH["draws"]:
        found.append(
            f"Preliminary: {len(study.seeds)} seeds x {study.draws} draws; a verdict asks for at least "
            f"{ENOUGH['seeds']} seeds x {ENOUGH['draws']} draws."
        )
    if any(_is_full(each) for each in judged):
        found.append(
            "Where every reading is at its ceiling (κ of 0.99 and more), heads tell all samples apart whatever the "
            "network: the contrast says nothing."
        )
    if any(not each.paired and not each.own for each in judged):
        found.append(
            "Where a contrast compares different samples, its interval is over seeds and draws; the draws' spread "
            "holds what the labels of the samples do, but the choice of the samples is not resampled."
        )
    if any(each.own and each.quantity == "κ" for each in judged):
        found.append(
            "Training heads leave one mean a draw, so their intervals are over seeds and draws; non-members have no "
            "training heads, so there is no Δ of them."
        )
    return found


def _is_full(judged: Judged) -> bool:
    return judged.quantity == "κ" and all(shown.estimate.mean >= CEILING for shown in judged.points)
