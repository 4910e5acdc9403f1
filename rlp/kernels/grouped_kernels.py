# pyright: reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalOperand=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
"""The kernels of path `grouped`: blocks of rows of one class, tiles of that class's weight.

Everywhere 16 places for rows are the columns of a product and labels or features its rows, for a class has few rows.
ACC is the type of sums; OPERAND that of the products, to which operands are rounded; DOT that in which they are
multiplied, another one only in Triton's interpreter, which gets half precision wrong. INDEX is the type of places in a
tile of the weight. Positions count sorted rows.
"""

import triton
import triton.language as tl

from rlp.kernels.triton_math import BOOST, logit_gradient_to_features, logit_gradient_to_weight

PLACES = tl.constexpr(16)


@triton.jit
def _find_block(slot, offsets, classes, STEPS: tl.constexpr, ROWS: tl.constexpr):
    """Class, its first position, and the block's first and end; an empty block where there is none.

    Class c has the slots from ``offsets[c] // ROWS + c`` on: enough for its blocks, whatever the sizes of the classes
    are, and less than ``B / ROWS + C`` in all. So neither list nor launch is needed to deal out blocks.
    """
    low = tl.full([], 0, tl.int64)
    high = tl.full([], classes - 1, tl.int64)
    for _ in range(STEPS):
        middle = (low + high + 1) // 2
        fits = tl.load(offsets + middle) // ROWS + middle <= slot
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle - 1)
    start, end = tl.load(offsets + low), tl.load(offsets + low + 1)
    first = start + (slot - start // ROWS - low) * ROWS
    return low, start, tl.where(first < start, end, first), end


@triton.jit
def _finite(x):
    """What to subtract before the exponential: 0 for an infinite maximum, with which ``inf - inf`` would be NaN."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def _product(tile, columns, total, OPERAND: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """``total + tile^T columns``; the columns as a sum of two numbers where OPERAND is of half precision.

    They may be nearly equal, and all that matters in their differences.
    """
    high = columns.to(OPERAND)
    total = tl.dot(tl.trans(tile), high.to(DOT), total, input_precision=PRECISION, out_dtype=total.dtype)
    if OPERAND.primitive_bitwidth == 16:
        low = (columns - high.to(columns.dtype)).to(OPERAND)
        total = tl.dot(tl.trans(tile), low.to(DOT), total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def _mark_strays(z_t, lse_rest, z_mean, max_rest, entropy_rest, rows, offsets, batch, heads, classes, head):
    """NaN for the rows whose class does not exist: those before the first and after the last one's."""
    start, end = tl.load(offsets), tl.load(offsets + classes)
    for begin in range(0, batch, 128):
        position = begin + tl.arange(0, 128)
        stray = (position < batch) & ((position < start) | (position >= end))
        one = tl.load(rows + position, mask=stray, other=0) * heads + head
        nan = tl.full([128], float("nan"), z_t.dtype.element_ty)
        tl.store(z_t + one, nan, mask=stray)
        tl.store(lse_rest + one, nan, mask=stray)
        tl.store(z_mean + one, nan, mask=stray)
        tl.store(max_rest + one, nan, mask=stray)
        if entropy_rest is not None:
            tl.store(entropy_rest + one, nan, mask=stray)


@triton.jit(do_not_specialize=["batch", "heads", "classes", "n"])
def forward_kernel(
    x, weight, bias, target, rows, offsets, z_t, lse_rest, z_mean, max_rest, entropy_rest, logits, toward,
    batch, heads, classes, n, dim, x_row, x_head, w_head, w_class, w_label, w_dim,
    ACC: tl.constexpr, OPERAND: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, INDEX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Statistics of one block, online over the labels; the last slot is for the rows without a class.

    `logits` ``[B, H, n]`` and `toward` ``[2, B, H, D]`` by position, or None. With `toward`, BLOCK_D holds D, and ROWS
    is 15: the last place is a row of zeros. Its softmax is uniform, so that what it gives is the mean of the weight.
    """
    slot, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if slot == tl.num_programs(0) - 1:
        _mark_strays(z_t, lse_rest, z_mean, max_rest, entropy_rest, rows, offsets, batch, heads, classes, head)
    else:
        c, start, first, end = _find_block(slot, offsets, classes, STEPS, ROWS)
        if first < end:
            place = tl.arange(0, PLACES)
            position = first + place
            there = (position < end) & (place < ROWS)
            row = tl.load(rows + position, mask=there, other=0)
            label = tl.load(target + row * heads + head, mask=there, other=-1)
            d, lane = tl.arange(0, BLOCK_D).to(INDEX), tl.arange(0, BLOCK_N).to(INDEX)
            step_n, step_d = tl.full([], BLOCK_N, INDEX) * w_label, tl.full([], BLOCK_D, INDEX) * w_dim
            source = x + (row * x_row + head * x_head)[None, :] + d[:, None]
            tile = weight + head * w_head + c * w_class
            lanes = lane[:, None] * w_label + d[None, :] * w_dim
            one = head * classes + c  # of the H * C heads
            out = (position * heads + head) * n
            if toward is not None:
                inside = (d < dim)[:, None]
                columns = tl.load(source, mask=inside & there[None, :], other=0.0).to(OPERAND).to(DOT)
                total = tl.zeros([BLOCK_D, PLACES], ACC)

            # Of the logits other than the label's so far: maximum m, sum s of e^(z - m), sum t of (z - m) e^(z - m).
            m = tl.full([PLACES], -float("inf"), ACC)
            s = tl.zeros([BLOCK_N, PLACES], ACC)
            t = tl.zeros([BLOCK_N, PLACES], ACC)
            sum_z = tl.zeros([BLOCK_N, PLACES], ACC)
            at_label = tl.zeros([BLOCK_N, PLACES], ACC)
            for begin in tl.range(0, n, BLOCK_N):
                known = (lane < n - begin)[:, None]
                if toward is not None:
                    w = tl.load(tile + lanes, mask=known & (d < dim)[None, :], other=0.0).to(OPERAND).to(DOT)
                    z = tl.dot(w, columns, input_precision=PRECISION, out_dtype=ACC)
                else:
                    z = tl.zeros([BLOCK_N, PLACES], ACC)
                    part_of_tile = tile
                    for ahead in tl.range(0, dim, BLOCK_D):
                        has_d = d < dim - ahead
                        w = tl.load(part_of_tile + lanes, mask=known & has_d[None, :], other=0.0)
                        part = tl.load(source + ahead, mask=has_d[:, None] & there[None, :], other=0.0)
                        w, part = w.to(OPERAND).to(DOT), part.to(OPERAND).to(DOT)
                        z = tl.dot(w, part, z, input_precision=PRECISION, out_dtype=ACC)
                        part_of_tile += step_d
                tile += step_n
                if bias is not None:
                    shift = tl.load(bias + one * n + begin + lane, mask=lane < n - begin, other=0.0)
                    z += tl.where(there[None, :], shift.to(OPERAND).to(ACC)[:, None], 0.0)
                if logits is not None:
                    tl.store(logits + out[None, :] + begin + lane[:, None], z, mask=known & there[None, :])
                is_label = begin + lane[:, None] == label[None, :]
                at_label += tl.where(is_label, z, 0.0)
                sum_z += z
                rest = tl.where(known & (begin + lane[:, None] != label[None, :]), z, -float("inf"))
                peak = tl.maximum(m, tl.max(rest, 0))
                base = _finite(peak)
                shrink = tl.exp(m - base)[None, :]
                away = rest - base[None, :]
                e = tl.exp(away)
                if entropy_rest is not None:  # -1000 stands for minus infinity, whose product with 0 would be NaN
                    t = shrink * (t + tl.maximum(m - base, -1000.0)[None, :] * s) + tl.maximum(away, -1000.0) * e
                s = shrink * s + e
                if toward is not None:
                    total = _product(w, e, total * shrink, OPERAND, DOT, PRECISION)
                m = peak

            sum_s = tl.sum(s, 0)
            log_s = tl.log(sum_s)
            found = row * heads + head
            has_label = (label >= 0) & (label < n)
            tl.store(z_t + found, tl.where(has_label, tl.sum(at_label, 0), float("nan")), mask=there)
            tl.store(lse_rest + found, _finite(m) + log_s, mask=there)
            tl.store(z_mean + found, tl.sum(sum_z, 0) / tl.full([], n, ACC), mask=there)
            tl.store(max_rest + found, tl.where(sum_s == sum_s, m, float("nan")), mask=there)
            if entropy_rest is not None:
                tl.store(entropy_rest + found, log_s - tl.sum(t, 0) / sum_s, mask=there)
            if toward is not None:
                is_mean = place == ROWS
                to = (tl.where(is_mean, batch + start, position) * heads + head) * dim
                wanted = there | (is_mean & (first == start))
                tl.store(toward + to[None, :] + d[:, None], total / sum_s[None, :], mask=inside & wanted[None, :])


@triton.jit
def _across(values, where, there):
    """Values of a block's rows, zeros for None; ``[1, PLACES]``."""
    if values is None:
        return tl.zeros([1, PLACES], tl.float32)
    else:
        return tl.load(values + where, mask=there, other=0.0)[None, :]


@triton.jit(do_not_specialize=["batch", "heads", "classes", "n"])
def combine_kernel(
    toward, weight, target, classes_of, rows, offsets, g_z_t, g_lse_rest, g_z_mean, dx,
    batch, heads, classes, n, dim, w_head, w_class, w_label, w_dim,
    ACC: tl.constexpr, OPERAND: tl.constexpr, SHARED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``g_lse Σ_j r_j W_j + g_t W_t + g_mean mean(W)`` of one row, for one head or, with SHARED, for all."""
    position = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + position)
    c = tl.load(classes_of + row)
    has_class = (c >= 0) & (c < classes)
    start = tl.load(offsets + c, mask=has_class, other=0)
    d = tl.arange(0, BLOCK_D).to(INDEX)
    total = tl.zeros([BLOCK_D], ACC)
    for step in range(heads if SHARED else 1):
        head = tl.program_id(1).to(tl.int64) + step
        here = row * heads + head
        mask = has_class & (d < dim)
        if g_lse_rest is not None:
            part = tl.load(toward + (position * heads + head) * dim + d, mask=mask, other=0.0)
            total += tl.load(g_lse_rest + here, mask=has_class, other=0.0) * part
        if g_z_mean is not None:
            part = tl.load(toward + ((batch + start) * heads + head) * dim + d, mask=mask, other=0.0)
            total += tl.load(g_z_mean + here, mask=has_class, other=0.0) * part
        if g_z_t is not None:
            label = tl.load(target + here)
            at_label = weight + head * w_head + c * w_class + label * w_label
            part = tl.load(at_label + d * w_dim, mask=mask & (label >= 0) & (label < n), other=0.0)
            total += tl.load(g_z_t + here, mask=has_class, other=0.0) * part.to(OPERAND).to(ACC)
    to = row if SHARED else row * heads + tl.program_id(1)
    tl.store(dx + to * dim + d, total.to(dx.dtype.element_ty), mask=d < dim)


@triton.jit(do_not_specialize=["heads", "classes", "n"])
def features_kernel(
    logits, weight, target, rows, offsets, lse_rest, entropy_rest, g_z_t, g_lse_rest, g_z_mean, g_entropy_rest, dx,
    heads, classes, n, dim, w_head, w_class, w_label, w_dim,
    ACC: tl.constexpr, OPERAND: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, SHARED: tl.constexpr, INDEX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Any gradient of the features from the kept logits: some features of one block; heads as in `combine_kernel`."""
    c, _, first, end = _find_block(tl.program_id(0), offsets, classes, STEPS, ROWS)
    if first < end:
        place = tl.arange(0, PLACES)
        position = first + place
        there = (position < end) & (place < ROWS)
        row = tl.load(rows + position, mask=there, other=0)
        lane = tl.arange(0, BLOCK_N).to(INDEX)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(INDEX)
        step_n = tl.full([], BLOCK_N, INDEX) * w_label
        lanes = lane[:, None] * w_label + d[None, :] * w_dim
        total = tl.zeros([BLOCK_D, PLACES], ACC)
        for step in range(heads if SHARED else 1):
            head = tl.program_id(2).to(tl.int64) + step
            here = row * heads + head
            label = tl.load(target + here, mask=there, other=-1)
            lse = tl.load(lse_rest + here, mask=there, other=0.0)[None, :]
            entropy = _across(entropy_rest, here, there)
            slope_t, slope_lse = _across(g_z_t, here, there), _across(g_lse_rest, here, there)
            slope_mean, slope_entropy = _across(g_z_mean, here, there) / n, _across(g_entropy_rest, here, there)
            tile = weight + head * w_head + c * w_class
            source = logits + ((position * heads + head) * n)[None, :] + lane[:, None]
            for begin in tl.range(0, n, BLOCK_N):
                known = (lane < n - begin)[:, None]
                w = tl.load(tile + lanes, mask=known & (d < dim)[None, :], other=0.0).to(OPERAND).to(DOT)
                z = tl.load(source + begin, mask=known & there[None, :], other=0.0)
                dz = logit_gradient_to_features(
                    z, begin + lane[:, None] == label[None, :], lse, entropy, slope_t, slope_lse, slope_mean,
                    None if g_entropy_rest is None else slope_entropy,
                )  # fmt: skip
                total = _product(w, tl.where(known & there[None, :], dz, 0.0), total, OPERAND, DOT, PRECISION)
                tile += step_n
        to = row if SHARED else row * heads + tl.program_id(2)
        mask = there[None, :] & (d < dim)[:, None]
        tl.store(dx + (to * dim)[None, :] + d[:, None], total.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "heads", "classes", "n"])
def weight_kernel(
    logits, x, target, rows, offsets, z_t, lse_rest, g_fit, dw, db,
    batch, heads, classes, n, dim, x_row, x_head,
    ACC: tl.constexpr, OPERAND: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of the contiguous weight gradient, and some of the bias's: sums over a class's rows, 0 if it has none."""
    tiles_n, tiles_d = tl.cdiv(n, BLOCK_N), tl.cdiv(dim, BLOCK_D)
    tile_d = tl.program_id(0) % tiles_d
    tile_n = tl.program_id(0) // tiles_d % tiles_n
    one = tl.program_id(0) // tiles_d // tiles_n  # of the H * C heads
    head, c = (one // classes).to(tl.int64), one % classes
    start, end = tl.load(offsets + c), tl.load(offsets + c + 1)
    j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    total_bias = tl.zeros([BLOCK_N], ACC)
    for begin in range(start, end, PLACES):
        position = begin + tl.arange(0, PLACES)
        there = position < end
        row = tl.load(rows + position, mask=there, other=0)
        here = row * heads + head
        label = tl.load(target + here, mask=there, other=-1)[None, :]
        mask = there[None, :] & (j < n)[:, None]
        z = tl.load(logits + ((position * heads + head) * n)[None, :] + j[:, None], mask=mask, other=0.0)
        at_label = tl.load(z_t + here, mask=there, other=0.0)[None, :]
        lse = tl.load(lse_rest + here, mask=there, other=0.0)[None, :]
        source = x + (row * x_row + head * x_head)[:, None] + d[None, :]
        features = tl.load(source, mask=there[:, None] & (d < dim)[None, :], other=0.0).to(OPERAND).to(DOT)
        dz = tl.where(mask, logit_gradient_to_weight(z, j[:, None] == label, at_label, lse), 0.0)
        total_bias += tl.sum(dz, 1)
        dz = (dz * BOOST).to(OPERAND).to(DOT)
        total = tl.dot(dz, features, total, input_precision=PRECISION, out_dtype=ACC)
    mean = tl.load(g_fit + head) / batch
    tile = dw + (one.to(tl.int64) * n + tile_n * BLOCK_N) * dim
    inside = (j < n)[:, None] & (d < dim)[None, :]
    tile += tl.arange(0, BLOCK_N)[:, None] * dim + d[None, :]
    tl.store(tile, (total * (mean / BOOST)).to(dw.dtype.element_ty), mask=inside)
    if db is not None:
        mask = (j < n) & (tile_d == 0)
        tl.store(db + one.to(tl.int64) * n + j, (total_bias * mean).to(db.dtype.element_ty), mask=mask)
