"""Instance retrieval: whether a new view of a sample is nearer to that sample than to any other."""

import numpy as np
import torch
from torch import Tensor

from rlp.errors import UserError
from rlp.measure.spectrum import check_features

TIE = 1e-12
"""Distances that differ by less, relative to the squared lengths, are ties: rounding of the float64 sums."""
CHUNK = 1024
"""Queries, and anchors, that are compared at a time."""


def own_view_is_nearest(anchors: Tensor, queries: Tensor) -> np.ndarray:
    """For each query whether, of all anchors, the one of its own row is nearest (Euclidean).

    Args:
        anchors: features of the samples, ``[N, D]``.
        queries: features of another view of each, ``[N, D]``, in the same order.

    Returns:
        bool ``[N]``; a tie with another anchor counts as wrong, so a network that maps all to one point scores 0.
        Chance is 1 / N.

    Raises:
        UserError: shapes or devices differ, or features are not finite.
    """
    if anchors.shape != queries.shape or anchors.device != queries.device:
        raise UserError(
            f"anchors are {[*anchors.shape]} on {anchors.device}, queries {[*queries.shape]} on {queries.device}; "
            "expected one row of each for a sample, on one device"
        )
    check_features(anchors)
    check_features(queries)
    with torch.no_grad():
        middle = anchors.mean(0, dtype=torch.float64)
        parts = [_nearest(anchors, queries, start, middle) for start in range(0, len(anchors), CHUNK)]
    return torch.cat(parts).cpu().numpy()


def _nearest(anchors: Tensor, queries: Tensor, start: int, middle: Tensor) -> Tensor:
    """Of the queries from `start` on; the distances are float64, of features about their middle."""
    query = queries[start : start + CHUNK].double() - middle
    own = (query - (anchors[start : start + CHUNK].double() - middle)).square().sum(1)
    right = torch.ones_like(own, dtype=torch.bool)
    length = query.square().sum(1)
    rows = torch.arange(len(query), device=query.device)
    for first in range(0, len(anchors), CHUNK):
        other = anchors[first : first + CHUNK].double() - middle
        squared = other.square().sum(1)
        distance = torch.addmm(length[:, None] + squared, query, other.T, alpha=-2.0)
        nearer = distance <= own[:, None] + TIE * (length[:, None] + squared)
        if first == start:
            nearer[rows, rows] = False
        right &= ~nearer.any(1)
    return right
