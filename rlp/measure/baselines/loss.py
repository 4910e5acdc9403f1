"""The network's own loss on the given label: the plain score that any measure of single samples has to beat.

Larger is harder. On members of a network that fits everything it is near zero for all, on non-members it is the usual
sign of a wrong label. Cost: none, the logits are there.
"""

from rlp.measure.baselines.interface import Finding, Findings, SampleScore, Subject
from rlp.measure.estimate import mean_estimate
from rlp.measure.rows import class_loss


def measure(subject: Subject) -> Findings:
    """Score ``loss`` (nats) of members and non-members, and its mean."""
    groups = (subject.members, subject.non_members, subject.untrained)
    losses = [class_loss(samples) for samples in groups]
    means = [mean_estimate([values[None]]) for values in losses]
    row = Finding(
        measure="loss",
        quantity="class loss",
        value=means[0],
        non_members=means[1],
        chance=None,
        controls={"untrained": means[2].mean},
        count=len(losses[0]),
        settings="nats, eval mode, clean images",
    )
    scores = [
        SampleScore(name="loss", group=samples.group, ids=samples.ids, values=values)
        for samples, values in zip(groups[:2], losses, strict=False)
    ]
    return Findings(scores=tuple(scores), rows=(row,))
