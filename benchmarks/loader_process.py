"""A process for every contender of `benchmarks.loader`, and the page cache that they share.

In one process they would change one another: FFCV sets torch's number of threads, worker processes inherit what is
loaded. Between its turns a process waits and does nothing.
"""

from collections.abc import Iterable, Iterator
import ctypes
import gc
import mmap
import multiprocessing
from multiprocessing.connection import Connection
import os
from pathlib import Path
import time
from typing import Any

import torch

from benchmarks.loader_cases import Case, Contender, Epochs, Item
from benchmarks.loader_checks import why_wrong
from benchmarks.loader_sets import ImageSet

PATIENCE = 300.0
"""Seconds without an answer after which a contender counts as stuck."""
_PAUSE = 1.0  # seconds
_MADV_DONTNEED = 4


class ContenderError(Exception):
    """What a contender raised, or that it ended or got stuck, as a short clause."""


class Process:
    """One contender at work on one case, to be used as a context; what it does raises :class:`ContenderError`.

    Attributes:
        launch: seconds from starting the process to the first batch, everything included.
        opening: seconds of that from opening the set on; imports before it are not counted, this project's are.
    """

    def __init__(self, contender: Contender, case: Case, images: ImageSet, device: torch.device) -> None:
        self._connection, far = multiprocessing.Pipe()
        # "spawn": a fresh interpreter. Not a daemon: those may have no worker processes.
        arguments = (far, contender, case, images, str(device))
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments)
        start = time.perf_counter()
        self._process.start()
        far.close()
        try:
            self.opening = self._answer()
        except BaseException:
            self.close()
            raise
        self.launch = time.perf_counter() - start

    def _ask(self, *command: Any) -> Any:
        try:
            self._connection.send(command)
        except OSError:
            raise ContenderError("its process is gone") from None
        return self._answer()

    def _answer(self) -> Any:
        if not self._connection.poll(PATIENCE):
            raise ContenderError(f"no answer within {PATIENCE:.0f} s")
        try:
            succeeded, answer = self._connection.recv()
        except (EOFError, OSError):
            raise ContenderError("its process ended without a word") from None
        if not succeeded:
            raise ContenderError(answer)
        return answer

    def check(self) -> str | None:
        """What is wrong with its first epoch, which has to be asked first."""
        return self._ask("check")

    def time(self, at_least: float = 0.0, cold: bool = False) -> float:
        """Seconds of an epoch, over as many as last `at_least` seconds; `cold` opens anew what lies in memory."""
        return self._ask("time", at_least, cold)

    def forget(self) -> None:
        """Let go of the pages of files that are mapped: what anybody has mapped stays in the page cache."""
        self._ask("forget")

    def close(self) -> None:
        """End it, and its workers with it."""
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(connection: Connection, contender: Contender, case: Case, images: ImageSet, device: str) -> None:
    """Build the contender, tell when its first batch is there, and answer commands until the connection closes.

    Commands are the methods of :class:`Process`.
    """
    try:
        _Server(connection, contender, case, images, torch.device(device)).run()
    except (EOFError, ConnectionError):
        pass  # nobody asks any more
    except Exception as error:
        connection.send((False, _clause(error)))
    gc.collect()  # ends worker processes that are still at work
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join(5)
    os._exit(0)  # some contenders leave threads behind that never end


class _Server:
    """The far end of a :class:`Process`."""

    def __init__(
        self, connection: Connection, contender: Contender, case: Case, images: ImageSet, device: torch.device
    ) -> None:
        self._connection, self._contender, self._images, self._device = connection, contender, images, device
        self._case, self._next = contender.task(case), 1

    def run(self) -> None:
        contender = self._contender
        if not contender.is_ours:  # this project imports what it needs while the clock runs
            contender.import_needs()
        start = time.perf_counter()
        self._epochs = self._build()
        self._first = self._epochs(0)
        self._batch = next(self._first)
        self._connection.send((True, time.perf_counter() - start))
        while True:
            command, *arguments = self._connection.recv()
            self._connection.send((True, getattr(self, command)(*arguments)))

    def _build(self) -> Epochs:
        return self._contender.build(self._case, self._images, self._device)

    def check(self) -> str | None:
        """The first epoch, which the first batch belongs to."""

        def epoch() -> Iterator[Item]:
            yield self._batch
            yield from self._first

        reason = why_wrong(epoch(), self._case, self._images)
        del self._batch, self._first
        return reason

    def time(self, at_least: float, cold: bool) -> float:
        start = time.perf_counter()
        if cold and self._contender.in_memory:
            self._epochs = self._build()
        first = self._next
        while self._next == first or time.perf_counter() - start < at_least:
            for _ in self._epochs(self._next):
                pass
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._next += 1
        seconds = time.perf_counter() - start
        if self._contender.runs_ahead:
            time.sleep(_PAUSE)  # or it would take the cores from whose turn is next
        return seconds / (self._next - first)

    def forget(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, *_, path = line.split(maxsplit=5)
            if path.startswith(str(self._images.folder)):
                begin, end = (int(address, 16) for address in addresses.split("-"))
                libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def _clause(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:150]}" if first else type(error).__name__


def drop_cache(paths: Iterable[Path]) -> None:
    """Ask the system to let go of the files' pages; it keeps those that a process has mapped."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)  # pages not yet on the disk stay
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def cached_share(paths: Iterable[Path]) -> float:
    """Share of the files' pages that lie in the page cache, 0 to 1, as ``mincore`` tells."""
    libc, pages, cached = ctypes.CDLL(None, use_errno=True), 0, 0
    for path in paths:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            flags = (ctypes.c_ubyte * -(-len(memory) // mmap.PAGESIZE))()
            if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(memory)), flags):
                raise OSError(ctypes.get_errno(), "mincore")
            pages += len(flags)
            cached += sum(flag & 1 for flag in flags)
    return cached / pages
