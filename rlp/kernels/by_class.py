"""Path `by_class`: heads of its own for each class, in PyTorch; the rows of one class after the other.

On the CPU one `grouped_mm` serves all classes of a head; where it cannot, a loop over the classes that occur. Both know
the number of rows of each class on the host, so that on a GPU this path waits for it: there `grouped` is the fast one.
"""

from functools import cache

import torch
from torch import Tensor
import torch.nn.functional as F

from rlp.errors import UserError
from rlp.kernels.problem import ClassOrder, Gradients, Kept, Problem, Upstream
from rlp.kernels.products import multiply, normalised, scaled, softmax_of
from rlp.kernels.reference import Statistics


def kept(problem: Problem) -> Kept:
    """The logits ``[B, H, n]``, if any gradient is wanted."""
    if not (problem.need_weight or problem.need_features):
        return ()
    shape = (problem.batch, problem.heads, problem.num_labels)
    return (problem.x.new_empty(shape, dtype=problem.logits_dtype),)


def forward(problem: Problem) -> tuple[Statistics, Kept]:
    """Logits head by head, statistics by one pass over them."""
    order = _checked(problem)
    shape = (problem.batch, problem.heads, problem.num_labels)
    logits = problem.x.new_empty(shape, dtype=problem.logits_dtype)
    for head in range(problem.heads):
        mine = _rows_times(_sorted_features(problem, head), problem.weight[head].mT, order.offsets, logits.dtype)
        if problem.bias is not None:
            mine += problem.bias[head].to(problem.dtype)[order.classes[order.rows]]
        logits[order.rows, head] = mine
    keep = problem.need_weight or problem.need_features
    return softmax_of(problem).statistics(logits, problem.target, problem.entropy, keep), (logits,) if keep else ()


def backward(problem: Problem, stats: Statistics, kept: Kept, upstream: Upstream) -> Gradients:
    """One pass over the logits, then for each head a product for each route."""
    order = _checked(problem)
    upstream, scale = normalised(upstream, problem.dtype)
    to_weight, to_features = softmax_of(problem).gradients(
        kept[0], problem.target, stats, upstream, problem.num_labels, problem.need_weight, problem.need_features
    )
    dx = dw = db = None
    if to_features is not None:
        dx = scaled(_feature_gradient(problem, order, to_features), scale, problem.x.dtype)
    if to_weight is not None and upstream.fit is not None:
        mean = upstream.fit / problem.batch
        dw = _weight_gradient(problem, order, to_weight, mean).to(problem.weight.dtype)
        if problem.bias is not None:
            each = to_weight.transpose(0, 1).to(problem.stats_dtype) * mean[:, None, None]
            shape = problem.bias.shape
            db = each.new_zeros(shape).index_add_(1, order.classes, each).to(problem.bias.dtype)
    return Gradients(dx, dw, db)


def _checked(problem: Problem) -> ClassOrder:
    order, classes = problem.order, problem.weight.shape[1]
    assert order is not None
    if int(order.offsets[0]) != 0 or int(order.offsets[-1]) != len(order.rows):
        wrong = order.classes[(order.classes < 0) | (order.classes >= classes)]
        raise UserError(f"classes holds {int(wrong[0])}; expected class ids in [0, {classes})")
    return order


def _sorted_features(problem: Problem, head: int) -> Tensor:
    """``[B, D]``: of one head, in the order of the classes."""
    assert problem.order is not None
    x = problem.x if problem.x.dim() == 2 else problem.x[:, head]
    return x[problem.order.rows].to(problem.dtype)


def _sorted_gradient(dz: Tensor, order: ClassOrder, head: int) -> Tensor:
    """``[B, n]``: of one head, in the order of the classes; rows start at multiples of 16 bytes, as grouped_mm asks."""
    mine = dz[order.rows, head]
    n = mine.shape[1]
    return F.pad(mine, (0, -n % 4))[:, :n] if n % 4 else mine


def _feature_gradient(problem: Problem, order: ClassOrder, dz: Tensor) -> Tensor:
    """``[B, D]``, a sum over the heads, or ``[B, H, D]``."""
    total = torch.zeros_like(problem.x, dtype=problem.stats_dtype, memory_format=torch.contiguous_format)
    for head in range(problem.heads):
        mine = _rows_times(_sorted_gradient(dz, order, head), problem.weight[head], order.offsets, total.dtype)
        into = total if total.dim() == 2 else total[:, head]
        into.index_add_(0, order.rows, mine)
    return total


def _weight_gradient(problem: Problem, order: ClassOrder, dz: Tensor, mean: Tensor) -> Tensor:
    """``[H, C, n, D]``; zeros for the classes that are absent."""
    parts = [
        _outer(_sorted_gradient(dz, order, head), _sorted_features(problem, head), order.offsets, factor)
        for head, factor in enumerate(mean)
    ]
    return torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)


# -- products ----------------------------------------------------------------------------------------------------


def _rows_times(a: Tensor, b: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, N]`` of ``a [B, K]``, sorted by class, and ``b [C, K, N]``: each row times its class's matrix."""
    if _can_group(a, b):
        return F.grouped_mm(a, b, offs=offsets[1:].int())
    product = a.new_empty((len(a), b.shape[2]), dtype=dtype)
    for c, (start, end) in _occurring(offsets):
        product[start:end] = multiply(a[start:end], b[c].to(a.dtype), dtype)
    return product


def _outer(a: Tensor, b: Tensor, offsets: Tensor, factor: Tensor) -> Tensor:
    """``[C, M, N]`` of ``a [B, M]`` and ``b [B, N]``: ``factor * a^T b`` over the rows of each class."""
    if _can_group(a.T, b):
        return F.grouped_mm(a.mul_(factor).T, b, offs=offsets[1:].int())
    dtype = torch.promote_types(a.dtype, torch.float32)
    product = a.new_zeros((len(offsets) - 1, a.shape[1], b.shape[1]), dtype=dtype)
    for c, (start, end) in _occurring(offsets):
        torch.mul(multiply(a[start:end].T, b[start:end], dtype), factor, out=product[c])
    return product


def _occurring(offsets: Tensor) -> list[tuple[int, tuple[int, int]]]:
    """Number, first row and end of the classes that have rows."""
    bounds = offsets.tolist()
    return [(c, pair) for c, pair in enumerate(zip(bounds[:-1], bounds[1:], strict=True)) if pair[0] < pair[1]]


def _can_group(a: Tensor, b: Tensor) -> bool:
    """Whether grouped_mm takes these matrices: float32 on a CPU, dense in one direction, on multiples of 16 bytes."""
    return a.dtype == b.dtype == torch.float32 and a.is_cpu and _aligned(a) and _aligned(b) and _has_grouped_mm()


def _aligned(matrix: Tensor) -> bool:
    rows, columns = matrix.shape[-2:]
    row, column = matrix.stride()[-2:]
    dense = (column == 1 and row >= columns) or (row == 1 and column >= rows)
    others = [stride for stride in matrix.stride() if stride != 1]
    return dense and len(others) == matrix.dim() - 1 and not any(s % 4 for s in others) and matrix.data_ptr() % 16 == 0


@cache
def _has_grouped_mm() -> bool:
    """Some versions of PyTorch have none, or none for float32 on a CPU."""
    try:
        F.grouped_mm(torch.ones(4, 4), torch.ones(1, 4, 4), offs=torch.tensor([4], dtype=torch.int32))
    except (AttributeError, RuntimeError):
        return False
    return True
