"""What the paths of the random-label loss are given, and what they give back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlp.kernels.reference import Statistics, optional


class ClassOrder(NamedTuple):
    """The rows of a batch sorted by class; made once a step by :func:`sort_by_class`, shared by taps and draws.

    ``classes``: int64 ``[B]``, as given; ``rows``: int64 ``[B]``, row numbers in the order of their classes (stable);
    ``offsets``: int64 ``[C + 1]``, the rows of class c are ``rows[offsets[c]:offsets[c + 1]]``.
    """

    classes: Tensor
    rows: Tensor
    offsets: Tensor


def sort_by_class(classes: Tensor, num_classes: int) -> ClassOrder:
    """Sort int64 ``classes [B]`` in [0, num_classes), on their device and without a host sync."""
    ordered, rows = torch.sort(classes, stable=True)
    bounds = torch.arange(num_classes + 1, device=classes.device, dtype=classes.dtype)
    return ClassOrder(classes, rows, torch.searchsorted(ordered, bounds))


@dataclass(frozen=True)
class Problem:
    """One call of the loss.

    Shapes: ``x [B, D]`` or ``[B, H, D]``; ``weight [H, n, D]`` or, with ``order``, ``[H, C, n, D]``; ``bias`` like the
    weight without D, or None; ``target [B, H]``. ``dtype`` is what the products are computed in. ``need_weight`` and
    ``need_features`` say which gradients will be asked for; ``budget`` is the number of bytes that temporary matrices
    of logits may take; ``triton`` says whether Triton's kernels are to be used.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    order: ClassOrder | None
    dtype: torch.dtype
    entropy: bool
    need_weight: bool
    need_features: bool
    budget: int
    triton: bool

    @property
    def batch(self) -> int:
        """B."""
        return self.x.shape[0]

    @property
    def heads(self) -> int:
        """H."""
        return self.weight.shape[0]

    @property
    def num_labels(self) -> int:
        """n."""
        return self.weight.shape[-2]

    @property
    def dim(self) -> int:
        """D."""
        return self.weight.shape[-1]

    @property
    def stats_dtype(self) -> torch.dtype:
        """Type of statistics and of sums: float64 where all is, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def logits_dtype(self) -> torch.dtype:
        """Type of logits in memory: that of the products only where a kernel reads them for gradients.

        Elsewhere they are not rounded: two that are only read shall not be equal for that.
        """
        return self.dtype if self.triton and (self.need_weight or self.need_features) else self.stats_dtype


class Upstream(NamedTuple):
    """Gradients that arrive: of ``fit`` ``[H]`` (for the weights), of the statistics ``[B, H]`` (for the features).

    None where nothing arrives. What reaches neither is None altogether.
    """

    fit: Tensor | None
    z_t: Tensor | None
    lse_rest: Tensor | None
    z_mean: Tensor | None
    entropy_rest: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Upstream":
        """The statistics' gradients changed; None stays None, and so does `fit`."""
        return Upstream(self.fit, *(optional(part, change) for part in self[1:]))

    @property
    def reaches_features(self) -> bool:
        """Whether any statistic has a gradient."""
        return any(part is not None for part in self[1:])


class Gradients(NamedTuple):
    """Gradients that leave, in the shapes and types of their tensors; None where not asked for."""

    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


Kept = tuple[Tensor, ...]
"""What a path's forward leaves for its backward: as many tensors as its `kept` says."""


class Path(Protocol):
    """One way of computing the loss; a module with these three functions."""

    def kept(self, problem: Problem) -> Kept:
        """Empty tensors in the shapes and types of what :meth:`forward` keeps; must not look at values."""
        ...

    def forward(self, problem: Problem) -> tuple[Statistics, Kept]:
        """The statistics, contiguous ``[B, H]`` of ``problem.stats_dtype``, and what the backward pass needs."""
        ...

    def backward(self, problem: Problem, stats: Statistics, kept: Kept, upstream: Upstream) -> Gradients:
        """The gradients. ``kept`` must stay as it is, for the caller may come again (``retain_graph``)."""
        ...
