"""Path `whole`: the logits of all heads fit into the budget and are kept; three matrix products a step.

For draws at one tap: x [B, D] and weight [H, n, D] are one product with a softmax over segments of n columns.
"""

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


def kept(problem: Problem) -> Kept:
    """The logits ``[B, H, n]``, if any gradient is wanted; without the heads' dimension in front they are dense."""
    if not (problem.need_weight or problem.need_features):
        return ()
    shape = (problem.batch, problem.heads, problem.num_labels)
    if problem.x.dim() == 2:
        return (problem.x.new_empty(shape, dtype=problem.logits_dtype),)
    return (problem.x.new_empty((shape[1], shape[0], shape[2]), dtype=problem.logits_dtype).transpose(0, 1),)


def forward(problem: Problem) -> tuple[Statistics, Kept]:
    """Logits by one product, statistics by one pass over them."""
    logits = logits_of(*operands(problem), problem.logits_dtype)
    keep = problem.need_weight or problem.need_features
    return softmax_of(problem).statistics(logits, problem.target, problem.entropy, keep), (logits,) if keep else ()


def backward(problem: Problem, stats: Statistics, kept: Kept, upstream: Upstream) -> Gradients:
    """One pass over the logits for the routes that are needed, then one product for each."""
    x, weight, _ = operands(problem)
    upstream, scale = normalised(upstream, problem.dtype)
    to_weight, to_features = softmax_of(problem).gradients(
        kept[0], problem.target, stats, upstream, problem.num_labels, problem.need_weight, problem.need_features
    )
    dx = dw = db = None
    if to_features is not None:
        dx = scaled(feature_gradient(to_features, weight, x.dim() == 2, problem.stats_dtype), scale, problem.x.dtype)
    if to_weight is not None and upstream.fit is not None:
        mean = upstream.fit / problem.batch
        dw = scaled(weight_gradient(to_weight, x, problem.stats_dtype), mean[:, None, None], problem.weight.dtype)
        if problem.bias is not None:
            db = scaled(to_weight.sum(0, dtype=problem.stats_dtype), mean[:, None], problem.bias.dtype)
    return Gradients(dx, dw, db)
