"""One copy of an array for all processes of a machine, filled by the first that needs it."""

from collections.abc import Callable
import contextlib
import fcntl
import hashlib
import mmap
import os
from pathlib import Path
import random
import time

import numpy as np

MEMORY = Path("/dev/shm")


class SharedBytes:
    """``size`` bytes in shared memory under a name; made by :func:`share`.

    Attributes:
        array: uint8 [size]; it stays valid after :meth:`close`, as long as it is referenced.
    """

    def __init__(self, path: Path, descriptor: int, array: np.ndarray) -> None:
        self.array, self._path, self._descriptor, self._process = array, path, descriptor, os.getpid()

    def close(self) -> None:
        """Give the name back; the last process to do so frees the memory."""
        if self._descriptor < 0:
            return
        if os.getpid() != self._process:  # a forked child shares the lock, which is its parent's to give back
            return
        with contextlib.suppress(OSError):  # another process still uses it, or has removed it
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(self._path, self._descriptor):
                self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        self.close()


def share(name: str, size: int, fill: Callable[[np.ndarray], None], folder: Path = MEMORY) -> SharedBytes:
    """The bytes that every process of this user gets under ``name``; whoever comes first calls ``fill``, others wait.

    A lock that the system drops with its holder keeps them apart: when the process that fills dies or fails, the next
    one fills. What is left when the last user was killed is used by the next one of the same name, if its hash is
    right, or removed by the next one of another name.

    Args:
        name: of the contents, e.g. their hash.
        size: number of bytes.
        fill: writes all of a uint8 [size].
        folder: in memory.

    Raises:
        OSError: no such folder, or too little room in it.
    """
    path = folder / f"rlp-{os.getuid()}-{name}-{size}"
    while True:
        descriptor = _open_locked(path)
        try:
            if _is_whole(descriptor, size) or _fill(path, descriptor, size, fill):
                return SharedBytes(path, descriptor, _mapped(descriptor, size))
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(random.uniform(0.001, 0.02))


def _open_locked(path: Path) -> int:
    """A descriptor of the file that holds a shared lock; waits while another process fills it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_uid != os.getuid():
            os.close(descriptor)
            raise PermissionError(f"{path} belongs to somebody else")
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # its last user removed it between our open and our lock


def _fill(path: Path, descriptor: int, size: int, fill: Callable[[np.ndarray], None]) -> bool:
    """Fill the file and hold it shared; False where another process is about to, and the lock is lost.

    The exclusive lock is never waited for: who has filled holds a shared one from then on, as long as it lives.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if not _is_at(path, descriptor):  # the lock was ours and then another's for a moment
        return False
    if not _is_whole(descriptor, size):
        try:
            _remove_leftovers(path.parent)
            os.ftruncate(descriptor, 0)
            os.posix_fallocate(descriptor, 0, size)  # too little room is an error here, and no crash later
            target = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
            fill(target)
            os.pwrite(descriptor, _digest(target), size)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _digest(content: np.ndarray) -> bytes:
    return hashlib.sha256(content).digest()  # type: ignore[arg-type]  # an array is a buffer


def _is_whole(descriptor: int, size: int) -> bool:
    """True when the file holds its contents and, behind them, their hash."""
    if os.fstat(descriptor).st_size != size + hashlib.sha256().digest_size:
        return False
    return os.pread(descriptor, 64, size) == _digest(_mapped(descriptor, size))


def _mapped(descriptor: int, size: int) -> np.ndarray:
    """The contents; what is written there stays with the writer."""
    return np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY), np.uint8)


def _remove_leftovers(folder: Path) -> None:
    """Free what was left by processes that were killed: nobody holds a lock on it."""
    for path in folder.glob(f"rlp-{os.getuid()}-*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(path, descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)
