"""The C functions behind the compiled decoder: turbojpeg and OpenCV's resizing, out of FFCV's library.

FFCV's shared library is loaded by itself. Importing the package would take a second, set torch to one thread and start
numba's threads. turbojpeg is called directly: FFCV's own call asks for the fast inverse transform, which is up to six
levels off, while the exact one takes 3% longer and equals Pillow to the bit.

numba can cache code that calls a symbol by name, but not code that calls a ctypes function: so the addresses are
registered under names of ours before the compiled code is loaded.
"""

import ctypes
from functools import cache
import importlib.util
from pathlib import Path

import llvmlite.binding as llvm

_FUNCTIONS = ("tjDecompressHeader3", "tjDecompress2", "tjGetErrorCode", "resize")
PREFIX = "rlp_native_"


def library_path() -> Path | None:
    """FFCV's shared library, None where FFCV is not installed."""
    spec = importlib.util.find_spec("ffcv")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("_libffcv*.so"), None)


@cache
def _library() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise ImportError("FFCV is not installed")
    library = ctypes.CDLL(str(path))  # its symbols include those of the libraries that it is linked with
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjDestroy.argtypes = [ctypes.c_void_p]
    _one_thread(library)
    return library


def _one_thread(library: ctypes.CDLL) -> None:
    """OpenCV resizes in the thread that asks; threads of its own would fight with ours for the cores."""
    set_threads = getattr(library, "_ZN2cv13setNumThreadsEi", None)  # absent where OpenCV is linked in and hidden
    if set_threads is not None:
        set_threads(ctypes.c_int(0))


def register() -> None:
    """Make the functions known to the linker of compiled code; to be called before it is loaded.

    Raises:
        ImportError: FFCV or one of the libraries that it is linked with cannot be loaded.
    """
    try:
        for name in _FUNCTIONS:
            address = ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value
            llvm.add_symbol(PREFIX + name, address)
    except (OSError, AttributeError) as error:
        raise ImportError(str(error)) from error


class JpegDecoder:
    """One turbojpeg decoder, for one thread at a time; ``handle`` is what compiled code passes to turbojpeg."""

    def __init__(self) -> None:
        self.handle = 0
        self.renew()

    def renew(self) -> None:
        """A fresh decoder: after a damaged JPEG turbojpeg's stays in the middle of it, and fails on healthy ones."""
        self.close()
        self.handle = _library().tjInitDecompress() or 0
        if not self.handle:
            raise MemoryError("turbojpeg could not make a decoder")

    def close(self) -> None:
        """Free its memory."""
        if self.handle:
            _library().tjDestroy(self.handle)
            self.handle = 0
