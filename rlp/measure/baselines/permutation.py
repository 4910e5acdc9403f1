"""Shared structure: what a shallow classifier learns of shuffled labels from a network's features (Chaibub Neto 2018).

"Detecting Learning vs Memorization in Deep Neural Networks using Shared Structure Validation Sets", arXiv 1802.07714. A
shallow classifier, here 1-nearest-neighbour, reads features of the training images, and is validated on another view of
each image, which has the same, shuffled, label. With labels that say nothing only knowing the sample again can help, so

- memorisation: accuracies a_b of B = 999 shuffles above chance;
- learning: p = (1 + #{a_b ≥ a*}) / (B + 1), a* with the given labels.

A network with fresh weights keeps samples apart best of all, so the accuracy of shuffles alone is no sign of having
been trained on: read member − non-member. *Ours*: the view, which the source leaves open, is Gaussian noise on the
image (0.25 of the pixels' deviation), or the run's own augmentation; recorded with the number. Neighbours do not depend
on labels, so shuffles cost nothing: N² · D products a tap and group, minutes at 50,000 × 640 on a CPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from rlp.errors import UserError
from rlp.measure.baselines.images import noisy_features
from rlp.measure.baselines.interface import Finding, Findings, SampleScore, Subject
from rlp.measure.baselines.neighbours import nearest
from rlp.measure.estimate import Estimate, share_estimate
from rlp.measure.features import FeatureSet, augmentation, extract
from rlp.seeding import named_seed


@dataclass(frozen=True)
class Shuffles:
    """What 1-NN makes of given and of shuffled labels.

    Attributes:
        true: accuracy with the given labels.
        null: accuracies of the shuffles, float64 ``[B]``.
        by_sample: share of shuffles in which a sample's view gets its label, float64 ``[N]``.
        chance: Σ_c share(c)², what a neighbour at random gives.
    """

    true: float
    null: np.ndarray
    by_sample: np.ndarray
    chance: float

    @property
    def p(self) -> float:
        """(1 + #{a_b ≥ a*}) / (B + 1)."""
        return float((1 + (self.null >= self.true).sum()) / (len(self.null) + 1))

    @property
    def memorised(self) -> Estimate:
        """Mean accuracy of the shuffles, with an interval over samples."""
        return share_estimate(self.by_sample)


def shuffled(neighbour: np.ndarray, labels: np.ndarray, shuffles: int, seed: int) -> Shuffles:
    """Accuracies of a 1-NN classifier on views, with the given labels and with shuffles of them.

    Args:
        neighbour: row of the training sample nearest to each view, int64 ``[N]``.
        labels: given labels of the training samples, and so of their views, int64 ``[N]``.
        shuffles: B, at least 1.
        seed: of the shuffles.
    """
    random = np.random.default_rng(named_seed(seed, "baselines.permutation"))
    right, null = np.zeros(len(labels)), np.empty(shuffles)
    for b in range(shuffles):
        drawn = random.permutation(labels)
        same = drawn[neighbour] == drawn
        right += same
        null[b] = same.mean()
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    true = float((labels[neighbour] == labels).mean())
    return Shuffles(true, null, right / shuffles, float((shares**2).sum()))


def measure(subject: Subject, *, shuffles: int = 999, noise: float | None = 0.25) -> Findings:
    """Null accuracy, true accuracy and p of every tap, and the score ``permutation`` of the last.

    The score is the share of shuffles in which 1-NN gives a sample's view its shuffled label: high where the view is
    nearest to its own sample. The last tap is read, where a network has had the most to say.

    Args:
        subject: the run and its samples.
        shuffles: B, 99 or more for a p of 0.01.
        noise: deviation of the noise that makes the view, in those of the pixels; None for an augmented view.

    Raises:
        UserError: no shuffles.
    """
    if shuffles < 1:
        raise UserError(f"{shuffles} shuffles of the labels; expected at least 1")
    view = f"Gaussian noise of {noise} deviations" if noise is not None else augmentation(subject.run)[1]
    groups = {"members": subject.members, "non-members": subject.non_members, "untrained": subject.untrained}
    views = {name: _view(subject, group, noise, name == "untrained") for name, group in groups.items()}
    scores: tuple[SampleScore, ...] = ()
    rows: list[Finding] = []
    for depth, tap in enumerate(subject.members.features):
        found = {
            name: shuffled(
                _neighbour(subject, views[name][tap], group.features[tap]), group.given, shuffles, subject.seed
            )
            for name, group in groups.items()
        }
        scores = tuple(
            SampleScore(name="permutation", group=name, ids=groups[name].ids, values=found[name].by_sample)
            for name in ("members", "non-members")
        )
        rows += _rows(found, tap, depth, len(subject.members), f"1-NN, B = {shuffles}, view: {view}")
    return Findings(scores=scores, rows=tuple(rows))


def _rows(found: Mapping[str, Shuffles], tap: str, depth: int, count: int, settings: str) -> list[Finding]:
    mine, theirs, fresh = (found[name] for name in ("members", "non-members", "untrained"))
    place = {"measure": "permutation", "tap": tap, "depth": depth, "count": count, "settings": settings}
    null = Finding(
        quantity="null accuracy",
        value=mine.memorised,
        non_members=theirs.memorised,
        chance=mine.chance,
        controls={
            "untrained": fresh.memorised.mean,
            "member − non-member": mine.memorised.mean - theirs.memorised.mean,
            "true labels": mine.true,
        },
        **place,
    )
    p = Finding(
        quantity="p of learning",
        value=_number(mine.p, count),
        non_members=_number(theirs.p, count),
        chance=None,
        controls={"untrained": fresh.p},
        **place,
    )
    return [null, p]


def _number(value: float, samples: int) -> Estimate:
    """A number that is no mean over samples, and has no interval."""
    return Estimate(
        mean=value, low=None, high=None, sd_seed=None, sd_draw=None, sd_sample=None, seeds=1, draws=1, samples=samples
    )


def _view(subject: Subject, group: FeatureSet, noise: float | None, untrained: bool) -> Mapping[str, Tensor]:
    """Features of another view of the same samples, by tap."""
    run, seed = subject.run, subject.seed
    if noise is not None:
        return noisy_features(run, group, noise, seed, untrained=seed if untrained else None)
    taps, count = list(group.features), len(group)
    seen = extract(run, group.group, taps=taps, view=0, limit=count, seed=seed, untrained=untrained)
    return seen.features


def _neighbour(subject: Subject, views: Tensor, samples: Tensor) -> np.ndarray:
    device = subject.run.device
    return nearest(views.to(device), samples.to(device), 1, p=2.0)[:, 0].cpu().numpy()
