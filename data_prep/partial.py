"""Outputs that appear whole or not at all: written under another name, locked, renamed together at the end."""

import contextlib
import fcntl
from io import FileIO
import os
from pathlib import Path

from rlp.data.card import card_path
from rlp.errors import UserError
from rlp.files import sync_folder


def partial_path(path: Path) -> Path:
    """The name under which a file is written: hidden, in the same folder, so that renaming is one step."""
    return path.with_name(f".{path.name}.partial")


def was_interrupted(betons: list[Path]) -> bool:
    """True when an earlier write to these outputs was killed: it left partial files."""
    return any(partial_path(path).exists() for beton in betons for path in (beton, card_path(beton)))


def remove_partial(betons: list[Path]) -> None:
    """Remove what a killed write left, if nobody holds it and the folder lets us."""
    with contextlib.suppress(OSError, UserError), PartialPair(betons):
        pass


class PartialPair:
    """The .betons of one write and their cards, under partial names, until :meth:`commit`.

    A context manager: leaving it without a commit removes every partial file; so does the next write after a
    ``kill -9``. A lock, which the system drops when its holder dies, keeps two writes to one output apart.
    """

    def __init__(self, betons: list[Path]) -> None:
        self._betons = betons
        self._files: list[FileIO] = []
        self._committing = False

    def __enter__(self) -> "PartialPair":
        try:
            for beton in self._betons:
                beton.parent.mkdir(parents=True, exist_ok=True)
                self._files.append(_open_locked(beton))
                partial_path(card_path(beton)).unlink(missing_ok=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what this write holds, and only that: another write's partial files are not ours.

        A commit that began leaves nothing when it ends, and what it leaves when it is cut short tells the next write.
        """
        for beton, file in zip(self._betons, self._files, strict=False):
            if not self._committing:
                partial_path(beton).unlink(missing_ok=True)
                partial_path(card_path(beton)).unlink(missing_ok=True)
            file.close()
        self._files = []

    def file(self, beton: Path) -> FileIO:
        """The open, empty, unbuffered file that becomes ``beton``."""
        return self._files[self._betons.index(beton)]

    def commit(self, cards: list[str]) -> None:
        """Give the written files their names; ``cards`` are the cards' texts in the order of the .betons.

        The old cards go first and the new ones come last, so that at every moment in between at least one .beton
        has no card and is refused, and the partial cards that are left tell the next write what happened.
        """
        for beton, file, card in zip(self._betons, self._files, cards, strict=True):
            os.fsync(file.fileno())
            _write_synced(partial_path(card_path(beton)), card)
        self._committing = True
        folders = {beton.parent for beton in self._betons}
        for beton in self._betons:
            card_path(beton).unlink(missing_ok=True)
        _sync(folders)
        for beton in self._betons:
            partial_path(beton).replace(beton)
        _sync(folders)
        for beton in self._betons:
            partial_path(card_path(beton)).replace(card_path(beton))
        _sync(folders)


def _open_locked(beton: Path) -> FileIO:
    path = partial_path(beton)
    file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder may have renamed the file between our open and our lock: then it is no longer the partial file.
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise BlockingIOError
    except BlockingIOError:
        file.close()
        raise UserError(f"{beton} is being written by another process; wait for it or stop it") from None
    file.truncate(0)
    return file


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folders: set[Path]) -> None:
    for folder in folders:
        sync_folder(folder)
