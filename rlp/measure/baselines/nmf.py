"""Non-negative rank of activations: how much of a ReLU layer a network needs for a batch of one class (Collins 2018).

Collins, Bigdeli, Süsstrunk, "Detecting Memorization in ReLU Networks", arXiv 1810.03372. For samples of one (given)
label, A ≥ 0 is the matrix of their activations, rows = samples (maps: samples × positions; tokens alike), columns =
units. A is replaced by W_k H_k of non-negative rank k, the rest of the network runs on, and the accuracy is read
against k. Its area over log k, 1 if rank 1 is enough for all, is the number: a network that generalises is nearly
linear on a class in its deep layers and loses nothing; one that memorises needs what tells samples apart.

*Ours*, where the paper could not be read: ranks 1, 2, 4, 8; batches of up to 100; the best of three restarts; the area
over log k; a sample's score, 1 − its own share of that area. Controls at the same k: principal components, k units
left and the others zeroed (ablation), and the accuracy with nothing replaced. A network with fresh weights has no
accuracy to lose, so it is no control here. A tap must lie behind a ReLU: GELU's activations are negative in part.

Cost: restarts · Σk · 200 · 8 · R · D operations a batch of R rows: seconds a tap for a small network on one core; maps
of many positions want a GPU, on which many batches are factorised at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlp.errors import UserError
from rlp.low_rank.curve import FEWEST, RANKS, NegativeActivations, accuracy_by_rank, area
from rlp.measure.baselines.images import images_of
from rlp.measure.baselines.interface import Finding, Findings, SampleScore, Subject
from rlp.measure.estimate import Estimate, mean_estimate
from rlp.measure.features import FeatureSet

SAMPLES = 4000
"""Of a group that are looked at, about: their images lie on the device together."""


def measure(
    subject: Subject, *, ranks: Sequence[int] = RANKS, size: int = 100, samples: int = SAMPLES, restarts: int = 3
) -> Findings:
    """The area at every tap behind a ReLU, and the score ``nmf`` of the first of these.

    The score is 1 − a sample's own share of the area: how long it is wrong as ranks grow. Samples of labels with fewer
    than ten, and those beyond ``samples``, have none. Intervals are over samples, with the batches as they were made.

    Args:
        subject: the run and its samples.
        ranks: k, ascending.
        size: samples of one label that are factorised together, at most.
        samples: of a group that are looked at, as many of each label, but ten of each at least.
        restarts: of the factorisation.

    Raises:
        UserError: no tap lies behind a ReLU, or no label has enough samples.
    """
    rows: list[Finding] = []
    scores: list[SampleScore] = []
    refused: UserError | None = None
    groups = [_Part.of(subject, group, samples) for group in (subject.members, subject.non_members)]
    for depth, tap in enumerate(subject.members.features):
        try:
            mine, theirs = (part.areas(tap, ranks, size, restarts) for part in groups)
        except NegativeActivations as error:
            refused = error
            continue
        if not rows:
            scores = [part.score(1 - found["nmf"]) for part, found in zip(groups, (mine, theirs), strict=True)]
        rows.append(
            Finding(
                measure="nmf",
                quantity="area",
                value=_mean(mine["nmf"]),
                non_members=_mean(theirs["nmf"]),
                chance=groups[0].chance(mine["nmf"]),
                controls={
                    "whole": groups[0].accuracy(mine["nmf"]),
                    **{kind: _mean(mine[kind]).mean for kind in ("pca", "ablation")},
                },
                count=int(np.isfinite(mine["nmf"]).sum()),
                tap=tap,
                depth=depth,
                settings=f"k = {', '.join(map(str, ranks))}; batches of {size} of a given label at most; "
                f"best of {restarts} restarts",
            )
        )
    if refused is not None and not rows:
        raise refused
    return Findings(scores=tuple(scores), rows=tuple(rows))


@dataclass(frozen=True)
class _Part:
    """The samples of a group that are looked at: their places in it, and their images."""

    subject: Subject
    group: FeatureSet
    places: np.ndarray
    images: Tensor

    @classmethod
    def of(cls, subject: Subject, group: FeatureSet, samples: int) -> "_Part":
        every = [np.flatnonzero(group.given == c) for c in np.unique(group.given)]
        per_label = max(FEWEST, samples // len(every))
        spread = (rows[np.linspace(0, len(rows) - 1, min(per_label, len(rows))).astype(int)] for rows in every)
        places = np.concatenate(list(spread))
        return cls(subject, group, places, images_of(subject.run, group.ids[places], group.group))

    def accuracy(self, areas: np.ndarray) -> float:
        """With nothing replaced, of the samples that have an area."""
        right = self.group.logits.argmax(1).numpy() == self.group.given
        return float(right[np.isfinite(areas)].mean())

    def chance(self, areas: np.ndarray) -> float:
        """Accuracy of the most frequent given label, of the same."""
        counts = np.bincount(self.group.given[np.isfinite(areas)])
        return float(counts.max() / counts.sum())

    def areas(self, tap: str, ranks: Sequence[int], size: int, restarts: int) -> dict[str, np.ndarray]:
        """By kind the area of each sample of the whole group, float64 ``[N]``."""
        model, seed = self.subject.run.model, self.subject.seed
        labels = torch.from_numpy(self.group.given[self.places]).to(self.images.device)
        found = accuracy_by_rank(model, self.images, labels, tap, ranks=ranks, size=size, restarts=restarts, seed=seed)
        areas = {kind: np.full(len(self.group), np.nan) for kind in found}
        for kind, by_rank in found.items():
            areas[kind][self.places] = area(by_rank, ranks)
        return areas

    def score(self, values: np.ndarray) -> SampleScore:
        return SampleScore(name="nmf", group=self.group.group, ids=self.group.ids, values=values)


def _mean(areas: np.ndarray) -> Estimate:
    return mean_estimate([areas[None, np.isfinite(areas)]])
