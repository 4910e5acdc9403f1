"""numba's compiler as this project uses it: no lock held, and the result kept on disk for the next start."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Any:
    """``function`` compiled on its first call, with exact floating point and without the interpreter's lock.

    The machine code is kept beside the source, or in the user's cache folder where that cannot be written. Where
    neither can, on a read-only system, it is compiled anew in every process.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba has no place to keep it
        return numba.njit(nogil=True)(function)
