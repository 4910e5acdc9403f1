"""The protocols: what is fitted to one group's features, and what it is scored on, sample by sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rlp.measure.controls import Material, Part
from rlp.measure.fit import TOLERANCE, HeadSpec, fit_budget, fit_converged
from rlp.measure.preprocess import Preprocess
from rlp.measure.reading import Condition, Reading
from rlp.measure.retrieval import own_view_is_nearest
from rlp.measure.spectrum import Spectrum, spectrum

Protocol = Literal["converged", "views", "budget", "retrieval", "online"]

FIT_VIEWS, SCORE_VIEWS = (0, 1, 2, 3, 4, 5), (6, 7)
"""Protocol ``views``: the augmented views that heads are fitted to, and the unseen ones that they are scored on."""
BUDGET_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
RETRIEVAL_SAMPLES = 2000

Views = Sequence[int | None]
Transform = Callable[[Part], Tensor]
"""A part's features as heads are given them, on the device, ``[V·N, dim]``."""


def views_of(protocol: Protocol, images: str) -> tuple[Views, Views]:
    """Views that heads are fitted to and scored on; None is the clean image."""
    if protocol == "views":
        return FIT_VIEWS, SCORE_VIEWS
    if protocol == "retrieval":
        return (None,), (0,)
    same: Views = (None,) if images == "clean" else (0,)
    return same, same


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that one row of the table is about, but the tap.

    ``n`` is 0 for retrieval, where there are as many labels as samples.
    """

    protocol: Protocol
    mode: str
    images: str
    features: str
    width: int = 128
    n: int = 0
    head: HeadSpec = field(default_factory=HeadSpec)
    seed: int = 0
    num_classes: int = 0
    tolerance: float = TOLERANCE
    max_steps: int = 2000
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def head_name(self) -> str:
        """The kind of head; retrieval has none."""
        return "none" if self.protocol == "retrieval" else self.head.kind


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was read from one group.

    Attributes:
        group: ``members``, ``non-members`` or a control.
        part: the samples that were scored.
        n: random labels; in retrieval the number of samples.
        correct: share of right answers of each draw and view, ``[K, V, N]``; of the budget: mean over the steps.
        log_p, margin: float32 ``[K, V, N]``, NaN where the protocol has none.
        dim: features that heads saw.
        steps: the optimiser's.
        converged: share of heads that passed the test of convergence.
        spectrum: of the features that heads were fitted to.
        curve: κ after so many steps (budget).
    """

    group: str
    part: Part
    n: int
    correct: np.ndarray
    log_p: np.ndarray
    margin: np.ndarray
    dim: int
    steps: int
    converged: float
    spectrum: Spectrum
    curve: tuple[tuple[int, float], ...] = ()

    @property
    def by_sample(self) -> np.ndarray:
        """Mean of :attr:`correct` over the views of a sample, ``[K, N]``: its views stand or fall together."""
        return self.correct[:, 0] if self.correct.shape[1] == 1 else self.correct.mean(axis=1)

    def reading(self, setting: Setting, tap: str, depth: int) -> Reading:
        """The result as it is stored; a sample occurs once for each view that it was scored in."""
        condition = Condition(
            protocol=setting.protocol,
            tap=tap,
            depth=depth,
            dim=self.dim,
            num_labels=self.n,
            head=setting.head_name,
            features=setting.features,
            mode=setting.mode,
            images=setting.images,
            group=self.group,
            steps=self.steps,
            converged=self.converged,
        )
        flat = {name: getattr(self, name).reshape(len(self.correct), -1) for name in ("correct", "log_p", "margin")}
        ids = np.tile(self.part.ids, self.correct.shape[1])
        return Reading(condition=condition, ids=ids, **flat)


def read(material: Material, setting: Setting) -> Result:
    """Fit heads to one group as the protocol says, and score them."""
    fit = material.fit
    means_of = Part.row_predictions if setting.features == "residual-predicted" else Part.row_classes
    prepared = Preprocess.fit(
        fit.rows, setting.features, width=setting.width, seed=setting.seed, classes=means_of(fit)
    )  # the statistics of what heads are fitted to, in every group alike

    def transform(part: Part) -> Tensor:
        return prepared(part.rows, means_of(part)).to(setting.device)

    reader: dict[str, Callable[[Material, Setting, Transform], Result]] = {
        "converged": _converged,
        "views": _converged,
        "budget": _budget,
        "retrieval": _retrieval,
    }
    return reader[setting.protocol](material, setting, transform)


def _classes(part: Part, setting: Setting) -> Tensor | None:
    return part.row_classes().to(setting.device) if setting.head.kind == "per-class" else None


def _converged(material: Material, setting: Setting, transform: Transform) -> Result:
    x = transform(material.fit)
    fitted = fit_converged(
        x,
        material.fit.targets(setting.n).to(setting.device),
        setting.n,
        setting.head,
        classes=_classes(material.fit, setting),
        num_classes=setting.num_classes if setting.head.kind == "per-class" else 0,
        max_steps=setting.max_steps,
        tolerance=setting.tolerance,
        seed=setting.seed,
    )
    part = material.score
    scored = x if part is material.fit else transform(part)
    found = fitted.read(scored, part.targets(setting.n).to(setting.device), _classes(part, setting))
    views, samples = part.x.shape[:2]
    correct, log_p, margin = (each.cpu().numpy().T.reshape(-1, views, samples) for each in found)
    return Result(
        group=material.group,
        part=part,
        n=setting.n,
        correct=correct,
        log_p=log_p.astype(np.float32),
        margin=margin.astype(np.float32),
        dim=x.shape[1],
        steps=fitted.steps,
        converged=float(fitted.converged.float().mean()),
        spectrum=spectrum(x),
    )


def _held_out(part: Part, setting: Setting, transform: Transform) -> tuple[Tensor, Tensor, Tensor | None]:
    x = transform(part)
    return x, part.targets(setting.n).to(setting.device), _classes(part, setting)


def log_weights(steps: Sequence[int]) -> np.ndarray:
    """Weights of the trapezoid rule over log2 of the steps, float64 ``[S]`` that sum to 1."""
    if len(steps) == 1:
        return np.ones(1)
    place = np.log2(np.asarray(steps, float))
    gaps = np.diff(place)
    return (np.append(gaps, 0) + np.append(0, gaps)) / (2 * (place[-1] - place[0]))


def _budget(material: Material, setting: Setting, transform: Transform) -> Result:
    x = transform(material.fit)
    other = material.score is not material.fit
    curve = fit_budget(
        x,
        material.fit.targets(setting.n).to(setting.device),
        setting.n,
        setting.head,
        steps=BUDGET_STEPS,
        classes=_classes(material.fit, setting),
        num_classes=setting.num_classes if setting.head.kind == "per-class" else 0,
        seed=setting.seed,
        held_out=_held_out(material.score, setting, transform) if other else None,
    )
    part = material.score
    weights = log_weights(curve.steps.tolist()).astype(np.float32)
    correct = np.einsum("s,skn->kn", weights, curve.correct, dtype=np.float32)[:, None]
    accuracy = curve.correct.mean(axis=(1, 2))
    kappas = ((setting.n * accuracy - 1) / (setting.n - 1)).tolist()
    none = np.full(correct.shape, np.nan, np.float32)
    return Result(
        group=material.group,
        part=part,
        n=setting.n,
        correct=correct,
        log_p=none,
        margin=none,
        dim=x.shape[1],
        steps=int(curve.steps[-1]),
        converged=1.0,
        spectrum=spectrum(x),
        curve=tuple(zip(curve.steps.tolist(), kappas, strict=True)),
    )


def _retrieval(material: Material, setting: Setting, transform: Transform) -> Result:
    anchors, queries = transform(material.fit), transform(material.score)
    correct = own_view_is_nearest(anchors, queries)[None, None]
    none = np.full(correct.shape, np.nan, np.float32)
    return Result(
        group=material.group,
        part=material.score,
        n=len(material.fit.ids),
        correct=correct,
        log_p=none,
        margin=none,
        dim=anchors.shape[1],
        steps=0,
        converged=1.0,
        spectrum=spectrum(anchors),
    )


def for_retrieval(material: Material) -> Material:
    """At most :data:`RETRIEVAL_SAMPLES` of the samples: all pairs of them are compared."""
    count = len(material.fit.ids)
    if count <= RETRIEVAL_SAMPLES:
        return material
    rows = np.linspace(0, count - 1, RETRIEVAL_SAMPLES).round().astype(np.int64)
    return replace(material, fit=material.fit.take(rows), score=material.score.take(rows))
