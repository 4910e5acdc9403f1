"""The loss as two PyTorch operators, forward and backward, so that autograd and torch.compile know it.

The last seven arguments of both are the options of `Problem`. An operator returns tensors only, so that what is absent
is an empty tensor.
"""

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from rlp.kernels.problem import ClassOrder, Path, Problem, Upstream
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


@torch.library.custom_op("rlp::random_label_loss", mutates_args=())
def random_label_loss(
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
    fit_to_features: bool,
    budget: int,
    triton: bool,
) -> list[Tensor]:
    """Forward pass: ``[fit, z_t, lse_rest, z_mean, max_rest, entropy_rest, *kept]``; ``path`` is one of `PATHS`."""
    problem = _problem(x, weight, bias, target, order, dtype, entropy, need_weight, need_features, budget, triton)
    with torch.autocast(x.device.type, enabled=False):  # `dtype` has taken it into account
        stats, kept = path_named(path).forward(problem)
        return _pack(mean_fit(stats.z_t, stats.lse_rest), stats, kept)


@random_label_loss.register_fake
def _(
    x, weight, bias, target, order, path, dtype, entropy, need_weight, need_features, fit_to_features, budget, triton
):  # fmt: skip
    problem = _problem(x, weight, bias, target, order, dtype, entropy, need_weight, need_features, budget, triton)
    shape = (problem.batch, problem.heads)
    parts = [x.new_empty(shape, dtype=problem.stats_dtype) for _ in range(5 if entropy else 4)]
    fit = x.new_empty(problem.heads, dtype=problem.stats_dtype)
    return _pack(fit, Statistics(*parts), path_named(path).kept(problem))


def _pack(fit: Tensor, stats: Statistics, kept: tuple[Tensor, ...]) -> list[Tensor]:
    entropy = fit.new_empty(0) if stats.entropy_rest is None else stats.entropy_rest
    return [fit, *stats[:4], entropy, *kept]  # pyright: ignore[reportReturnType]


def unpack(outputs: list[Tensor], entropy: bool) -> tuple[Tensor, Statistics, tuple[Tensor, ...]]:
    """Fit loss, statistics and what was kept, of the operator's outputs."""
    fit, z_t, lse_rest, z_mean, max_rest, entropy_rest, *kept = outputs
    return fit, Statistics(z_t, lse_rest, z_mean, max_rest, entropy_rest if entropy else None), tuple(kept)


@torch.library.custom_op("rlp::random_label_loss_backward", mutates_args=())
def random_label_loss_backward(
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
    upstream = Upstream(fit, z_t, lse_rest, z_mean, entropy_rest)
    with torch.autocast(x.device.type, enabled=False):
        found = path_named(path).backward(problem, stats, kept, upstream)
    return [x.new_empty(0) if part is None else part for part in found]


@random_label_loss_backward.register_fake
def _(
    fit, z_t, lse_rest, z_mean, entropy_rest, outputs, x, weight, bias, target, order,
    path, dtype, entropy, need_weight, need_features, budget, triton,
):  # fmt: skip
    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        return x.new_empty(0) if tensor is None or not needed else tensor.new_empty(tensor.shape)

    return [like(x, need_features), like(weight, need_weight), like(bias, need_weight)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, bias, target, order, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # None says that a pass can be left out
    ctx.has_bias, ctx.ordered = bias is not None, bool(order)
    ctx.save_for_backward(x, weight, bias, target, *order, *output)


def _backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    x, weight, bias, target, *rest = ctx.saved_tensors
    order, outputs = rest[: 3 * ctx.ordered], rest[3 * ctx.ordered :]
    path, dtype, entropy, need_weight, need_features, fit_to_features, budget, triton = ctx.options
    fit, z_t, lse_rest, z_mean, _, entropy_rest, *_ = upstream
    entropy_rest = entropy_rest if entropy else None
    if fit_to_features and fit is not None:
        _, stats, _ = unpack(outputs, entropy)
        step = fit / len(x) * torch.sigmoid(stats.lse_rest - stats.z_t)  # d fit / d lse_rest
        z_t, lse_rest = -step if z_t is None else z_t - step, step if lse_rest is None else lse_rest + step
    need_weight = need_weight and fit is not None
    need_features = need_features and any(part is not None for part in (z_t, lse_rest, z_mean, entropy_rest))
    found = random_label_loss_backward(
        fit, z_t, lse_rest, z_mean, entropy_rest, outputs, x, weight, bias, target, order,
        path, dtype, entropy, need_weight, need_features, budget, triton,
    )  # fmt: skip
    needed = (need_features, need_weight, need_weight and ctx.has_bias)
    gradients = [part if wanted else None for part, wanted in zip(found, needed, strict=True)]
    return (*gradients, None, [None] * len(order), *[None] * len(ctx.options))


random_label_loss.register_autograd(_backward, setup_context=_setup_context)
