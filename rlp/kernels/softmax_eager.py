"""Rows of logits to statistics and back, in PyTorch: what `softmax_triton` does where there is no Triton.

Works in place where it can, for on a CPU each pass over the logits counts. What it keeps of logits for the backward
pass is ``r_j = exp(z_j - lse_rest)``, with 0 at the label.
"""

import torch
from torch import Tensor

from rlp.kernels.problem import Upstream
from rlp.kernels.reference import Statistics


def statistics(logits: Tensor, target: Tensor, entropy: bool, keep: bool) -> Statistics:
    """Statistics of logits ``[R, H, n]``, float32 or float64, for ``target [R, H]``.

    The logits may be a piece of a head's: a target outside [0, n) then gives ``z_t = -inf``, and a piece that holds the
    target alone ``lse_rest = -inf`` and an entropy of 0.

    The logits are used up; with `keep` they hold what `gradients` takes afterwards.
    """
    label, inside = _place(target, logits.shape[-1])
    at_label, z_mean = logits.gather(-1, label), logits.mean(-1)
    logits.scatter_(-1, label, at_label.masked_fill(inside, -torch.inf))
    max_rest = logits.amax(-1)
    base = max_rest.masked_fill(max_rest == -torch.inf, 0.0)  # the label alone: -inf - -inf would be NaN
    total = logits.sub_(base.unsqueeze(-1)).exp_().sum(-1)
    found = Statistics(at_label.masked_fill(~inside, -torch.inf).squeeze(-1), total.log() + base, z_mean, max_rest)
    if keep or entropy:
        logits.div_(total.masked_fill(total == 0, 1.0).unsqueeze(-1))
    return found._replace(entropy_rest=torch.special.entr(logits).sum(-1)) if entropy else found


def _place(target: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The label's place in the piece, and whether it is inside; ``[R, H, 1]``."""
    target = target.unsqueeze(-1)
    return target.clamp(0, n - 1), (target >= 0) & (target < n)


def again(logits: Tensor, target: Tensor, stats: Statistics) -> None:
    """Logits that were computed again, to what `gradients` takes; `stats` are those of the whole heads."""
    label, inside = _place(target, logits.shape[-1])
    logits.sub_(stats.lse_rest.unsqueeze(-1)).exp_()
    logits.scatter_(-1, label, logits.gather(-1, label).masked_fill(inside, 0.0))


def replace_by_residual(logits: Tensor, target: Tensor) -> Statistics:
    """As `statistics` of whole heads, without the entropy; the logits are overwritten by ``r - [j = t] - 1 / (n - 1)``.

    Taking off the mean 1 / (n - 1) of r keeps a low-precision r exact near the uniform distribution.
    """
    stats = statistics(logits, target, entropy=False, keep=True)
    logits.scatter_(-1, target.unsqueeze(-1), -1.0).sub_(1 / (logits.shape[-1] - 1))
    return stats


def gradients(
    kept: Tensor,
    target: Tensor,
    stats: Statistics,
    upstream: Upstream,
    num_labels: int,
    need_weight: bool,
    need_features: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the logits ``[R, H, n]`` along the two routes, new tensors of the type and layout of `kept`.

    With ``r_j = exp(z_j - lse_rest)`` for j other than t, 0 at t, and ``h = entropy_rest``:

    - to the weights ``(1 - p)(r_j - [j = t])``: the gradient of ``-log p`` of each row, **without** the upstream
      gradient of the mean, which is for the caller to multiply the product with (folded in here it would vanish in
      float16);
    - to the features ``r_j (g_lse - g_h (log r_j + h)) + [j = t] g_t + g_mean / num_labels``.

    Args:
        kept: what `statistics` or `again` left of the logits, of a piece or whole heads.
        target: ``[R, H]``.
        stats: of the whole heads, ``[R, H]``.
        upstream: its ``fit`` is not looked at.
        num_labels: n of the whole heads.
        need_weight, need_features: which of the two; None for the other.
    """
    label, inside = _place(target, kept.shape[-1])
    to_weight = to_features = None
    if need_weight:
        wrong = torch.sigmoid(stats.lse_rest - stats.z_t).unsqueeze(-1)  # 1 - p
        to_weight = kept * wrong
        to_weight.scatter_add_(-1, label, -wrong * inside)
    if need_features:
        to_features = _to_features(kept, label, inside, stats, upstream, num_labels)
    return to_weight, to_features


def _to_features(
    r: Tensor, label: Tensor, inside: Tensor, stats: Statistics, upstream: Upstream, num_labels: int
) -> Tensor:
    slope = torch.zeros_like(stats.z_t) if upstream.lse_rest is None else upstream.lse_rest
    if upstream.entropy_rest is not None and stats.entropy_rest is not None:
        slope = slope - upstream.entropy_rest * stats.entropy_rest
    dz = r * slope.unsqueeze(-1)
    if upstream.entropy_rest is not None:
        dz.addcmul_(torch.special.entr(r), upstream.entropy_rest.unsqueeze(-1))
    if upstream.z_t is not None:
        dz.scatter_add_(-1, label, upstream.z_t.unsqueeze(-1) * inside)
    if upstream.z_mean is not None:
        dz += (upstream.z_mean / num_labels).unsqueeze(-1)
    return dz
