"""Banks of heads: the H heads of one tap, one for each draw."""

import math
from typing import Any

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from rlp.kernels.loss import MEMORY_BUDGET, random_label_loss
from rlp.kernels.reference import RandomLabelLoss, head_logits
from rlp.seeding import named_seed


class HeadBank(nn.Module):
    """The H heads of one tap, one for each draw: linear, or with one hidden ReLU layer.

    ``weight`` is ``[H, n, D]`` (``[H, n, M]`` behind a hidden layer of M units, whose weight is ``[H, M, D]``). Each
    head is initialised like ``nn.Linear``, from ``seed``, ``tap`` and its draw alone: neither the global generators nor
    the number of taps and draws have a say, so one more of them leaves the others' weights as they were.
    """

    decayed_parameters = ("weight", "hidden_weight")

    def __init__(self, dim: int, draws: int, num_labels: int, hidden: int, seed: int, tap: str) -> None:
        super().__init__()
        self.dim, self.draws, self.num_labels, self.hidden = dim, draws, num_labels, hidden

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(draws, *shape, dtype=torch.float32, device="cpu"))

        layers = []  # parameters of a layer, and their fan-in
        if hidden:
            self.hidden_weight, self.hidden_bias = empty(hidden, dim), empty(hidden)
            layers.append((self.hidden_weight, self.hidden_bias, dim))
        width = hidden or dim
        self.weight, self.bias = empty(num_labels, width), empty(num_labels)
        layers.append((self.weight, self.bias, width))
        for draw in range(draws):
            generator = torch.Generator().manual_seed(named_seed(seed, f"heads.{tap}.{draw}"))
            for *parameters, fan_in in layers:
                for parameter in parameters:
                    parameter.data[draw].uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, H, n]`` of features ``[B, D]``, with ordinary gradients."""
        return head_logits(self._units(x).to(self.weight.dtype), self.weight, self.bias)

    def loss(
        self, x: Tensor, target: Tensor, penalised: bool, impl: str = "auto", memory_budget: int = MEMORY_BUDGET
    ) -> RandomLabelLoss:
        """Fit losses ``[H]``, whose gradient reaches this bank alone, and statistics ``[B, H]``.

        Args:
            x: features ``[B, D]``.
            target: random labels, int64 ``[B, H]``.
            penalised: whether the statistics' gradient reaches the features, and nothing else; if not, it ends here.
            impl, memory_budget: as in :func:`rlp.kernels.loss.random_label_loss`.
        """
        how: dict[str, Any] = {"impl": impl, "memory_budget": memory_budget}
        if not self.hidden:
            return random_label_loss(x if penalised else x.detach(), self.weight, self.bias, target, **how)
        units = self._units(x.detach())
        found = random_label_loss(units, self.weight, self.bias, target, fit_to_features=True, **how)
        if not penalised:
            return found
        frozen = self._units(x, frozen=True)
        weight, bias = self.weight.detach(), self.bias.detach()
        return RandomLabelLoss(found.fit, random_label_loss(frozen, weight, bias, target, **how).stats)

    def _units(self, x: Tensor, frozen: bool = False) -> Tensor:
        """What the last layer sees: the features, or the hidden units ``[B, H, M]``."""
        if not self.hidden:
            return x
        weight, bias = self.hidden_weight.flatten(0, 1), self.hidden_bias.flatten()
        if frozen:
            weight, bias = weight.detach(), bias.detach()
        return F.linear(x.to(weight.dtype), weight, bias).relu().unflatten(1, (self.draws, self.hidden))
