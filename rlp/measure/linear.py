"""Linear heads at the optimum of their loss: L-BFGS on whitened features, with the fused loss and its gradient."""

from collections.abc import Callable
from dataclasses import dataclass
import math

import torch
from torch import Tensor

from rlp.kernels.loss import random_label_loss
from rlp.kernels.reference import RandomLabelLoss
from rlp.measure.heads import Heads, LinearHeads
from rlp.measure.lbfgs import MEMORY, Found, minimise
from rlp.measure.whiten import Whitening

SURE = math.log(9.0)
"""``z_t - lse_rest`` from which on a label has a probability of 0.9."""
LOGITS_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Bytes of logits that one piece of the samples has: on a CPU so few that the passes over them stay in its caches."""
STATE_BYTES = 2**30
"""Bytes that the optimiser's memory may take; more heads are fitted in groups."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class WhitenedHeads:
    """Heads that take whitened features."""

    whitening: Whitening
    heads: Heads

    @property
    def row_bytes(self) -> int:
        return self.heads.row_bytes

    def loss(self, x: Tensor, target: Tensor, classes: Tensor | None) -> RandomLabelLoss:
        return self.heads.loss(self.whitening(x), target, classes)


def fit_linear(
    x: Tensor, target: Tensor, n: int, max_steps: int, tolerance: float, progress: Progress | None
) -> tuple[WhitenedHeads, Found]:
    """Fit linear heads to features ``[N, D]`` and random labels ``[N, H]``; arguments as for `fit_converged`.

    Returns:
        The heads, which take features as given, and losses ``[H]``, reasons and the slowest head's passes (``point``
        holds weights and biases for whitened features, ``[H, n, R + 1]``).
    """
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
    loss = torch.cat([part.loss for part in found])
    reason = [name for part in found for name in part.reason]
    passes = max(part.passes for part in found)
    return WhitenedHeads(whitening, linear), Found(point=point, loss=loss, reason=reason, passes=passes)


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
