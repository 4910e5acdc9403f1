"""What heads are given of the features while a network trains: a named choice, since each erases part of the signal."""

import torch
from torch import Tensor, nn

from rlp.errors import UserError
from rlp.seeding import named_seed

FEATURES = ("raw", "standardised", "normalised", "projected")
MOMENTUM = 0.1
"""Weight of the newest batch in the running statistics, as in ``nn.BatchNorm1d``."""
EPS = 1e-5
"""Added to a variance before its root is taken, as in ``nn.BatchNorm1d``: a constant feature becomes 0."""


def check_features(kind: str) -> None:
    """Raise a UserError unless ``kind`` is one of :data:`FEATURES`."""
    if kind not in FEATURES:
        raise UserError(f"features is '{kind}'; expected one of {', '.join(FEATURES)}")


class Featurizer(nn.Module):
    """A map of features ``[B, D]`` to ``[B, dim]`` whose statistics run along with the network's training.

    - ``standardised``: mean 0 and deviation 1 for each feature, without trained parameters (``nn.BatchNorm1d`` with
      ``affine=False``). Erases the features' scales.
    - ``normalised``: mean 0 for each feature, then each sample to length sqrt(D). Erases the samples' norms.
    - ``projected``: standardised, then times a fixed Gaussian matrix ``[D, width]`` with variance 1 / D. Equal widths
      make taps comparable: with D > width it erases directions.

    These are the definitions of :class:`rlp.measure.preprocess.Preprocess`, up to the statistics and :data:`EPS`: in
    train mode those of the batch (of the rank's own, with several), through which gradients flow, and in eval mode
    running ones, exponential averages with :data:`MOMENTUM` and the unbiased variance. A batch of one sample, which has
    no variance, is given the running statistics too and leaves them as they are.

    Args:
        kind: one of :data:`FEATURES` but ``raw``, for which there is nothing to do.
        dim: D.
        width: columns of the projection.
        seed: of the projection, which is a function of D, width and seed alone.

    Attributes:
        dim: features that come out.
        running_mean, running_var: float32 ``[D]``, part of ``state_dict()``.
    """

    running_mean: Tensor
    running_var: Tensor
    matrix: Tensor | None

    def __init__(self, kind: str, dim: int, width: int, seed: int) -> None:
        super().__init__()
        check_features(kind)
        if kind == "raw":
            raise ValueError("raw features need no Featurizer")
        self.kind, self.dim = kind, width if kind == "projected" else dim
        self.register_buffer("running_mean", torch.zeros(dim, device="cpu"))
        self.register_buffer("running_var", torch.ones(dim, device="cpu"))
        matrix = None
        if kind == "projected":
            random = torch.Generator().manual_seed(named_seed(seed, f"measure.projection.{dim}.{width}"))
            matrix = torch.randn((dim, width), generator=random, device="cpu") / dim**0.5
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, dim]``, float32 (float64 of float64), also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            mean, var = self._statistics(x)
            centred = x - mean.to(x.dtype)
            if self.kind == "normalised":
                return centred * (centred.square().mean(1, keepdim=True) + EPS).rsqrt()
            standard = centred * (var.to(x.dtype) + EPS).rsqrt()
            return standard if self.matrix is None else standard @ self.matrix.to(x.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance ``[D]`` to use; in train mode the running ones move."""
        if not self.training or len(x) < 2:
            return self.running_mean, self.running_var
        var, mean = torch.var_mean(x, dim=0, correction=0)
        with torch.no_grad():
            unbiased = var * (len(x) / (len(x) - 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), MOMENTUM)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), MOMENTUM)
        return mean, var

    def reset(self) -> None:
        """Forget the running statistics."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
