"""Path `by_class`: heads of its own for each class, in PyTorch; the rows of one class after the other.

On the CPU one `grouped_mm` serves all classes of a head; where it cannot, a loop over the classes that occur. The host
must know how many rows a class has, so that on a GPU this path waits for it: there `grouped` is the fast one.
"""

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
import torch.nn.functional as F

from rlp.errors import UserError
from rlp.kernels.problem import ClassOrder, Gradients, Kept, Problem, Upstream
from rlp.kernels.products import multiply, softmax_of
from rlp.kernels.reference import Statistics


def kept(problem: Problem) -> Kept:
    """What is left of the logits ``[B, H, n]``, rows in the order of the classes, if any gradient is wanted."""
    if not (problem.need_weight or problem.need_features):
        return ()
    return (problem.x.new_empty((problem.batch, problem.heads, problem.num_labels), dtype=problem.stats_dtype),)


def forward(problem: Problem) -> tuple[Statistics, Kept]:
    """Logits head by head, statistics by one pass over them."""
    order = _checked(problem)
    x, logits = problem.x[order.rows].to(problem.dtype), []
    for head in range(problem.heads):
        mine = _rows_times(_of_head(x, head), problem.weight[head].mT, order.offsets, problem.stats_dtype)
        if problem.bias is not None:
            mine += problem.bias[head].to(problem.dtype)[order.classes[order.rows]]
        logits.append(mine)
    joined = _stacked(logits, 1).contiguous()  # grouped_mm may leave gaps between rows
    keep = problem.need_weight or problem.need_features
    found = softmax_of(problem).statistics(joined, problem.target[order.rows], problem.entropy, keep)
    back = order.rows.argsort()
    stats = found.map(lambda part: part[back])
    return stats, (joined,) if keep else ()


def backward(problem: Problem, stats: Statistics, kept: Kept, upstream: Upstream) -> Gradients:
    """One pass over what is kept, then for each head a product for each route; these in the type of the sums."""
    order = _checked(problem)
    arriving = upstream.map(lambda part: part[order.rows])
    found = stats.map(lambda part: part[order.rows])
    to_weight, to_features = softmax_of(problem).gradients(
        kept[0], problem.target[order.rows], found, arriving, problem.num_labels, problem.need_weight,
        problem.need_features,
    )  # fmt: skip
    dx = dw = db = None
    if to_features is not None:
        dx = _feature_gradient(problem, order, to_features).to(problem.x.dtype)
    if to_weight is not None and upstream.fit is not None:
        to_weight *= (upstream.fit / problem.batch).unsqueeze(-1)
        dw = _weight_gradient(problem, order, to_weight).to(problem.weight.dtype)
        if problem.bias is not None:
            db = _bias_gradient(problem, order, to_weight).to(problem.bias.dtype)
    return Gradients(dx, dw, db)


def _checked(problem: Problem) -> ClassOrder:
    order, classes = problem.order, problem.weight.shape[1]
    assert order is not None
    if int(order.offsets[0]) != 0 or int(order.offsets[-1]) != len(order.rows):
        wrong = order.classes[(order.classes < 0) | (order.classes >= classes)]
        raise UserError(f"classes holds {int(wrong[0])}; expected class ids in [0, {classes})")
    return order


def _of_head(x: Tensor, head: int) -> Tensor:
    """``[B, D]``."""
    return x if x.dim() == 2 else x[:, head].contiguous()


def _stacked(parts: list[Tensor], dim: int) -> Tensor:
    """`torch.stack`, without a copy of a single part."""
    return torch.stack(parts, dim) if len(parts) > 1 else parts[0].unsqueeze(dim)


def _of_gradient(dz: Tensor, head: int) -> Tensor:
    """``[B, n]``; rows start at multiples of 16 bytes, as grouped_mm asks."""
    mine = dz[:, head]
    n = mine.shape[1]
    return F.pad(mine, (0, -n % 4))[:, :n] if n % 4 else mine


def _feature_gradient(problem: Problem, order: ClassOrder, dz: Tensor) -> Tensor:
    """``[B, D]``, a sum over the heads, or ``[B, H, D]``."""
    parts = [
        _rows_times(_of_gradient(dz, head), problem.weight[head], order.offsets, dz.dtype)
        for head in range(problem.heads)
    ]
    if problem.x.dim() == 3:
        mine = _stacked(parts, 1)
    else:
        mine = parts[0]
        for part in parts[1:]:
            mine += part
    return torch.empty_like(mine).index_copy_(0, order.rows, mine)


def _weight_gradient(problem: Problem, order: ClassOrder, dz: Tensor) -> Tensor:
    """``[H, C, n, D]``; zeros for the classes that are absent."""
    x = problem.x[order.rows].to(dz.dtype)
    return _stacked([_outer(_of_gradient(dz, h), _of_head(x, h), order.offsets) for h in range(problem.heads)], 0)


def _bias_gradient(problem: Problem, order: ClassOrder, dz: Tensor) -> Tensor:
    """``[H, C, n]``; zeros for the classes that are absent."""
    sums = dz.new_zeros(problem.weight.shape[:3])
    if not dz.is_cuda:
        return sums.index_add_(1, order.classes[order.rows], dz.transpose(0, 1))
    for c, start, end in _occurring(order.offsets):  # there index_add_ would add in a different order every time
        sums[:, c] = dz[start:end].sum(0)
    return sums


# -- products ----------------------------------------------------------------------------------------------------


def _rows_times(a: Tensor, b: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, N]`` of ``a [B, K]``, sorted by class, and ``b [C, K, N]``: each row times its class's matrix."""
    if _can_group(a, b):
        return F.grouped_mm(a, b, offs=offsets[1:].int())
    product = a.new_empty((len(a), b.shape[2]), dtype=dtype)
    for c, start, end in _occurring(offsets):
        product[start:end] = multiply(a[start:end], b[c].to(a.dtype), dtype)
    return product


def _outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """``[C, M, N]`` of ``a [B, M]`` and ``b [B, N]``: ``a^T b`` over the rows of each class."""
    if _can_group(a.T, b):
        return F.grouped_mm(a.T, b, offs=offsets[1:].int())
    product = a.new_zeros((len(offsets) - 1, a.shape[1], b.shape[1]))
    for c, start, end in _occurring(offsets):
        torch.mm(a[start:end].T, b[start:end], out=product[c])
    return product


def _occurring(offsets: Tensor) -> list[tuple[int, int, int]]:
    """Number, first row and end of the classes that have rows."""
    return [(c, start, end) for c, (start, end) in enumerate(pairwise(offsets.tolist())) if start < end]


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
