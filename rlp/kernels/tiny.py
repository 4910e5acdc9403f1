# pyright: reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalOperand=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
"""Path `tiny`: few labels and little work, where launches cost more than arithmetic; one forward, one backward.

Serves shared heads and heads of their own for each class alike. Nothing is sorted: a program of the forward pass and of
the features' gradient has one row and reads its class's weight, which is small and comes from the cache; a program of
the weight gradient has one class and looks through all rows for its own. Neither waits for the host nor depends on
values, so a CUDA graph can hold both.
"""

from typing import Any

import torch
from torch import Tensor
import triton
import triton.language as tl

from rlp.kernels.problem import Gradients, Kept, Problem, Upstream
from rlp.kernels.reference import Statistics
from rlp.kernels.triton_math import BOOST, dot_types, logit_gradient_to_features, logit_gradient_to_weight


def kept(problem: Problem) -> Kept:
    """Logits ``[B, H, n]`` in the type of sums, if a gradient is wanted."""
    needed = problem.need_weight or problem.need_features
    shape = (problem.batch, problem.heads, problem.num_labels)
    return (problem.x.new_empty(shape if needed else 0, dtype=problem.stats_dtype),)


SMS = 132
"""Of an H100 or H200: with fewer programs some of them would have nothing to do."""


def launch(n: int, dim: int, heads: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of both kernels, and those that the backward kernel has besides; `heads` counts all classes' heads.

    A row's tile holds 4096 weights or less. A program of the weight gradient looks through ROWS rows at a time. Where
    there would be too few of them each takes fewer features and, if registers suffice, more rows; where there are many,
    more programs at a time on an SM count for more.
    """
    labels, padded = max(16, triton.next_power_of_2(n)), max(16, triton.next_power_of_2(dim))
    few = heads * triton.cdiv(dim, 64) < SMS
    return (
        {"LABELS": labels, "BLOCK_D": min(padded, 4096 // labels), "num_warps": 4},
        {"ROWS": 128 if few and labels == 16 else 64, "GRADIENT_D": min(padded, 32 if few else 64)},
    )


def forward(problem: Problem) -> tuple[Statistics, Kept]:
    """One launch."""
    shape, dtype = (problem.batch, problem.heads), problem.stats_dtype
    stats = Statistics(*(problem.x.new_empty(shape, dtype=dtype) for _ in range(5 if problem.entropy else 4)))
    result, types = kept(problem), dot_types(problem)
    weight = _by_class(problem, problem.weight)
    bias = None if problem.bias is None else _by_class(problem, problem.bias)
    with torch.cuda.device_of(problem.x):
        forward_kernel[(shape[0] * shape[1],)](
            problem.x, weight, bias, problem.target, _classes(problem), *stats,
            result[0] if result[0].numel() else None, *_sizes(problem), *_strides(problem), *weight.stride(),
            *_bias_strides(bias), ACC=types["ACC"], OPERAND=types["OPERAND"], **_launch(problem)[0],
        )  # fmt: skip
    return stats, result


def backward(problem: Problem, stats: Statistics, kept: Kept, upstream: Upstream) -> Gradients:
    """One launch for both routes: first the programs of the weight gradient, then those of the features'.

    Upstream gradients that a sum or a mean has expanded are copied first, a small launch each; dense ones are not.
    """
    to_weight = problem.need_weight and upstream.fit is not None
    to_features = problem.need_features and upstream.reaches_features
    shape, of_weight = _launch(problem)
    dw = problem.weight.new_empty(problem.weight.shape) if to_weight else None
    db = problem.bias.new_empty(problem.bias.shape) if to_weight and problem.bias is not None else None
    dx = problem.x.new_empty(problem.x.shape) if to_features else None
    weight = _by_class(problem, problem.weight)
    weight_programs = (
        problem.heads * weight.shape[1] * triton.cdiv(problem.dim, of_weight["GRADIENT_D"]) if to_weight else 0
    )
    rows = problem.batch * (1 if problem.x.dim() == 2 else problem.heads)
    feature_programs = rows * triton.cdiv(problem.dim, shape["BLOCK_D"]) if to_features else 0
    if weight_programs + feature_programs == 0:
        return Gradients()
    with torch.cuda.device_of(problem.x):
        backward_kernel[(weight_programs + feature_programs,)](
            kept[0], problem.x, weight, problem.target, _classes(problem), stats.z_t, stats.lse_rest,
            stats.entropy_rest, *(None if part is None else part.contiguous() for part in upstream), dw, db, dx,
            weight_programs, problem.batch, *_sizes(problem), *_strides(problem), *weight.stride(),
            SHARED=problem.x.dim() == 2, **dot_types(problem), **shape, **of_weight,
        )  # fmt: skip
    return Gradients(dx, dw, db)


def _by_class(problem: Problem, tensor: Tensor) -> Tensor:
    """Shared heads as those of a single class."""
    return tensor.unsqueeze(1) if problem.order is None else tensor


def _classes(problem: Problem) -> Tensor | None:
    return None if problem.order is None else problem.order.classes.contiguous()


def _sizes(problem: Problem) -> tuple[int, ...]:
    classes = 1 if problem.order is None else problem.weight.shape[1]
    return problem.heads, classes, problem.num_labels, problem.dim


def _launch(problem: Problem) -> tuple[dict[str, Any], dict[str, Any]]:
    heads, classes, n, dim = _sizes(problem)
    return launch(n, dim, heads * classes)


def _strides(problem: Problem) -> tuple[int, ...]:
    """Of x (0 between heads that share it) and of the target."""
    x = problem.x
    return x.stride(0), x.stride(1) if x.dim() == 3 else 0, x.stride(-1), *problem.target.stride()


def _bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if bias is None else bias.stride()


@triton.jit
def _class_of(classes_of, row, classes, n):
    """The row's class, 0 where heads are shared, and how many labels it has: none if there is no such class."""
    if classes_of is None:  # noqa: SIM108  (settled when the kernel is compiled)
        c = tl.zeros([], tl.int64)
    else:
        c = tl.load(classes_of + row)
    return c, tl.where((c >= 0) & (c < classes), n, 0)


@triton.jit(do_not_specialize=["heads", "classes"])
def forward_kernel(
    x, weight, bias, target, classes_of, z_t, lse_rest, z_mean, max_rest, entropy_rest, logits,
    heads, classes, n, dim, x_row, x_head, x_dim, t_row, t_head, w_head, w_class, w_label, w_dim,
    b_head, b_class, b_label,
    ACC: tl.constexpr, OPERAND: tl.constexpr, LABELS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits and statistics of one row and head."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    c, labels = _class_of(classes_of, row, classes, n)
    label = tl.load(target + row * t_row + head * t_head)
    j, d = tl.arange(0, LABELS), tl.arange(0, BLOCK_D).to(tl.int64)
    known = j < labels
    source = x + row * x_row + head * x_head
    tile = weight + head * w_head + c * w_class + (j.to(tl.int64) * w_label)[:, None]
    total = tl.zeros([LABELS, BLOCK_D], ACC)
    for begin in range(0, dim, BLOCK_D):
        at = begin + d
        w = tl.load(tile + (at * w_dim)[None, :], mask=known[:, None] & (at < dim)[None, :], other=0.0)
        part = tl.load(source + at * x_dim, mask=at < dim, other=0.0)
        total += w.to(OPERAND).to(ACC) * part.to(OPERAND).to(ACC)[None, :]
    z = tl.sum(total, 1)
    if bias is not None:
        shift = tl.load(bias + head * b_head + c * b_class + j.to(tl.int64) * b_label, mask=known, other=0.0)
        z += shift.to(OPERAND).to(ACC)
    z = tl.where(labels > 0, z, float("nan"))
    one = row * heads + head
    if logits is not None:
        tl.store(logits + one * n + j, z, mask=j < n)

    is_label = j == label
    rest = tl.where((j < n) & (j != label), z, -float("inf"))
    peak = tl.max(rest, 0)
    base = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
    e = tl.exp(rest - base)
    s = tl.sum(e, 0)
    at_label = tl.sum(tl.where(is_label & (j < n), z, 0.0), 0)
    tl.store(z_t + one, tl.where((label >= 0) & (label < n), at_label, -float("inf")))
    tl.store(lse_rest + one, base + tl.log(s))
    tl.store(z_mean + one, tl.sum(tl.where(j < n, z, 0.0), 0) / n)
    tl.store(max_rest + one, tl.where(s == s, peak, float("nan")))  # a maximum passes over NaN
    if entropy_rest is not None:
        spread = tl.sum(tl.maximum(rest - base, -1000.0) * e, 0)  # minus infinity times 0 would be NaN
        tl.store(entropy_rest + one, tl.log(s) - spread / s)


@triton.jit
def _value(values, where):
    """A value; 0 for None."""
    if values is None:
        return 0.0
    else:
        return tl.load(values + where)


@triton.jit
def _weight_gradient(
    program, logits, x, target, classes_of, z_t, lse_rest, g_fit, dw, db, batch, heads, classes, n, dim,
    x_row, x_head, x_dim, t_row, t_head,
    ACC: tl.constexpr, OPERAND: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, GRADIENT_D: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Some features of one head and class: the sum over the rows of the class, 0 if it has none."""
    tiles = tl.cdiv(dim, GRADIENT_D)
    tile, c = program % tiles, program // tiles % classes
    head = (program // tiles // classes).to(tl.int64)
    j, d = tl.arange(0, LABELS), tile * GRADIENT_D + tl.arange(0, GRADIENT_D).to(tl.int64)
    total = tl.zeros([LABELS, GRADIENT_D], ACC)
    total_bias = tl.zeros([LABELS], ACC)
    for begin in range(0, batch, ROWS):
        row = begin + tl.arange(0, ROWS).to(tl.int64)
        mine = row < batch
        if classes_of is not None:
            mine = tl.load(classes_of + row, mask=mine, other=-1) == c
        if tl.max(mine.to(tl.int32), 0) > 0:
            one = row * heads + head
            label = tl.load(target + row * t_row + head * t_head, mask=mine, other=-1)
            mask = mine[:, None] & (j < n)[None, :]
            z = tl.load(logits + (one * n)[:, None] + j[None, :], mask=mask, other=0.0)
            at_label = tl.load(z_t + one, mask=mine, other=0.0)[:, None]
            lse = tl.load(lse_rest + one, mask=mine, other=0.0)[:, None]
            dz = tl.where(mask, logit_gradient_to_weight(z, j[None, :] == label[:, None], at_label, lse), 0.0)
            source = x + (row * x_row + head * x_head)[:, None] + (d * x_dim)[None, :]
            part = tl.load(source, mask=mine[:, None] & (d < dim)[None, :], other=0.0).to(OPERAND).to(DOT)
            total_bias += tl.sum(dz, 0)
            dz = tl.trans((dz * BOOST).to(OPERAND).to(DOT))
            total = tl.dot(dz, part, total, input_precision=PRECISION, out_dtype=ACC)
    mean = tl.load(g_fit + head) / batch
    out = (head * classes + c) * n + j
    inside = (j < n)[:, None] & (d < dim)[None, :]
    tl.store(dw + out[:, None] * dim + d[None, :], (total * (mean / BOOST)).to(dw.dtype.element_ty), mask=inside)
    if db is not None:
        tl.store(db + out, (total_bias * mean).to(db.dtype.element_ty), mask=j < tl.where(tile == 0, n, 0))


@triton.jit
def _feature_gradient(
    program, logits, weight, target, classes_of, lse_rest, entropy_rest, g_z_t, g_lse_rest, g_z_mean, g_entropy_rest,
    dx, heads, classes, n, dim, t_row, t_head, w_head, w_class, w_label, w_dim,
    ACC: tl.constexpr, OPERAND: tl.constexpr, SHARED: tl.constexpr, LABELS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some features of one row: a sum over the heads, or of one head where each has features of its own."""
    tiles = tl.cdiv(dim, BLOCK_D)
    j, d = tl.arange(0, LABELS), program % tiles * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    line = (program // tiles).to(tl.int64)  # of dx
    row = line if SHARED else line // heads
    c, labels = _class_of(classes_of, row, classes, n)
    known = j < labels
    tile = weight + c * w_class + (j.to(tl.int64) * w_label)[:, None] + (d * w_dim)[None, :]
    total = tl.zeros([LABELS, BLOCK_D], ACC)
    for step in range(heads if SHARED else 1):
        head = line * 0 + step if SHARED else line % heads
        one = row * heads + head
        label = tl.load(target + row * t_row + head * t_head)
        z = tl.load(logits + one * n + j, mask=j < n, other=0.0)
        dz = logit_gradient_to_features(
            z, j == label, tl.load(lse_rest + one), _value(entropy_rest, one), _value(g_z_t, one),
            _value(g_lse_rest, one), _value(g_z_mean, one) / n,
            None if g_entropy_rest is None else _value(g_entropy_rest, one),
        )  # fmt: skip
        w = tl.load(tile + head * w_head, mask=known[:, None] & (d < dim)[None, :], other=0.0)
        total += tl.where(known, dz, 0.0)[:, None] * w.to(OPERAND).to(ACC)
    tl.store(dx + line * dim + d, tl.sum(total, 0).to(dx.dtype.element_ty), mask=d < dim)


@triton.jit(do_not_specialize=["weight_programs", "batch", "heads", "classes"])
def backward_kernel(
    logits, x, weight, target, classes_of, z_t, lse_rest, entropy_rest,
    g_fit, g_z_t, g_lse_rest, g_z_mean, g_entropy_rest, dw, db, dx, weight_programs, batch,
    heads, classes, n, dim, x_row, x_head, x_dim, t_row, t_head, w_head, w_class, w_label, w_dim,
    ACC: tl.constexpr, OPERAND: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, GRADIENT_D: tl.constexpr, LABELS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """First the programs of the weight gradient, then those of the features'; None for what is not needed."""
    if tl.program_id(0) < weight_programs:
        if dw is not None:
            _weight_gradient(
                tl.program_id(0), logits, x, target, classes_of, z_t, lse_rest, g_fit, dw, db, batch,
                heads, classes, n, dim, x_row, x_head, x_dim, t_row, t_head,
                ACC, OPERAND, DOT, PRECISION, ROWS, GRADIENT_D, LABELS,
            )  # fmt: skip
    elif dx is not None:
        _feature_gradient(
            tl.program_id(0) - weight_programs, logits, weight, target, classes_of, lse_rest, entropy_rest,
            g_z_t, g_lse_rest, g_z_mean, g_entropy_rest, dx,
            heads, classes, n, dim, t_row, t_head, w_head, w_class, w_label, w_dim,
            ACC, OPERAND, SHARED, LABELS, BLOCK_D,
        )  # fmt: skip
