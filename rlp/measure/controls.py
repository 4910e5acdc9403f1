"""What a head's κ is compared with: other samples, an untrained network, noise, the class alone, held-out samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlp.labels import class_floor, random_labels
from rlp.measure.features import FeatureSet
from rlp.measure.spectrum import noise_like
from rlp.seeding import named_seed

CONTROLS = ("untrained", "noise", "leak")

Sets = Mapping[tuple[str, int | None], FeatureSet]
"""Feature sets by group (``members``, ``non-members``, ``untrained``) and view (None for clean images)."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Samples seen in one or more views.

    Attributes:
        x: features, float32 ``[V, N, D]``.
        ids, classes: sample ids and given labels, int64 ``[N]``.
        predicted: classes that the network predicts, of each view, int64 ``[V, N]``.
        words: random words, int64 ``[N, K]``.
    """

    x: Tensor
    ids: np.ndarray
    classes: np.ndarray
    predicted: Tensor
    words: np.ndarray

    @property
    def rows(self) -> Tensor:
        """All views one below the other, ``[V·N, D]``."""
        return self.x.flatten(0, 1)

    def targets(self, n: int) -> Tensor:
        """Random labels of :attr:`rows`, int64 ``[V·N, K]``."""
        return torch.from_numpy(random_labels(self.words, n)).repeat(len(self.x), 1)

    def row_classes(self) -> Tensor:
        """Given labels of :attr:`rows`, int64 ``[V·N]``."""
        return torch.from_numpy(self.classes).repeat(len(self.x))

    def row_predictions(self) -> Tensor:
        """Predicted classes of :attr:`rows`, int64 ``[V·N]``."""
        return self.predicted.flatten()

    def take(self, rows: np.ndarray) -> "Part":
        """The samples at these places."""
        places = torch.from_numpy(rows)
        return Part(
            x=self.x[:, places],
            ids=self.ids[rows],
            classes=self.classes[rows],
            predicted=self.predicted[:, places],
            words=self.words[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Material:
    """What heads are fitted to and what they are scored on; the same object where that is the same."""

    group: str
    fit: Part
    score: Part


def materials(
    sets: Sets, tap: str, fit_views: Sequence[int | None], score_views: Sequence[int | None], seed: int
) -> list[Material]:
    """Members, non-members and every control, at one tap.

    Args:
        sets: features of the groups ``members``, ``non-members`` and ``untrained`` in all these views.
        tap: which features.
        fit_views: views that heads are fitted to.
        score_views: views that they are scored on; the same list for fitted views.
        seed: of the noise and of the halves of the leak check.
    """
    found = {}
    for group in ("members", "non-members", "untrained"):
        fit = _part(sets, group, tap, fit_views)
        score = fit if list(score_views) == list(fit_views) else _part(sets, group, tap, score_views)
        found[group] = Material(group=group, fit=fit, score=score)
    members = found["members"]
    return [*found.values(), noise(members, named_seed(seed, f"noise {tap}")), leak(members, seed)]


def _part(sets: Sets, group: str, tap: str, views: Sequence[int | None]) -> Part:
    first = sets[group, views[0]]
    x = torch.stack([sets[group, view].features[tap] for view in views])
    predicted = torch.stack([sets[group, view].logits.argmax(dim=1) for view in views])
    return Part(x=x, ids=first.ids, classes=first.given, predicted=predicted, words=first.words)


def noise(members: Material, seed: int) -> Material:
    """Gaussian features of equal mean and covariance; each view of a sample is noise of its own."""
    fit, score = members.fit, members.score
    parts = [fit.x] if score is fit else [fit.x, score.x]
    drawn = noise_like(torch.cat([part.flatten(0, 1) for part in parts]), seed)
    pieces = drawn.split([part.shape[0] * part.shape[1] for part in parts])
    made = [replace(p, x=x.view(p.x.shape)) for p, x in zip((fit, score), pieces, strict=False)]
    return Material(group="noise", fit=made[0], score=made[-1])


def leak(members: Material, seed: int) -> Material:
    """Heads fitted to one half of the samples and scored on the other half, whose random labels they cannot know."""
    count = len(members.fit.ids)
    order = np.random.default_rng(named_seed(seed, "leak")).permutation(count)
    first, second = np.sort(order[: count // 2]), np.sort(order[count // 2 :])
    return Material(group="leak", fit=members.fit.take(first), score=members.score.take(second))


def class_only(given: np.ndarray, words: np.ndarray, n: int) -> float:
    """κ of the best guess from the given class alone, mean over draws; see :func:`rlp.labels.class_floor`."""
    floor = class_floor(given, random_labels(words, n), int(given.max()) + 1, n).mean()
    return float((n * floor - 1) / (n - 1))
