"""Whitening of features: an invertible affine map that changes no converged linear head, only how fast it is found."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlp.errors import UserError
from rlp.measure.spectrum import (
    SMALLEST_DEVIATION,
    check_features,
    chunks,
    feature_deviation,
    feature_mean,
    principal_axes,
)


@dataclass(frozen=True)
class Whitening:
    """``(x - mean) @ matrix``: mean 0 and covariance 1 over the samples that it was made from.

    Directions are dropped whose standard deviation, after each feature was brought to deviation 1, is not above
    `SMALLEST_DEVIATION` (3e-7) times the largest, and features that vary by no more than float32's rounding: they are
    rounding, which a head without regularisation would otherwise amplify. Means, covariance, its eigenvectors and the
    map are float64, what comes out float32, so that features with a condition number of 10^6 keep their directions.

    Attributes:
        mean: float64 ``[D]``.
        matrix: float64 ``[D, R]``; where nothing varies R is 1 and the column 0.
        rank: directions kept, 0 to min(N - 1, D).
    """

    mean: Tensor
    matrix: Tensor
    rank: int

    @classmethod
    def fit(cls, x: Tensor) -> "Whitening":
        """The whitening of features ``[N, D]``.

        Raises:
            UserError: no samples, not two dimensions, or a feature that is not finite.
        """
        check_features(x)
        mean = feature_mean(x)
        deviation = feature_deviation(x, mean)
        scale = torch.where(deviation > 0, 1 / deviation, 0.0)
        variances, axes = principal_axes(x, mean, scale)
        kept = variances > SMALLEST_DEVIATION**2 * variances[0]
        rank = int(kept.sum())
        if not rank:
            return cls(mean, mean.new_zeros(x.shape[1], 1), 0)
        return cls(mean, scale[:, None] * axes[:, :rank] / variances[:rank].sqrt(), rank)

    def __call__(self, x: Tensor) -> Tensor:
        """Whitened features, float32 ``[N, R]``.

        Raises:
            UserError: the features have another width than those that it was made from.
        """
        if x.shape[1] != len(self.mean):
            raise UserError(f"the features have the shape {[*x.shape]}; expected [N, {len(self.mean)}]")
        return torch.cat([((part.double() - self.mean) @ self.matrix).float() for part in chunks(x)])
