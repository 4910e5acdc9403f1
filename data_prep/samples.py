"""Lists of images before they are read: names, labels, and pixels in memory or files on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.encode import Sample


@dataclass(frozen=True)
class Samples:
    """The images of one split, in the order in which they are written.

    Attributes:
        names: what errors and the fingerprint call each image.
        labels: class of each image, int64 [N].
        contents: pixels uint8 [N, H, W] or [N, H, W, 3], or one path per image.
    """

    names: Sequence[str]
    labels: np.ndarray
    contents: np.ndarray | Sequence[Path]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, start: int, stop: int) -> list[Sample]:
        """Samples ``start`` to ``stop`` - 1 (fewer at the end)."""
        return [
            Sample(self.names[i], int(self.labels[i]), self.contents[i]) for i in range(start, min(stop, len(self)))
        ]

    def take(self, rows: np.ndarray) -> "Samples":
        """The samples of the given rows, in their order."""
        picked = self.contents[rows] if isinstance(self.contents, np.ndarray) else [self.contents[i] for i in rows]
        return replace(self, names=[self.names[i] for i in rows], labels=self.labels[rows], contents=picked)
