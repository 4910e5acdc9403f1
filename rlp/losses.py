"""From statistics to losses: each a few operations on ``[B, H]``.

With the margin ``d = z_t - lse_rest`` the head's probability of the random label is ``p = sigmoid(d)``, so

- fit loss ``-log p = softplus(-d)``, which trains the heads;
- penalty ``-log(1 - p) = softplus(d)``, which the backbone minimises to forget.

The sign matters. Reading notes of arXiv 2607.11541 print the regulariser as ``log(1 - p)``: minimising that *raises*
p and teaches the random labels. What its text describes is minimising ``-log(1 - p)``.
"""

from collections.abc import Callable

import torch
from torch import Tensor
import torch.nn.functional as F

from rlp.errors import UserError
from rlp.kernels.reference import Statistics


def fit_loss(stats: Statistics) -> Tensor:
    """Cross-entropy on the random label, ``-log p = softplus(lse_rest - z_t)``, ``[B, H]``."""
    return F.softplus(stats.lse_rest - stats.z_t)


def forget_penalty(stats: Statistics) -> Tensor:
    """``-log(1 - p) = softplus(z_t - lse_rest)``, ``[B, H]`` (arXiv 2607.11541, with the sign that forgets).

    Never computed through ``log(1 - softmax)``, which is infinite in float32 from a margin of 17 on.
    """
    return F.softplus(stats.z_t - stats.lse_rest)


def uniform_penalty(stats: Statistics) -> Tensor:
    """Cross-entropy of the head to the uniform distribution, ``lse(all) - mean(all)``, ``[B, H]``; at least log n."""
    return torch.logaddexp(stats.z_t, stats.lse_rest) - stats.z_mean


PENALTIES: dict[str, Callable[[Statistics], Tensor]] = {"forget": forget_penalty, "uniform": uniform_penalty}


def penalty_named(name: str) -> Callable[[Statistics], Tensor]:
    """A penalty of :data:`PENALTIES` by name."""
    if name not in PENALTIES:
        raise UserError(f"penalty is '{name}'; expected one of {', '.join(PENALTIES)}")
    return PENALTIES[name]


def correct(stats: Statistics) -> Tensor:
    """True where the head's largest logit is the random label's alone (a tie counts as wrong), bool ``[B, H]``.

    With ties counted as right, a head that starts at zero would score 100%.
    """
    return stats.z_t > stats.max_rest


def kappa(accuracy: float, n: int) -> float:
    """Chance-corrected accuracy ``(n * accuracy - 1) / (n - 1)``: 0 at chance, 1 when all is right."""
    return (n * accuracy - 1) / (n - 1)
