"""The oracle: the random-label loss in plain PyTorch, by autograd; every fast path is held to it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
import torch.nn.functional as F


class Statistics(NamedTuple):
    """What every loss, penalty and accuracy of a head follows from; each ``[B, H]``, float32 or float64.

    ``z_t``: logit of the random label; ``lse_rest`` and ``max_rest``: log-sum-exp and maximum of the *other* logits;
    ``z_mean``: mean of all logits; ``entropy_rest`` (on request, else None): entropy in nats of the softmax over the
    other logits. With the label left out of the sum, ``z_t - lse_rest`` is exact where ``log(1 - softmax)`` has long
    rounded to minus infinity. ``max_rest`` carries no gradient.
    """

    z_t: Tensor
    lse_rest: Tensor
    z_mean: Tensor
    max_rest: Tensor
    entropy_rest: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Statistics":
        """Each of them changed; None stays None."""
        z_t, lse_rest, z_mean, max_rest = map(change, self[:4])
        return Statistics(z_t, lse_rest, z_mean, max_rest, optional(self.entropy_rest, change))


def optional(tensor: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    """``change(tensor)``; None stays None."""
    return None if tensor is None else change(tensor)


class RandomLabelLoss(NamedTuple):
    """The fit loss ``[H]``, mean over the batch, and the statistics ``[B, H]``; the gradients' routes differ.

    ``fit`` reaches weight and bias only, ``stats`` reach the features only.
    """

    fit: Tensor
    stats: Statistics


def mean_fit(z_t: Tensor, lse_rest: Tensor) -> Tensor:
    """Fit loss ``[H]``: mean over the batch of ``-log p = softplus(lse_rest - z_t)``."""
    return F.softplus(lse_rest - z_t).mean(0)


def statistics_from_logits(logits: Tensor, target: Tensor, entropy: bool = False) -> Statistics:
    """Statistics of given logits.

    Args:
        logits: ``[B, H, n]`` with n >= 2; half precision is raised to float32 before any sum.
        target: int64 ``[B, H]`` random labels in [0, n).
        entropy: also ``entropy_rest``.
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"a head has {logits.shape[-1]} random label; expected at least 2")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    label = target.unsqueeze(-1)
    rest = logits.scatter(-1, label, -torch.inf)
    lse_rest = rest.logsumexp(-1)
    others = logits.scatter(-1, label, 0.0)  # finite, for the label's r is 0
    return Statistics(
        z_t=logits.gather(-1, label).squeeze(-1),
        lse_rest=lse_rest,
        z_mean=logits.mean(-1),
        max_rest=rest.detach().amax(-1),
        entropy_rest=lse_rest - (rest.softmax(-1) * others).sum(-1) if entropy else None,
    )


def head_logits(x: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor | None = None) -> Tensor:
    """Logits ``[B, H, n]``; arguments as for :func:`random_label_loss`."""
    if classes is not None:
        weight = weight[:, classes].transpose(0, 1)  # [B, H, n, D]: each sample's own heads
        bias = None if bias is None else bias[:, classes].transpose(0, 1)
    features = "bd" if x.dim() == 2 else "bhd"
    logits = torch.einsum(f"{features},{'hnd' if classes is None else 'bhnd'}->bhn", x, weight)
    return logits if bias is None else logits + bias


def statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    classes: Tensor | None = None,
    entropy: bool = False,
) -> Statistics:
    """Statistics of linear heads, with ordinary gradients; arguments as for :func:`random_label_loss`."""
    return statistics_from_logits(head_logits(x, weight, bias, classes), target, entropy)


def random_label_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    classes: Tensor | None = None,
    entropy: bool = False,
    fit_to_features: bool = False,
) -> RandomLabelLoss:
    """Fit loss and statistics by "detach and run twice".

    Args:
        x: features ``[B, D]``, shared by the heads, or ``[B, H, D]``, one row for each.
        weight: ``[H, n, D]``, or ``[H, C, n, D]`` where each of C classes has heads of its own.
        bias: ``[H, n]`` or ``[H, C, n]``, or None.
        target: int64 ``[B, H]`` random labels in [0, n).
        classes: int64 ``[B]`` in [0, C) with a weight of four dimensions, else None.
        entropy: also ``entropy_rest``.
        fit_to_features: let the fit loss reach the features too, as an ordinary loss does.
    """
    fit = statistics(x if fit_to_features else x.detach(), weight, bias, target, classes)
    frozen = None if bias is None else bias.detach()
    stats = statistics(x, weight.detach(), frozen, target, classes, entropy)
    return RandomLabelLoss(mean_fit(fit.z_t, fit.lse_rest), stats)
