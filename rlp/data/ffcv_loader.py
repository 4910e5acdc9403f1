"""Large sets through FFCV 1.0.2: its file reader, JPEG decoder, resizing and pipeline compiler, and none of its faults.

What calls the compiled pipeline is ours, because FFCV's own loader aliases batches, hangs on errors, leaks threads and
memory, seeds orders badly, pads evaluation, and sets torch's number of threads. Instead:

- every batch is decoded into fresh memory (pinned for a GPU), so it belongs to whoever receives it;
- the workers are plain Python threads on parts of a batch: the compiled code holds no lock and uses no numba
  threading layer, whose kinds abort with two loaders or after a fork;
- the file is mapped, and no tables of its pages are built (half a gigabyte and seconds for a million samples);
- crops come from (seed, epoch, sample id), and a JPEG that does not decode is an error that names the sample.

Import this module only where FFCV is installed; :func:`rlp.data.loader.open_loader` does.
"""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

_threads = torch.get_num_threads()
from ffcv.fields.basics import IntDecoder  # noqa: E402
from ffcv.fields.ndarray import NDArrayDecoder  # noqa: E402
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder  # noqa: E402
from ffcv.libffcv import imdecode, memcpy, resize_crop  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.graph import Graph  # noqa: E402
from ffcv.pipeline.pipeline_spec import PipelineSpec  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402
from ffcv.reader import Reader  # noqa: E402

# Importing FFCV sets torch to one thread, and the number of threads decides the last bits of sums.
torch.set_num_threads(_threads)

from rlp.data.batch import Batch, Schedule  # noqa: E402
from rlp.data.beton import Beton  # noqa: E402
from rlp.data.decode import center_crop, random_crop  # noqa: E402
from rlp.data.prefetch import Prefetcher  # noqa: E402
from rlp.errors import UserError  # noqa: E402
from rlp.labels import noisy_labels  # noqa: E402

_WORD_MASK = 0xFFFFFFFF
_BATCHES_AHEAD = 3
_GOOD = -1  # in the report of a decoder: every image was decoded


@dataclass(frozen=True)
class Crop:
    """How images become squares of ``size`` pixels: random resized crops (``scale``) or the middle (``ratio``)."""

    size: int
    random: bool
    scale: tuple[float, float]
    ratio: float
    seed: int


class WholeImageDecoder(SimpleRGBImageDecoder):
    """Images of one size as they are. The code's memory is (destination uint8 [n, H, W, 3], report int64 [2]).

    The report's first number is the epoch (read), the second the row of an image that could not be decoded (written).
    """

    def generate_code(self) -> Callable:
        """FFCV compiles what this returns."""
        read, jpg = cast(Callable[..., Any], self.memory_read), IMAGE_MODES["jpg"]
        decode_jpeg, copy = Compiler.compile(imdecode), Compiler.compile(memcpy)

        def decode(rows, memory, metadata, storage):
            destination, report = memory
            for place in range(len(rows)):
                field = metadata[rows[place]]
                data = read(field["data_ptr"], storage)
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                if field["mode"] == jpg:
                    if decode_jpeg(data, destination[place], height, width, height, width, 0, 0, 1, 1, False, False):
                        report[1] = rows[place]
                else:
                    copy(data, destination[place])
            return destination

        return decode


class CropDecoder(SimpleRGBImageDecoder):
    """Images of any size, cropped and resized by area to one square; the code's memory is as for whole images."""

    def __init__(self, crop: Crop) -> None:
        super().__init__()
        self.crop = crop

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """What comes out: uint8 [size, size, 3] an image."""
        shape, dtype = (self.crop.size, self.crop.size, 3), np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def _place(self) -> Callable:
        """Compiled (height, width, epoch, row) -> (top, left, height, width) of the crop."""
        low, high, ratio = *self.crop.scale, self.crop.ratio
        seed = np.uint64(self.crop.seed)
        if self.crop.random:
            return Compiler.compile(lambda h, w, epoch, row: random_crop(h, w, low, high, seed, epoch, row))
        return Compiler.compile(lambda h, w, epoch, row: center_crop(h, w, ratio))

    def generate_code(self) -> Callable:
        """FFCV compiles what this returns."""
        read, jpg = cast(Callable[..., Any], self.memory_read), IMAGE_MODES["jpg"]
        place_crop = self._place()
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        largest = int((self.metadata["height"].astype(np.int64) * self.metadata["width"]).max()) * 3

        def decode(rows, memory, metadata, storage):
            destination, report = memory
            scratch = np.empty(largest, np.uint8)
            for place in range(len(rows)):
                field = metadata[rows[place]]
                data = read(field["data_ptr"], storage)
                height, width = np.int64(field["height"]), np.int64(field["width"])
                if field["mode"] == jpg:
                    pixels = scratch[: height * width * 3].reshape(height, width, 3)
                    if decode_jpeg(data, pixels, height, width, height, width, 0, 0, 1, 1, False, False):
                        report[1] = rows[place]
                else:
                    pixels = data.reshape(height, width, 3)
                top, left, tall, wide = place_crop(height, width, report[0], rows[place])
                resize(pixels, top, top + tall, left, left + wide, destination[place])
            return destination

        return decode


_HostBatch = tuple[Tensor, Tensor, Tensor, Tensor]
"""One decoded batch in host memory: image uint8 [B, H, W, 3], label and index int64 [B, 1], words int32 [B, K + 3]."""


def _read(pointer, storage):
    """Bytes that begin at ``pointer`` of the file; storage is (file, pointers in order, sizes)."""
    data, pointers, sizes = storage
    return data[pointer : pointer + sizes[np.searchsorted(pointers, pointer)]]


_compiled: dict[tuple[Crop | None, int], tuple[Callable, list[str]]] = {}
"""Compiled pipelines by crop and bytes of the largest image: a second loader of the same kind compiles nothing."""


def _compile(reader: Reader, crop: Crop | None) -> tuple[Callable, list[str]]:
    """FFCV's compiled code for all columns, and the names of its memory arguments in the order of the columns."""
    size = reader.metadata["f0"]
    key = (crop, int((size["height"].astype(np.int64) * size["width"]).max()) * 3)
    if key not in _compiled:
        Compiler.num_threads = 1  # no parallel code; the setter would also set torch's threads
        image = CropDecoder(crop) if crop else WholeImageDecoder()
        decoders = {"image": image, "label": IntDecoder(), "index": IntDecoder(), "words": NDArrayDecoder()}
        specs = {name: PipelineSpec(name, transforms=[decoder]) for name, decoder in decoders.items()}
        places = {name: place for place, name in enumerate(decoders)}
        graph = Graph(specs, reader.handlers, places, reader.metadata, Compiler.compile(_read))
        _, code = graph.collect_requirements()
        # All our operations are decoders, so FFCV makes one stage of them.
        stage = cast(Any, graph.codegen_all(code))[0][0][0]
        _compiled[key] = stage, [f"memory_{node.id}" for node in graph.nodes]
    return _compiled[key]


class _Pipeline:
    """FFCV's compiled code for one file: rows in, one batch in fresh host memory out."""

    def __init__(self, beton: Beton, crop: Crop | None, workers: int, device: torch.device) -> None:
        self._path, self._workers, self._device = beton.path, workers, device
        reader = Reader(str(beton.path))
        self._stage, self._memory_names = _compile(reader, crop)
        table = reader.alloc_table[np.argsort(reader.alloc_table["ptr"])]
        # Mapped copy-on-write: never written, but numba has one type for these bytes and for decoded ones.
        data = np.memmap(beton.path, np.uint8, mode="c")
        storage = (data, np.ascontiguousarray(table["ptr"]), np.ascontiguousarray(table["size"]))
        self._fixed: dict[str, Any] = {"metadata": reader.metadata, "storage_state": storage}
        self._fixed |= {f"shared_{name}": None for name in self._memory_names}
        side = (crop.size, crop.size) if crop else (beton.card.height, beton.card.width)
        self._image_shape, self._num_words = (*side, 3), len(beton.card.word_names)
        # The pool lives as long as the loader: FFCV keeps a JPEG decoder for every thread that ever decoded.
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=f"decode {beton.path.name}")

    def _allocate(self, count: int) -> _HostBatch:
        pinned = self._device.type == "cuda"

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty((count, *shape), dtype=dtype, pin_memory=pinned)

        # A thread starts on GPU 0, where pinning would set up a context for every rank.
        with torch.cuda.device(self._device) if pinned else nullcontext():
            return (
                empty(self._image_shape, torch.uint8),
                empty((1,), torch.int64),
                empty((1,), torch.int64),
                empty((self._num_words,), torch.int32),
            )

    def batch(self, rows: np.ndarray, epoch: int) -> _HostBatch:
        """Decode ``rows`` (int64 [B]); raises :class:`UserError` when an image cannot be decoded."""
        rows = np.ascontiguousarray(rows)  # strided rows would compile everything once more
        batch = self._allocate(len(rows))
        arrays = [column.numpy() for column in batch]

        def decode(part: slice) -> int:
            report = np.array([epoch, _GOOD])
            image, label, index, words = (array[part] for array in arrays)
            memory = dict(zip(self._memory_names, ((image, report), label, index, words), strict=True))
            self._stage(batch_indices=rows[part], **self._fixed, **memory)
            return int(report[1])

        bounds = np.linspace(0, len(rows), min(self._workers, len(rows)) + 1).astype(int).tolist()
        parts = [slice(first, last) for first, last in pairwise(bounds)]
        bad = [row for row in self._pool.map(decode, parts) if row != _GOOD]
        if bad:
            raise UserError(f"{self._path} is damaged: the JPEG of sample {min(bad)} cannot be decoded")
        return batch

    def close(self) -> None:
        """End the workers and let go of the file."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._fixed = {}


class FFCVLoader:
    """Batches decoded ahead by FFCV in threads of the host; a :class:`rlp.data.batch.Loader`.

    Args:
        beton: the open set.
        schedule: which samples this rank sees.
        device: where batches go; copies to a GPU do not wait.
        workers: decoding threads of this rank, at least 1.
        label_noise: share of samples with a wrong given label.
        crop: how to make squares of one size; None needs images of one size and keeps them whole.
    """

    def __init__(
        self,
        beton: Beton,
        schedule: Schedule,
        device: torch.device,
        workers: int = 1,
        label_noise: float = 0.0,
        crop: Crop | None = None,
    ) -> None:
        self.card, self.num_samples, self.steps = beton.card, len(schedule.ids), schedule.steps
        self._name, self._schedule, self._device, self._label_noise = str(beton.path), schedule, device, label_noise
        self._noise_columns = [beton.card.word_names.index(name) for name in ("noise", "noise_class")]
        self._pipeline = _Pipeline(beton, crop, workers, device)

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The batches of ``epoch`` from step ``start`` on."""
        rows = self._schedule.batches(epoch, start)
        batches = Prefetcher(lambda part: self._pipeline.batch(part, epoch), rows, _BATCHES_AHEAD, self._name)
        try:
            for host in batches:
                yield self._to_device(host)
        finally:
            batches.close()

    def _to_device(self, host: _HostBatch) -> Batch:
        image, label, index, words = (column.to(self._device, non_blocking=True) for column in host)
        label, index = label.squeeze(1), index.squeeze(1)
        if self._label_noise > 0:
            noise, noise_class = (words[:, k].long() & _WORD_MASK for k in self._noise_columns)
            label = noisy_labels(label, noise, noise_class, self._label_noise, len(self.card.classes))
        return Batch(image.permute(0, 3, 1, 2), label, index, words[:, : self.card.draws].long() & _WORD_MASK)

    def close(self) -> None:
        """End the decoding threads and let go of the file."""
        self._pipeline.close()
