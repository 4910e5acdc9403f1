# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
"""The optimiser's step of the classes that have rows, in one kernel: a tile of the gradient is made, used and gone."""

import torch
from torch import Tensor
import triton
import triton.language as tl

from rlp.kernels.row_sparse_optim import Moments, Rule


def blocks(n: int, dim: int) -> dict[str, int]:
    """Launch parameters: a tile of at most 4096 elements, for the gradient, weight and two moments lie in registers."""
    block_d = min(128, _power_of_2(dim))
    return {
        "BLOCK_N": min(4096 // block_d, 256, _power_of_2(n)),
        "BLOCK_D": block_d,
        "num_warps": 4,
        "num_stages": 1,
    }


def _power_of_2(size: int) -> int:
    """The smallest that is not below `size`."""
    return 1 << (size - 1).bit_length()


@triton.jit
def update_kernel(
    weight, first, second, dz, x, offsets, step_size, root, n, dim, heads, classes, x_row, x_head,
    decay, mix_first, keep_second, mix_second, eps,
    ADAM: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of one class of one head; rows of `dz` and `x` are sorted by class."""
    tiles_n, tiles_d = tl.cdiv(n, BLOCK_N), tl.cdiv(dim, BLOCK_D)
    tile = tl.program_id(0)
    one = tile // (tiles_d * tiles_n)  # of the H * C heads
    head, c = one // classes, one % classes
    start, end = tl.load(offsets + c), tl.load(offsets + c + 1)
    if start < end:
        label = tile // tiles_d % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        d = tile % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
        place = (one.to(tl.int64) * n + label)[:, None] * dim + d[None, :]
        inside = (label < n)[:, None] & (d < dim)[None, :]
        grad = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        for row in tl.range(start, end, loop_unroll_factor=4):  # so that the loads of several rows are under way
            a = tl.load(dz + (row * heads + head) * n + label, mask=label < n, other=0.0).to(ACC)
            b = tl.load(x + row * x_row + head * x_head + d, mask=d < dim, other=0.0).to(ACC)
            grad += a[:, None] * b[None, :]
        w = tl.load(weight + place, mask=inside, other=0.0).to(ACC) * decay
        size = tl.load(step_size + c)
        if ADAM:
            m = tl.load(first + place, mask=inside, other=0.0)
            v = tl.load(second + place, mask=inside, other=0.0)
            m += (grad - m) * mix_first
            v = v * keep_second + grad * grad * mix_second
            tl.store(first + place, m, mask=inside)
            tl.store(second + place, v, mask=inside)
            w -= size * m / (tl.sqrt(v) / tl.load(root + c) + eps)
        else:
            w -= size * grad
        tl.store(weight + place, w.to(weight.dtype.element_ty), mask=inside)


def update(weight: Tensor, moments: Moments, dz: Tensor, x: Tensor, offsets: Tensor, rule: Rule) -> None:
    """As :func:`rlp.kernels.row_sparse_optim.update`, without a word between host and device; all contiguous."""
    heads, classes, n, dim = weight.shape
    launch = blocks(n, dim)
    tiles = triton.cdiv(n, launch["BLOCK_N"]) * triton.cdiv(dim, launch["BLOCK_D"])
    first, second = (weight, weight) if moments is None else moments
    double = rule.step_size.dtype == torch.float64
    with torch.cuda.device_of(weight):
        update_kernel[(tiles * heads * classes,)](
            weight, first, second, dz, x, offsets, rule.step_size, rule.step_size if rule.root is None else rule.root,
            n, dim, heads, classes, x.stride(0), x.stride(1) if x.dim() == 3 else 0,
            rule.decay, rule.mix_first, rule.keep_second, rule.mix_second, rule.eps,
            ADAM=moments is not None, ACC=tl.float64 if double else tl.float32, **launch,
        )  # fmt: skip
    torch.autograd.graph.increment_version([weight, first, second])
