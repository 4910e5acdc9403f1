"""Lists of images before they are read: names, labels, and pixels in memory or files on disk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.encode import ByteRange, Sample
from rlp.errors import UserError
from rlp.philox import random_bits


@dataclass(frozen=True)
class OnDemand:
    """Image files inside an archive or a table, read by this process one at a time when they are written.

    Attributes:
        read: the image file of a row of the whole archive; rows are mostly asked for in rising order.
        rows: which of them these are, int64 [N].
    """

    read: Callable[[int], bytes]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> bytes:
        return self.read(int(self.rows[row]))

    def take(self, rows: np.ndarray) -> "OnDemand":
        """Those of the given rows, still unread."""
        return OnDemand(self.read, self.rows[rows])


@dataclass(frozen=True)
class Samples:
    """The images of one split, in the order in which they are written.

    Attributes:
        names: what errors and the fingerprint call each image.
        labels: class of each image, int64 [N].
        contents: pixels uint8 [N, H, W] or [N, H, W, 3], or the places of the image files, unread.
    """

    names: Sequence[str]
    labels: np.ndarray
    contents: np.ndarray | OnDemand | Sequence[Path | ByteRange]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, start: int, stop: int) -> list[Sample]:
        """Samples ``start`` to ``stop`` - 1 (fewer at the end)."""
        return [
            Sample(self.names[i], int(self.labels[i]), self.contents[i]) for i in range(start, min(stop, len(self)))
        ]

    def take(self, rows: np.ndarray) -> "Samples":
        """The samples of the given rows, in their order."""
        contents = self.contents
        if isinstance(contents, np.ndarray):
            picked = contents[rows]
        elif isinstance(contents, OnDemand):
            picked = contents.take(rows)
        else:
            picked = [contents[int(i)] for i in rows]
        return Samples([self.names[int(i)] for i in rows], self.labels[rows], picked)


def name_classes(names: Sequence[str] | None, *splits: Samples) -> tuple[str, ...]:
    """The classes' names: those given, or else the numbers from 0 to the highest label.

    Raises:
        UserError: a label is below 0 or has no name, or numbers leave out so many that most classes would be empty.
    """
    count = len(names) if names is not None else max(len(samples) for samples in splits)
    for samples in splits:
        for row in np.flatnonzero((samples.labels < 0) | (samples.labels >= count))[:1]:
            named = f"from 0 to {count - 1}" if names is not None else f"from 0, below the number of images, {count}"
            raise UserError(f"{samples.names[row]} has the label {samples.labels[row]}; expected one {named}")
    if names is not None:
        return tuple(names)
    return tuple(str(number) for number in range(1 + max(int(samples.labels.max(initial=-1)) for samples in splits)))


def rank_in_class(labels: np.ndarray, seed: int, stream: str) -> np.ndarray:
    """Place of every sample in a random order of its own class, int64 [N] in [0, size of the class).

    A function of (seed, stream, row) and the labels: the first k of each class are nested as k grows.
    """
    bits = random_bits(seed, stream, np.arange(len(labels)), 2)
    order = np.lexsort((bits[:, 1], bits[:, 0], labels))  # by class, then at random
    starts = np.searchsorted(labels[order], labels[order])
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - starts
    return rank


def hold_out(samples: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Split at random into (train, val): ``fraction`` of every class is held out, at least one and never all."""
    rank = rank_in_class(samples.labels, seed, "source.split")
    sizes = np.bincount(samples.labels)
    held = np.maximum(np.minimum(np.rint(sizes * fraction), sizes - 1), np.minimum(sizes, 1))
    in_val = rank < held[samples.labels]
    return samples.take(np.flatnonzero(~in_val)), samples.take(np.flatnonzero(in_val))


def limited(samples: Samples, limit: int, seed: int) -> Samples:
    """At most ``limit`` samples in their old order, as many of each class as it goes, nested as the limit grows."""
    if not limit or limit >= len(samples):
        return samples
    rank = rank_in_class(samples.labels, seed, "source.limit")
    return samples.take(np.sort(np.lexsort((samples.labels, rank))[:limit]))
