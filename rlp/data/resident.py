"""The whole set in the device's memory as uint8: for sets that fit, nothing is faster."""

from collections.abc import Generator
from weakref import WeakValueDictionary

import numpy as np
import torch

from rlp.data.batch import Batch, Schedule
from rlp.data.beton import Beton
from rlp.labels import noisy_labels

_WORD_MASK = 0xFFFFFFFF


class _DeviceSet:
    """Images, sample ids and words of one file on one device, whatever the view or the order."""

    def __init__(self, beton: Beton, device: torch.device) -> None:
        # One row an image: torch copies whole rows, but goes through a tensor of four dimensions pixel by pixel.
        rows = beton.images().reshape(beton.num_samples, -1)
        # Words are kept as 32-bit patterns: half the memory of int64.
        words = beton.draw_words.astype(np.uint32).view(np.int32)
        self.images, self.index, self.words = (
            torch.from_numpy(column).to(device) for column in (rows, beton.index, words)
        )


# The training set is loaded twice, to train and to evaluate: both loaders share what lies on the device.
_sets: WeakValueDictionary[tuple[str, str], _DeviceSet] = WeakValueDictionary()


def _device_set(beton: Beton, device: torch.device) -> _DeviceSet:
    key = (beton.card.sha256, str(device))
    found = _sets.get(key)
    if found is None:
        found = _sets[key] = _DeviceSet(beton, device)
    return found


class ResidentLoader:
    """Batches by indexing images that lie on the device; a :class:`rlp.data.batch.Loader`.

    Needs images of one size: N·H·W·3 bytes of memory, and 4·K for the words. A step is four index operations on
    the device; the order of the epoch goes there once, so no step waits for the host.

    Args:
        beton: the open set.
        schedule: which samples this rank sees.
        device: where images, labels and words live.
        label_noise: share of samples with a wrong given label.
    """

    def __init__(self, beton: Beton, schedule: Schedule, device: torch.device, label_noise: float = 0.0) -> None:
        self.card, self.num_samples, self.steps = beton.card, len(schedule.ids), schedule.steps
        self._schedule, self._device = schedule, device
        label = beton.label
        if label_noise > 0:
            noise, noise_class = beton.named("noise"), beton.named("noise_class")
            label = noisy_labels(label, noise, noise_class, label_noise, len(beton.card.classes))
        self._label = torch.from_numpy(label).to(device)
        self._set: _DeviceSet | None = _device_set(beton, device)

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The batches of ``epoch`` from step ``start`` on."""
        batches = self._schedule.batches(epoch, start)
        if not batches or self._set is None:
            return
        images, labels, index, words = self._set.images, self._label, self._set.index, self._set.words
        shape = (-1, self.card.height, self.card.width, 3)
        ids = torch.from_numpy(np.concatenate(batches)).to(self._device)
        for chosen in ids.split(self._schedule.local_size):
            yield Batch(
                images.index_select(0, chosen).view(shape).permute(0, 3, 1, 2),
                labels.index_select(0, chosen),
                index.index_select(0, chosen),
                words.index_select(0, chosen).long() & _WORD_MASK,
            )

    def close(self) -> None:
        """Free the device's memory, unless another loader of the same file still uses it."""
        self._set = None
