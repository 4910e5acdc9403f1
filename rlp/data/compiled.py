"""numba's compiler as this project uses it: no lock held, and the result kept on disk for the next start."""

from collections.abc import Callable
import contextlib
from typing import Any

import numba


class _Kept:
    """numba's cache of one function, such that nothing wrong with it stops a run: then code is compiled anew.

    A full disk, or files that were torn by one or by a kill, would else be a traceback at every start.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, signature: Any, target: Any) -> Any:
        """The compiled function, None when there is none that can be read."""
        try:
            return self._cache.load_overload(signature, target)
        except Exception:  # torn files raise almost anything
            with contextlib.suppress(Exception):
                self._cache.flush()
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        """Keep a compiled function if there is room."""
        with contextlib.suppress(Exception):
            self._cache.save_overload(signature, data)


def compiled(function: Callable[..., Any]) -> Any:
    """``function`` compiled on its first call, with exact floating point and without the interpreter's lock.

    The machine code is kept beside the source, or in the user's cache folder where that cannot be written. Where
    neither can, on a read-only system, it is compiled anew in every process.
    """
    try:
        dispatcher: Any = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba has no place to keep it
        return numba.njit(nogil=True)(function)
    dispatcher._cache = _Kept(dispatcher._cache)
    return dispatcher
