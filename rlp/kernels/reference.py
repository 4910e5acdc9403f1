"""The oracle: statistics of the random-label softmax in plain PyTorch; every fast path is held to it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """What every loss, penalty and accuracy of a head follows from; each ``[B, H]``, float32 or float64.

    ``z_t``: logit of the random label; ``lse_rest`` and ``max_rest``: log-sum-exp and maximum of the *other* logits;
    ``z_mean``: mean of all logits. With the label left out of the sum, ``z_t - lse_rest`` is exact where
    ``log(1 - softmax)`` has long rounded to minus infinity.
    """

    z_t: Tensor
    lse_rest: Tensor
    z_mean: Tensor
    max_rest: Tensor


def statistics_from_logits(logits: Tensor, target: Tensor) -> Statistics:
    """Statistics of given logits.

    Args:
        logits: ``[B, H, n]`` with n >= 2; half precision is raised to float32 before any sum.
        target: int64 ``[B, H]`` random labels in [0, n).
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"a head has {logits.shape[-1]} random label; expected at least 2")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    label = target.unsqueeze(-1)
    rest = logits.scatter(-1, label, -torch.inf)
    return Statistics(
        z_t=logits.gather(-1, label).squeeze(-1),
        lse_rest=rest.logsumexp(-1),
        z_mean=logits.mean(-1),
        max_rest=rest.detach().amax(-1),
    )


def statistics(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Statistics:
    """Statistics of linear heads, ``logits[b, h] = weight[h] @ x[b] + bias[h]``.

    Args:
        x: features ``[B, D]``, shared by the heads, or ``[B, H, D]``, one row for each.
        weight: ``[H, n, D]``.
        bias: ``[H, n]`` or None.
        target: int64 ``[B, H]``.
    """
    logits = torch.einsum("bd,hnd->bhn" if x.dim() == 2 else "bhd,hnd->bhn", x, weight)
    return statistics_from_logits(logits if bias is None else logits + bias, target)
