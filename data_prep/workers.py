"""Encode samples in worker processes, in order, a bounded number of chunks ahead; a dead worker is an exception."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
import multiprocessing
from multiprocessing.synchronize import Event
import os
import signal
import threading
from types import TracebackType

from data_prep.encode import Chunk, ImageOptions, Sample, encode_chunk
from data_prep.samples import Samples
from rlp.errors import UserError

CHUNK = 64
"""Samples per task: the result of one is held in memory at a time per worker, and a few more wait."""
_WORTH_A_WORKER = 4096  # images; for fewer, starting a process takes longer than it saves


def automatic_workers(num_samples: int) -> int:
    """Workers worth starting for so many images: 0 (encode in this process) up to the cores this process may use."""
    return min(len(os.sched_getaffinity(0)), num_samples // _WORTH_A_WORKER)


class Encoder:
    """Encodes samples chunk by chunk with ``workers`` processes, or in this process when ``workers`` is 0.

    A context manager; leaving it ends the workers after the image at hand.
    """

    def __init__(self, workers: int) -> None:
        self._ahead = 2 * workers + 2
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            # Spawned, not forked: a fork copies locks that threads of this process may hold.
            context = multiprocessing.get_context("spawn")
            self._stop = context.Event()
            self._pool = ProcessPoolExecutor(workers, context, _start_worker, (self._stop,))

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool is not None:
            self._stop.set()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def chunks(self, samples: Samples, options: ImageOptions) -> Iterator[tuple[list[Sample], Chunk]]:
        """Every chunk of samples with its encoding, in order.

        Raises:
            UserError: an image is unreadable, or a worker died.
        """
        waiting: deque[tuple[list[Sample], Future[Chunk]]] = deque()
        for start in range(0, len(samples), CHUNK):
            chunk = samples.rows(start, start + CHUNK)
            if self._pool is None:
                yield chunk, encode_chunk(chunk, options)
                continue
            waiting.append((chunk, self._submit(chunk, options)))
            if len(waiting) >= self._ahead:
                yield self._collect(waiting)
        while waiting:
            yield self._collect(waiting)

    def _submit(self, chunk: list[Sample], options: ImageOptions) -> "Future[Chunk]":
        assert self._pool is not None
        try:
            return self._pool.submit(_work, chunk, options)
        except BrokenProcessPool:
            raise _dead_worker(chunk[0]) from None

    @staticmethod
    def _collect(waiting: "deque[tuple[list[Sample], Future[Chunk]]]") -> tuple[list[Sample], Chunk]:
        chunk, future = waiting.popleft()
        try:
            return chunk, future.result()
        except BrokenProcessPool:
            raise _dead_worker(chunk[0]) from None


def _dead_worker(sample: Sample) -> UserError:
    return UserError(f"a worker process died (killed, or out of memory?) while encoding images near {sample.name}")


_stop: Event | None = None
"""In a worker process: set when the main process wants no more."""


def _work(samples: list[Sample], options: ImageOptions) -> Chunk:
    assert _stop is not None
    return encode_chunk(samples, options, _stop.is_set)


def _start_worker(stop: Event) -> None:
    """Ctrl-C is the main process's to handle; and a worker must not outlive a main process that was killed."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
