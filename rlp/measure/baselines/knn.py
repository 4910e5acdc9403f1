"""DNN or k-NN: does the network answer as its nearest training samples would? (Cohen, Sapiro, Giryes 2018)

"DNN or k-NN: That is the Generalize vs. Memorize Question", arXiv 1805.06822. With ŷ_DNN the network's class and ŷ_kNN
that of the vote of the k = 30 nearest members at some depth,

    P_SAME = P(ŷ_DNN = ŷ_kNN),  MA = P(ŷ_kNN right | ŷ_DNN right),  MD = P(ŷ_kNN = ŷ_DNN | ŷ_DNN wrong),
    P_SAME = MA·acc + MD·(1 − acc).

P_SAME alone follows the accuracy, so MA and MD stand beside it. Features are reduced to 64 principal components of the
members; the distance is L1; labels are the given ones, and *right* means the given label. A member is no neighbour of
itself. Controls: chance is the agreement of independent answers with the same frequencies; ``untrained`` is the vote in
the features of the same network with fresh weights, held against the trained network's answers.

Cost: N² · 64 subtractions a tap and group. 50,000 members on one core: about four minutes; on a GPU seconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlp.measure.baselines.images import inputs_of
from rlp.measure.baselines.interface import Finding, Findings, SampleScore, Subject
from rlp.measure.baselines.neighbours import Reduction, nearest, vote
from rlp.measure.estimate import Estimate, share_estimate
from rlp.measure.features import FeatureSet

INPUT = "input"
"""Name of the place before the first layer; its depth is −1."""


@dataclass(frozen=True)
class Probe:
    """k-NN at one depth: the given labels of each sample's nearest members, nearest first, int64 ``[N, k]`` (CPU).

    Attributes:
        tap, depth: where; :data:`INPUT` and −1 for the images themselves.
        members: of the members, without the sample itself.
        non_members: of the non-members.
        untrained: of the members in the network with fresh weights; None for images, which no weights change.
    """

    tap: str
    depth: int
    members: Tensor
    non_members: Tensor
    untrained: Tensor | None


def probes(subject: Subject, k: int = 30, width: int = 64) -> Iterator[Probe]:
    """k-NN probes of the images and of every tap, shallowest first.

    Args:
        subject: the run and its samples.
        k: neighbours; one fewer than the members where there are not more.
        width: principal components.
    """
    members, others, fresh = subject.members, subject.non_members, subject.untrained
    device = subject.run.device
    given = torch.from_numpy(members.given)
    k = min(k, len(members) - 1)

    def labels(anchors: Tensor, queries: Tensor | None = None) -> Tensor:
        reduction = Reduction(anchors.to(device), width)
        placed = reduction(anchors.to(device))
        asked = placed if queries is None else reduction(queries.to(device))
        return given[nearest(asked, placed, k, leave_out=queries is None).cpu()]

    mine, theirs = inputs_of(subject.run, members), inputs_of(subject.run, others)
    yield Probe(INPUT, -1, labels(mine), labels(mine, theirs), None)
    for depth, (tap, mine) in enumerate(members.features.items()):
        yield Probe(tap, depth, labels(mine), labels(mine, others.features[tap]), labels(fresh.features[tap]))


def measure(subject: Subject, *, k: int = 30, width: int = 64) -> Findings:
    """k-NN accuracy, P_SAME, MA and MD of the images and of each tap, and the score ``knn_disagreement``.

    The score is the share of a sample's k neighbours whose given label is not its own. Of all depths it is taken where
    the members' votes name the given labels of most *non-members*: where the network has memorised, its last layers
    put even a wrongly labelled member among the class it was given, and nothing disagrees any more.

    MD is over the samples that the network gets wrong; where these are none of the members, the row stands for the
    non-members alone, and where these too are all right there is none. Intervals are over samples, those of MA and MD
    over the right and the wrong ones as they are.

    Args:
        subject: the run and its samples.
        k: neighbours.
        width: principal components.
    """
    classes = subject.members.logits.shape[1]
    rows: list[Finding] = []
    best, chosen = -1.0, None
    for probe in probes(subject, k, width):
        rows += _rows(subject, probe, classes, width)
        accuracy = float((vote(probe.non_members, classes).numpy() == subject.non_members.given).mean())
        if accuracy > best:
            best, chosen = accuracy, probe
    assert chosen is not None
    scores = [
        _disagreement(group, labels)
        for group, labels in ((subject.members, chosen.members), (subject.non_members, chosen.non_members))
    ]
    return Findings(scores=tuple(scores), rows=tuple(rows))


def _disagreement(group: FeatureSet, labels: Tensor) -> SampleScore:
    differs = labels.numpy() != group.given[:, None]
    return SampleScore(name="knn_disagreement", group=group.group, ids=group.ids, values=differs.mean(axis=1))


@dataclass(frozen=True)
class _Pair:
    """Votes, what they are held against, and among which samples, ``[N]`` each."""

    votes: np.ndarray
    expected: np.ndarray
    among: np.ndarray

    @property
    def share(self) -> float:
        """How often the two agree."""
        return float((self.votes == self.expected)[self.among].mean())

    @property
    def estimate(self) -> Estimate:
        """The same with its interval."""
        return share_estimate((self.votes == self.expected)[self.among])

    @property
    def chance(self) -> float:
        """How often they would agree if neither knew of the other, Σ_c P(vote = c) P(expected = c)."""
        size = 1 + int(max(self.votes.max(), self.expected.max()))
        both = (np.bincount(each[self.among], minlength=size) for each in (self.votes, self.expected))
        return float(np.prod([counts / self.among.sum() for counts in both], axis=0).sum())


def _rows(subject: Subject, probe: Probe, classes: int, width: int) -> list[Finding]:
    members = _pairs(subject.members, probe.members, classes)
    others = _pairs(subject.non_members, probe.non_members, classes)
    fresh = _pairs(subject.members, probe.untrained, classes) if probe.untrained is not None else {}
    rows = []
    for quantity in members:
        sides = [pairs[quantity] for pairs in (members, others) if pairs[quantity].among.any()]
        if not sides:
            continue
        alone = sides[0] is not members[quantity]
        rows.append(
            Finding(
                measure="knn",
                quantity=f"{quantity} of non-members" if alone else quantity,
                value=sides[0].estimate,
                non_members=sides[1].estimate if len(sides) > 1 else None,
                chance=sides[0].chance,
                controls={"untrained": fresh[quantity].share} if fresh and not alone else {},
                count=int(sides[0].among.sum()),
                tap=probe.tap,
                depth=probe.depth,
                settings=f"k = {probe.members.shape[1]}, L1, {width} principal components of the members",
            )
        )
    return rows


def _pairs(group: FeatureSet, labels: Tensor, classes: int) -> dict[str, _Pair]:
    """By quantity what it compares."""
    votes, answers = vote(labels, classes).numpy(), group.logits.argmax(1).numpy()
    right = answers == group.given
    every = np.ones_like(right)
    return {
        "k-NN accuracy": _Pair(votes, group.given, every),
        "P_SAME": _Pair(votes, answers, every),
        "MA": _Pair(votes, answers, right),
        "MD": _Pair(votes, answers, ~right),
    }
