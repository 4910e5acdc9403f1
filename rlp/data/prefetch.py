"""Work done ahead in a thread, such that nothing of it can hang or leak."""

from collections.abc import Callable, Iterator, Sequence
import logging
import os
import queue
import threading
from typing import Generic, TypeVar

from rlp.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_CLOSE_SECONDS = 30.0


class SameProcess:
    """Notices use after a fork: threads do not live on in the child, which would wait for them for ever."""

    def __init__(self, name: str) -> None:
        self._name, self._process = name, os.getpid()

    def check(self) -> None:
        """Raise :class:`UserError` in another process than the one that made this object."""
        if os.getpid() != self._process:
            raise UserError(f"the loader of {self._name} was opened before a fork; open it in the child process")


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
        self._work, self._items, self._name, self._patience = work, items, name, patience
        self._results: queue.Queue[Result | BaseException | None] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"prefetch {name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if self._stop.is_set() or not self._put(self._work(item)):
                    return
            self._put(None)
        except BaseException as error:  # Whatever it is, the main thread must hear of it.
            self._put(error)

    def _put(self, result: Result | BaseException | None) -> bool:
        """Hand over one result; False when nobody wants it any more."""
        while not self._stop.is_set():
            try:
                self._results.put(result, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

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
