"""Work done ahead in a thread, such that nothing of it can hang or leak."""

from collections.abc import Callable, Iterator, Sequence
import logging
import os
import queue
import threading
from typing import Any, Generic, TypeVar
import weakref

from rlp.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_CLOSE_SECONDS = 30.0


class InUse:
    """Says whether a loader can still be used: not after it was closed, and not in another process.

    Threads do not live on in a forked child, which would wait for them for ever.
    """

    def __init__(self, name: str) -> None:
        self._name, self._process, self._closed = name, os.getpid(), False

    def check(self) -> None:
        """Raise :class:`UserError` after a fork, :class:`RuntimeError` after the loader was closed."""
        if os.getpid() != self._process:
            raise UserError(f"the loader of {self._name} was opened before a fork; open it in the child process")
        if self._closed:
            raise RuntimeError(f"the loader of {self._name} was closed; open another one")

    def next_of(self, results: Iterator[Result]) -> Result | None:
        """The next result, None at the end; checked before."""
        self.check()
        return next(results, None)

    def close(self) -> bool:
        """Note that the loader is closed; True when its threads are this process's to end, and still there."""
        first, self._closed = not self._closed, True
        return first and os.getpid() == self._process


def _put(results: "queue.Queue[Any]", result: object, stop: threading.Event) -> bool:
    """Hand over one result; False when nobody wants it any more."""
    while not stop.is_set():
        try:
            results.put(result, timeout=_POLL_SECONDS)
            return True
        except queue.Full:
            continue
    return False


class Prefetcher(Generic[Item, Result]):
    """``work(item)`` for every item, in order, up to ``ahead`` results early in a thread of its own.

    An exception in the thread is raised by ``next``. A thread that dies, or brings nothing for ``patience`` seconds,
    ends in a :class:`RuntimeError` and not in waiting for ever. ``close`` ends the thread and drops what it made;
    it may be called at any time and more than once.

    Args:
        work: called in the thread.
        items: its arguments, one by one.
        ahead: results that may wait to be taken.
        name: what is loaded, for messages and for the thread.
        patience: seconds without a result after which loading counts as stuck.
    """

    def __init__(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
        ahead: int = 3,
        name: str = "prefetch",
        patience: float = 600.0,
    ) -> None:
        self._name, self._patience = name, patience
        self._results: queue.Queue[Result | BaseException | None] = queue.Queue(ahead)
        self._stop = threading.Event()
        # The thread knows nothing of this object: lost without being closed, as by Ctrl-C, it takes the thread along.
        weakref.finalize(self, self._stop.set)
        arguments = (work, items, self._results, self._stop)
        self._thread = threading.Thread(target=self._run, args=arguments, name=f"prefetch {name}", daemon=True)
        self._thread.start()

    @staticmethod
    def _run(
        work: Callable[[Item], Result],
        items: Sequence[Item],
        results: "queue.Queue[Result | BaseException | None]",
        stop: threading.Event,
    ) -> None:
        try:
            for item in items:
                if stop.is_set() or not _put(results, work(item), stop):
                    return
            _put(results, None, stop)
        except BaseException as error:  # Whatever it is, the main thread must hear of it.
            _put(results, error, stop)

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if self._stop.is_set():
            raise StopIteration
        result = self._take()
        if isinstance(result, BaseException):
            self.close()
            raise result
        if result is None:
            self.close()
            raise StopIteration
        return result

    def _take(self) -> Result | BaseException | None:
        waited = 0.0
        while waited < self._patience:
            # Read before the queue: a thread that was dead by then has put everything it ever will.
            dead = not self._thread.is_alive()
            try:
                return self._results.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if dead:
                    self.close()
                    raise RuntimeError(f"the thread that loads {self._name} ended without a word") from None
                waited += _POLL_SECONDS
        self._stop.set()
        raise RuntimeError(f"no batch of {self._name} came for {self._patience:g} s; the thread that loads it is stuck")

    def close(self) -> None:
        """End the thread and free what waits to be taken.

        The thread ends after the item it works on; one that is stuck is left behind (it is a daemon) with a warning.
        """
        self._stop.set()
        self._thread.join(timeout=_CLOSE_SECONDS)
        if self._thread.is_alive():
            _log.warning("the thread that loads %s does not end; it is left behind", self._name)
        self._drain()

    def _drain(self) -> None:
        while True:
            try:
                self._results.get_nowait()
            except queue.Empty:
                return
