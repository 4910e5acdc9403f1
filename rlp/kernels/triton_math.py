# pyright: reportAttributeAccessIssue=false
"""The formulas that all Triton kernels share, and the types they compute in; the mathematics is in docs/kernels.md.

With ``r_j = exp(z_j - lse_rest)`` for j other than the label t, and ``1 - p = sigmoid(lse_rest - z_t)``.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from rlp.kernels.problem import Problem

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
BOOST = tl.constexpr(1024.0)
"""Keeps coefficients of the weight gradient, at most 1, from vanishing in float16."""


def is_nvidia() -> bool:
    """Whether kernels are compiled for a GPU of NVIDIA; True in the interpreter."""
    return triton.knobs.runtime.interpret or triton.runtime.driver.active.get_current_target().backend == "cuda"


def dot_types(problem: Problem) -> dict[str, Any]:
    """ACC, of sums; OPERAND, to which operands of products are rounded; DOT, in which they are multiplied; PRECISION.

    DOT is another type than OPERAND in Triton's interpreter alone, which gets half precision wrong. A float32 product
    takes three of TF32 where there are any, which is as good as float32 itself; it is never a single one.
    """
    acc, operand = TYPES[problem.stats_dtype], TYPES[problem.dtype]
    if triton.knobs.runtime.interpret:
        return {"ACC": acc, "OPERAND": operand, "DOT": acc, "PRECISION": "ieee"}
    precision = "tf32x3" if is_nvidia() and problem.dtype == torch.float32 else "ieee"
    return {"ACC": acc, "OPERAND": operand, "DOT": operand, "PRECISION": precision}


@triton.jit
def logit_gradient_to_weight(z, is_label, z_t, lse_rest):
    """``(1 - p)(r_j - [j = t])``: of ``-log p``, for each row, without the upstream gradient of the mean."""
    wrong = 1 / (1 + tl.exp(z_t - lse_rest))
    return wrong * tl.where(is_label, -1.0, tl.exp(z - lse_rest))


@triton.jit
def logit_gradient_to_features(z, is_label, lse_rest, entropy_rest, g_z_t, g_lse_rest, g_z_mean, g_entropy_rest):
    """``r_j (g_lse - g_h (log r_j + h)) + [j = t] g_t + g_mean``, where `g_z_mean` is already divided by n.

    `g_entropy_rest` may be None; then `entropy_rest` is not looked at.
    """
    log_r = z - lse_rest
    r = tl.exp(log_r)
    if g_entropy_rest is None:
        others = r * g_lse_rest
    else:  # at r = 0 its logarithm is minus infinity, and their product 0
        others = r * (g_lse_rest - g_entropy_rest * (tl.where(r > 0, log_r, 0.0) + entropy_rest))
    return tl.where(is_label, g_z_t, others) + g_z_mean
