"""What a loader yields, and which samples go into which batch: pure functions of (seed, epoch, sample id)."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from rlp.data.beton import Card
from rlp.data.view import View
from rlp.philox import random_bits


class Batch(NamedTuple):
    """One rank's part of a batch; everything lies on the rank's device and belongs to the receiver.

    ``image`` uint8 ``[B, 3, H, W]`` with channels_last strides, in training cropped, mirrored and shifted already;
    ``label`` int64 ``[B]``, the given label (label noise applied); ``index`` int64 ``[B]``, the sample ids; ``words``
    int64 ``[B, K]`` in [0, 2^32), the draws' random words.
    """

    image: Tensor
    label: Tensor
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    words: Tensor


class Loader(Protocol):
    """Batches of one set. ``num_samples`` counts the view over all ranks, ``steps`` this rank's batches an epoch."""

    card: Card
    view: View
    num_samples: int
    steps: int

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The batches of ``epoch`` from step ``start`` on; leaving the loop early frees what it holds."""
        ...

    def close(self) -> None:
        """Free threads, file and memory; the loader cannot be used afterwards."""
        ...


def epoch_order(seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """The samples in the order of one epoch: ``ids`` sorted by 64 random bits of (seed, epoch, id).

    A sample's place depends on nothing but these bits and those of the others, so seeds and epochs never repeat one
    another's orders, as they do where the generator is seeded with ``seed + epoch``.

    Args:
        seed: any integer in [0, 2^64).
        epoch: integer in [0, 2^32).
        ids: int64 ``[N]``, distinct; their own order matters only between equal bits (probability N²/2^65).

    Returns:
        int64 ``[N]``, a permutation of ``ids``.
    """
    words = random_bits(seed, "order", ids, 2, epoch).astype(np.uint64)
    keys = (words[:, 0] << np.uint64(32)) | words[:, 1]
    return ids[np.argsort(keys, kind="stable")]


def train_batches(order: np.ndarray, batch_size: int, rank: int, size: int) -> np.ndarray:
    """This rank's samples of every step: int64 ``[steps, batch_size / size]``.

    Step s is ``order[s * batch_size : (s + 1) * batch_size]`` whatever the number of ranks; the ranks take
    consecutive parts of it. An incomplete last batch is left out, so that every step weighs the same.

    Args:
        order: int64 ``[N]`` from :func:`epoch_order`.
        batch_size: samples a step over all ranks, a multiple of ``size``.
        rank: this rank, 0 to ``size - 1``.
        size: number of ranks.
    """
    if batch_size % size:
        raise ValueError(f"batch_size {batch_size} is not a multiple of the {size} ranks")
    steps, local = len(order) // batch_size, batch_size // size
    return order[: steps * batch_size].reshape(steps, batch_size)[:, rank * local : (rank + 1) * local]


def balanced_batches(
    order: np.ndarray, label: np.ndarray, batch_size: int, splits: int, seed: int, epoch: int
) -> np.ndarray:
    """Batches of ``splits`` splits with equal class lists, int64 ``[steps, batch_size]``, split after split.

    Every class is cut into groups of ``splits`` samples in the epoch's order; the groups of all classes are shuffled,
    and ``batch_size / splits`` of them make a batch, of which each split takes one sample of every group. So classes
    are as frequent as in the set, up to fewer than ``splits`` samples a class and the incomplete last batch, which are
    left out.

    Args:
        order: int64 ``[N]`` from :func:`epoch_order`.
        label: int64 ``[N]``, the class of each sample of ``order``.
        batch_size: samples a step, a multiple of ``splits``.
        splits: samples of a group.
        seed: of the groups' order, with ``epoch``.
        epoch: integer in [0, 2^32).
    """
    groups = []
    for value in np.unique(label):
        mine = order[label == value]
        groups.append(mine[: len(mine) // splits * splits].reshape(-1, splits))
    cut = np.concatenate(groups)
    words = random_bits(seed, "order.groups", cut[:, 0], 2, epoch)
    cut = cut[np.lexsort((words[:, 1], words[:, 0]))]
    each = batch_size // splits
    steps = len(cut) // each
    return cut[: steps * each].reshape(steps, each, splits).transpose(0, 2, 1).reshape(steps, batch_size)


def eval_ids(ids: np.ndarray, rank: int, size: int) -> np.ndarray:
    """Every ``size``-th sample from ``rank`` on: over the ranks each sample occurs once, without padding."""
    return ids[rank::size]


@dataclass(frozen=True)
class Schedule:
    """Which samples one rank sees, step by step.

    ``ids`` int64 ``[N]`` are the samples of the view in file order, ``batch_size`` counts over all ranks. Training
    shuffles and drops the incomplete last batch; evaluation goes through the file and keeps a ragged last batch, and so
    does training that is not to ``shuffle``: its images are moved all the same. With ``splits`` training takes
    :func:`balanced_batches` by ``label`` int64 ``[N]``, on one rank.
    """

    ids: np.ndarray
    train: bool
    batch_size: int
    seed: int
    rank: int
    size: int
    shuffle: bool = True
    splits: int = 0
    label: np.ndarray | None = None

    @property
    def local_size(self) -> int:
        """Samples of this rank in a full step."""
        return max(1, self.batch_size // self.size)

    @property
    def steps(self) -> int:
        """Steps an epoch on this rank; for evaluation the ranks may differ by one."""
        if self.label is not None and self.splits:
            return int((np.bincount(self.label) // self.splits).sum()) // (self.batch_size // self.splits)
        if self.train and self.shuffle:
            return len(self.ids) // self.batch_size
        return -(-len(eval_ids(self.ids, self.rank, self.size)) // self.local_size)

    def batches(self, epoch: int, start: int = 0) -> list[np.ndarray]:
        """Sample ids of every step of ``epoch`` from ``start`` on, int64 arrays of up to ``local_size``."""
        if not 0 <= start <= self.steps:
            raise ValueError(f"start is {start}; expected 0 to {self.steps}, the steps of an epoch")
        if self.train and self.shuffle:
            order = epoch_order(self.seed, epoch, self.ids)
            if self.label is not None and self.splits:
                label = self.label[np.searchsorted(self.ids, order)]  # ids are in file order
                return list(balanced_batches(order, label, self.batch_size, self.splits, self.seed, epoch)[start:])
            return list(train_batches(order, self.batch_size, self.rank, self.size)[start:])
        mine, local = eval_ids(self.ids, self.rank, self.size), self.local_size
        return [mine[first : first + local] for first in range(start * local, len(mine), local)]
