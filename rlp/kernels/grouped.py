# pyright: reportCallIssue=false
"""Path `grouped`: heads of its own for each class, in Triton; the weight is read once, its gradient written once.

Time goes into the bytes of the weight ``[H, C, n, D]``. A program holds up to 16 rows of one class and passes over that
class's weight once: logits (kept, a small part of it), statistics, and as in attention ``Σ_j r_j W_j`` with
``r_j = exp(z_j - lse_rest)`` off the label. From this and the mean of the weight follows the features' gradient of any
function of the statistics but the entropy, ``g_lse Σ_j r_j W_j + g_t W_t + g_mean mean_j W_j``. Where the entropy is
asked for, the products are of full precision, or the sums do not fit into a program or the budget, the backward pass
reads the weight once more.
"""

import torch
from torch import Tensor
import triton
import triton.language as tl

from rlp.kernels.grouped_kernels import combine_kernel, features_kernel, forward_kernel, weight_kernel
from rlp.kernels.problem import ClassOrder, Gradients, Kept, Problem, Upstream
from rlp.kernels.products import normalised, scaled
from rlp.kernels.reference import Statistics
from rlp.kernels.triton_math import dot_types, is_nvidia

MOST_FEATURES = 1024
"""The sums of 16 rows of so many features fit into a program's registers."""
MOST_BYTES = 256 * 2**20
"""That the sums may take."""


def keeps_sums(problem: Problem) -> bool:
    """Whether ``Σ_j r_j W_j`` is kept for the features' gradient; by shapes and types alone."""
    fits = problem.dim <= MOST_FEATURES and problem.dtype != torch.float32  # whose products would need more registers
    size = 2 * problem.batch * problem.heads * problem.dim * problem.stats_dtype.itemsize
    return problem.need_features and not problem.entropy and fits and size <= MOST_BYTES


def kept(problem: Problem) -> Kept:
    """Logits ``[B, H, n]``; sums and, from the first row of each class on, means ``[2, B, H, D]``; or empty.

    Rows lie in the order of the classes.
    """

    def new(needed: bool, *shape: int) -> Tensor:
        return problem.x.new_empty(shape if needed else 0, dtype=problem.stats_dtype)

    rows, sums = (problem.batch, problem.heads), keeps_sums(problem)
    needs_logits = problem.need_weight or (problem.need_features and not sums)
    return new(needs_logits, *rows, problem.num_labels), new(sums, 2, *rows, problem.dim)


def forward(problem: Problem) -> tuple[Statistics, Kept]:
    """One launch."""
    order, parts = _order(problem), kept(problem)
    stats = [torch.empty_like(problem.target, dtype=problem.stats_dtype) for _ in range(5 if problem.entropy else 4)]
    stats = [part.contiguous() for part in stats]
    fused = parts[1].numel() > 0
    if fused:
        parts[1][1].zero_()  # the places where no class begins, so that all that is kept is the same on every run
    launch = forward_launch(problem.num_labels, problem.dim, problem.weight.itemsize, fused)
    x = _dense_rows(problem.x)
    with torch.cuda.device_of(x):
        forward_kernel[(slots(problem, launch["ROWS"]) + 1, problem.heads)](
            x, problem.weight, _contiguous(problem.bias), problem.target.contiguous(), order.rows, order.offsets,
            *stats, *([None] if not problem.entropy else []), *(part if part.numel() else None for part in parts),
            problem.batch, *_sizes(problem), *_strides(x), *problem.weight.stride(), STEPS=_steps(problem),
            INDEX=_index(problem), **dot_types(problem), **launch,
        )  # fmt: skip
    return Statistics(*stats), parts


def backward(problem: Problem, stats: Statistics, kept: Kept, upstream: Upstream) -> Gradients:
    """One launch for each route."""
    logits, toward = kept
    dx = dw = db = None
    if problem.need_features and upstream.reaches_features:
        dx = _combine(problem, toward, upstream) if toward.numel() else _features(problem, logits, stats, upstream)
    if problem.need_weight and upstream.fit is not None:
        dw, db = _weights(problem, logits, stats, upstream.fit)
    return Gradients(dx, dw, db)


def _combine(problem: Problem, toward: Tensor, upstream: Upstream) -> Tensor:
    order, shared = _order(problem), problem.x.dim() == 2
    dx = problem.x.new_empty(problem.x.shape)
    block, types = _block(problem.dim, problem.dim), dot_types(problem)
    with torch.cuda.device_of(dx):
        combine_kernel[(problem.batch, 1 if shared else problem.heads)](
            toward, problem.weight, problem.target.contiguous(), order.classes, order.rows, order.offsets,
            *(_contiguous(part) for part in upstream[1:4]), dx, problem.batch, *_sizes(problem),
            *problem.weight.stride(), ACC=types["ACC"], OPERAND=types["OPERAND"], SHARED=shared,
            INDEX=_index(problem), BLOCK_D=block, num_warps=max(1, min(4, block // 128)),
        )  # fmt: skip
    return dx


def _features(problem: Problem, logits: Tensor, stats: Statistics, upstream: Upstream) -> Tensor:
    order, shared = _order(problem), problem.x.dim() == 2
    upstream, scale = normalised(upstream, problem.dtype)
    # Zeros for the rows whose class does not exist.
    dx = problem.x.new_zeros(problem.x.shape, dtype=problem.x.dtype if scale is None else problem.stats_dtype)
    launch = features_launch(problem.num_labels, problem.dim, problem.weight.itemsize)
    grid = (slots(problem, launch["ROWS"]), triton.cdiv(problem.dim, launch["BLOCK_D"]), 1 if shared else problem.heads)
    with torch.cuda.device_of(dx):
        features_kernel[grid](
            logits, problem.weight, problem.target.contiguous(), order.rows, order.offsets, stats.lse_rest,
            stats.entropy_rest, *(_contiguous(part) for part in upstream[1:]), dx, *_sizes(problem),
            *problem.weight.stride(), SHARED=shared, STEPS=_steps(problem), INDEX=_index(problem),
            **dot_types(problem), **launch,
        )  # fmt: skip
    return scaled(dx, scale, problem.x.dtype)


def _weights(problem: Problem, logits: Tensor, stats: Statistics, fit: Tensor) -> tuple[Tensor, Tensor | None]:
    order, x = _order(problem), _dense_rows(problem.x)
    dw = problem.weight.new_empty(problem.weight.shape)
    db = None if problem.bias is None else problem.bias.new_empty(problem.bias.shape)
    launch = weight_launch(problem.num_labels, problem.dim)
    tiles = triton.cdiv(problem.num_labels, launch["BLOCK_N"]) * triton.cdiv(problem.dim, launch["BLOCK_D"])
    with torch.cuda.device_of(x):
        weight_kernel[(tiles * problem.heads * problem.weight.shape[1],)](
            logits, x, problem.target.contiguous(), order.rows, order.offsets, stats.z_t, stats.lse_rest,
            fit.contiguous(), dw, db, problem.batch, *_sizes(problem), *_strides(x), **dot_types(problem), **launch,
        )  # fmt: skip
    return dw, db


# -- launches ----------------------------------------------------------------------------------------------------


def slots(problem: Problem, rows: int) -> int:
    """Enough for the blocks of all classes; see `grouped_kernels`. No number of rows in a class is looked at."""
    return problem.batch // rows + problem.weight.shape[1]


def forward_launch(n: int, dim: int, itemsize: int, fused: bool) -> dict[str, int]:
    """With the sums a program holds all features of some labels, else it walks over the features too.

    Two programs of four warps fit on a multiprocessor; of float32 weights, rounded in registers, one of eight.
    """
    padded = _block(dim, dim)
    if fused:
        labels = 16 if padded * itemsize > 1024 else 32
        wide = itemsize > 2 and padded > 256
        return _launch(15, labels, padded, warps=8 if wide else 4, stages=3 if is_nvidia() and not wide else 2)
    return _launch(16, _block(n, 64), _block(dim, 256 // itemsize), warps=8, stages=3)


def features_launch(n: int, dim: int, itemsize: int) -> dict[str, int]:
    """A tile of 16 KiB at most."""
    return _launch(16, _block(n, 128 // itemsize), _block(dim, 256 // itemsize), warps=8, stages=3)


def weight_launch(n: int, dim: int) -> dict[str, int]:
    """Tiles as large as registers allow, for the rows' coefficients are made anew for each."""
    return {"BLOCK_N": _block(n, 64), "BLOCK_D": _block(dim, 128), "num_warps": 4, "num_stages": 2}


def _launch(rows: int, block_n: int, block_d: int, warps: int, stages: int) -> dict[str, int]:
    return {"ROWS": rows, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}


def _block(size: int, most: int) -> int:
    """The smallest power of two from 16 on that holds `size`, or that holds `most` where this is smaller."""
    return 1 << max(4, (min(size, most) - 1).bit_length())


def _order(problem: Problem) -> ClassOrder:
    assert problem.order is not None
    return problem.order


def _steps(problem: Problem) -> int:
    """Of a binary search over the classes."""
    return (problem.weight.shape[1] - 1).bit_length()


def _index(problem: Problem) -> tl.dtype:
    """int64 only where a tile of at most 64 labels reaches far, with the features not innermost: it takes registers."""
    *_, label, dim = problem.weight.stride()
    return tl.int64 if 64 * label + 2 * problem.dim * dim >= 2**31 else tl.int32


def _sizes(problem: Problem) -> tuple[int, ...]:
    return problem.heads, problem.weight.shape[1], problem.num_labels, problem.dim


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    """Of rows and of heads, 0 where these share the features."""
    return x.stride(0), x.stride(1) if x.dim() == 3 else 0
