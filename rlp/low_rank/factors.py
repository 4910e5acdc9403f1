"""Activations of low rank in the place of the whole: non-negative factors, principal components, a few units.

Each takes many matrices at once, ``[b, R, D]``, and gives the same shape back; one matrix never touches another.
"""

import torch
from torch import Tensor

TINY = 1e-12
"""Added to what is divided by."""
CHECK = 10
"""Iterations between looks at the error; a look costs a transfer from the device."""


@torch.no_grad()
def non_negative(
    a: Tensor, k: int, random: torch.Generator, *, restarts: int = 3, iterations: int = 200, tolerance: float = 1e-4
) -> Tensor:
    """``W H`` with non-negative ``W [b, R, k]`` and ``H [b, k, D]``, by multiplicative updates (Lee and Seung 2001).

        W ← W ∘ (A Hᵀ) / (W H Hᵀ),    H ← H ∘ (Wᵀ A) / (Wᵀ W H)

    from |N(0, 1)|·√(mean(A)/k), until no matrix gains more than ``tolerance`` of its first error in ten iterations. Of
    the restarts that of the smallest squared error is kept, for each matrix by itself.

    Args:
        a: non-negative, float ``[b, R, D]``.
        k: rank, at least 1.
        random: a generator on the CPU.
        restarts, iterations, tolerance: as above.
    """
    scale = (a.mean((1, 2), keepdim=True) / k).sqrt()
    best, least = torch.zeros_like(a), torch.full_like(scale, torch.inf)
    for _ in range(restarts):
        w, h = (
            torch.randn(shape, generator=random).abs().to(a) * scale
            for shape in ((len(a), a.shape[1], k), (len(a), k, a.shape[2]))
        )
        first = last = _error(a, w @ h)
        for iteration in range(1, iterations + 1):
            w *= (a @ h.mT) / (w @ (h @ h.mT)).add_(TINY)
            h *= (w.mT @ a) / ((w.mT @ w) @ h).add_(TINY)
            if iteration % CHECK == 0:
                error = _error(a, w @ h)
                if bool((last - error <= tolerance * first).all()):
                    break
                last = error
        found = w @ h
        error = _error(a, found)
        best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    return best


def _error(a: Tensor, found: Tensor) -> Tensor:
    """Frobenius norm of the difference, ``[b, 1, 1]``."""
    return (a - found).square_().sum((1, 2), keepdim=True).sqrt_()


@torch.no_grad()
def principal(a: Tensor, ks: list[int]) -> list[Tensor]:
    """The column means and the first k principal components, for each k in turn; entries may be negative."""
    mean = a.mean(1, keepdim=True)
    centred = (a - mean).double()
    # Eigenvectors of the smaller side's products: far cheaper than a singular value decomposition of tall matrices.
    tall = a.shape[1] >= a.shape[2]
    vectors = torch.linalg.eigh(centred.mT @ centred if tall else centred @ centred.mT)[1].flip(-1)
    kept = (vectors[..., :k] for k in ks)
    return [mean + ((centred @ v @ v.mT) if tall else (v @ (v.mT @ centred))).to(a.dtype) for v in kept]


@torch.no_grad()
def few_units(a: Tensor, k: int, random: torch.Generator) -> Tensor:
    """k of the D units as they are, others zero; which ones is drawn for each matrix."""
    order = torch.rand((len(a), a.shape[2]), generator=random).argsort(1).to(a.device)
    return a * (order < k).to(a)[:, None, :]
