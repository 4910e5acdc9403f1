"""Optimisers whose step makes the gradient of each class in the batch, uses it at once and touches no other class."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
import torch.distributed as dist
from torch.optim import Optimizer

from rlp.errors import UserError
from rlp.kernels.loss import uses_triton
from rlp.kernels.problem import ClassOrder, sort_by_class
from rlp.kernels.products import weight_gradient
from rlp.kernels.reference import RandomLabelLoss
from rlp.kernels.row_sparse import Factors, check_factors_impl, row_sparse_random_label_loss
from rlp.kernels.sharded import Ranks, all_gather


def joint_factors(found: list[Factors], group: Any, device: torch.device) -> Factors | None:
    """The factors of all backward passes and ranks, None if there are none; over ranks the gradient is the mean.

    The host waits for the device where there are several ranks: they agree on their numbers of rows.
    """
    mine = Factors(*map(torch.cat, zip(*found, strict=True))) if found else None
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return mine
    rows = -1 if mine is None else len(mine.x)
    batches = all_gather(torch.tensor(rows, device=device), group).tolist()
    if -1 in batches:
        if max(batches) == -1:
            return None
        raise UserError(f"rank {batches.index(-1)} has called no backward; expected one on every rank before step")
    assert mine is not None
    ranks = Ranks(group, dist.get_rank(group), batches)
    return Factors(*map(ranks.gather, mine._replace(dz=mine.dz / len(batches))))


class Rule(NamedTuple):
    """A step in numbers: ``w = decay w - step_size[c] m / (sqrt(v) / root[c] + eps)``; without moments ``m = g``.

    The moments are ``m += mix_first (g - m)`` and ``v = keep_second v + mix_second g²``; ``step_size`` and ``root`` are
    ``[C]``, of float32 or float64.
    """

    decay: float
    step_size: Tensor
    root: Tensor | None = None
    mix_first: float = 1.0
    keep_second: float = 0.0
    mix_second: float = 1.0
    eps: float = 0.0


Moments = tuple[Tensor, Tensor] | None


def update(weight: Tensor, moments: Moments, dz: Tensor, x: Tensor, offsets: Tensor, rule: Rule) -> None:
    """A step of the classes that have rows, in place and in PyTorch; the host waits for the device.

    Args:
        weight: ``[H, C, n, D]``.
        moments: m and v in the weight's shape, float32 or float64; or None.
        dz, x: as in `Factors`, the rows sorted by class.
        offsets: int64 ``[C + 1]``, as in `ClassOrder`.
        rule: what to do.
    """
    dtype = rule.step_size.dtype
    dz, x = dz.to(dtype), x.to(dtype)
    for c, (start, end) in enumerate(pairwise(offsets.tolist())):
        if start == end:
            continue
        move = weight_gradient(dz[start:end], x[start:end], dtype)
        if moments is not None and rule.root is not None:
            m, v = moments[0][:, c], moments[1][:, c]
            m.lerp_(move, rule.mix_first)
            v.mul_(rule.keep_second).addcmul_(move, move, value=rule.mix_second)
            move = m / (v.sqrt() / rule.root[c] + rule.eps)
        weight[:, c] = weight[:, c].to(dtype) * rule.decay - rule.step_size[c] * move


class RowSparseOptimizer(Optimizer):
    """What both optimisers share: ``param_groups``, as every optimiser of PyTorch has, for the weight and the bias.

    ``step`` does, for each class with a row since ``zero_grad``, what the dense optimiser does, and leaves all others:
    their moments and weights do not decay, and bias corrections count the steps of a class. Backward passes add up
    until ``zero_grad``. Over the ranks of `group` the gradient is the mean, as DDP's; from equal weights all ranks get
    the same ones to the bit. A GradScaler has no ``.grad`` to look at and refuses; bfloat16 needs none.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, defaults: dict[str, Any], group: Any, impl: str
    ) -> None:
        check_factors_impl(impl)
        if weight.dim() != 4 or (bias is not None and bias.shape != weight.shape[:-1]):
            shapes = [[*p.shape] for p in (weight, bias) if p is not None]
            raise UserError(f"weight and bias have the shapes {shapes}; expected [H, C, n, D] and [H, C, n]")
        if not all(p.is_contiguous() for p in (weight, bias) if p is not None):
            raise UserError("weight or bias is not contiguous; expected contiguous parameters")
        if not defaults["lr"] >= 0 or not defaults["weight_decay"] >= 0:
            raise UserError(f"lr or weight_decay is below 0: {defaults}; expected numbers of at least 0")
        groups: list[dict[str, Any]] = [{"params": [weight]}]
        if bias is not None:
            groups.append({"params": [bias], "weight_decay": 0.0})
        super().__init__(groups, defaults)
        self.weight, self.bias, self.group, self.impl = weight, bias, group, impl
        self.factors: list[Factors] = []

    def loss(
        self, x: Tensor, target: Tensor, classes: Tensor | ClassOrder, *, entropy: bool = False
    ) -> RandomLabelLoss:
        """The loss of the weight and bias, whose gradient this optimiser's `step` will use; see `Factors`."""
        return row_sparse_random_label_loss(
            x, self.weight, self.bias, target, classes, self.factors, entropy=entropy, impl=self.impl
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the backward passes so far."""
        self.factors.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the classes that have rows; nothing without a backward pass since `zero_grad`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factors = joint_factors(self.factors, self.group, self.weight.device)
        if factors is None:
            return loss
        order = sort_by_class(factors.classes, self.weight.shape[1])
        dz, x = factors.dz[order.rows], factors.x[order.rows]
        if self.weight.requires_grad:
            self._update(self.weight, self.param_groups[0], dz, x, order.offsets)
        if self.bias is not None and self.bias.requires_grad:  # a weight of one feature, which is 1
            self._update(self.bias, self.param_groups[1], dz, x.new_ones(len(x), 1), order.offsets)
        return loss

    def _update(self, parameter: Tensor, options: dict[str, Any], dz: Tensor, x: Tensor, offsets: Tensor) -> None:
        rule, moments = self.rule(parameter, options, offsets.diff() > 0)
        if parameter.dim() == 3:
            moments = None if moments is None else (moments[0].unsqueeze(-1), moments[1].unsqueeze(-1))
            parameter = parameter.unsqueeze(-1)
        step = update
        if uses_triton(self.impl, x, x.dtype):
            from rlp.kernels.row_sparse_kernels import update as step
        step(parameter, moments, dz, x, offsets, rule)

    def rule(self, parameter: Tensor, options: dict[str, Any], present: Tensor) -> tuple[Rule, Moments]:
        """The coming step, where `present`, bool ``[C]``, says which classes have rows."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, to the bit."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for place, values in state_dict["state"].items():
            for name, value in values.items():
                expected = parameters[place].shape if name != "step" else parameters[place].shape[1:2]
                if value.shape != expected:
                    raise UserError(f"the state's {name} has the shape {[*value.shape]}; expected {[*expected]}")
        super().load_state_dict(state_dict)
        for place, values in state_dict["state"].items():  # once more, for PyTorch rounds them to the parameter's type
            parameter = parameters[place]
            self.state[parameter] = {name: value.to(parameter.device, copy=True) for name, value in values.items()}


class RowSparseSGD(RowSparseOptimizer):
    """SGD without momentum: without weight decay the same as dense SGD."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        lr: float,
        weight_decay: float = 0.0,
        group: Any = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(weight, bias, {"lr": lr, "weight_decay": weight_decay}, group, impl)

    def rule(self, parameter: Tensor, options: dict[str, Any], present: Tensor) -> tuple[Rule, Moments]:
        """One step size for all classes."""
        size = torch.full(present.shape, options["lr"], dtype=_sum_dtype(parameter), device=parameter.device)
        return Rule(1 - options["lr"] * options["weight_decay"], size), None


class RowSparseAdamW(RowSparseOptimizer):
    """AdamW; with every class in every step the same as dense AdamW, the bias without weight decay.

    Args:
        weight: ``[H, C, n, D]``.
        bias: ``[H, C, n]``, or None.
        lr, betas, eps, weight_decay: as in :class:`torch.optim.AdamW`; the bias does not decay.
        group: the process group over which gradients are averaged, by default all ranks.
        impl: ``auto``, ``eager`` or ``triton``, of loss and step.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        group: Any = None,
        impl: str = "auto",
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas) or eps < 0:
            raise UserError(f"betas are {betas}, eps is {eps}; expected betas in [0, 1) and eps of at least 0")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(weight, bias, defaults, group, impl)

    def rule(self, parameter: Tensor, options: dict[str, Any], present: Tensor) -> tuple[Rule, Moments]:
        """Counts the step of the classes that are there."""
        state, dtype = self.state[parameter], _sum_dtype(parameter)
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
            state["step"] = torch.zeros(present.shape, dtype=torch.int64, device=parameter.device)
        state["step"] += present
        (first, second), lr, steps = options["betas"], options["lr"], state["step"].double()
        rule = Rule(
            decay=1 - lr * options["weight_decay"],
            step_size=(lr / (1 - first**steps)).to(dtype),
            root=(1 - second**steps).sqrt().to(dtype),
            mix_first=1 - first,
            keep_second=second,
            mix_second=1 - second,
            eps=options["eps"],
        )
        return rule, (state["exp_avg"], state["exp_avg_sq"])


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
