"""Path `by_columns`: any number of heads and labels in any budget; logits are computed again in the backward pass.

A piece is a group of whole heads or, where one head is too large, some of its labels. The statistics of a head's pieces
are merged; the gradients of a piece need only the merged ones. Each element of the weight gradient is written once.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from rlp.kernels.problem import Gradients, Kept, Problem, Upstream
from rlp.kernels.products import (
    feature_gradient,
    logits_of,
    normalised,
    operands,
    scaled,
    softmax_of,
    weight_gradient,
)
from rlp.kernels.reference import Statistics

Piece = tuple[slice, slice]
"""Some heads, and some labels of these."""


def pieces(problem: Problem) -> Iterator[tuple[slice, list[Piece]]]:
    """Groups of heads, each with its pieces, whose logits and two gradients fit into the budget if one column does."""
    columns = max(1, problem.budget // ((3 + problem.entropy) * problem.batch * problem.logits_dtype.itemsize))
    heads, n = max(1, columns // problem.num_labels), problem.num_labels
    for start in range(0, problem.heads, heads):
        group = slice(start, min(start + heads, problem.heads))
        step = min(columns, n)
        yield group, [(group, slice(first, min(first + step, n))) for first in range(0, n, step)]


def _logits(problem: Problem, piece: Piece) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, features, weight and target of a piece; the target counts from the piece's first label."""
    heads, labels = piece
    x, weight, bias = operands(problem, heads, labels)
    x = x if x.dim() == 2 else x[:, heads]
    return logits_of(x, weight, bias, problem.logits_dtype), x, weight, problem.target[:, heads] - labels.start


def kept(problem: Problem) -> Kept:
    """Nothing."""
    return ()


def forward(problem: Problem) -> tuple[Statistics, Kept]:
    """The statistics, piece by piece."""
    groups = []
    for _, group in pieces(problem):
        parts = []
        for piece in group:
            logits, _, _, target = _logits(problem, piece)
            parts.append(softmax_of(problem).statistics(logits, target, problem.entropy, keep=False))
        groups.append(merge(parts, [labels.stop - labels.start for _, labels in group]))
    joined = (None if parts[0] is None else torch.cat(parts, 1) for parts in zip(*groups, strict=True))
    return Statistics(*joined), ()  # pyright: ignore[reportArgumentType]


def merge(parts: Sequence[Statistics], counts: Sequence[int]) -> Statistics:
    """Statistics of heads from those of their pieces, in the order of the labels; `counts` labels in each piece.

    The entropy follows the chain rule: that of the choice of a piece, and the mean of those within.
    """
    if len(parts) == 1:
        return parts[0]
    z_t, lse, peak = (torch.stack([part[place] for part in parts]) for place in (0, 1, 3))  # pyright: ignore
    lse_rest = lse.logsumexp(0)
    # By numbers of the host: a tensor of them would be a copy that it waits for, and that no CUDA graph can hold.
    means = [part.z_mean * (count / sum(counts)) for part, count in zip(parts, counts, strict=True)]
    entropy = None
    if parts[0].entropy_rest is not None:
        within = torch.stack([part.entropy_rest for part in parts if part.entropy_rest is not None])
        share = (lse - lse_rest).exp()
        entropy = (torch.special.entr(share) + share * within).sum(0)
    return Statistics(z_t.amax(0), lse_rest, torch.stack(means).sum(0), peak.amax(0), entropy)


def backward(problem: Problem, stats: Statistics, kept: Kept, upstream: Upstream) -> Gradients:
    """Logits once more, piece by piece, and the products of the routes that are needed."""
    found = gradient_sums(problem, stats, upstream)
    return found if found.x is None else found._replace(x=found.x.to(problem.x.dtype))


def gradient_sums(problem: Problem, stats: Statistics, upstream: Upstream) -> Gradients:
    """The same before the features' gradient is rounded: it is one in `stats_dtype` to which others can be added."""
    upstream, scale = normalised(upstream, problem.dtype)
    totals = _empty(problem)
    for heads, group in pieces(problem):
        of_group = partial(_columns, heads)
        for piece in group:
            _add_piece(problem, piece, stats.map(of_group), upstream.map(of_group), totals)
    dx, dw, db = totals
    mean = None if upstream.fit is None else (upstream.fit / problem.batch)[:, None]
    return Gradients(
        None if dx is None else scaled(dx, scale, problem.stats_dtype),
        None if dw is None or mean is None else dw.mul_(mean.unsqueeze(-1)),
        None if db is None or mean is None else db.mul_(mean),
    )


def _columns(heads: slice, tensor: Tensor) -> Tensor:
    return tensor[:, heads]


def _empty(problem: Problem) -> Gradients:
    """The features' gradient zero, for it is a sum; the others in their final types."""
    bias = problem.bias
    return Gradients(
        problem.x.new_zeros(problem.x.shape, dtype=problem.stats_dtype) if problem.need_features else None,
        problem.weight.new_empty(problem.weight.shape) if problem.need_weight else None,
        bias.new_empty(bias.shape) if problem.need_weight and bias is not None else None,
    )


def _add_piece(problem: Problem, piece: Piece, stats: Statistics, upstream: Upstream, totals: Gradients) -> None:
    heads, labels = piece
    logits, x, weight, target = _logits(problem, piece)
    softmax = softmax_of(problem)
    softmax.again(logits, target, stats)
    to_weight, to_features = softmax.gradients(
        logits, target, stats, upstream, problem.num_labels, problem.need_weight, problem.need_features
    )
    if totals.x is not None and to_features is not None:
        shared = x.dim() == 2
        into = totals.x if shared else totals.x[:, heads]
        into += feature_gradient(to_features, weight, shared, problem.stats_dtype)
    if totals.weight is not None and to_weight is not None:
        totals.weight[heads, labels] = weight_gradient(to_weight, x, problem.stats_dtype)
        if totals.bias is not None:
            totals.bias[heads, labels] = to_weight.sum(0, dtype=problem.stats_dtype)
