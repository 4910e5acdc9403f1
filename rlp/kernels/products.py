"""The matrix products of shared heads, left to the vendor's library; and which code works on the rows of logits."""

from types import ModuleType

import torch
from torch import Tensor
import torch.nn.functional as F

from rlp.kernels import softmax_eager
from rlp.kernels.problem import Problem, Upstream


def softmax_of(problem: Problem) -> ModuleType:
    """`softmax_triton` or `softmax_eager`, which have the same functions."""
    if not problem.triton:
        return softmax_eager
    from rlp.kernels import softmax_triton

    return softmax_triton


ALL = slice(None)


def operands(problem: Problem, heads: slice = ALL, labels: slice = ALL) -> tuple[Tensor, Tensor, Tensor | None]:
    """All features, and weight and bias of some heads and labels, in the type of the products."""
    bias = None if problem.bias is None else problem.bias[heads, labels].to(problem.dtype)
    return problem.x.to(problem.dtype), problem.weight[heads, labels].to(problem.dtype), bias


def logits_of(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Logits ``[B, H, n]`` in ``dtype`` of ``x [B, D]`` or ``[B, H, D]`` and ``weight [H, n, D]``.

    Rows of n are contiguous; rows of H need not be.
    """
    if dtype != x.dtype:
        flat = x.dim() == 2
        logits = multiply(x, weight.flatten(0, 1).T, dtype) if flat else multiply(x.transpose(0, 1), weight.mT, dtype)
        logits = logits.unflatten(1, weight.shape[:2]) if flat else logits.transpose(0, 1)
        return logits if bias is None else logits.add_(bias)
    if x.dim() == 2:
        flat_bias = None if bias is None else bias.flatten()
        return F.linear(x, weight.flatten(0, 1), flat_bias).unflatten(1, weight.shape[:2])
    rows = x.transpose(0, 1)
    logits = rows @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
    return logits.transpose(0, 1)


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b``, two- or three-dimensional, in ``dtype``; half precision is summed up and kept in float32 if asked."""
    if dtype == torch.float32 and a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=dtype) if a.dim() == 2 else torch.bmm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def add_product_(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a @ b``, or ``total = a @ b`` where `first`; `total` in float32 or float64, not rounded in between."""
    beta = 0 if first else 1  # with 0 what lies in `total` is not read
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


def weight_gradient(dz: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[H, n, D]`` of ``dz [B, H, n]`` and ``x [B, D]`` or ``[B, H, D]``, multiplied in the type of x."""
    dz = dz.to(x.dtype)
    if x.dim() == 2:
        return multiply(dz.flatten(1).T, x, dtype).unflatten(0, dz.shape[1:])
    return multiply(dz.permute(1, 2, 0), x.transpose(0, 1), dtype)


def feature_gradient(dz: Tensor, weight: Tensor, shared: bool, dtype: torch.dtype) -> Tensor:
    """``[B, D]`` (summed over heads, where they share the features) or ``[B, H, D]``, in the type of the weight."""
    dz = dz.to(weight.dtype)
    if shared:
        return multiply(dz.flatten(1), weight.flatten(0, 1), dtype)
    return multiply(dz.transpose(0, 1), weight, dtype).transpose(0, 1)


def normalised(upstream: Upstream, dtype: torch.dtype) -> tuple[Upstream, Tensor | None]:
    """For float16: the gradients of the statistics divided by their largest, and that, to multiply the product with.

    They hold the 1 / B of a mean, with which most coefficients of a large batch would vanish in float16.
    """
    parts = [part for part in upstream[1:] if part is not None]
    if dtype != torch.float16 or not parts:
        return upstream, None
    scale = torch.stack([part.abs().amax() for part in parts]).amax().clamp_min(torch.finfo(torch.float32).tiny)
    return upstream.map(lambda part: part / scale), scale


def scaled(product: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``product * factor`` in place, then in ``dtype``."""
    return (product if factor is None else product.mul_(factor)).to(dtype)
