"""The loss for autograd: as a function of its own when run step by step, as PyTorch operators when compiled.

The operators are what ``torch.compile`` can keep whole in its graph; called one by one they cost some hundred
microseconds on the host, more than a small problem on the device, so that eager code goes past them. An operator
returns tensors only: what is absent is an empty tensor. The last arguments everywhere are the options of `Problem`.
"""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from rlp.errors import UserError
from rlp.kernels.problem import ClassOrder, Gradients, Kept, Path, Problem, Upstream
from rlp.kernels.reference import Statistics, mean_fit

PATHS = ("whole", "by_rows", "by_columns", "by_class", "tiny", "grouped")
"""The modules of this package that are a `Path`."""


def path_named(name: str) -> Path:
    """A path's module; imported when first used, for two of them need Triton."""
    return cast(Path, import_module(f"rlp.kernels.{name}"))


def _problem(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, order: list[Tensor], *options: Any
) -> Problem:
    return Problem(x, weight, bias, target, ClassOrder(*order) if order else None, *options)


def _forward(problem: Problem, path: str) -> tuple[Tensor, Statistics, Kept]:
    with torch.autocast(problem.x.device.type, enabled=False):  # `dtype` has taken it into account
        stats, kept = path_named(path).forward(problem)
        return mean_fit(stats.z_t, stats.lse_rest), stats, kept


def _backward(problem: Problem, path: str, stats: Statistics, kept: Kept, upstream: Upstream) -> Gradients:
    if not problem.batch:  # the paths divide by it
        return Gradients(
            torch.zeros_like(problem.x) if problem.need_features else None,
            torch.zeros_like(problem.weight) if problem.need_weight else None,
            None if problem.bias is None or not problem.need_weight else torch.zeros_like(problem.bias),
        )
    with torch.autocast(problem.x.device.type, enabled=False):
        return path_named(path).backward(problem, stats, kept, upstream)


def _arriving(stats: Statistics, grads: tuple[Tensor | None, ...], fit_to_features: bool) -> Upstream:
    """From the gradients of fit, z_t, lse_rest, z_mean and entropy_rest; the first one's way to the features added."""
    fit, z_t, lse_rest, *others = grads
    if fit_to_features and fit is not None:
        step = fit / len(stats.z_t) * torch.sigmoid(stats.lse_rest - stats.z_t)  # d fit / d lse_rest
        z_t, lse_rest = -step if z_t is None else z_t - step, step if lse_rest is None else lse_rest + step
    return Upstream(fit, z_t, lse_rest, *others)


# -- step by step ------------------------------------------------------------------------------------------------


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A function's backward pass whose results are an error to differentiate.

    PyTorch's `once_differentiable` takes them for constants where the arriving gradients are: a gradient penalty on
    ``fit.sum()`` would do nothing, without a word.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # nobody passed create_graph
            return found
        return _Once.apply(torch.zeros((), requires_grad=True), *found)  # pyright: ignore[reportReturnType]

    return wrapped


class _Once(torch.autograd.Function):
    """Gradients as they are; their own are an error."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, *grads: Tensor | None):
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        raise UserError("the random-label loss has no second derivatives; expected create_graph=False, or impl "
                        "'reference'")  # fmt: skip


class _Loss(torch.autograd.Function):
    """``(fit, z_t, lse_rest, z_mean, entropy_rest or None, max_rest)``."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, target, order, path, fit_to_features, *options):
        problem = _problem(x, weight, bias, target, order, *options)
        fit, stats, kept = _forward(problem, path)
        ctx.set_materialize_grads(False)  # None says that a pass can be left out
        ctx.mark_non_differentiable(stats.max_rest)
        ctx.path, ctx.fit_to_features, ctx.options, ctx.ordered = path, fit_to_features, options, len(order)
        ctx.save_for_backward(x, weight, bias, target, stats.entropy_rest, stats.z_t, stats.lse_rest, stats.z_mean,
                              stats.max_rest, *order, *kept)  # fmt: skip
        return fit, stats.z_t, stats.lse_rest, stats.z_mean, stats.entropy_rest, stats.max_rest

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, target, entropy_rest, z_t, lse_rest, z_mean, max_rest, *rest = ctx.saved_tensors
        stats = Statistics(z_t, lse_rest, z_mean, max_rest, entropy_rest)
        upstream = _arriving(stats, grads[:5], ctx.fit_to_features)
        dtype, entropy, need_weight, need_features, *others = ctx.options
        need_weight, need_features = (
            need_weight and upstream.fit is not None,
            need_features and upstream.reaches_features,
        )
        problem = _problem(
            x, weight, bias, target, rest[: ctx.ordered], dtype, entropy, need_weight, need_features, *others
        )
        found = _backward(problem, ctx.path, stats, tuple(rest[ctx.ordered :]), upstream)
        return (*found, None, None, None, None, *[None] * len(ctx.options))


def random_label_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    order: list[Tensor],
    path: str,
    fit_to_features: bool,
    *options: Any,
) -> tuple[Tensor, Statistics]:
    """Fit loss and statistics with their gradients; `path` is one of `PATHS`, `order` a `ClassOrder` or empty.

    `options`: dtype, entropy, need_weight, need_features, budget, triton, as in `Problem`.
    """
    if torch.compiler.is_compiling():
        fit, stats, _ = unpack(
            random_label_loss_op(x, weight, bias, target, order, path, fit_to_features, *options), options[1]
        )
        return fit, stats._replace(max_rest=stats.max_rest.detach())
    fit, z_t, lse_rest, z_mean, entropy_rest, max_rest = _Loss.apply(
        x, weight, bias, target, order, path, fit_to_features, *options
    )
    return fit, Statistics(z_t, lse_rest, z_mean, max_rest, entropy_rest)


# -- compiled ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("rlp::random_label_loss", mutates_args=())
def random_label_loss_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    order: list[Tensor],
    path: str,
    fit_to_features: bool,
    dtype: torch.dtype,
    entropy: bool,
    need_weight: bool,
    need_features: bool,
    budget: int,
    triton: bool,
) -> list[Tensor]:
    """Forward pass: ``[fit, z_t, lse_rest, z_mean, max_rest, entropy_rest, *kept]``."""
    options = (dtype, entropy, need_weight, need_features, budget, triton)
    return _pack(*_forward(_problem(x, weight, bias, target, order, *options), path))


@random_label_loss_op.register_fake
def _(x, weight, bias, target, order, path, fit_to_features, *options):
    problem = _problem(x, weight, bias, target, order, *options)
    shape = (problem.batch, problem.heads)
    parts = [x.new_empty(shape, dtype=problem.stats_dtype) for _ in range(5 if problem.entropy else 4)]
    fit = x.new_empty(problem.heads, dtype=problem.stats_dtype)
    return _pack(fit, Statistics(*parts), path_named(path).kept(problem))


def _pack(fit: Tensor, stats: Statistics, kept: Kept) -> list[Tensor]:
    entropy_rest = fit.new_empty(0) if stats.entropy_rest is None else stats.entropy_rest
    return [fit, stats.z_t, stats.lse_rest, stats.z_mean, stats.max_rest, entropy_rest, *kept]


def unpack(outputs: list[Tensor], entropy: bool) -> tuple[Tensor, Statistics, Kept]:
    """Fit loss, statistics and what was kept, of the operator's outputs."""
    fit, z_t, lse_rest, z_mean, max_rest, entropy_rest, *kept = outputs
    return fit, Statistics(z_t, lse_rest, z_mean, max_rest, entropy_rest if entropy else None), tuple(kept)


@torch.library.custom_op("rlp::random_label_loss_backward", mutates_args=())
def random_label_loss_backward_op(
    fit: Tensor | None,
    z_t: Tensor | None,
    lse_rest: Tensor | None,
    z_mean: Tensor | None,
    entropy_rest: Tensor | None,
    outputs: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    order: list[Tensor],
    path: str,
    dtype: torch.dtype,
    entropy: bool,
    need_weight: bool,
    need_features: bool,
    budget: int,
    triton: bool,
) -> list[Tensor]:
    """Gradients of features, weight and bias (empty if not needed), from `Upstream` and the forward's outputs."""
    problem = _problem(x, weight, bias, target, order, dtype, entropy, need_weight, need_features, budget, triton)
    _, stats, kept = unpack(outputs, entropy)
    found = _backward(problem, path, stats, kept, Upstream(fit, z_t, lse_rest, z_mean, entropy_rest))
    # Compiled code takes the strides for those that the function below promises.
    return [x.new_empty(0) if part is None else part.contiguous() for part in found]


@random_label_loss_backward_op.register_fake
def _(fit, z_t, lse_rest, z_mean, entropy_rest, outputs, x, weight, bias, target, order, path, *options):
    _, _, need_weight, need_features, *_ = options

    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        return x.new_empty(0) if tensor is None or not needed else tensor.new_empty(tensor.shape)

    return [like(x, need_features), like(weight, need_weight), like(bias, need_weight)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, bias, target, order, ctx.path, ctx.fit_to_features, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.ordered = len(order)
    ctx.save_for_backward(x, weight, bias, target, *order, *output)


def _compiled_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, weight, bias, target, *rest = ctx.saved_tensors
    order, outputs = rest[: ctx.ordered], rest[ctx.ordered :]
    dtype, entropy, need_weight, need_features, *others = ctx.options
    fit, z_t, lse_rest, z_mean, _, entropy_rest, *_ = grads
    arriving = (fit, z_t, lse_rest, z_mean, entropy_rest if entropy else None)
    upstream = _arriving(unpack(outputs, entropy)[1], arriving, ctx.fit_to_features)
    needed = (need_features and upstream.reaches_features, need_weight and fit is not None)
    found = random_label_loss_backward_op(
        *upstream, outputs, x, weight, bias, target, order, ctx.path, dtype, entropy, needed[1], needed[0], *others
    )
    wanted = (*needed, needed[1] and bias is not None)
    gradients = [part if is_wanted else None for part, is_wanted in zip(found, wanted, strict=True)]
    return (*gradients, None, [None] * len(order), None, None, *[None] * len(ctx.options))


random_label_loss_op.register_autograd(_compiled_backward, setup_context=_setup_context)
