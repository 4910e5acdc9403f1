"""How many directions features have, and noise with as many: covariance, effective rank, Gaussian control.

All sums are float64, whatever the features are, and taken over pieces of the samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlp.errors import UserError
from rlp.seeding import named_seed

SMALLEST_DEVIATION = 3e-7
"""A direction counts if its standard deviation is more than this share of the largest: a few roundings of float32."""
CHUNK_BYTES = 64 * 2**20
"""Bytes that a piece of the features may take in float64."""


@dataclass(frozen=True)
class Spectrum:
    """Spectrum of the features' covariance.

    Attributes:
        eigenvalues: of the covariance (divided by N), float64 ``[D]``, descending, not below 0.
        effective_rank: ``exp(-sum p log p)`` of ``p = eigenvalues / sum`` (Roy & Vetterli 2007, of the covariance
            matrix, whose singular values these are); 1 to D, and 0 where no feature varies.
        participation_ratio: ``(sum eigenvalues)^2 / sum eigenvalues^2``; 1 to D, and 0 where no feature varies.
        numerical_rank: directions whose standard deviation is above `SMALLEST_DEVIATION` times the largest.
    """

    eigenvalues: np.ndarray
    effective_rank: float
    participation_ratio: float
    numerical_rank: int


def spectrum(x: Tensor) -> Spectrum:
    """Spectrum of features ``[N, D]``; N may be smaller than D, features may be constant.

    Raises:
        UserError: no samples, not two dimensions, or a feature that is not finite.
    """
    check_features(x)
    values = np.zeros(x.shape[1])
    found = principal_axes(x, feature_mean(x))[0].cpu().numpy()
    values[: len(found)] = found
    total = values.sum()
    if total == 0:
        return Spectrum(values, 0.0, 0.0, 0)
    share = values / total
    share = share[share > 0]  # what is left of a tiny eigenvalue may be 0
    return Spectrum(
        values,
        effective_rank=float(np.exp(-(share * np.log(share)).sum())),
        participation_ratio=float(1 / (share**2).sum()),
        numerical_rank=int((values > SMALLEST_DEVIATION**2 * values[0]).sum()),
    )


def noise_like(x: Tensor, seed: int) -> Tensor:
    """Gaussian noise ``[N, D]`` float32 drawn from the mean and covariance of features ``[N, D]``.

    What heads read from it is what the spectrum alone lets them read. Equal seeds give equal noise; no global random
    state is touched.

    Raises:
        UserError: as for `spectrum`.
    """
    check_features(x)
    mean = feature_mean(x)
    variances, axes = principal_axes(x, mean)
    root = (axes * variances.sqrt()).T
    random = torch.Generator().manual_seed(named_seed(seed, "measure.noise"))
    noise = torch.randn((len(x), len(root)), generator=random, dtype=torch.float32).to(x.device)
    return torch.cat([(part.double() @ root + mean).float() for part in chunks(noise)])


# -- moments -----------------------------------------------------------------------------------------------------


def check_features(x: Tensor) -> None:
    """Raise a UserError unless `x` is ``[N, D]``, N and D at least 1, floating and finite."""
    if x.dim() != 2 or not x.numel():
        raise UserError(f"the features have the shape {[*x.shape]}; expected [N, D] with at least one of each")
    if not x.is_floating_point():
        raise UserError(f"the features are {x.dtype}; expected floating-point numbers")
    start = 0
    for part in chunks(x):
        finite = part.isfinite().all(1)
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            raise UserError(f"the features of sample {row} hold NaN or infinity; expected finite numbers")
        start += len(part)


def chunks(x: Tensor) -> Iterator[Tensor]:
    """Pieces of the rows whose float64 copy takes `CHUNK_BYTES` at most."""
    return iter(x.split(max(1, CHUNK_BYTES // (8 * x.shape[1]))))


def feature_mean(x: Tensor) -> Tensor:
    """Mean of each feature, float64 ``[D]``; of a constant feature its very value."""
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    for part in chunks(x):
        total += part.sum(0, dtype=torch.float64)
    low, high = x.aminmax(dim=0)
    return torch.where(low == high, low.double(), total / len(x))


def feature_deviation(x: Tensor, mean: Tensor) -> Tensor:
    """Standard deviation of each feature, float64 ``[D]``; 0 where it is no more than float32's rounding of x."""
    total = torch.zeros_like(mean)
    for part in chunks(x):
        total += (part.double() - mean).square_().sum(0)
    deviation = (total / len(x)).sqrt_()
    rounding = torch.finfo(torch.float32).eps * x.abs().amax(0).double()
    return deviation.masked_fill_(deviation <= rounding, 0.0)


def principal_axes(x: Tensor, mean: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Variances ``[r]``, descending, and unit directions ``[D, r]`` of ``(x - mean) * scale``, r = min(N, D); float64.

    From the covariance ``[D, D]``, or where D > N from the samples' inner products ``[N, N]``; there directions whose
    variance is below the rounding of the sums are 0.
    """
    scale = torch.ones_like(mean) if scale is None else scale
    if len(x) < x.shape[1]:
        return _axes_of_few((x.double() - mean) * scale)
    covariance = mean.new_zeros(x.shape[1], x.shape[1])
    for part in chunks(x):
        centred = (part.double() - mean).mul_(scale)
        covariance.addmm_(centred.T, centred, alpha=1 / len(x))
    variances, axes = torch.linalg.eigh(covariance)
    return variances.flip(0).clamp_min_(0.0), axes.flip(1)


def _axes_of_few(centred: Tensor) -> tuple[Tensor, Tensor]:
    variances, of_samples = torch.linalg.eigh(centred @ centred.T / len(centred))
    variances, of_samples = variances.flip(0).clamp_min(0.0), of_samples.flip(1)
    real = variances > 1e-15 * len(centred) * variances[0]
    axes = centred.T @ of_samples
    axes /= torch.where(real, (variances * len(centred)).sqrt(), torch.inf)
    return variances * real, axes
