"""What heads are given of the features: a named choice, since each erases part of the signal."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlp.errors import UserError
from rlp.measure.spectrum import check_features, chunks, feature_deviation, feature_mean
from rlp.seeding import named_seed

FEATURES = ("raw", "standardised", "normalised", "projected", "residual", "residual-predicted")
RESIDUALS = FEATURES[-2:]


@dataclass(frozen=True)
class Preprocess:
    """A map of features ``[N, D]`` to float32 ``[N, dim]``, with the statistics of the features it was fitted to.

    - ``raw``: as they are.
    - ``standardised``: mean 0 and deviation 1 for each feature; constant features become 0. Erases their scales.
    - ``normalised``: mean 0 for each feature, then each sample to length sqrt(D) (a sample at the mean stays 0). Erases
      the samples' norms.
    - ``projected``: standardised, then times a fixed Gaussian matrix ``[D, width]`` with variance 1 / D. Equal widths
      make taps comparable: with D > width it erases directions. With D < width there are no more directions than
      before, D of them in `width` numbers.
    - ``residual``: minus the mean of the sample's given class. Erases what the class tells, as heads per class do
      (arXiv 2411.19640), and leaves the rest to one head. It alone lets the given labels into a reading.
    - ``residual-predicted``: minus the mean of the class that the network predicts, its control: where a network is
      often wrong, as on non-members, subtracting given classes leaves directions of the predicted ones.

    Attributes:
        kind: one of `FEATURES`.
        dim: features that come out.
        mean, scale: float64 ``[D]``, what is taken off, and multiplied with after; for residuals the mean of each class
            and, last, that of all, ``[C + 1, D]``.
        matrix: float32 ``[D, dim]`` of the projection, else None.
    """

    kind: str
    dim: int
    mean: Tensor
    scale: Tensor
    matrix: Tensor | None = None

    @classmethod
    def fit(
        cls, x: Tensor, kind: str, *, width: int = 128, seed: int = 0, classes: Tensor | None = None
    ) -> "Preprocess":
        """The map with the statistics of features ``[N, D]``; `width` and `seed` are those of the projection.

        `classes` are the given or predicted labels, int64 ``[N]``, which residuals need. The matrix is a function of D,
        width and seed alone. No global random state is touched.

        Raises:
            UserError: an unknown kind, a width below 1, or features that are not finite, ``[N, D]`` and at least one.
        """
        if kind not in FEATURES:
            raise UserError(f"features is '{kind}'; expected one of {', '.join(FEATURES)}")
        if width < 1:
            raise UserError(f"width is {width}; expected the number of dimensions to project to, at least 1")
        check_features(x)
        mean, dim = feature_mean(x), x.shape[1]
        if kind in RESIDUALS:
            return cls(kind, dim, _class_means(x, _checked(classes, x), mean), torch.ones_like(mean))
        if kind in ("raw", "normalised"):
            return cls(kind, dim, mean, torch.ones_like(mean))
        deviation = feature_deviation(x, mean)
        scale = torch.where(deviation > 0, 1 / deviation, 0.0)
        if kind == "standardised":
            return cls(kind, dim, mean, scale)
        random = torch.Generator().manual_seed(named_seed(seed, f"measure.projection.{dim}.{width}"))
        matrix = torch.randn((dim, width), generator=random) / dim**0.5
        return cls(kind, width, mean, scale, matrix.to(x.device))

    def __call__(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """Float32 ``[N, dim]``; residuals need the labels, int64 ``[N]``.

        Raises:
            UserError: the features have another width than those that the map was fitted to, or classes are missing.
        """
        width = self.mean.shape[-1]
        if x.dim() != 2 or x.shape[1] != width:
            raise UserError(f"the features have the shape {[*x.shape]}; expected [N, {width}]")
        if self.kind == "raw":
            return x.float()
        if self.kind in RESIDUALS:
            own = self.mean[_checked(classes, x).clamp(max=len(self.mean) - 1)]
            return torch.cat(
                [(part.double() - mean).float() for part, mean in zip(chunks(x), chunks(own), strict=True)]
            )
        return torch.cat([self._part(part) for part in chunks(x)])

    def _part(self, x: Tensor) -> Tensor:
        centred = x.double() - self.mean
        if self.kind == "normalised":
            length = centred.norm(dim=1, keepdim=True)
            return (centred * torch.where(length > 0, self.dim**0.5 / length, 0.0)).float()
        centred *= self.scale
        return (centred if self.matrix is None else centred @ self.matrix.double()).float()


def _checked(classes: Tensor | None, x: Tensor) -> Tensor:
    """The classes on the features' device."""
    if classes is None or classes.shape != x.shape[:1] or classes.dtype != torch.int64 or int(classes.min()) < 0:
        raise UserError(f"residual features need the class of each sample; expected int64 [{len(x)}], 0 or more")
    return classes.to(x.device)


def _class_means(x: Tensor, classes: Tensor, mean: Tensor) -> Tensor:
    """Float64 ``[C + 1, D]``: of each class, and, for classes without samples, of all."""
    own = [classes == number for number in range(int(classes.max()) + 1)]
    return torch.stack([*(feature_mean(x[mine]) if mine.any() else mean for mine in own), mean])
