"""The whole set in memory as uint8, on the device or shared by the ranks of a machine: fastest for sets that fit."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
import os
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from rlp.data.batch import Batch, Schedule
from rlp.data.beton import Beton
from rlp.data.canaries import DeviceGallery, Gallery
from rlp.data.geometry import Geometry, fill_of, move
from rlp.data.prefetch import InUse
from rlp.data.shared import SharedBytes, share
from rlp.data.view import View

_WORD_MASK = 0xFFFFFFFF
_FILL_ROWS = 4096


class _DeviceSet:
    """Images, sample ids and words of one set on one device, whatever the view or the order.

    On the CPU the ranks of a machine share one copy of the images, where shared memory has room for it.
    """

    def __init__(self, beton: Beton, device: torch.device) -> None:
        self._shared: SharedBytes | None = None
        images = self._host_images(beton, device)
        self.host = (images, beton.index) if device.type == "cpu" else None
        # Words are kept as 32-bit patterns: half the memory of int64.
        stored = beton.stored_words(np.arange(beton.num_samples))
        words = np.ascontiguousarray(stored[:, : beton.card.draws]).view(np.int32)
        self.images, self.index, self.words = (
            torch.from_numpy(column).to(device) for column in (images, beton.index, words)
        )

    def _host_images(self, beton: Beton, device: torch.device) -> np.ndarray:
        if device.type != "cpu" or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
            return beton.images(progress=True)
        card = beton.card
        shape = (card.num_samples, card.height, card.width, 3)

        def fill(target: np.ndarray) -> None:
            for start in range(0, len(beton.label), _FILL_ROWS):  # no second copy of the whole
                rows = np.arange(start, min(start + _FILL_ROWS, len(beton.label)))
                target.reshape(shape)[rows] = beton.images(rows)

        try:
            self._shared = share(card.sha256, int(np.prod(shape)), fill)
        except OSError:  # no shared memory, or too little: a copy of our own
            return beton.images(progress=True)
        return self._shared.array.reshape(shape)


# The training set is loaded twice, to train and to evaluate: both loaders share what lies on the device.
_sets: WeakValueDictionary[tuple[str, str], _DeviceSet] = WeakValueDictionary()


def _device_set(beton: Beton, device: torch.device) -> _DeviceSet:
    key = (beton.card.sha256, str(device))
    found = _sets.get(key)
    if found is None:
        found = _sets[key] = _DeviceSet(beton, device)
    return found


class ResidentLoader:
    """Batches by indexing images that lie in memory; a :class:`rlp.data.batch.Loader`.

    Needs images of one size: N·H·W·3 bytes of memory, and 4·K·N for the words. On a GPU a step is a few operations
    there, and the order of the epoch goes there once, so no step waits for the host. On a CPU with numba, threads of
    its own fetch the next batches ahead: compiled code mirrors and shifts an image while it copies it.

    Args:
        beton: the open set.
        view: the samples, and the labels they are given.
        schedule: which samples this rank sees.
        device: where images, labels and words live.
        geometry: mirror and padded crop, done in training; crops to a size are not done here.
        workers: threads on a CPU, at least 1.
    """

    def __init__(
        self,
        beton: Beton,
        view: View,
        schedule: Schedule,
        device: torch.device,
        geometry: Geometry | None = None,
        workers: int = 1,
    ) -> None:
        self.card, self.view, self.num_samples, self.steps = beton.card, view, len(schedule.ids), schedule.steps
        self._schedule, self._device, self._geometry = schedule, device, geometry or Geometry()
        self._fill = self._geometry.fill or fill_of(beton.card.mean)
        self._label = torch.from_numpy(view.label).to(device)
        self._set: _DeviceSet | None = _device_set(beton, device)
        compiled = device.type == "cpu" and find_spec("numba") is not None
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=f"gather {beton.path.name}") if compiled else None
        self._ahead, self._in_use = 2 * workers, InUse(str(beton.path))
        self._gallery = Gallery(beton.card, view.canaries)
        self._on_device = None
        if view.canaries is not None and not compiled:
            self._on_device = DeviceGallery(beton, view.canaries, device)

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The batches of ``epoch`` from step ``start`` on."""
        self._in_use.check()
        batches, held = self._schedule.batches(epoch, start), self._set
        if not batches or held is None:
            return
        if self._pool is None:
            rows = torch.from_numpy(np.concatenate(batches)).to(self._device)
            yield from (self._indexed(held, chosen, epoch) for chosen in rows.split(self._schedule.local_size))
            return
        waiting: deque[Future[Batch]] = deque()
        try:
            for chosen in batches:
                waiting.append(self._pool.submit(self._gathered, held, chosen, epoch))
                if len(waiting) > self._ahead:
                    yield waiting.popleft().result()
                    self._in_use.check()
            while waiting:
                yield waiting.popleft().result()
                self._in_use.check()
        finally:
            for future in waiting:
                future.cancel()

    def _indexed(self, held: _DeviceSet, rows: Tensor, epoch: int) -> Batch:
        # One row an image: torch copies whole rows, but goes through a tensor of four dimensions pixel by pixel.
        shown = rows if self._on_device is None else self._on_device.rows(rows)
        images = held.images.flatten(1).index_select(0, shown).view(len(rows), *held.images.shape[1:])
        if self._on_device is not None:
            images = self._on_device.hang_noise(images, rows)
        index = held.index.index_select(0, rows)
        if self._schedule.train:
            images = move(images, index, epoch, self._schedule.seed, self._geometry, self._fill)
        return self._batch(held, images, rows, index)

    def _gathered(self, held: _DeviceSet, rows: np.ndarray, epoch: int) -> Batch:
        from rlp.data.decode import gather_images, plan_of

        train = self._schedule.train and self._geometry.moves
        plan = plan_of(self._geometry, train, self._schedule.seed, epoch)
        assert held.host is not None  # on a CPU
        all_images, all_ids = held.host
        images = np.empty((len(rows), *all_images.shape[1:]), np.uint8)
        ids, fill = all_ids[rows], np.array(self._fill, np.uint8)
        gather_images(all_images, self._gallery.rows(rows), ids, plan, fill, images)
        self._gallery.hang_noise(images, rows, ids, plan, fill)
        return self._batch(held, *(torch.from_numpy(column) for column in (images, rows, ids)))

    def _batch(self, held: _DeviceSet, images: Tensor, rows: Tensor, index: Tensor) -> Batch:
        words = held.words.index_select(0, rows).long() & _WORD_MASK
        return Batch(images.permute(0, 3, 1, 2), self._label.index_select(0, rows), index, words)

    def close(self) -> None:
        """Free the memory, unless another loader of the same set still uses it; this one can no longer be used."""
        self._set = None
        if self._in_use.close() and self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
