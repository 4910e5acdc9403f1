"""The random-label loss with the labels of every head spread over the ranks, for heads too large for one device.

Each rank has samples of its own and a slice of the labels. Features and targets go to all ranks; a rank computes the
statistics of its slice for all samples, piece by piece as the path `by_columns` does, and these small matrices are
exchanged and merged. No logit leaves its rank.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
import torch.distributed as dist

from rlp.errors import UserError
from rlp.kernels import by_columns
from rlp.kernels.loss import FLOATS, MEMORY_BUDGET, check_impl, check_range, product_dtype, uses_triton
from rlp.kernels.ops import differentiable_once
from rlp.kernels.problem import Problem, Upstream
from rlp.kernels.reference import RandomLabelLoss, Statistics, mean_fit


class Shard(NamedTuple):
    """The labels ``first_label <= j < first_label + labels`` of every head, which one rank has."""

    first_label: int
    labels: int

    @classmethod
    def of(cls, num_labels: int, rank: int, size: int) -> "Shard":
        """What `rank` of `size` has of `num_labels`: slices in the order of the ranks, whose sizes differ by one."""
        if not 0 <= rank < size:
            raise UserError(f"rank is {rank}; expected one of 0 to {size - 1}")
        if num_labels < size:
            raise UserError(f"{num_labels} labels are fewer than {size} ranks; expected at least one for each")
        first = rank * num_labels // size
        return cls(first, (rank + 1) * num_labels // size - first)


def sharded_random_label_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    num_labels: int,
    first_label: int,
    group: Any = None,
    entropy: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    impl: str = "auto",
) -> RandomLabelLoss:
    """:func:`rlp.kernels.loss.random_label_loss` of all ranks' samples, where each rank has a slice of the labels.

    ``fit [H]`` is the mean over the samples of *all* ranks, the same on every rank to the bit; its gradient reaches
    weight and bias. ``stats [B_r, H]`` are those of the rank's own samples; their gradient reaches the rank's own x.

    Every rank calls this function and then ``backward`` of its own loss, with several heads in the same order, and
    gives ``fit`` the same coefficient. Each gradient is then what a single process finds on the joint batch: that of
    weight and bias is complete as it is, and must be neither summed nor averaged over the ranks (keep the heads out of
    DDP); that of x is the gradient of this rank's loss, as for a network in DDP. If x needs no gradient, detach it: the
    backward pass then needs no communication.

    Args:
        x: the rank's features ``[B_r, D]`` or ``[B_r, H, D]``; B_r may differ between ranks and be 0.
        weight: the rank's slice ``[H, n_r, D]`` of the labels, n_r >= 1.
        bias: ``[H, n_r]``, or None.
        target: int64 ``[B_r, H]``, random labels in [0, num_labels).
        num_labels: n, at least 2, of all slices together.
        first_label: the first label of the slice; the slices lie one after the other in the order of the ranks, as
            :meth:`Shard.of` cuts them.
        group: the process group; by default that of all ranks, or this process alone where there is none.
        entropy: also the statistic ``entropy_rest``.
        memory_budget: bytes that temporary matrices of logits and their gradients may take on each rank.
        impl: ``auto`` (Triton's kernels on a GPU, else PyTorch), ``eager`` or ``triton``.

    Returns:
        ``fit [H]`` and statistics ``[B_r, H]``, float32 or float64.

    Raises:
        UserError: on every rank, if the arguments of one are wrong or those of several do not fit together.

    The host waits for the device once a call: the ranks agree on the shapes.
    """
    dtype, grad = product_dtype(x, weight), torch.is_grad_enabled()
    triton = uses_triton(impl, x, dtype)
    need_weight = grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    need_features = grad and x.requires_grad
    try:
        _check(x, weight, bias, target, num_labels, memory_budget, impl)
        facts = [1, len(x), first_label, weight.shape[1]]
        facts += [num_labels, x.dim(), len(weight), x.shape[-1], need_features, entropy]
        facts += [FLOATS.index(x.dtype), FLOATS.index(dtype)]
        mistake = None
    except UserError as error:
        facts, mistake = [0] * (4 + len(EQUAL)), error
    ranks = _agree(facts, num_labels, group, x.device, mistake)
    options = (dtype, entropy, need_weight, need_features, memory_budget, triton)
    fit, *stats = _ShardedLoss.apply(x, weight, bias, target, ranks, options)  # pyright: ignore
    return RandomLabelLoss(fit, Statistics(*stats))


EQUAL = ("num_labels", "dimensions of x", "heads", "features", "x.requires_grad", "entropy", "type of x", "precision")
"""What must be equal on all ranks."""


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, num_labels: int, memory_budget: int, impl: str
) -> None:
    """Raise a UserError unless one rank's arguments fit together."""
    check_impl(impl)
    if impl == "reference":
        raise UserError("impl is 'reference', which knows no slices of labels; expected auto, eager or triton")
    if memory_budget < 1:
        raise UserError(f"memory_budget is {memory_budget}; expected a number of bytes above 0")
    if num_labels < 2:
        raise UserError(f"num_labels is {num_labels}; expected at least 2")
    if weight.dim() != 3 or not weight.shape[1]:
        raise UserError(f"weight has the shape {[*weight.shape]}; expected [H, n_r, D] with a label at least")
    heads, labels, dim = weight.shape
    if tuple(x.shape[1:]) not in ((dim,), (heads, dim)):
        raise UserError(f"x has the shape {[*x.shape]}; expected [B, {dim}] or [B, {heads}, {dim}], as the weight has")
    shapes = {"target": (target, (len(x), heads)), "bias": (bias, (heads, labels)), "weight": (weight, weight.shape)}
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape):
            raise UserError(f"{name} has the shape {[*tensor.shape]}; expected {[*shape]}")
        if tensor.device != x.device:
            raise UserError(f"{name} is on {tensor.device}, x on {x.device}; expected one device")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in FLOATS:
            raise UserError(f"{name} is {tensor.dtype}; expected one of {', '.join(map(str, FLOATS))}")
    if target.dtype != torch.int64:
        raise UserError(f"target is {target.dtype}; expected int64")
    check_range(target, num_labels, "target", "random labels")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a group, the rows that each has, and the labels."""

    group: Any
    rank: int
    batches: list[int]
    labels: list[int] = field(default_factory=list)

    def gather(self, mine: Tensor) -> Tensor:
        """``[B, ...]`` of all ranks, in their order, from each one's ``[B_r, ...]``; the same bits everywhere."""
        if len(self.batches) == 1:
            return mine
        every = all_gather(self._padded(mine), self.group)
        return torch.cat([part[:rows] for part, rows in zip(every, self.batches, strict=True)])

    def own(self, joint: Tensor) -> Tensor:
        """This rank's rows of ``[B, ...]``."""
        return joint.split(self.batches)[self.rank]

    def sum_own(self, joint: Tensor) -> Tensor:
        """This rank's rows of the sum of all ranks' ``[B, ...]``."""
        if len(self.batches) == 1:
            return joint
        parts = [self._padded(part) for part in joint.split(self.batches)]
        total = torch.empty_like(parts[self.rank])
        dist.reduce_scatter(total, parts, group=self.group)
        return total[: self.batches[self.rank]]

    def _padded(self, rows: Tensor) -> Tensor:
        """As many rows on every rank, for collectives of equal sizes are those that every backend has."""
        most = max(self.batches)
        return torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])


def all_gather(mine: Tensor, group: Any) -> Tensor:
    """``[W, ...]``: what each rank has."""
    every = mine.new_empty(dist.get_world_size(group), *mine.shape)
    dist.all_gather(list(every), mine, group=group)
    return every


def _agree(facts: list[int], num_labels: int, group: Any, device: torch.device, mistake: UserError | None) -> Ranks:
    """Exchange what the ranks were given; raise a UserError on all of them if it does not fit together."""
    alone = group is None and not (dist.is_available() and dist.is_initialized())
    every, rank = [facts], 0
    if not alone:
        rank = dist.get_rank(group)
        if rank < 0:
            raise UserError("this process is not in the group; expected a call by the ranks of the group alone")
        if dist.get_world_size(group) > 1:
            every = all_gather(torch.tensor(facts, device=device), group).tolist()
    if mistake is not None:
        raise mistake
    good, batches, firsts, labels, *equal = map(list, zip(*every, strict=True))
    if not all(good):
        raise UserError(f"rank {good.index(0)} of the group was given wrong arguments; its own error names them")
    for name, values in zip(EQUAL, equal, strict=True):
        if len(set(values)) > 1:
            raise UserError(f"the ranks differ in {name}: {values}; expected the same on all")
    _check_tiling([Shard(*pair) for pair in zip(firsts, labels, strict=True)], num_labels)
    if not sum(batches):
        raise UserError("no rank has a sample; expected at least one on one of them")
    return Ranks(group, rank, batches, labels)


def _check_tiling(shards: list[Shard], num_labels: int) -> None:
    end = 0
    for rank, (first, labels) in enumerate(shards):
        if first != end:
            raise UserError(f"the slice of rank {rank} begins with label {first}; expected {end}, where the last ends")
        end += labels
    if end != num_labels:
        raise UserError(f"the slices of the ranks hold {end} labels together; expected {num_labels}")


class _ShardedLoss(torch.autograd.Function):
    """The loss of one rank; `options` are the last six of `Problem`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ranks: Ranks,
        options: tuple[torch.dtype, bool, bool, bool, int, bool],
    ) -> tuple[Tensor, ...]:
        """``(fit, z_t, lse_rest, z_mean, max_rest[, entropy_rest])``."""
        dtype = options[0]
        narrow = x if x.dtype.itemsize <= dtype.itemsize else x.to(dtype)
        first = sum(ranks.labels[: ranks.rank])
        with torch.autocast(x.device.type, enabled=False):
            joint, target = ranks.gather(narrow).to(dtype), ranks.gather(target) - first
            found, _ = by_columns.forward(Problem(joint, weight, bias, target, None, *options))
            stats = _merge_slices(found, ranks)
            fit = mean_fit(stats.z_t, stats.lse_rest)
        parts = [part for part in stats if part is not None]
        ctx.save_for_backward(joint, weight, bias, target, *parts)
        ctx.set_materialize_grads(False)
        ctx.ranks, ctx.options, ctx.dtype = ranks, options, x.dtype
        mine = [ranks.own(part).clone() for part in parts]
        ctx.mark_non_differentiable(mine[3])  # max_rest
        return fit, *mine

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, fit: Tensor | None, *arriving: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Gradients of x, weight and bias. The ranks communicate where x has one, whatever arrives."""
        joint, weight, bias, target, *parts = ctx.saved_tensors
        problem, ranks = Problem(joint, weight, bias, target, None, *ctx.options), ctx.ranks
        problem = replace(problem, need_weight=problem.need_weight and fit is not None)
        upstream = Upstream(fit, None, None, None, None)
        dx = None
        with torch.autocast(joint.device.type, enabled=False):
            if problem.need_features:
                upstream = _gather_upstream(fit, arriving, parts, ranks)
            found = by_columns.gradient_sums(problem, Statistics(*parts), upstream)
            if found.x is not None:
                dx = ranks.sum_own(found.x).to(ctx.dtype)
        return dx, found.weight, found.bias, None, None, None


def _merge_slices(mine: Statistics, ranks: Ranks) -> Statistics:
    """Statistics of whole heads from those of each rank's slice, the same bits on every rank."""
    if len(ranks.labels) == 1:
        return mine
    every = all_gather(torch.stack([part for part in mine if part is not None]), ranks.group)
    return by_columns.merge([Statistics(*parts) for parts in every], ranks.labels)


def _gather_upstream(
    fit: Tensor | None, arriving: tuple[Tensor | None, ...], parts: list[Tensor], ranks: Ranks
) -> Upstream:
    """The statistics' gradients for all samples; a rank that has none sends zeros, for another may have some."""
    mine = [
        torch.zeros_like(ranks.own(part)) if arrived is None else arrived
        for arrived, part in zip(arriving, parts, strict=True)
    ]
    z_t, lse_rest, z_mean, _, *entropy_rest = ranks.gather(torch.stack(mine, 1)).movedim(1, 0).contiguous()
    share = ranks.labels[ranks.rank] / sum(ranks.labels)  # of the slice's mean in the mean of all logits
    return Upstream(fit, z_t, lse_rest, z_mean * share, entropy_rest[0] if entropy_rest else None)
