"""Rows of logits to statistics and back, in PyTorch: what `softmax_triton` does where there is no Triton."""

import torch
from torch import Tensor

from rlp.kernels.problem import Upstream
from rlp.kernels.reference import Statistics


def statistics(logits: Tensor, target: Tensor, entropy: bool) -> Statistics:
    """Statistics of logits ``[R, H, n]``, whose last dimension is contiguous, for ``target [R, H]``.

    The logits may be a piece of a head's: a target outside [0, n) then gives ``z_t = -inf``, and a piece that holds the
    target alone ``lse_rest = -inf`` and an entropy of 0.
    """
    z, label, inside = _raise(logits), *_place(target, logits.shape[-1])
    at_label = z.gather(-1, label)
    rest = z.scatter(-1, label, at_label.masked_fill(inside, -torch.inf))
    lse_rest = rest.logsumexp(-1)
    return Statistics(
        z_t=at_label.masked_fill(~inside, -torch.inf).squeeze(-1),
        lse_rest=lse_rest,
        z_mean=z.mean(-1),
        max_rest=rest.amax(-1),
        entropy_rest=_entropy(rest, lse_rest) if entropy else None,
    )


def _raise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _place(target: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The label's place in the piece, and whether it is inside; ``[R, H, 1]``."""
    target = target.unsqueeze(-1)
    return target.clamp(0, n - 1), (target >= 0) & (target < n)


def _entropy(rest: Tensor, lse_rest: Tensor) -> Tensor:
    return torch.special.entr(_probabilities(rest, lse_rest)).sum(-1)


def _probabilities(rest: Tensor, lse_rest: Tensor) -> Tensor:
    """``r = exp(z - lse_rest)``, 0 at the label, also where it is alone and ``lse_rest`` is -inf."""
    return (rest - lse_rest.clamp_min(torch.finfo(rest.dtype).min).unsqueeze(-1)).exp()


def replace_by_residual(logits: Tensor, target: Tensor) -> Statistics:
    """As `statistics` of whole heads, without the entropy; the logits are overwritten by ``r - [j = t] - 1 / (n - 1)``.

    Taking off the mean 1 / (n - 1) of r keeps a low-precision r exact near the uniform distribution.
    """
    stats = statistics(logits, target, entropy=False)
    n, label = logits.shape[-1], target.unsqueeze(-1)
    rest = _raise(logits).scatter(-1, label, -torch.inf)
    q = _probabilities(rest, stats.lse_rest).scatter(-1, label, -1.0).sub_(1 / (n - 1))
    logits.copy_(q)
    return stats


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
    label, inside = _place(target, logits.shape[-1])
    z = _raise(logits)
    rest = z.scatter(-1, label, z.gather(-1, label).masked_fill(inside, -torch.inf))
    r = _probabilities(rest, stats.lse_rest)
    to_weight = to_features = None
    if need_features:
        to_features = _to_features(r, label, inside, stats, upstream, num_labels).to(logits.dtype)
    if need_weight:
        r.scatter_add_(-1, label, -inside.to(r.dtype))
        to_weight = r.mul_(torch.sigmoid(stats.lse_rest - stats.z_t).unsqueeze(-1)).to(logits.dtype)
    return to_weight, to_features


def _to_features(
    r: Tensor, label: Tensor, inside: Tensor, stats: Statistics, upstream: Upstream, num_labels: int
) -> Tensor:
    slope = torch.zeros_like(stats.z_t) if upstream.lse_rest is None else upstream.lse_rest
    if upstream.entropy_rest is not None and stats.entropy_rest is not None:
        slope = slope - upstream.entropy_rest * stats.entropy_rest
    dz = r * slope.unsqueeze(-1)
    if upstream.entropy_rest is not None:
        dz -= upstream.entropy_rest.unsqueeze(-1) * torch.special.xlogy(r, r)
    if upstream.z_t is not None:
        dz.scatter_add_(-1, label, upstream.z_t.unsqueeze(-1).to(r.dtype) * inside)
    if upstream.z_mean is not None:
        dz += (upstream.z_mean / num_labels).unsqueeze(-1)
    return dz
