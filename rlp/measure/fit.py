"""Fresh heads on frozen features, fitted until a stated test of convergence holds: hundreds at once.

A linear head without regularisation minimises a convex loss that does not change when the features go through an
invertible affine map: the map's inverse goes into the weights. So features can be whitened first, which makes the loss
round and a few dozen passes enough, without changing what is found. It also means that **raw and standardised features,
and a projection that keeps all directions, give one and the same converged reading**: at convergence a linear head
knows N, n, the directions that were kept, and how the samples lie in them, not the spectrum. Only the budget
(`fit_budget`, on the features as given) and the number of directions tell such features apart. With random labels and
samples in general position even the network hardly matters (Cover 1965).
"""

from collections.abc import Callable
from dataclasses import dataclass
import math

import torch
from torch import Tensor

from rlp.errors import UserError
from rlp.kernels.loss import random_label_loss
from rlp.kernels.reference import RandomLabelLoss
from rlp.measure.budget import BudgetCurve, fit_budget
from rlp.measure.heads import Heads, HeadSpec, LinearHeads, check_labels, check_problem, full_precision, read_heads
from rlp.measure.lbfgs import MEMORY, Found, minimise
from rlp.measure.spectrum import check_features
from rlp.measure.two_layer import train_two_layer
from rlp.measure.whiten import Whitening

__all__ = ["BudgetCurve", "HeadFit", "HeadSpec", "fit_budget", "fit_converged"]

LINEAR = HeadSpec()
TOLERANCE = 1e-4
SURE = math.log(9.0)
"""``z_t - lse_rest`` from which on a label has a probability of 0.9."""
LOGITS_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Bytes of logits that one piece of the samples has: on a CPU so few that the passes over them stay in its caches."""
STATE_BYTES = 2**30
"""Bytes that the optimiser's memory may take; more heads are fitted in groups."""
SEVERITY = ("separated", "gradient", "loss", "steps")

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class HeadFit:
    """Fitted heads.

    Attributes:
        steps: passes over the samples that the slowest head took.
        converged: bool ``[H]``, false where the reason is ``steps``.
        reason: why each head stopped, see `fit_converged`.
        loss: mean fit loss ``[H]``, float64, nats, on the samples fitted to.
    """

    steps: int
    converged: Tensor
    reason: list[str]
    loss: Tensor
    heads: Heads
    num_labels: int

    def read(self, x: Tensor, target: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the heads say of features ``[N, D]`` and random labels ``[N, H]``: other views of the same samples, too.

        Returns:
            ``correct`` bool (a tie is wrong), ``log_p`` of the random label (nats) and ``margin`` (its logit minus the
            largest other) float32, each ``[N, H]`` on the CPU.

        Raises:
            UserError: shapes, types or devices do not fit, or features are not finite.
        """
        check_features(x)
        check_labels(x, target, self.num_labels)
        return read_heads(self.heads, x, target, classes)


def fit_converged(
    x: Tensor,
    target: Tensor,
    n: int,
    spec: HeadSpec = LINEAR,
    *,
    classes: Tensor | None = None,
    num_classes: int = 0,
    max_steps: int = 2000,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    progress: Progress | None = None,
) -> HeadFit:
    """Fit H heads to random labels, without regularisation, until each has converged.

    Linear heads begin at zero and are fitted by `rlp.measure.lbfgs` on features whitened by `rlp.measure.whiten`
    (directions below 3e-7 of the largest deviation are dropped); deterministic. Heads per class are linear heads
    fitted class by class, each class with a whitening of its own, which is exact, for no two classes share a weight; a
    head whose class has no sample stays at zero. Two-layer heads are trained by `rlp.measure.two_layer` on the
    whitened features from weights that `seed` alone decides; their loss is not convex, so that they are converged in
    the sense of its plateau rule.

    A head stops for the first of these reasons that holds:

    - ``separated``: every sample's label has a probability of 0.9 or more. A linear head can then lower its loss to 0
      by growing alone, so that from here on log p tells when one stopped, not what the features hold.
    - ``gradient``: the gradient's norm, on whitened features, is at most `tolerance` times that at zero weights.
    - ``loss``: twenty steps lowered the loss by no more than ``tolerance / 100`` of its fall so far, or float32 shows
      no step that lowers it.
    - ``steps``: `max_steps` passes over the samples were made; the head has not converged.

    Of a head per class the worst reason of its classes counts.

    Args:
        x: features ``[N, D]``, any floating type and device.
        target: random labels int64 ``[N, H]`` in [0, n), one column a head.
        n: number of random labels.
        spec: the kind of head.
        classes: class of each sample, int64 ``[N]``; only heads per class look at it.
        num_classes: C, 0 for the largest class plus one.
        max_steps: passes over the samples.
        tolerance: see above.
        seed: of two-layer heads.
        progress: given a short line now and then.

    Raises:
        UserError: an argument is out of range or does not fit, or features are not finite.
    """
    if max_steps < 1 or not 0 <= tolerance < 1:
        raise UserError(f"max_steps is {max_steps}, tolerance {tolerance}; expected at least 1, and one in [0, 1)")
    count = check_problem(x, target, n, spec, classes, num_classes)
    with torch.enable_grad(), full_precision(x.device):
        if count and classes is not None:
            return _fit_classes(x.detach(), target, n, classes, count, max_steps, tolerance, progress)
        if spec.kind == "linear":
            return _fit_linear(x.detach(), target, n, max_steps, tolerance, progress)
        whitening = Whitening.fit(x.detach())
        heads, found = train_two_layer(whitening(x.detach()), target, n, spec.hidden, max_steps, seed, progress)
        return _head_fit(found.passes, found.reason, found.loss, _Whitened(whitening, heads), n)


def _head_fit(steps: int, reason: list[str], loss: Tensor, heads: Heads, n: int) -> HeadFit:
    converged = torch.tensor([name != "steps" for name in reason])
    return HeadFit(steps=steps, converged=converged, reason=reason, loss=loss.cpu(), heads=heads, num_labels=n)


# -- linear ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Whitened:
    """Heads that take whitened features."""

    whitening: Whitening
    heads: Heads

    @property
    def row_bytes(self) -> int:
        return self.heads.row_bytes

    def loss(self, x: Tensor, target: Tensor, classes: Tensor | None) -> RandomLabelLoss:
        return self.heads.loss(self.whitening(x), target, classes)


def _fit_linear(
    x: Tensor, target: Tensor, n: int, max_steps: int, tolerance: float, progress: Progress | None
) -> HeadFit:
    whitening = Whitening.fit(x)
    white, heads = whitening(x), target.shape[1]
    size = n * (white.shape[1] + 1)
    memory = max(3, min(MEMORY, STATE_BYTES // (8 * size)))
    group = max(1, STATE_BYTES // (4 * size * (2 * memory + 8)))
    found = []
    for start in range(0, heads, group):
        columns = target[:, start : start + group]
        found.append(_minimise(white, columns, n, memory, max_steps, tolerance, progress))
    point = torch.cat([part.point for part in found]).unflatten(1, (n, -1))
    linear = LinearHeads(point[..., :-1].contiguous(), point[..., -1].contiguous())
    reason = [name for part in found for name in part.reason]
    steps = max(part.passes for part in found)
    return _head_fit(steps, reason, torch.cat([part.loss for part in found]), _Whitened(whitening, linear), n)


def _minimise(
    white: Tensor, target: Tensor, n: int, memory: int, max_steps: int, tolerance: float, progress: Progress | None
) -> Found:
    """L-BFGS over the heads of ``target [N, H]``; a point is ``[n, R + 1]``, the bias last."""

    def report(passes: int, running: int) -> None:
        if progress is not None and passes % 10 == 0:
            progress(f"{passes} passes, {running} of {target.shape[1]} heads to go")

    return minimise(
        LinearObjective(white, target, n),
        white.new_zeros(target.shape[1], n * (white.shape[1] + 1)),
        curvature=1 / n,  # of whitened features at zero weights: (1 - 1 / n) / n, and 1 / n along the gradient
        tolerance=tolerance, max_passes=max_steps, memory=memory, report=report,
    )  # fmt: skip


class LinearObjective:
    """Loss and gradient of linear heads through the fused loss, over pieces of the samples; for `minimise`.

    Args:
        white: features float32 ``[N, R]``.
        target: random labels int64 ``[N, H]``.
        n: number of random labels; a point is the weight and, last, the bias: ``[n, R + 1]``, flattened.
    """

    def __init__(self, white: Tensor, target: Tensor, n: int) -> None:
        self.white, self.all_targets, self.n = white, target, n
        self.target = target.contiguous()

    def __call__(self, point: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.target.shape[1] != len(numbers):
            self.target = self.all_targets[:, numbers]
        samples = len(self.white)
        rows = max(256, LOGITS_BYTES[self.white.device.type] // (4 * len(numbers) * self.n))
        both = point.unflatten(1, (self.n, -1))
        weight, bias = (part.contiguous().requires_grad_() for part in (both[..., :-1], both[..., -1]))
        loss = point.new_zeros(len(numbers), dtype=torch.float64)
        least = point.new_full((len(numbers),), torch.inf)
        for start in range(0, samples, rows):
            target = self.target[start : start + rows]
            found = random_label_loss(self.white[start : start + rows], weight, bias, target)
            part = found.fit * (len(target) / samples)
            part.sum().backward()
            loss += part.detach()
            least = torch.minimum(least, (found.stats.z_t - found.stats.lse_rest).detach().amin(0))
        assert weight.grad is not None
        assert bias.grad is not None
        gradient = torch.cat([weight.grad, bias.grad.unsqueeze(2)], dim=2).flatten(1)
        return loss, gradient, least >= SURE


# -- per class ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PerClass:
    """Linear heads of each class, None for a class without samples."""

    heads: list[Heads | None]
    of_absent: LinearHeads

    @property
    def row_bytes(self) -> int:
        return self.of_absent.row_bytes

    def loss(self, x: Tensor, target: Tensor, classes: Tensor | None) -> RandomLabelLoss:
        if classes is None or classes.shape != x.shape[:1] or classes.dtype != torch.int64:
            raise UserError(f"heads per class need classes; expected int64 [{len(x)}], a class per sample")
        rows_of = [(c, (classes == c).nonzero().squeeze(1)) for c in classes.unique().tolist()]
        if rows_of[0][0] < 0 or rows_of[-1][0] >= len(self.heads):
            raise UserError(f"classes holds {rows_of[-1][0]}; expected class ids in [0, {len(self.heads)})")
        parts = [((self.heads[c] or self.of_absent).loss(x[rows], target[rows], None), rows) for c, rows in rows_of]
        back = torch.cat([rows for _, rows in parts]).argsort()
        joined = [torch.cat(columns)[back] for columns in zip(*(part.stats[:4] for part, _ in parts), strict=True)]
        fit = torch.stack([part.fit * (len(rows) / len(x)) for part, rows in parts]).sum(0)
        return RandomLabelLoss(fit, type(parts[0][0].stats)(*joined))


def _fit_classes(
    x: Tensor,
    target: Tensor,
    n: int,
    classes: Tensor,
    count: int,
    max_steps: int,
    tolerance: float,
    progress: Progress | None,
) -> HeadFit:
    fits: list[HeadFit | None] = []
    loss = torch.zeros(target.shape[1], dtype=torch.float64)
    for c in range(count):
        mine = classes == c
        samples = int(mine.sum())
        fit = _fit_linear(x[mine], target[mine], n, max_steps, tolerance, None) if samples else None
        fits.append(fit)
        if fit is not None:
            loss += fit.loss * (samples / len(x))
        if progress is not None:
            progress(f"{c + 1} of {count} classes")
    present = [fit for fit in fits if fit is not None]
    reason = [max(names, key=SEVERITY.index) for names in zip(*(fit.reason for fit in present), strict=True)]
    absent = LinearHeads(x.new_zeros(target.shape[1], n, x.shape[1]).float(), x.new_zeros(target.shape[1], n).float())
    heads = _PerClass([None if fit is None else fit.heads for fit in fits], absent)
    return _head_fit(max(fit.steps for fit in present), reason, loss, heads, n)
