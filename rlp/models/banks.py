"""Banks of heads: the H heads of one tap, one for each draw."""

import math
from typing import Any

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from rlp.errors import UserError
from rlp.kernels.loss import MEMORY_BUDGET, random_label_loss
from rlp.kernels.problem import ClassOrder
from rlp.kernels.reference import RandomLabelLoss, head_logits
from rlp.models.featurize import Featurizer
from rlp.seeding import named_seed

KINDS = ("shared", "per_class", "copied")


def check_kind(kind: str) -> None:
    """Raise a UserError unless ``kind`` is one of :data:`KINDS`."""
    if kind not in KINDS:
        raise UserError(f"kind is '{kind}'; expected one of {', '.join(KINDS)}")


class Bank(nn.Module):
    """The H heads of one tap, whatever their kind.

    Attributes:
        kind: one of :data:`KINDS`.
        features: what of the tap's features reaches the heads, one of :data:`rlp.models.featurize.FEATURES`.
        shape: of one sample at the tap, without the batch.
        dim: size of a head's input.
        draws, num_labels: H heads, each for n random labels.
        num_classes: C, where each class has heads of its own, else 0.
    """

    kind: str
    features: str
    shape: tuple[int, ...]
    dim: int
    draws: int
    num_labels: int
    num_classes: int

    def initialise(self, generation: int = 0) -> None:
        """Fresh weights (and running statistics), a function of seed, tap, draw and generation alone."""
        raise NotImplementedError

    def describe(self) -> str:
        """What the heads are, in a line."""
        raise NotImplementedError

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """Logits ``[B, H, n]`` of what the tap gives ``[B, *shape]``, with ordinary gradients."""
        raise NotImplementedError

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        penalised: bool,
        impl: str = "auto",
        memory_budget: int = MEMORY_BUDGET,
        classes: Tensor | ClassOrder | None = None,
        entropy: bool = False,
    ) -> RandomLabelLoss:
        """Fit losses ``[H]``, whose gradient reaches this bank alone, and statistics ``[B, H]``.

        Args:
            x: what the tap gives, ``[B, *shape]``.
            target: random labels, int64 ``[B, H]``.
            penalised: whether the statistics' gradient reaches the features, and nothing else; if not, it ends here.
            impl, memory_budget: as in :func:`rlp.kernels.loss.random_label_loss`.
            classes: int64 ``[B]``, which only heads of a class's own read.
            entropy: also the statistic ``entropy_rest``.
        """
        raise NotImplementedError


class HeadBank(Bank):
    """Linear heads, or with one hidden ReLU layer, on features ``[B, D]``: one for each draw, or each draw and class.

    ``weight`` is ``[H, n, D]`` (``[H, n, M]`` behind a hidden layer of M units, whose weight is ``[H, M, D]``), or
    ``[H, C, n, D]`` where each of C classes has a head of its own and a sample uses its class's (arXiv 2411.19640),
    so that knowing the class is worth nothing. Each head is initialised like ``nn.Linear``, from ``seed``, ``tap`` and
    its draw alone: neither the global generators nor the number of taps and draws have a say, so one more of them
    leaves the others' weights as they were.

    Args:
        dim: D at the tap; the heads' own input is as wide as what ``features`` makes of it.
        hidden: M, or 0 for linear heads.
        num_classes: C, or 0 for heads that all classes share; linear only.
        features, width: :class:`rlp.models.featurize.Featurizer`.
    """

    decayed_parameters = ("weight", "hidden_weight")

    def __init__(
        self,
        dim: int,
        draws: int,
        num_labels: int,
        hidden: int,
        seed: int,
        tap: str,
        *,
        num_classes: int = 0,
        features: str = "raw",
        width: int = 128,
    ) -> None:
        super().__init__()
        if hidden and num_classes:
            raise ValueError("heads of a class's own are linear; expected hidden or num_classes to be 0")
        self.kind, self.features = "per_class" if num_classes else "shared", features
        self.featurize = None if features == "raw" else Featurizer(features, dim, width, seed)
        self.shape, self.dim = (dim,), self.featurize.dim if self.featurize else dim
        self.draws, self.num_labels, self.num_classes, self.hidden = draws, num_labels, num_classes, hidden
        self.seed, self.tap = seed, tap

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(draws, *shape, dtype=torch.float32, device="cpu"))

        if hidden:
            self.hidden_weight, self.hidden_bias = empty(hidden, self.dim), empty(hidden)
        own = (num_classes,) if num_classes else ()
        self.weight, self.bias = empty(*own, num_labels, hidden or self.dim), empty(*own, num_labels)
        self.initialise()

    @torch.no_grad()
    def initialise(self, generation: int = 0) -> None:
        """Fresh weights (and running statistics), a function of seed, tap, draw and generation alone."""
        if self.featurize is not None:
            self.featurize.reset()
        layers = [(self.weight, self.bias)]
        if self.hidden:
            layers.insert(0, (self.hidden_weight, self.hidden_bias))
        for draw in range(self.draws):
            name = f"heads.{self.tap}.{draw}" + (f".{generation}" if generation else "")
            generator = torch.Generator().manual_seed(named_seed(self.seed, name))
            for weight, bias in layers:
                bound = 1 / math.sqrt(weight.shape[-1])
                for parameter in (weight, bias):
                    # On the CPU, so that the numbers do not depend on the device.
                    fresh = torch.empty(parameter.shape[1:], device="cpu").uniform_(-bound, bound, generator=generator)
                    parameter[draw].copy_(fresh)

    def describe(self) -> str:
        """What the heads are, in a line."""
        own = f" for each of {self.num_classes} classes" if self.num_classes else ""
        layers = f"two-layer ({self.hidden} units)" if self.hidden else "linear"
        return (
            f"tap {self.tap}: {layers} heads, one a draw{own}, on {self.features} features "
            f"({self.shape[0]} at the tap, {self.dim} into a head)"
        )

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """Logits ``[B, H, n]`` of features ``[B, D]``, with ordinary gradients."""
        units = self._units(self._given(x)).to(self.weight.dtype)
        return head_logits(units, self.weight, self.bias, classes if self.num_classes else None)

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        penalised: bool,
        impl: str = "auto",
        memory_budget: int = MEMORY_BUDGET,
        classes: Tensor | ClassOrder | None = None,
        entropy: bool = False,
    ) -> RandomLabelLoss:
        """As :meth:`Bank.loss`, of features ``[B, D]``."""
        how: dict[str, Any] = {"impl": impl, "memory_budget": memory_budget, "entropy": entropy}
        x = self._given(x if penalised else x.detach())
        if not self.hidden:
            classes = classes if self.num_classes else None
            return random_label_loss(x, self.weight, self.bias, target, classes, **how)
        units = self._units(x.detach())
        found = random_label_loss(units, self.weight, self.bias, target, fit_to_features=True, **how)
        if not penalised:
            return found
        frozen = self._units(x, frozen=True)
        weight, bias = self.weight.detach(), self.bias.detach()
        return RandomLabelLoss(found.fit, random_label_loss(frozen, weight, bias, target, **how).stats)

    def _given(self, x: Tensor) -> Tensor:
        """What the heads get of the tap's features."""
        return x if self.featurize is None else self.featurize(x)

    def _units(self, x: Tensor, frozen: bool = False) -> Tensor:
        """What the last layer sees: the features, or the hidden units ``[B, H, M]``."""
        if not self.hidden:
            return x
        weight, bias = self.hidden_weight.flatten(0, 1), self.hidden_bias.flatten()
        if frozen:
            weight, bias = weight.detach(), bias.detach()
        return F.linear(x.to(weight.dtype), weight, bias).relu().unflatten(1, (self.draws, self.hidden))
