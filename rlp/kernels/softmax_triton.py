"""Rows of logits to statistics and back, in Triton: the functions of `softmax_eager`, each a single launch.

A *segment* is the row of n logits of one sample and one head. Small ones share a program, so that loads stay wide; a
large one has a program of its own, which walks over it in blocks. The shape of a program does not depend on how many
segments there are, so that no result depends on what else is in its batch.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (it takes a kernel for the Python function that it was)

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
import triton
import triton.language as tl

from rlp.kernels.problem import Upstream
from rlp.kernels.reference import Statistics
from rlp.kernels.triton_math import logit_gradient_to_features, logit_gradient_to_weight

LOG2_E = tl.constexpr(1.4426950408889634)
"""2 to a power is one instruction, and the multiplication one with the subtraction of the maximum."""
LOWEST = tl.constexpr(-2e38)
"""Stands for a maximum of minus infinity, which taken off minus infinity would be NaN."""


class Launch(NamedTuple):
    """A program's tile of ``[depth, rows, width]`` logits, its warps, and the stages of its loop over a segment.

    A block of a segment, ``[depth, width]``, is summed up over the depth within each thread.
    """

    depth: int
    rows: int
    width: int
    warps: int
    stages: int


def launch(n: int, wide: int) -> Launch:
    """For segments of n logits, loaded `wide` at a time: 16 or 32 logits to a thread; a loop above n = 8192.

    With a segment of 10 to each thread, one of 100 to eight, and one of 1000 to a warp, threads talk little, and what
    is done once for a segment is not done by many threads.
    """
    if n > 8192:
        return Launch(depth=16 // wide, rows=1, width=256 * wide, warps=8, stages=3)
    block = 1 << (n - 1).bit_length()
    threads = max(block // 32, min(block // 16, 32), 1)  # of one segment
    width = threads * min(wide, block // threads)
    all_threads = max(threads, 128)
    return Launch(block // width, all_threads // threads, width, all_threads // 32, stages=1)


Strides = tuple[int, int]
"""Of rows and of heads."""


def _strides(tensor: Tensor) -> Strides:
    """0 along a dimension of size 1."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0, tensor.stride(1) if tensor.shape[1] > 1 else 0


def _fold(rows: int, heads: int, strides: list[Strides]) -> tuple[int, list[Strides]]:
    """Number of heads and strides, with rows and heads as one dimension of rows where all strides allow it."""
    if all(rows == 1 or row == heads * head for row, head in strides):
        return 1, [(head, 0) for _, head in strides]
    return heads, strides


def _in_units(n: int, strides: list[Strides]) -> tuple[int, list[int]]:
    """The largest power of two up to 16 that divides n and all strides; these, divided by it.

    It tells how wide loads may be. Triton would see divisibility by 16 only, and 100 or 1000 labels have none.
    """
    sizes = [n, *(stride for pair in strides for stride in pair)]
    unit = gcd(16, *sizes)
    return unit, [size // unit for size in sizes]


@triton.jit
def _segments(first, segments, heads, ROWS: tl.constexpr):
    """Numbers of a program's segments, which of them are there, and their rows and heads."""
    segment = first + tl.arange(0, ROWS)
    return segment, segment < segments, (segment // heads).to(tl.int64), (segment % heads).to(tl.int64)


@triton.jit
def _lines(first, segments, heads, row_units, head_units, UNIT: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr):
    """Where the lines of a tile ``[DEPTH * ROWS, WIDTH]`` start, and which are there; both ``[DEPTH * ROWS, 1]``.

    A tile is loaded and stored in two dimensions, in which all versions of Triton deal out lines to threads alike.
    """
    segment = first + tl.arange(0, DEPTH * ROWS) % ROWS
    row, head = (segment // heads).to(tl.int64), (segment % heads).to(tl.int64)
    return (row * row_units * UNIT + head * head_units * UNIT)[:, None], (segment < segments)[:, None]


@triton.jit
def _lanes(DEPTH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Places of a tile's elements in their block, ``[DEPTH * ROWS, WIDTH]``."""
    return (tl.arange(0, DEPTH * ROWS) // ROWS * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _deep(tile, DEPTH: tl.constexpr):
    return tl.reshape(tile, [DEPTH, tile.shape[0] // DEPTH, tile.shape[1]])


@triton.jit
def _flat(tile):
    return tl.reshape(tile, [tile.shape[0] * tile.shape[1], tile.shape[2]])


@triton.jit
def _label(target, segment, there, n):
    """The labels' places, -1 where outside the piece."""
    label = tl.load(target + segment, mask=there, other=-1)
    return tl.where((label >= 0) & (label < n), label, -1).to(tl.int32)


@triton.jit(do_not_specialize=["segments", "n_units", "row_units", "head_units"])  # `UNIT` says what matters of these
def statistics_kernel(
    logits,
    target,
    z_t,
    lse_rest,
    z_mean,
    max_rest,
    entropy_rest,
    segments,
    heads,
    n_units,
    row_units,
    head_units,
    UNIT: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SINGLE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Statistics ``[R, H]`` in one pass, online; with `RESIDUAL` a second one, of the program's own segments."""
    BLOCK: tl.constexpr = DEPTH * WIDTH
    dtype = z_t.dtype.element_ty
    n = n_units * UNIT
    segment, there, row, head = _segments(tl.program_id(0) * ROWS, segments, heads, ROWS)
    start = row * row_units * UNIT + head * head_units * UNIT
    label = _label(target, segment, there, n)
    at_label = tl.load(logits + start + label, mask=label >= 0, other=-float("inf")).to(dtype)
    start, known = _lines(tl.program_id(0) * ROWS, segments, heads, row_units, head_units, UNIT, DEPTH, ROWS)
    lane, mark = _lanes(DEPTH, ROWS, WIDTH), label[None, :, None]
    log2_e = tl.full([], LOG2_E, dtype)
    own = logits + start + lane
    deep = _deep(lane, DEPTH)

    # Of the logits other than the label's so far: maximum m; base, m / log 2 as rounded; sum s of 2^(z / log 2 - base),
    # and sum t of the same times its exponent. The base's rounding is in all terms alike. It moves with the maximum
    # only: a step by the rounding of a product, which a fused multiply-add would see, would spoil s block by block.
    m = tl.full([ROWS], LOWEST, dtype)
    base = tl.full([ROWS], LOWEST, dtype)
    s = tl.zeros([ROWS, WIDTH], dtype)
    t = tl.zeros([ROWS, WIDTH], dtype)
    total = tl.zeros([ROWS, WIDTH], dtype)
    for begin in tl.range(0, BLOCK if SINGLE else n, BLOCK, num_stages=STAGES):
        z = _deep(tl.load(own + begin, mask=known & (lane < n - begin), other=0.0), DEPTH).to(dtype)
        total += tl.sum(z, 0)
        rest = tl.where((deep == mark - begin) | (deep >= n - begin), -float("inf"), z)
        peak = tl.max(tl.max(rest, 0), 1)
        m, last = tl.maximum(m, peak), base
        base = tl.maximum(last, peak * log2_e)
        moved = last - base
        shrink = tl.exp2(moved)[:, None]
        away = tl.fma(rest, log2_e, -base[None, :, None])
        e = tl.exp2(away)
        if entropy_rest is not None:  # -2000 stands for minus infinity, whose product with e = 0 would be NaN
            t = shrink * (t + tl.maximum(moved, -2000.0)[:, None] * s) + tl.sum(tl.maximum(away, -2000.0) * e, 0)
        s = shrink * s + tl.sum(e, 0)
    s = tl.sum(s, 1)
    empty = s == 0
    some = tl.where(empty, 1.0, s)
    log_s = tl.log(some)

    if RESIDUAL:
        tl.debug_barrier()  # the label's logit was loaded by other threads than those that now overwrite it
        # Backwards: what was read last is the likeliest to be in the cache still.
        share = 1.0 / tl.full([], n - 1, dtype)
        scale = (1.0 / some)[None, :, None]
        for back in tl.range(0, 1 if SINGLE else tl.cdiv(n, BLOCK), num_stages=STAGES):
            begin = 0 if SINGLE else (tl.cdiv(n, BLOCK) - 1 - back) * BLOCK
            mask = known & (lane < n - begin)
            z = _deep(tl.load(own + begin, mask=mask, other=0.0), DEPTH).to(dtype)
            r = tl.exp2(tl.fma(z, log2_e, -base[None, :, None])) * scale
            q = tl.where(deep == mark - begin, -1.0, r) - share
            tl.store(own + begin, _flat(q.to(logits.dtype.element_ty)), mask=mask)

    tl.store(z_t + segment, at_label, mask=there)
    tl.store(lse_rest + segment, tl.where(empty, -float("inf"), m + log_s), mask=there)
    tl.store(z_mean + segment, tl.sum(total, 1) * (1.0 / tl.full([], n, dtype)), mask=there)
    peak = tl.where(empty, -float("inf"), tl.where(s == s, m, float("nan")))  # a maximum passes over NaN
    tl.store(max_rest + segment, peak, mask=there)
    if entropy_rest is not None:
        entropy = tl.where(empty, 0.0, log_s - tl.sum(t, 1) / some / log2_e)
        tl.store(entropy_rest + segment, entropy, mask=there)


def statistics(logits: Tensor, target: Tensor, entropy: bool, keep: bool = False) -> Statistics:
    """Statistics of logits ``[R, H, n]``, whose last dimension is contiguous, for ``target [R, H]``.

    The logits may be a piece of a head's: a target outside [0, n) then gives ``z_t = -inf``, and a piece that holds the
    target alone ``lse_rest = -inf`` and an entropy of 0. ``R * H`` is below 2^31; the number of logits need not be.
    """
    return _statistics(logits, target, entropy, residual=False)


def again(logits: Tensor, target: Tensor, stats: Statistics) -> None:
    """Nothing: `gradients` takes logits as they are."""


def replace_by_residual(logits: Tensor, target: Tensor) -> Statistics:
    """As `statistics` of whole heads, without the entropy; the logits are overwritten by ``r - [j = t] - 1 / (n - 1)``.

    Taking off the mean 1 / (n - 1) of r keeps a low-precision r exact near the uniform distribution.
    """
    return _statistics(logits, target, entropy=False, residual=True)


def _statistics(logits: Tensor, target: Tensor, entropy: bool, residual: bool) -> Statistics:
    rows, heads, n = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    stats = Statistics(*(logits.new_empty((rows, heads), dtype=dtype) for _ in range(5 if entropy else 4)))
    if rows * heads == 0:
        return stats
    inner, strides = _fold(rows, heads, [_strides(logits)])
    unit, sizes = _in_units(n, strides)
    shape = launch(n, min(unit, 16 // logits.itemsize))
    with torch.cuda.device_of(logits):
        statistics_kernel[(triton.cdiv(rows * heads, shape.rows),)](
            logits, target.contiguous(), *stats, rows * heads, inner, *sizes,
            UNIT=unit, DEPTH=shape.depth, ROWS=shape.rows, WIDTH=shape.width,
            SINGLE=n <= shape.depth * shape.width, RESIDUAL=residual, STAGES=shape.stages, num_warps=shape.warps,
        )  # fmt: skip
    return stats


@triton.jit
def _column(values, where, there):
    """Values of a program's segments, zeros for None; ``[1, ROWS, 1]``."""
    if values is None:
        return tl.zeros([1, there.shape[0], 1], tl.float32)
    else:
        return tl.load(values + where, mask=there, other=0.0)[None, :, None]


@triton.jit(
    do_not_specialize=[
        "segments", "n_units", "row_units", "head_units", "out_row_units", "out_head_units", "part_row", "part_head",
        "num_labels",
    ]
)  # fmt: skip
def gradients_kernel(
    logits,
    target,
    z_t,
    lse_rest,
    entropy_rest,
    g_z_t,
    g_lse_rest,
    g_z_mean,
    g_entropy_rest,
    to_weight,
    to_features,
    segments,
    heads,
    n_units,
    row_units,
    head_units,
    out_row_units,
    out_head_units,
    part_row,
    part_head,
    num_labels,
    UNIT: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One tile of the gradients of the logits along one or both routes; None for what is not there."""
    n = n_units * UNIT
    blocks = tl.cdiv(n, DEPTH * WIDTH)
    first = tl.program_id(0) // blocks * ROWS
    segment, there, row, head = _segments(first, segments, heads, ROWS)
    start, known = _lines(first, segments, heads, row_units, head_units, UNIT, DEPTH, ROWS)
    place = tl.program_id(0) % blocks * (DEPTH * WIDTH) + _lanes(DEPTH, ROWS, WIDTH)
    mask = known & (place < n)
    z = _deep(tl.load(logits + start + place, mask=mask, other=0.0), DEPTH).to(z_t.dtype.element_ty)
    is_label = _deep(place, DEPTH) == _label(target, segment, there, n)[None, :, None]

    part = row * part_row + head * part_head
    lse = _column(lse_rest, part, there)
    lse = tl.where(lse == -float("inf"), -1e38, lse)  # all others are minus infinity, whose r shall be 0
    out = place + _lines(first, segments, heads, out_row_units, out_head_units, UNIT, DEPTH, ROWS)[0]
    if to_weight is not None:
        dz = logit_gradient_to_weight(z, is_label, _column(z_t, part, there), lse)
        tl.store(to_weight + out, _flat(dz.to(to_weight.dtype.element_ty)), mask=mask)
    if to_features is not None:
        dz = logit_gradient_to_features(
            z,
            is_label,
            lse,
            _column(entropy_rest, part, there),
            _column(g_z_t, part, there),
            _column(g_lse_rest, part, there),
            _column(g_z_mean, part, there) / num_labels,
            None if g_entropy_rest is None else _column(g_entropy_rest, part, there),
        )
        tl.store(to_features + out, _flat(dz.to(to_features.dtype.element_ty)), mask=mask)


def gradients(
    logits: Tensor,
    target: Tensor,
    stats: Statistics,
    upstream: Upstream,
    num_labels: int,
    need_weight: bool,
    need_features: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the logits ``[R, H, n]`` along the two routes, new tensors of the logits' type and layout.

    With ``r_j = exp(z_j - lse_rest)`` for j other than t, 0 at t, and ``h = entropy_rest``:

    - to the weights ``(1 - p)(r_j - [j = t])``: the gradient of ``-log p`` of each row, **without** the upstream
      gradient of the mean, which is for the caller to multiply the product with (folded in here it would vanish in
      float16);
    - to the features ``r_j (g_lse - g_h (log r_j + h)) + [j = t] g_t + g_mean / num_labels``.

    Args:
        logits: a piece or whole heads, as for `statistics`.
        target: ``[R, H]``.
        stats: of the whole heads, ``[R, H]``.
        upstream: its ``fit`` is not looked at.
        num_labels: n of the whole heads.
        need_weight, need_features: which of the two; None for the other.
    """
    rows, heads, n = logits.shape
    found = [torch.empty_like(logits) if needed else None for needed in (need_weight, need_features)]
    outputs = [part for part in found if part is not None]
    if rows * heads == 0 or not outputs:
        return found[0], found[1]
    parts, part_strides = _alike(
        [stats.z_t, stats.lse_rest, stats.entropy_rest, *(upstream[1:] if need_features else [None] * 4)]
    )
    inner, (mine, theirs, others) = _fold(rows, heads, [_strides(logits), _strides(outputs[0]), part_strides])
    unit, sizes = _in_units(n, [mine, theirs])
    shape = launch(n, min(unit, 16 // logits.itemsize))
    with torch.cuda.device_of(logits):
        gradients_kernel[(triton.cdiv(rows * heads, shape.rows) * triton.cdiv(n, shape.depth * shape.width),)](
            logits, target.contiguous(), *parts, *found, rows * heads, inner, *sizes, *others, num_labels,
            UNIT=unit, DEPTH=shape.depth, ROWS=shape.rows, WIDTH=shape.width, num_warps=shape.warps,
        )  # fmt: skip
    return found[0], found[1]


def _alike(parts: list[Tensor | None]) -> tuple[list[Tensor | None], Strides]:
    """The parts with the strides that all have: as they are, if these are the same already (slices are), else dense."""
    if len({part.stride() for part in parts if part is not None}) > 1:
        parts = [None if part is None else part.contiguous() for part in parts]
    return parts, next(_strides(part) for part in parts if part is not None)
