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

import torch
from torch import Tensor

from rlp.errors import UserError
from rlp.kernels.reference import RandomLabelLoss
from rlp.measure.budget import BudgetCurve, fit_budget
from rlp.measure.heads import Heads, HeadSpec, LinearHeads, check_labels, check_problem, full_precision, read_heads
from rlp.measure.lbfgs import Found
from rlp.measure.linear import WhitenedHeads, fit_linear
from rlp.measure.spectrum import check_features
from rlp.measure.two_layer import train_two_layer
from rlp.measure.whiten import Whitening

__all__ = ["BudgetCurve", "HeadFit", "HeadSpec", "fit_budget", "fit_converged"]

LINEAR = HeadSpec()
TOLERANCE = 1e-4
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
            heads, found = fit_linear(x.detach(), target, n, max_steps, tolerance, progress)
            return _head_fit(heads, found, n)
        whitening = Whitening.fit(x.detach())
        heads, found = train_two_layer(whitening(x.detach()), target, n, spec.hidden, max_steps, seed, progress)
        return _head_fit(WhitenedHeads(whitening, heads), found, n)


def _head_fit(heads: Heads, found: Found, n: int) -> HeadFit:
    converged = torch.tensor([name != "steps" for name in found.reason])
    return HeadFit(
        steps=found.passes, converged=converged, reason=found.reason, loss=found.loss.cpu(), heads=heads, num_labels=n
    )


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
    heads: list[Heads | None] = [None] * count
    fits = []
    loss = torch.zeros(target.shape[1], dtype=torch.float64)
    for c in range(count):
        mine = classes == c
        samples = int(mine.sum())
        if samples:
            heads[c], found = fit_linear(x[mine], target[mine], n, max_steps, tolerance, None)
            loss += found.loss.cpu() * (samples / len(x))
            fits.append(found)
        if progress is not None:
            progress(f"{c + 1} of {count} classes")
    reason = [max(names, key=SEVERITY.index) for names in zip(*(found.reason for found in fits), strict=True)]
    absent = LinearHeads(x.new_zeros(target.shape[1], n, x.shape[1]).float(), x.new_zeros(target.shape[1], n).float())
    passes = max(found.passes for found in fits)
    whole = Found(point=x.new_zeros(0), loss=loss, reason=reason, passes=passes)
    return _head_fit(_PerClass(heads, absent), whole, n)
