"""Heads to be fitted to features, many at once: what kinds there are, their weights, and how they are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
import torch.nn.functional as F

from rlp.errors import UserError
from rlp.kernels.loss import check_range, random_label_loss
from rlp.kernels.reference import RandomLabelLoss
from rlp.measure.spectrum import check_features

READ_BYTES = 64 * 2**20
"""Bytes that the logits and hidden features of a piece of the samples may take when heads are read."""


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What kind of head is fitted.

    Attributes:
        kind: ``linear``; ``two-layer``, with one hidden ReLU layer of its own for each head; ``per-class``, a linear
            head for each class, a sample using its own class's (arXiv 2411.19640).
        hidden: width of the hidden layer of ``two-layer``.
    """

    kind: Literal["linear", "two-layer", "per-class"] = "linear"
    hidden: int = 512


class Heads(Protocol):
    """H heads with n random labels that take features as they are."""

    @property
    def row_bytes(self) -> int:
        """Bytes that one sample takes in a pass."""
        ...

    def loss(self, x: Tensor, target: Tensor, classes: Tensor | None) -> RandomLabelLoss:
        """Fit loss ``[H]`` and statistics ``[B, H]`` of ``x [B, D]`` and ``target [B, H]``."""
        ...


class TrainableHeads(Heads, Protocol):
    """Heads whose weights are trained."""

    def parameters(self) -> list[Tensor]:
        """Leaves that ask for gradients."""
        ...


@dataclass(frozen=True)
class LinearHeads:
    """Weight ``[H, n, D]`` and bias ``[H, n]``; with a dimension C after H, per class."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def zeros(cls, heads: int, n: int, dim: int, classes: int | None, device: torch.device) -> "LinearHeads":
        """Heads that read chance, ready to be trained; `classes` is C, or None for heads that all classes share."""
        shape = (heads, n) if classes is None else (heads, classes, n)
        weight, bias = torch.zeros((*shape, dim), device=device), torch.zeros(shape, device=device)
        return cls(weight.requires_grad_(), bias.requires_grad_())

    @property
    def row_bytes(self) -> int:
        return 4 * self.weight.shape[0] * self.weight.shape[-2]

    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias]

    def loss(self, x: Tensor, target: Tensor, classes: Tensor | None) -> RandomLabelLoss:
        return random_label_loss(x, self.weight, self.bias, target, classes if self.weight.dim() == 4 else None)


@dataclass(frozen=True)
class TwoLayerHeads:
    """Hidden weight ``[H, hidden, D]`` and bias ``[H, hidden]``, ReLU, then linear heads on ``[B, H, hidden]``."""

    hidden_weight: Tensor
    hidden_bias: Tensor
    last: LinearHeads

    @classmethod
    def random(
        cls, heads: int, n: int, dim: int, hidden: int, random: torch.Generator, device: torch.device
    ) -> "TwoLayerHeads":
        """Uniform weights and biases within 1 / sqrt(fan-in), as PyTorch's linear layers have them."""

        def draw(fan_in: int, *shape: int) -> Tensor:
            uniform = torch.rand(shape, generator=random) * 2 - 1
            return (uniform / fan_in**0.5).to(device).requires_grad_()

        weight, bias = draw(dim, heads, hidden, dim), draw(dim, heads, hidden)
        return cls(weight, bias, LinearHeads(draw(hidden, heads, n, hidden), draw(hidden, heads, n)))

    @property
    def row_bytes(self) -> int:
        return self.last.row_bytes + 4 * self.hidden_bias.numel()

    def parameters(self) -> list[Tensor]:
        return [self.hidden_weight, self.hidden_bias, *self.last.parameters()]

    def loss(self, x: Tensor, target: Tensor, classes: Tensor | None) -> RandomLabelLoss:
        hidden = F.linear(x, self.hidden_weight.flatten(0, 1), self.hidden_bias.flatten()).relu()
        hidden = hidden.unflatten(1, self.hidden_bias.shape)
        return random_label_loss(hidden, self.last.weight, self.last.bias, target, fit_to_features=True)


def read_heads(heads: Heads, x: Tensor, target: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``correct`` bool, ``log_p`` and ``margin`` float32, each ``[N, H]`` on the CPU, over pieces of the samples.

    ``correct`` asks the random label's logit to be above all others: a tie is wrong.
    """
    rows = max(1, READ_BYTES // heads.row_bytes)
    parts = []
    with torch.no_grad(), full_precision(x.device):
        for start in range(0, len(x), rows):
            piece = slice(start, start + rows)
            stats = heads.loss(x[piece], target[piece], None if classes is None else classes[piece]).stats
            margin = stats.z_t - stats.max_rest
            log_p = -F.softplus(stats.lse_rest - stats.z_t)
            parts.append((margin.cpu() > 0, log_p.float().cpu(), margin.float().cpu()))
    correct, log_p, margin = (torch.cat(column) for column in zip(*parts, strict=True))
    return correct, log_p, margin


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in float32 as such: no autocast, no TF32, whose rounding would end the optimiser early."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_problem(x: Tensor, target: Tensor, n: int, spec: HeadSpec, classes: Tensor | None, num_classes: int) -> int:
    """C, or 0 where the classes share their heads; a UserError unless features, random labels and classes fit.

    C is `num_classes`, or where that is 0 the largest class plus one.
    """
    check_features(x)
    if spec.kind not in ("linear", "two-layer", "per-class"):
        raise UserError(f"the kind of head is '{spec.kind}'; expected linear, two-layer or per-class")
    if n < 2:
        raise UserError(f"n is {n}; expected at least 2 random labels")
    if spec.hidden < 1:
        raise UserError(f"hidden is {spec.hidden}; expected the width of a layer, at least 1")
    check_labels(x, target, n)
    if spec.kind != "per-class":
        return 0
    if classes is None or classes.dtype != torch.int64 or classes.shape != x.shape[:1] or classes.device != x.device:
        raise UserError(f"heads per class need classes; expected int64 [{len(x)}] on {x.device}, a class per sample")
    num_classes = num_classes or int(classes.max()) + 1
    check_range(classes.cpu(), num_classes, "classes", "class ids")
    return num_classes


def check_labels(x: Tensor, target: Tensor, n: int) -> None:
    """Raise a UserError unless `target` is int64 ``[N, H]`` in [0, n), on the device of ``x [N, D]``."""
    if target.dim() != 2 or len(target) != len(x) or not target.shape[1]:
        raise UserError(f"target has the shape {[*target.shape]}; expected [{len(x)}, H], a random label per head")
    if target.dtype != torch.int64 or target.device != x.device:
        raise UserError(f"target is {target.dtype} on {target.device}; expected int64 on {x.device}")
    check_range(target.cpu(), n, "target", "random labels")
