"""Exact nearest neighbours in chunks, and how they vote; on the CPU or on a GPU."""

import torch
from torch import Tensor
from tqdm import tqdm

from rlp.measure.spectrum import check_features, chunks, feature_mean, principal_axes

BLOCK = 2**25
"""Distances that are held at a time."""
WORK = 2**34
"""Subtractions from which on a search shows its progress; about ten seconds of one core."""


class Reduction:
    """Principal components of one set of features, for others of the same tap.

    Args:
        x: features ``[N, D]``, of which the ``width`` directions of largest variance are kept (at most min(N, D)).
        width: of what comes out.
    """

    def __init__(self, x: Tensor, width: int) -> None:
        check_features(x)
        self.mean = feature_mean(x)
        self.axes = principal_axes(x, self.mean)[1][:, :width]

    def __call__(self, x: Tensor) -> Tensor:
        """Features ``[N, D]`` to float32 ``[N, width]``."""
        return torch.cat([((part.double() - self.mean) @ self.axes).float() for part in chunks(x)])


@torch.no_grad()
def nearest(queries: Tensor, anchors: Tensor, k: int, *, p: float = 1.0, leave_out: bool = False) -> Tensor:
    """Rows of the k nearest anchors of each query, nearest first; exact, every pair is compared.

    Args:
        queries: ``[M, D]``.
        anchors: ``[N, D]``, on the same device.
        k: at most N, or N − 1 with ``leave_out``.
        p: 1 for the city-block distance, 2 for the Euclidean.
        leave_out: row i of both is one sample, which is no neighbour of itself.

    Returns:
        int64 ``[M, k]`` on that device. Equal distances may come in any order.
    """
    if not 1 <= k <= len(anchors) - leave_out:
        raise ValueError(f"k is {k} with {len(anchors)} anchors; expected 1 to {len(anchors) - leave_out}")
    if p == 2.0:  # as a product of matrices, whose rounding in float32 would drown small distances
        middle = anchors.mean(0, dtype=torch.float64)
        queries, anchors = queries.double() - middle, anchors.double() - middle
    step, found = max(1, BLOCK // len(anchors)), []
    quick = len(queries) * anchors.numel() < WORK
    for start in tqdm(range(0, len(queries), step), "neighbours", leave=False, disable=True if quick else None):
        distance = torch.cdist(queries[start : start + step], anchors, p=p)
        if leave_out:
            rows = torch.arange(len(distance), device=distance.device)
            distance[rows, start + rows] = torch.inf
        found.append(distance.topk(k, largest=False).indices)
    return torch.cat(found)


def vote(labels: Tensor, classes: int) -> Tensor:
    """The class that most neighbours have.

    Among classes with equally many, it is the one whose neighbours are nearer by the sum of their ranks, and then the
    one with the smaller number.

    Args:
        labels: of the neighbours, nearest first, int64 ``[M, k]`` in [0, classes).
        classes: C.

    Returns:
        int64 ``[M]``.
    """
    k = labels.shape[1]
    weight = k * k + torch.arange(k, 0, -1, device=labels.device)  # the ranks sum to less than one more vote
    score = torch.zeros((len(labels), classes), dtype=torch.int64, device=labels.device)
    return score.scatter_add_(1, labels, weight.expand_as(labels)).argmax(1)
