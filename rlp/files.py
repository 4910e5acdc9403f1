"""Writing a file so that a reader, or a crash, never sees half of it."""

import os
from pathlib import Path
import secrets


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Replace `path` by `content` in one step: a reader sees the old file or the whole new one.

    The content goes to a temporary file in the same folder (a rename across file systems is a copy, not one
    step), is flushed to the disk, and is renamed over `path`. On any failure the temporary file is removed and
    `path` is left as it was. The folder is made if it is missing. Text is written as UTF-8 without newline
    translation.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return path


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it outlives a power cut (POSIX only)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
