"""Path `by_rows`: one or a few heads with more labels than the budget holds logits for.

A chunk of rows at a time: logits, statistics, and at once what both gradients need, so that no logit is computed twice.
With ``r_j = exp(z_j - lse_rest)`` off the label and ``q_j = r_j - [j = t]``:

- the fit loss has the logit gradient ``(1 - p) q``, so its weight gradient is ``q^T ((1 - p) x)``;
- a function of the statistics has, at the features, the gradient ``g_lse (q W) + (g_lse + g_t) W_t + g_mean mean(W)``
  (the entropy has not: that is left to `by_columns`).

One matrix q serves both routes. It overwrites the logits as ``q - 1 / (n - 1)``, whose rounding is small where r is
nearly uniform; the rest is of rank one and put back in float32.
"""

import torch
from torch import Tensor

from rlp.kernels.problem import Gradients, Kept, Problem, Upstream
from rlp.kernels.products import add_product_, logits_of, multiply, operands, softmax_of
from rlp.kernels.reference import Statistics


def rows_per_chunk(problem: Problem) -> int:
    """Rows whose logits fit into the budget, at least one; chunks of about equal size."""
    most = max(1, problem.budget // (problem.num_labels * problem.logits_dtype.itemsize))
    chunks = -(-problem.batch // most)
    return -(-problem.batch // chunks)


def kept(problem: Problem) -> Kept:
    """``[H, n, D]``, ``[H, n]`` and ``[H, D]`` of the fit loss, and ``q W`` ``[B, H, D]``; empty what is not needed."""

    def new(needed: bool, *shape: int) -> Tensor:
        return problem.x.new_empty(shape if needed else 0, dtype=problem.stats_dtype)

    heads, n, dim = problem.heads, problem.num_labels, problem.dim
    to_weight = problem.need_weight
    return (
        new(to_weight, heads, n, dim),
        new(to_weight and problem.bias is not None, heads, n),
        new(to_weight, heads, dim),
        new(problem.need_features, problem.batch, heads, dim),
    )


def forward(problem: Problem) -> tuple[Statistics, Kept]:
    """All products; the upstream gradient of a head's mean fit loss is one number, with which backward multiplies."""
    parts = kept(problem)
    shape = (problem.batch, problem.heads)
    stats = [problem.x.new_empty(shape, dtype=problem.stats_dtype) for _ in range(4)]
    given = operands(problem)
    for head in range(problem.heads):
        _head(problem, head, given, stats, parts)
    return Statistics(*stats), parts


def _head(
    problem: Problem, head: int, given: tuple[Tensor, Tensor, Tensor | None], stats: list[Tensor], parts: Kept
) -> None:
    """Fills column `head` of the statistics and of what is kept."""
    x, weight, bias = given
    x = x if x.dim() == 2 else x[:, head]
    one, one_bias = weight[head : head + 1], None if bias is None else bias[head : head + 1]
    share = 1 / (problem.num_labels - 1)
    mean_others = weight[head].sum(0, dtype=problem.stats_dtype) * share if problem.need_features else None
    softmax, step = softmax_of(problem), rows_per_chunk(problem)
    for start in range(0, problem.batch, step):
        rows = slice(start, start + step)
        logits = logits_of(x[rows], one, one_bias, problem.logits_dtype)
        found = softmax.replace_by_residual(logits, problem.target[rows, head : head + 1])
        for part, value in zip(stats, found, strict=False):
            part[rows, head : head + 1] = value
        residual = logits.squeeze(1).to(problem.dtype)
        if problem.need_weight:
            _add_weight_gradient(residual, x[rows], found, [part[head : head + 1] for part in parts[:3]], start == 0)
        if mean_others is not None:
            parts[3][rows, head] = multiply(residual, one[0], problem.stats_dtype) + mean_others


def _add_weight_gradient(residual: Tensor, x: Tensor, stats: Statistics, parts: list[Tensor], first: bool) -> None:
    """Adds the rows' share of ``Σ (1 - p) q x^T`` and ``Σ (1 - p) q``, with ``q = residual + 1 / (n - 1)``."""
    weight, bias, pull = parts
    wrong = torch.sigmoid(stats.lse_rest - stats.z_t)  # 1 - p, [R, 1]
    pulled = (x * wrong).to(x.dtype)
    add_product_(weight[0], residual.T, pulled, first)
    total = pulled.sum(0, dtype=pull.dtype)
    pull[0] = total if first else pull[0] + total
    if bias.numel():
        add_product_(bias.T, residual.T, wrong.to(x.dtype), first)
        bias += wrong.to(x.dtype).sum(dtype=bias.dtype) / (residual.shape[1] - 1)


def backward(problem: Problem, stats: Statistics, kept: Kept, upstream: Upstream) -> Gradients:
    """Scales what the forward pass found."""
    weight, bias, pull, toward = kept
    dx = _feature_gradient(problem, upstream, toward) if problem.need_features else None
    if upstream.fit is None or not problem.need_weight:
        return Gradients(dx)
    mean = (upstream.fit / problem.batch)[:, None, None]
    shift = pull.unsqueeze(1) * mean / (problem.num_labels - 1)
    dw = torch.addcmul(shift, weight, mean).to(problem.weight.dtype)
    return Gradients(dx, dw, None if problem.bias is None else (bias * mean[:, 0]).to(problem.bias.dtype))


def _feature_gradient(problem: Problem, upstream: Upstream, toward: Tensor) -> Tensor:
    """``[B, D]`` or ``[B, H, D]`` from ``q W`` and the gradients of the statistics."""
    weight, terms, at_label = problem.weight, [], upstream.z_t
    if upstream.lse_rest is not None:
        terms.append(upstream.lse_rest.unsqueeze(-1) * toward)
        at_label = upstream.lse_rest if at_label is None else upstream.lse_rest + at_label
    if at_label is not None:
        heads = torch.arange(problem.heads, device=weight.device)
        terms.append(at_label.unsqueeze(-1) * weight[heads, problem.target].to(toward.dtype))
    if upstream.z_mean is not None:
        terms.append(upstream.z_mean.unsqueeze(-1) * weight.mean(1, dtype=toward.dtype))
    total = torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]
    return (total if problem.x.dim() == 3 else total.sum(1)).to(problem.x.dtype)
