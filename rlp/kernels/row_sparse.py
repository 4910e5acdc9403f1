"""Opt-in training of heads of their own for each class, at the cost of the classes in the batch alone.

Most classes are absent from a batch, but a dense gradient holds all of them, and a dense optimiser reads and writes all
weights and moments: for large heads ten times what the loss costs. Here the backward pass leaves the two factors of the
weight gradient, from which the optimisers of `row_sparse_optim` make that of one class after the other.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlp.errors import UserError
from rlp.kernels.loss import MEMORY_BUDGET, check_arguments, check_impl, product_dtype, uses_triton
from rlp.kernels.ops import differentiable_once, path_named
from rlp.kernels.problem import ClassOrder, Problem, Upstream, sort_by_class
from rlp.kernels.products import softmax_of
from rlp.kernels.reference import RandomLabelLoss, Statistics, mean_fit


class Factors(NamedTuple):
    """The gradient of a weight ``[H, C, n, D]``: that of class c is the sum of ``dz_b x_b^T`` over its rows b.

    ``dz [B, H, n]``: gradients of the logits; ``x [B, D]`` or ``[B, H, D]``: features; ``classes``: int64 ``[B]``.
    """

    dz: Tensor
    x: Tensor
    classes: Tensor


def row_sparse_random_label_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    classes: Tensor | ClassOrder,
    sink: list[Factors],
    *,
    entropy: bool = False,
    impl: str = "auto",
) -> RandomLabelLoss:
    """:func:`rlp.kernels.loss.random_label_loss` with classes, whose weight and bias get no ``.grad``.

    The backward pass appends the factors of their gradient to `sink` instead. `impl` is ``auto``, ``eager`` or
    ``triton``; the other arguments are those of `random_label_loss`.
    """
    check_arguments(x, weight, bias, target, classes, MEMORY_BUDGET, impl)
    check_factors_impl(impl)
    dtype, grad = product_dtype(x, weight), torch.is_grad_enabled()
    triton = uses_triton(impl, x, dtype)
    order = sort_by_class(classes, weight.shape[1]) if isinstance(classes, Tensor) else classes
    need_weight = grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    options = (dtype, entropy, need_weight, grad and x.requires_grad, MEMORY_BUDGET, triton)
    fit, *stats = _Loss.apply(x, weight, bias, target, order, sink, options)  # pyright: ignore[reportGeneralTypeIssues]
    return RandomLabelLoss(fit, Statistics(*stats))


def check_factors_impl(impl: str) -> None:
    """Raise a UserError unless `impl` is one that can be had and leaves factors."""
    check_impl(impl)
    if impl == "reference":
        raise UserError("impl is 'reference', which knows no factors of gradients; expected auto, eager or triton")


class _Loss(torch.autograd.Function):
    """`options` are the last six of `Problem`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        order: ClassOrder,
        sink: list[Factors],
        options: tuple[torch.dtype, bool, bool, bool, int, bool],
    ) -> tuple[Tensor | None, ...]:
        """``(fit, z_t, lse_rest, z_mean, max_rest, entropy_rest or None)``."""
        problem = Problem(x, weight, bias, target, order, *options)
        with torch.autocast(x.device.type, enabled=False):
            stats, kept = path_named("grouped" if problem.triton else "by_class").forward(problem)
            fit = mean_fit(stats.z_t, stats.lse_rest)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats.max_rest)
        ctx.sink, ctx.options = sink, options
        ctx.save_for_backward(x, weight, bias, target, *order, *stats, *kept)
        return fit, *stats

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """The gradient of x; what the fit loss asks of the weights goes into the sink."""
        x, weight, bias, target, *rest = ctx.saved_tensors
        fit, z_t, lse_rest, z_mean, _, entropy_rest = grads
        problem = Problem(x, weight, bias, target, ClassOrder(*rest[:3]), *ctx.options)
        stats, kept = Statistics(*rest[3:8]), tuple(rest[8:])
        upstream, dx = Upstream(fit, z_t, lse_rest, z_mean, entropy_rest), None
        with torch.autocast(x.device.type, enabled=False):
            if problem.need_weight and fit is not None:
                ctx.sink.append(_factors(problem, stats, kept[0], fit))
            if problem.need_features and upstream.reaches_features:
                path = path_named("grouped" if problem.triton else "by_class")
                dx = path.backward(replace(problem, need_weight=False), stats, kept, upstream._replace(fit=None)).x
        return (dx, *(None,) * 6)


def _factors(problem: Problem, stats: Statistics, kept: Tensor, fit: Tensor) -> Factors:
    """From what the path kept of the logits, whose rows lie in the order of the classes."""
    assert problem.order is not None
    assert kept.shape == (problem.batch, problem.heads, problem.num_labels)
    classes, rows, _ = problem.order
    sorted_stats = stats.map(lambda part: part[rows])
    nothing = Upstream(None, None, None, None, None)
    dz, _ = softmax_of(problem).gradients(
        kept, problem.target[rows], sorted_stats, nothing, problem.num_labels, need_weight=True, need_features=False
    )
    mean = (fit / problem.batch).unsqueeze(-1)
    # With 1 / B in it most of dz would vanish in float16.
    dtype = torch.float32 if problem.dtype == torch.float16 else problem.dtype
    return Factors((dz * mean).to(dtype), problem.x.detach()[rows].to(problem.dtype).to(dtype), classes[rows])
