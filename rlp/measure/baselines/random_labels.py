"""Random-label heads as a score of samples: how well fresh heads know a sample's random labels (arXiv 2607.11541).

``log p`` of the random label at convergence, and the share of right answers over a small budget, both in the mean over
draws; the published measure has one draw, which tells next to nothing of a single sample. Larger is better known.
Heads are given features of one length (``normalised``): on raw ones the norm of a sample's features, which grows with
the network's confidence, decides how soon it is fitted, and drowns what else they know. *Chosen*: it brings back the
figure that is known, which raw features do not (docs/measures.md). Cost: a fit of `draws` heads at each tap, twice.
"""

import numpy as np
import torch

from rlp.labels import random_labels
from rlp.measure.baselines.interface import Finding, Findings, SampleScore, Subject
from rlp.measure.controls import class_only
from rlp.measure.estimate import Estimate, kappa_estimate
from rlp.measure.features import FeatureSet, probe_words
from rlp.measure.fit import HeadSpec, fit_budget, fit_converged
from rlp.measure.preprocess import Preprocess
from rlp.measure.protocols import BUDGET_STEPS, log_weights

READINGS = ("converged", "budget")


def measure(subject: Subject, *, n: int = 10, draws: int = 30, features: str = "normalised") -> Findings:
    """Scores ``rlp_TAP`` and ``rlp_budget_TAP`` of members and non-members, and κ of each tap.

    Args:
        subject: the run and its samples.
        n: random labels.
        draws: labellings, with a head of its own each, at every tap.
        features: what heads are given, one of ``raw``, ``standardised``, ``normalised``, ``projected``, with the
            statistics of the group that they are fitted to (:class:`rlp.measure.preprocess.Preprocess`).

    Raises:
        UserError: unknown features.
    """
    scores, rows = [], []
    for depth, tap in enumerate(subject.members.features):
        groups = {"members": subject.members, "non-members": subject.non_members, "untrained": subject.untrained}
        found = {name: _read(samples, tap, n, draws, features, subject) for name, samples in groups.items()}
        for reading, prefix in zip(READINGS, ("rlp", "rlp_budget"), strict=True):
            for group in ("members", "non-members"):
                ids, values = groups[group].ids, found[group][reading][1]
                scores.append(SampleScore(name=f"{prefix}_{tap}", group=group, ids=ids, values=values))
            rows.append(
                Finding(
                    measure="random_labels",
                    quantity=f"κ {reading}",
                    value=found["members"][reading][0],
                    non_members=found["non-members"][reading][0],
                    chance=0.0,
                    controls={
                        "untrained": found["untrained"][reading][0].mean,
                        "class-only": class_only(subject.members.given, _words(subject.members, draws, subject), n),
                    },
                    count=len(subject.members),
                    tap=tap,
                    depth=depth,
                    settings=f"n = {n}, {draws} draws, linear heads on {features} features",
                )
            )
    return Findings(scores=tuple(scores), rows=tuple(rows))


def _words(samples: FeatureSet, draws: int, subject: Subject) -> np.ndarray:
    return probe_words(subject.seed, samples.split, samples.ids, draws)


def _read(
    samples: FeatureSet, tap: str, n: int, draws: int, features: str, subject: Subject
) -> dict[str, tuple[Estimate, np.ndarray]]:
    """κ and the score of each sample, by reading."""
    device = subject.run.device
    x = samples.features[tap].to(device)
    x = Preprocess.fit(x, features, seed=subject.seed)(x)
    target = torch.from_numpy(random_labels(_words(samples, draws, subject), n)).to(device)
    correct, log_p, _ = fit_converged(x, target, n, seed=subject.seed).read(x, target)
    curve = fit_budget(x, target, n, HeadSpec(), steps=BUDGET_STEPS, seed=subject.seed)
    share = np.tensordot(log_weights(BUDGET_STEPS), curve.correct, axes=1)
    return {
        "converged": (kappa_estimate([correct.numpy().T], n), log_p.double().mean(dim=1).numpy()),
        "budget": (kappa_estimate([share], n), share.mean(axis=0)),
    }
