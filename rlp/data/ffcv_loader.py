"""Large sets, decoded batch by batch: FFCV's file format, JPEG decoder and resizing, and none of its loader's faults.

FFCV's own loop aliases batches, hangs on errors, leaks threads and memory, cannot seed augmentations, pads evaluation,
compiles everything again at every start, and sets torch's number of threads. Instead:

- every batch is decoded into fresh memory (pinned for a GPU), so it belongs to whoever receives it;
- the workers are plain Python threads on parts of a batch: the compiled code holds no lock and uses no numba
  threading layer, whose kinds abort with two loaders or after a fork;
- the compiled code is one function for all sets and settings, kept on disk (:mod:`rlp.data.decode`);
- crops and moves come from (seed, epoch, sample id), and an image that cannot be decoded is an error that names it.

Import this module only where FFCV is installed; :func:`rlp.data.loader.open_loader` does.
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
import threading

import numpy as np
import torch
from torch import Tensor

from rlp.data.batch import Batch, Schedule
from rlp.data.beton import Beton
from rlp.data.canaries import Canaries, Gallery
from rlp.data.decode import DAMAGED, GONE, SUSPECT, decode_images, plan_of, read_words
from rlp.data.geometry import Geometry, fill_of
from rlp.data.native import JpegDecoder, register
from rlp.data.prefetch import InUse, Prefetcher
from rlp.data.view import View
from rlp.errors import UserError

_WORD_MASK = 0xFFFFFFFF
_BATCHES_AHEAD = 3


class _Decoders(threading.local):
    """A turbojpeg decoder for every thread that asks."""

    def __init__(self, made: list[JpegDecoder]) -> None:
        self.mine = JpegDecoder()
        made.append(self.mine)


class HostReader:
    """Rows of a set in, decoded images and words in fresh host memory out; its threads live as long as it does.

    Args:
        beton: the open set.
        geometry: what is done to images.
        schedule: gives the seed, and whether this is training.
        workers: decoding threads, at least 1.
        pinned: a device whose context pinned memory belongs to; None for ordinary memory.
        canaries: what is planted, if anything.
    """

    def __init__(
        self,
        beton: Beton,
        geometry: Geometry,
        schedule: Schedule,
        workers: int,
        pinned: torch.device | None,
        canaries: Canaries | None = None,
    ) -> None:
        register()
        self._gallery = Gallery(beton.card, canaries)
        self._beton, self._geometry, self._schedule, self._pinned = beton, geometry, schedule, pinned
        self._files = np.array([file.handle for file in beton.files], np.int32)
        self._layout, self._ids = beton.layout, beton.index
        self._fill = np.array(geometry.fill or fill_of(beton.card.mean), np.uint8)
        size = geometry.image_size
        self._side = (size, size) if size else (beton.card.height, beton.card.width)
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=f"decode {beton.path.name}")
        self._made: list[JpegDecoder] = []
        self._decoders = _Decoders(self._made)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # A thread starts on GPU 0, where pinning would set up a context for every rank.
        with torch.cuda.device(self._pinned) if self._pinned else nullcontext():
            return torch.empty(shape, dtype=dtype, pin_memory=self._pinned is not None)

    def batch(self, rows: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, H, W, 3] and words int32 [B, K] (bit patterns) of ``rows``, int64 [B].

        Raises:
            UserError: an image cannot be decoded, or the file was changed meanwhile; nothing else happens to it.
        """
        self._beton.check_unchanged()
        rows = np.ascontiguousarray(rows)  # strided rows would compile everything once more
        shown = self._gallery.rows(rows)
        images = self._empty((len(rows), *self._side, 3), torch.uint8)
        words = self._empty((len(rows), self._beton.card.draws), torch.int32)
        plan = plan_of(self._geometry, self._schedule.train, self._schedule.seed, epoch)
        state = np.zeros(len(rows), np.uint8)

        def decode(first: int, last: int) -> None:
            whole, decoder = slice(first, last), self._decoders.mine
            while first < last:
                part = slice(first, last)
                ids, outputs = self._ids[rows[part]], (images.numpy()[part], state[part])
                first += decode_images(
                    shown[part], ids, self._layout, self._files, decoder.handle, plan, self._fill, *outputs
                )
                if first < last or state[last - 1]:
                    decoder.renew()
            read_words(rows[whole], self._layout, self._files, words.numpy()[whole], state[whole])

        bounds = np.linspace(0, len(rows), min(self._workers, len(rows)) + 1).astype(int).tolist()
        list(self._pool.map(decode, bounds[:-1], bounds[1:]))
        if state.any():
            self._explain(rows, shown, state)
        self._gallery.hang_noise(images.numpy(), rows, self._ids[rows], plan, self._fill)
        return images, words

    def _explain(self, words: np.ndarray, rows: np.ndarray, state: np.ndarray) -> None:
        """Raise for what could not be read; a JPEG decoded with a warning is fine if its bytes are those written.

        ``words`` are the rows whose words were read, ``rows`` those whose images were.
        """
        gone = state == GONE
        for row in [*rows[gone].tolist(), *words[gone].tolist()]:
            self._beton.check_unchanged()
            self._beton.crc32(row)  # reads it again, and says what is wrong
            raise UserError(f"{self._beton.path} could not be read at sample {self._ids[row]}, and then it could")
        bad = [row for row in rows[state == SUSPECT].tolist() if self._beton.crc32(row) != self._layout["crc32"][row]]
        bad += rows[state == DAMAGED].tolist()
        if bad:
            sample = int(self._ids[min(bad)])
            raise UserError(f"{self._beton.path} is damaged: the JPEG of sample {sample} cannot be decoded")

    def close(self) -> None:
        """End the workers and free their decoders."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for decoder in self._made:
            decoder.close()


class FFCVLoader:
    """Batches decoded ahead in threads of the host; a :class:`rlp.data.batch.Loader`.

    Args:
        beton: the open set.
        view: the samples, and the labels they are given.
        schedule: which samples this rank sees.
        device: where batches go; copies to a GPU do not wait.
        geometry: what is done to images; without ``image_size`` they must be of one size.
        workers: decoding threads of this rank, at least 1.
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
        self._name, self._index, self._schedule, self._device = str(beton.path), beton.index, schedule, device
        self._in_use = InUse(self._name)
        pinned = device if device.type == "cuda" else None
        self._reader = HostReader(beton, geometry or Geometry(), schedule, workers, pinned, view.canaries)

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The batches of ``epoch`` from step ``start`` on."""
        self._in_use.check()
        rows, reader = self._schedule.batches(epoch, start), self._reader
        batches = None
        try:
            batches = Prefetcher(lambda part: (part, reader.batch(part, epoch)), rows, _BATCHES_AHEAD, self._name)
            while (loaded := self._in_use.next_of(batches)) is not None:
                part, host = loaded
                yield self._to_device(part, *host)
        finally:
            if batches is not None:
                batches.close()

    def _to_device(self, rows: np.ndarray, images: Tensor, words: Tensor) -> Batch:
        columns = (images, torch.from_numpy(self.view.label[rows]), torch.from_numpy(self._index[rows]), words)
        image, label, index, words = (column.to(self._device, non_blocking=True) for column in columns)
        return Batch(image.permute(0, 3, 1, 2), label, index, words.long() & _WORD_MASK)

    def close(self) -> None:
        """End the decoding threads; the loader cannot be used afterwards."""
        if self._in_use.close():
            self._reader.close()
