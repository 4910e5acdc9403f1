"""Samples of a run on its device, for measures that train or probe networks on whole images."""

from collections.abc import Sequence
from dataclasses import dataclass
import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlp.measure.baselines.images import clean_batches
from rlp.measure.run import Group, Run


@dataclass(frozen=True)
class Pool:
    """Clean images of some groups, one group after the other.

    Attributes:
        images: uint8 ``[N, H, W, 3]``, on the run's device.
        labels: given classes, int64 ``[N]``, on the device.
        ids: sample ids, int64 ``[N]``, on the device; two groups of different files may share ids.
        sizes: samples of each group.
        key: hash of all that the samples and their labels depend on.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    sizes: tuple[int, ...]
    key: str

    @classmethod
    def of(cls, run: Run, groups: Sequence[Group]) -> "Pool":
        """Load the groups' images as the run's evaluation shows them: planted images in place, central crops."""
        labels = np.concatenate([group.view.label[group.view.ids] for group in groups])
        return cls(
            images=torch.cat([_images(run, group) for group in groups]),
            labels=torch.from_numpy(labels).to(run.device),
            ids=torch.from_numpy(np.concatenate([group.ids for group in groups])).to(run.device),
            sizes=tuple(len(group.ids) for group in groups),
            key=hashlib.sha256(repr([_key(run, group) for group in groups]).encode()).hexdigest(),
        )

    def places(self, *ids: np.ndarray) -> list[np.ndarray]:
        """Where samples of each group lie, by their ids, int64 ``[n]`` for each of the groups."""
        parts = self.ids.cpu().split(list(self.sizes))
        firsts = np.cumsum([0, *self.sizes[:-1]])
        found = zip(firsts, parts, ids, strict=True)
        return [first + np.searchsorted(part.numpy(), wanted) for first, part, wanted in found]

    def __len__(self) -> int:
        return len(self.labels)


def _images(run: Run, group: Group) -> Tensor:
    """Clean images uint8 ``[N, H, W, 3]`` in the order of the group's rows."""
    with clean_batches(run, group) as batches:
        return torch.cat([batch.image.permute(0, 2, 3, 1).contiguous() for batch in batches])


def _key(run: Run, group: Group) -> list[Any]:
    view = group.view
    columns = (view.ids, view.label[view.ids], view.shown[view.ids], view.planted[view.ids].astype("S"))
    return [group.beton.card.sha256, repr(run.geometry), *(hashlib.sha256(c.tobytes()).hexdigest() for c in columns)]
