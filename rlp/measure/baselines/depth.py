"""Prediction depth: how deep a sample must go until k-NN probes say what the network says (Baldock et al. 2021).

"Deep Learning Through the Lens of Example Difficulty", arXiv 2106.09647. At each depth a probe votes with the k = 30
nearest members; a sample's prediction depth is the first from which all probes to the end agree with the network's own
class: 0 for the images themselves, 1 for the first tap, …, L for the last, and L + 1 where even that probe disagrees.

The probes are those of :mod:`rlp.measure.baselines.knn`, so that one search serves both words of the field: L1 distance
of 64 principal components (*ours*; the paper compares whole representations), given labels, and a member is no
neighbour of itself. Control: the same from the features of the network with fresh weights, held against the trained
network's class. Cost: as there.
"""

import numpy as np

from rlp.measure.baselines.interface import Finding, Findings, SampleScore, Subject
from rlp.measure.baselines.knn import probes
from rlp.measure.baselines.neighbours import vote
from rlp.measure.estimate import mean_estimate


def prediction_depth(votes: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """First depth from which all votes to the end equal the network's answer.

    Args:
        votes: of the probes, shallowest first, int64 ``[L, N]``.
        answers: the network's classes, int64 ``[N]``.

    Returns:
        int64 ``[N]``, 0 to L; L where the last vote differs.
    """
    agrees = votes == answers
    return len(votes) - np.logical_and.accumulate(agrees[::-1], axis=0).sum(axis=0)


def measure(subject: Subject, *, k: int = 30, width: int = 64) -> Findings:
    """The score ``prediction_depth``, and its mean.

    Args:
        subject: the run and its samples.
        k: neighbours.
        width: principal components.
    """
    classes = subject.members.logits.shape[1]
    found = list(probes(subject, k, width))
    depths = {
        group: prediction_depth(
            np.stack([vote(labels, classes).numpy() for labels in of_probes]), answers.logits.argmax(1).numpy()
        )
        for group, of_probes, answers in (
            ("members", [probe.members for probe in found], subject.members),
            ("non-members", [probe.non_members for probe in found], subject.non_members),
            ("untrained", [p.members if p.untrained is None else p.untrained for p in found], subject.members),
        )
    }
    scores = tuple(
        SampleScore(name="prediction_depth", group=group.group, ids=group.ids, values=depths[group.group].astype(float))
        for group in (subject.members, subject.non_members)
    )
    row = Finding(
        measure="depth",
        quantity="prediction depth",
        value=mean_estimate([depths["members"][None]]),
        non_members=mean_estimate([depths["non-members"][None]]),
        chance=None,
        controls={"untrained": float(depths["untrained"].mean())},
        count=len(subject.members),
        settings=f"k = {found[0].members.shape[1]}, depths 0 (images) to {len(found)} (no probe agrees)",
    )
    return Findings(scores=scores, rows=(row,))
