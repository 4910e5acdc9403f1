"""From statistics to losses: each a few operations on ``[B, H]``; and one penalty that needs no head.

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

    Never computed through ``log(1 - softmax)``, which is infinite in float32 from a margin of 17 on. Its gradient in
    the margin is p: it pulls where a sample is memorised, and hardly where it is not.
    """
    return F.softplus(stats.z_t - stats.lse_rest)


def uniform_penalty(stats: Statistics) -> Tensor:
    """Cross-entropy of the head to the uniform distribution, ``lse(all) - mean(all)``, ``[B, H]``; at least log n."""
    return torch.logaddexp(stats.z_t, stats.lse_rest) - stats.z_mean


def entropy_penalty(stats: Statistics) -> Tensor:
    """Negative entropy ``-H`` of the head's n probabilities in nats, ``[B, H]``, from -log n to 0.

    By the chain rule of entropy ``H = h(p) + (1 - p) H_rest``, with h that of "the random label or another": all terms
    are products of a probability and a softplus, so nothing overflows or cancels where p is 0 or 1. It does not look
    at the label: a head that is sure of a wrong one is flattened as well. Needs the statistic ``entropy_rest``.
    """
    if stats.entropy_rest is None:
        raise ValueError("the statistics have no entropy_rest; expected them to be computed with entropy=True")
    d = stats.z_t - stats.lse_rest
    p, rest = torch.sigmoid(d), torch.sigmoid(-d)
    return -(p * F.softplus(-d) + rest * (F.softplus(d) + stats.entropy_rest))


def reversal_penalty(stats: Statistics) -> Tensor:
    """``log p``, ``[B, H]``: gradient reversal (Ganin & Lempitsky, 2015), the backbone ascends the fit loss.

    Its gradient in the margin is 1 - p. It saturates where :func:`forget_penalty` acts, on samples whose label the
    head is sure of, and has no lower bound where the label is already lost. Both belong to the definition.
    """
    return -fit_loss(stats)


PENALTIES: dict[str, Callable[[Statistics], Tensor]] = {
    "forget": forget_penalty,
    "uniform": uniform_penalty,
    "entropy": entropy_penalty,
    "reversal": reversal_penalty,
    "joint": fit_loss,
}
"""What the backbone minimises through the heads, by name.

``joint`` is the opposite of a penalty: the fit loss itself, so that the backbone helps the heads. The accuracy that
they reach together is what the network can memorise beside its task.
"""

DOF = "dof"
"""The penalty that asks no head: :func:`degrees_of_freedom`."""
PENALTY_NAMES = (*PENALTIES, DOF)
NEEDS_ENTROPY = frozenset({"entropy"})
"""Penalties that read the statistic ``entropy_rest``."""
RIDGE = 0.1
"""Default ρ of :func:`degrees_of_freedom`."""
_SMALLEST = 1e-30


def check_penalty(name: str) -> None:
    """Raise a UserError unless ``name`` is one of :data:`PENALTY_NAMES`."""
    if name not in PENALTY_NAMES:
        raise UserError(f"penalty is '{name}'; expected one of {', '.join(PENALTY_NAMES)}")


def penalty_named(name: str) -> Callable[[Statistics], Tensor]:
    """A penalty of :data:`PENALTIES` by name."""
    check_penalty(name)
    if name == DOF:
        raise UserError("penalty 'dof' is a function of the features; expected one of " + ", ".join(PENALTIES))
    return PENALTIES[name]


def degrees_of_freedom(x: Tensor, ridge: float = RIDGE) -> Tensor:
    """Share of the batch that a ridge head could fit, ``tr(H) / B`` with ``H = G (G + B ρ I)^-1`` and ``G = X Xᵀ``.

    X is centred and divided by one number, the root of the features' mean variance (with its gradient: otherwise
    shrinking all features would look like progress). With the covariance's eigenvalues l_i in units of their mean,
    the value is ``Σ l_i / (l_i + ρ) / B``, in [0, min(B - 1, D) / B].

    H turns labels y into what a ridge head fitted to them on this batch predicts. For random labels, independent
    with mean 0 and variance 1, ``E yᵀHy / B = tr(H) / B``: the mean agreement of labels and predictions over *all*
    draws (for ±1 labels the head's Rademacher correlation; in statistics the fit's degrees of freedom, Efron 2004).
    So no head stands for the rest, and none can be silenced alone.

    Args:
        x: features ``[B, ...]``.
        ridge: ρ > 0, in units of the mean variance; eigen-directions well below it count for little.

    Returns:
        0-dim, float32, float64 for float64; 0 for one sample or constant features, NaN for none.
    """
    with torch.autocast(x.device.type, enabled=False):
        given = torch.promote_types(x.dtype, torch.float32)
        # Where one direction has all the variance, the Gram matrix's condition is D / ρ, beyond what float32 resolves.
        x = x.flatten(1).double()
        batch, dim = x.shape
        centred = x - x.mean(0)
        scaled = centred * centred.square().mean().clamp_min(_SMALLEST).rsqrt()
        gram = scaled @ scaled.T if batch <= dim else scaled.T @ scaled  # equal traces, the smaller matrix
        shifted = gram + ridge * batch * torch.eye(len(gram), dtype=x.dtype, device=x.device)
        factor = torch.linalg.cholesky_ex(shifted).L  # positive definite; unlike cholesky it asks the host nothing
        return (torch.cholesky_solve(gram, factor).diagonal().sum() / batch).to(given)


def correct(stats: Statistics) -> Tensor:
    """True where the head's largest logit is the random label's alone (a tie counts as wrong), bool ``[B, H]``.

    With ties counted as right, a head that starts at zero would score 100%.
    """
    return stats.z_t > stats.max_rest


def kappa(accuracy: float, n: int) -> float:
    """Chance-corrected accuracy ``(n * accuracy - 1) / (n - 1)``: 0 at chance, 1 when all is right."""
    return (n * accuracy - 1) / (n - 1)
