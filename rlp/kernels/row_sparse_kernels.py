# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
"""The optimiser's step of the classes that have rows, in one kernel: a tile of the gradient is made, used and gone."""

import torch
from torch import Tensor
import triton
import triton.language as tl

from rlp.kernels.row_sparse_optim import Moments, Rule


def blocks(rows: int, n: int, dim: int) -> dict[str, int]:
    """Launch parameters for a mean of `rows` in a class: weight, gradient and moments of a tile lie in registers."""
    block_d = min(64, max(16, _power_of_2(dim)))
    return {
        "BLOCK_N": min(2048 // block_d, max(16, _power_of_2(n))),
        "BLOCK_D": block_d,
        "ROWS": min(64, max(16, _power_of_2(rows))),
        "num_warps": 4,
        "num_stages": 2,
    }


def _power_of_2(size: int) -> int:
    """The smallest that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


@triton.jit
def update_kernel(
    weight, first, second, dz, x, offsets, step_size, root, n, dim, heads, classes, x_row, x_head,
    decay, mix_first, keep_second, mix_second, eps,
    ADAM: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of one class of one head; rows of `dz` and `x` are sorted by class, their products summed in ACC."""
    tiles_n, tiles_d = tl.cdiv(n, BLOCK_N), tl.cdiv(dim, BLOCK_D)
    tile = tl.program_id(0)
    one = tile // (tiles_d * tiles_n)  # of the H * C heads
    head, c = one // classes, one % classes
    start, end = tl.load(offsets + c), tl.load(offsets + c + 1)
    if start < end:
        first_label = tile // tiles_d % tiles_n * BLOCK_N
        label = first_label + tl.arange(0, BLOCK_N)
        d = tile % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
        has_label, has_d = label < n, d < dim
        base = (one.to(tl.int64) * n + first_label) * dim
        place = tl.arange(0, BLOCK_N)[:, None] * dim + d[None, :]
        inside = has_label[:, None] & has_d[None, :]
        w = tl.load(weight + base + place, mask=inside, other=0.0).to(ACC)
        if ADAM:
            m = tl.load(first + base + place, mask=inside, other=0.0)
            v = tl.load(second + base + place, mask=inside, other=0.0)

        grad = tl.zeros((BLOCK_N, BLOCK_D), ACC)  # while weight and moments are under way
        for begin in range(start, end, ROWS):
            row = begin + tl.arange(0, ROWS)[:, None]
            there = row < end
            a = tl.load(dz + (row * heads + head) * n + label[None, :], mask=there & has_label[None, :], other=0.0)
            b = tl.load(x + row * x_row + head * x_head + d[None, :], mask=there & has_d[None, :], other=0.0)
            grad = tl.dot(tl.trans(a.to(DOT)), b.to(DOT), grad, input_precision="ieee", out_dtype=ACC)

        w *= decay
        size = tl.load(step_size + c)
        if ADAM:
            m += (grad - m) * mix_first
            v = v * keep_second + grad * grad * mix_second
            tl.store(first + base + place, m, mask=inside)
            tl.store(second + base + place, v, mask=inside)
            w -= size * m / (tl.sqrt(v) / tl.load(root + c) + eps)
        else:
            w -= size * grad
        tl.store(weight + base + place, w.to(weight.dtype.element_ty), mask=inside)


def update(weight: Tensor, moments: Moments, dz: Tensor, x: Tensor, offsets: Tensor, rule: Rule) -> None:
    """As :func:`rlp.kernels.row_sparse_optim.update`, without a word between host and device; all contiguous."""
    heads, classes, n, dim = weight.shape
    launch = blocks(len(x) // classes, n, dim)
    tiles = triton.cdiv(n, launch["BLOCK_N"]) * triton.cdiv(dim, launch["BLOCK_D"])
    first, second = (weight, weight) if moments is None else moments
    acc = tl.float64 if rule.step_size.dtype == torch.float64 else tl.float32
    half = dz.dtype == x.dtype == torch.bfloat16 and not triton.knobs.runtime.interpret  # which gets bfloat16 wrong
    with torch.cuda.device_of(weight):
        update_kernel[(tiles * heads * classes,)](
            weight, first, second, dz, x, offsets, rule.step_size, rule.step_size if rule.root is None else rule.root,
            n, dim, heads, classes, x.stride(0), x.stride(1) if x.dim() == 3 else 0,
            rule.decay, rule.mix_first, rule.keep_second, rule.mix_second, rule.eps,
            ADAM=moments is not None, ACC=acc, DOT=tl.bfloat16 if half else acc, **launch,
        )  # fmt: skip
    torch.autograd.graph.increment_version([weight, first, second])
