"""One interface for every measure that stands beside RLP-heads: a run and its data in, scores with intervals out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlp.errors import UserError
from rlp.measure.estimate import Estimate
from rlp.measure.features import FeatureSet, extract
from rlp.measure.run import Run

FEWEST = 10
"""Samples of each group that a measure needs."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What every measure looks at: one run, and the same samples.

    Attributes:
        run: the finished run.
        members, non_members: N of each, with features at all taps and logits, in eval mode on clean images.
        untrained: the members in the same network with fresh weights.
        seed: of everything that a measure draws.
    """

    run: Run
    members: FeatureSet
    non_members: FeatureSet
    untrained: FeatureSet
    seed: int = 0

    @classmethod
    def of(cls, run: Run, *, taps: Sequence[str] | None = None, samples: int | None = None, seed: int = 0) -> "Subject":
        """Equally many members and non-members of a run, at most ``samples`` of each.

        Raises:
            UserError: a group has too few samples, or too few are asked for.
        """
        if samples is not None and samples < FEWEST:
            raise UserError(f"--samples is {samples}; expected at least {FEWEST} of each group")
        sizes = [len(group.view.ids) for group in run.groups.values()]
        count = min(sizes if samples is None else [*sizes, samples])
        if count < FEWEST:
            raise UserError(
                f"the run has {sizes[0]} members and {sizes[1]} non-members; expected at least {FEWEST} of each"
            )
        members, others, untrained = (
            extract(run, group, taps=taps, limit=count, seed=seed, untrained=fresh)
            for group, fresh in (("members", False), ("non-members", False), ("members", True))
        )
        return cls(run=run, members=members, non_members=others, untrained=untrained, seed=seed)


@dataclass(frozen=True, kw_only=True)
class SampleScore:
    """A number for each sample; **larger is more memorised**, or harder, for every measure alike.

    Attributes:
        name: of the column, such as ``feldman_zhang``; snake case.
        group: ``members`` or ``non-members``.
        ids: sample ids, int64 ``[N]``, as in the group's features.
        values: float64 ``[N]``; NaN for a sample that has none.
    """

    name: str
    group: str
    ids: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One number of a tap or of the whole run, with everything that it must be read with.

    Attributes:
        measure, quantity: such as ``knn`` and ``MA``.
        value: on members, with its interval.
        non_members: the same on non-members; None where it cannot exist.
        chance: what guessing gives; None where there is no such thing.
        controls: further controls by name (``untrained``, ``pca``, …).
        count: N, the samples it rests on.
        tap, depth: where; empty and −1 for the whole run.
        settings: what else it depends on (k, B, n, …), in words.
    """

    measure: str
    quantity: str
    value: Estimate
    non_members: Estimate | None
    chance: float | None
    count: int
    controls: dict[str, float | None] = field(default_factory=dict)
    tap: str = ""
    depth: int = -1
    settings: str = ""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a measure found in a run: of single samples, and of taps or the whole."""

    scores: tuple[SampleScore, ...] = ()
    rows: tuple[Finding, ...] = ()


Measure = Callable[[Subject], Findings]
"""Every measure is a function of its subject; what can be set are keyword arguments with defaults."""
