"""What training shows of single samples, from copies of the run trained on all members, read at the end of every epoch.

- ``el2n``: length of p - y at an early epoch, mean over copies (Paul, Ganguli, Dziugaite, "Deep learning on a data
  diet", NeurIPS 2021, arXiv 2107.07075; epoch 20 of 200, 10 copies).
- ``grand``: length of the loss's gradient in all parameters at that epoch, exact, mean over copies (the same paper).
- ``forgetting``: how often a sample that was right is wrong one epoch later; never right counts as the largest number,
  that of the epochs (Toneva et al., "An empirical study of example forgetting", ICLR 2019, arXiv 1812.05159).
- ``aum``: minus the mean over epochs of the logit of the given class less the largest other one (Pleiss et al.,
  "Identifying mislabeled data using the area under the margin ranking", NeurIPS 2020, arXiv 2001.10528).

The last two papers read a sample when it comes up in training; here it is read in eval mode on the clean image after
every epoch, which costs a forward pass and is the same for samples that are not trained on: non-members stand beside
members, and what they show as well is how hard a sample is, not memory of it.

Cost: ``copies`` times the run's training, a pass over both groups an epoch, and one gradient a sample and copy.
"""

import numpy as np

from rlp.errors import UserError
from rlp.measure.baselines.ensemble import lacking
from rlp.measure.baselines.interface import Finding, Findings, SampleScore, Subject
from rlp.measure.baselines.planted import planted_findings
from rlp.measure.baselines.pool import Pool
from rlp.measure.baselines.retrain import AT_ONCE, retrain
from rlp.measure.estimate import mean_estimate
from rlp.seeding import named_seed

COPIES = 10
NAME = "dynamics"


def measure(
    subject: Subject, *, copies: int = COPIES, early: int = 0, epochs: int = 0, at_once: int = AT_ONCE
) -> Findings:
    """Scores ``el2n``, ``grand``, ``forgetting`` and ``aum``; of each the mean and the AUROC of planted truth.

    Args:
        subject: the run; copies train on all of its members, whichever the subject has.
        copies: networks, at least 1.
        early: epoch of ``el2n`` and ``grand``; by default a tenth of the epochs, at most 20.
        epochs: of each copy; 0 for the run's.
        at_once: copies trained together.

    Raises:
        UserError: no copies, or an early epoch that does not exist.
    """
    groups = list(subject.run.groups.values())
    epochs = epochs or subject.run.config.train.epochs
    early = early or early_epoch(epochs)
    if copies < 1:
        raise UserError(f"training dynamics of {copies} copies; expected at least 1")
    pool = Pool.of(subject.run, groups)
    subsets = np.tile(np.arange(len(pool)) < pool.sizes[0], (copies, 1))
    asked = {"margin": range(1, epochs + 1), "error": [early], "gradient": [early]}
    seed = named_seed(subject.seed, NAME)
    found = retrain(subject.run, pool, subsets, asked, seed=seed, epochs=epochs, at_once=at_once)
    columns = {
        "el2n": found["error"][:, 0].mean(axis=0),
        "grand": found["gradient"][:, 0].mean(axis=0),
        "forgetting": forgetting(found["margin"] > 0).mean(axis=0),
        "aum": -found["margin"].mean(axis=(0, 1)),
    }
    rows = pool.places(subject.members.ids, subject.non_members.ids)
    findings = Findings()
    for name, values in columns.items():
        at = f"after epoch {early} of {epochs}" if name in ("el2n", "grand") else f"{epochs} epochs"
        both = [values[chosen].astype(np.float64) for chosen in rows]
        findings = _with(findings, subject, name, both, f"{copies} copies, {at}{lacking(subject.run)}")
    return findings


def early_epoch(epochs: int) -> int:
    """A tenth of the epochs, 1 to 20: Paul et al. read epoch 20 of 200."""
    return min(20, max(1, round(epochs / 10)))


def forgetting(correct: np.ndarray) -> np.ndarray:
    """Forgetting events: how often right is followed by wrong; the number of epochs where a copy never was right.

    Args:
        correct: after each epoch, bool ``[M, E, N]``.

    Returns:
        int64 ``[M, N]``.
    """
    events = (correct[:, :-1] & ~correct[:, 1:]).sum(axis=1)
    return np.where(correct.any(axis=1), events, correct.shape[1])


def _with(findings: Findings, subject: Subject, name: str, both: list[np.ndarray], settings: str) -> Findings:
    """The findings and those of one more score, of members and non-members."""
    groups = (subject.members, subject.non_members)
    scores = [
        SampleScore(name=name, group=samples.group, ids=samples.ids, values=values)
        for samples, values in zip(groups, both, strict=True)
    ]
    members, others = (mean_estimate([values[None]]) for values in both)
    mean = Finding(
        measure=NAME,
        quantity=f"{name}: mean",
        value=members,
        non_members=others,
        chance=None,
        count=members.samples,
        settings=settings,
    )
    planted = planted_findings(subject, NAME, name, *both, settings=settings)
    return Findings(scores=(*findings.scores, *scores), rows=(*findings.rows, mean, *planted))
