"""One file of a set held open: its bytes, and what tells whether it is still the same file."""

import hashlib
import io
import os
from pathlib import Path
import weakref

import numpy as np

from rlp.data.format import Index, read_open_index
from rlp.errors import UserError

_PIECE = 8 << 20  # bytes hashed at once


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a whole file, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def decode_jpeg(content: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Pixels of a stored JPEG by Pillow, uint8 [H, W, 3].

    Raises:
        ValueError: it cannot be decoded or has another shape; the text goes on after "the JPEG of sample 3".
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as picture:
            found = (picture.height, picture.width, len(picture.getbands()))
            # Known before decoding: a damaged size may ask for gigabytes.
            pixels = np.asarray(picture) if found == shape else None
    except Exception as error:  # Pillow raises many kinds on damaged input; each is a damaged image to the user
        raise ValueError(f"cannot be decoded ({error})") from None
    if pixels is None:
        raise ValueError(f"is {found}, expected {shape}")
    return pixels


class OpenFile:
    """A .beton held open; made by :func:`open_file`.

    Attributes:
        path: the file.
        data: its bytes, a read-only memory map uint8 [size].
        handle: its descriptor, for reading by position; closed with the object.
    """

    def __init__(self, path: Path, handle: int, data: np.memmap, status: os.stat_result) -> None:
        self.path = path
        self.data = data
        self.handle = handle
        self._status = status
        weakref.finalize(self, os.close, handle)

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self._status.st_size

    def check_unchanged(self) -> None:
        """Raise :class:`UserError` when the file was removed, replaced, truncated or rewritten since it was opened.

        Costs two calls of ``stat``. A rewrite within one tick of the file system's clock (some ms) after the last
        change before the opening keeps the time stamp, and is not seen.
        """
        try:
            now = [os.fstat(self.handle), os.stat(self.path)]
        except FileNotFoundError:
            raise UserError(f"{self.path} was removed while it was in use") from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be read any more: {error.strerror or error}") from None
        if any(_identity(status) != _identity(self._status) for status in now):
            raise UserError(f"{self.path} was replaced, truncated or rewritten while it was in use")

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``, by a system call: a file that was truncated is an error, not a signal."""
        try:
            content = os.pread(self.handle, size, offset)
            while len(content) < size and (more := os.pread(self.handle, size - len(content), offset + len(content))):
                content += more
        except OSError as error:
            raise UserError(f"{self.path} cannot be read at byte {offset}: {error.strerror or error}") from None
        if len(content) < size:
            raise UserError(f"{self.path} was truncated while it was in use")
        return content

    def sha256(self) -> str:
        """SHA-256 of the whole file."""
        digest = hashlib.sha256()
        for offset in range(0, self.size, _PIECE):
            digest.update(self.read(offset, min(_PIECE, self.size - offset)))
        return digest.hexdigest()


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_file(path: Path, size: int, sha256_index: str, card: Path) -> tuple[OpenFile, Index]:
    """Open a .beton of which the card ``card`` tells ``size`` and ``sha256_index``; its index is checked.

    Raises:
        UserError: the file is missing, damaged, or another one than the card describes.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size != size:
                raise UserError(
                    f"{path} has {status.st_size} bytes, its card {card} says {size}: it is damaged or another file"
                )
            index = read_open_index(file, path)
            if index.sha256 != sha256_index:
                raise UserError(f"{path} is not the file its card {card} describes (sha256_index differs)")
            data = np.memmap(file, np.uint8, mode="r")
            return OpenFile(path, os.dup(file.fileno()), data, status), index
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; write it with write_datasets.py") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
