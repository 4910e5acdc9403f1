"""Whether a score finds samples of planted truth: wrong labels and canaries."""

import numpy as np

from rlp.measure.baselines.interface import Finding, Subject
from rlp.measure.estimate import Estimate, auroc_estimate
from rlp.measure.features import FeatureSet
from rlp.measure.rows import class_loss, planted_masks


def planted_findings(
    subject: Subject, measure: str, name: str, members: np.ndarray, others: np.ndarray | None = None, settings: str = ""
) -> list[Finding]:
    """AUROC of a score on every planted kind that members have, beside what the network's own loss reaches.

    Args:
        subject: whose samples.
        measure, name: of the measure and of its score.
        members, others: the score, float ``[N]``, larger for planted samples; NaN for samples without one.
        settings: of the score.
    """
    rows, scored = [], np.isfinite(members)
    for kind, (planted, _) in planted_masks(subject.members).items():
        count = int((planted & scored).sum())
        value = planted_auroc(members, subject.members, kind)
        if value is None:
            continue
        loss = planted_auroc(np.where(scored, class_loss(subject.members), np.nan), subject.members, kind)
        rows.append(
            Finding(
                measure=measure,
                quantity=f"{name}: AUROC({kind})",
                value=value,
                non_members=None if others is None else planted_auroc(others, subject.non_members, kind),
                chance=0.5,
                controls={"class loss": loss.mean if loss else None},
                count=value.samples,
                settings=f"{settings}; {count} planted".lstrip("; "),
            )
        )
    return rows


def planted_auroc(score: np.ndarray, samples: FeatureSet, kind: str = "wrong label") -> Estimate | None:
    """AUROC of a score on one planted kind, against plain samples; None where there are none of either."""
    masks = planted_masks(samples).get(kind)
    if masks is None:
        return None
    planted, scored = masks
    scored = scored & np.isfinite(score)
    if not 0 < planted[scored].sum() < scored.sum():
        return None
    return auroc_estimate(score[scored], planted[scored])
