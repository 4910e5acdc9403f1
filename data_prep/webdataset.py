"""Images in WebDataset's tar files: members of one key are one sample, ``000012.jpg`` and ``000012.cls``.

Format: https://github.com/webdataset/webdataset. Tars are read with the standard library; once opened, every image is
known by its place in its file, so that worker processes read images directly.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
import json
from pathlib import Path
import re
import tarfile

import numpy as np
from tqdm import tqdm

from data_prep.encode import ByteRange
from data_prep.folder import SUFFIXES, read_text
from data_prep.parquet import LABEL_COLUMNS
from data_prep.samples import Samples
from data_prep.split_files import find_split_files
from rlp.errors import UserError

LABELS = ("cls", "json", "txt")
"""Extensions of a sample's label: an integer as text, or a JSON object with one; the first that is there is taken."""
NAMES = ("classes.txt", "classes.json")
"""Files beside the tars with the names of the classes: one a line, or a JSON list."""
_IMAGES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # WebDataset's rule: the extension starts at the first dot
_BLOCK = 512  # bytes; tar's unit


def read_webdataset(
    path: Path, label_column: str | None
) -> tuple[list[str] | None, Samples, Samples | None, list[Path]]:
    """Class names (None where no file says them), training and validation samples (None if there are none), all files.

    Reads the headers of all members and the labels, no image.

    Args:
        path: a tar, a pattern or a folder, see :func:`~data_prep.split_files.find_split_files`.
        label_column: key of the label in JSON members; None for the first of LABEL_COLUMNS that is there.

    Raises:
        UserError: a tar is damaged or cut off, or a sample lacks its image or label or has one twice.
    """
    train, val = find_split_files(path, ".tar")
    folders = (train[0].parent, path)
    names = next((file for folder in folders for name in NAMES if (file := folder / name).is_file()), None)
    files = [*train, *val, *([names] if names else [])]
    return (
        _read_names(names) if names else None,
        _samples(train, label_column),
        _samples(val, label_column) if val else None,
        files,
    )


@dataclass
class _Entry:
    """What a tar has of one key."""

    images: list[ByteRange] = field(default_factory=list)
    labels: dict[str, bytes] = field(default_factory=dict)


def _samples(shards: list[Path], label_column: str | None) -> Samples:
    names, labels, images = [], [], []
    for shard in tqdm(shards, desc="headers", unit=" tars", leave=False, disable=None):
        for key, entry in _entries(shard).items():
            name = f"{shard.name}/{key}"
            if len(entry.images) != 1:
                count = len(entry.images) or "no"
                raise UserError(f"{name} has {count} images; expected one member that ends in {', '.join(_IMAGES)}")
            if not entry.labels:
                raise UserError(f"{name} has no label; expected a member that ends in {', '.join(LABELS)}")
            names.append(name)
            labels.append(_label(name, entry.labels, label_column))
            images.append(entry.images[0])
    return Samples(names, np.array(labels, np.int64), images)


def _entries(shard: Path) -> dict[str, _Entry]:
    """A tar's samples by key, in the order in which they begin."""
    try:
        with tarfile.open(shard, "r:") as tar:
            return _collect(tar, shard)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{shard} cannot be read as an uncompressed tar: {error}") from None


def _collect(tar: tarfile.TarFile, shard: Path) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    seen = set()
    for member in _members(tar, shard):
        found = _KEY.fullmatch(member.name)
        if found is None:
            raise UserError(f"{shard}: '{member.name}' has no extension; expected names like 000012.jpg and 000012.cls")
        key, extension = found[1], found[2].lower()
        if (key, extension) in seen:
            raise UserError(f"{shard} has '{member.name}' twice; expected every key once in a shard")
        seen.add((key, extension))
        entry = entries.setdefault(key, _Entry())
        if extension in _IMAGES:
            entry.images.append(ByteRange(shard, member.offset_data, member.size))
        elif extension in LABELS and (file := tar.extractfile(member)) is not None:
            entry.labels[extension] = file.read()
    return entries


def _members(tar: tarfile.TarFile, shard: Path) -> Iterator[tarfile.TarInfo]:
    """The files in a tar, hidden ones aside, one by one."""
    end = 0
    while (member := tar.next()) is not None:
        end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        if member.isdir() or member.name.rpartition("/")[2].startswith("."):
            continue
        if not member.isreg() or member.issparse():
            raise UserError(f"{shard}: '{member.name}' is not a plain file but a link or the like")
        yield member
    _check_end(shard, end)


def _check_end(shard: Path, end: int) -> None:
    """After the last member comes the mark of the end: tarfile takes a damaged header for it and keeps quiet."""
    with open(shard, "rb") as file:
        file.seek(end)
        rest = file.read(_BLOCK)
        if len(rest) < _BLOCK:
            raise UserError(f"{shard} is cut off: it stops at byte {end + len(rest)} without the mark of a tar's end")
        while rest:
            if rest.strip(b"\0"):
                raise UserError(f"{shard} is damaged: what follows its member that ends at byte {end} is no member")
            rest = file.read(1 << 20)


def _label(name: str, members: dict[str, bytes], column: str | None) -> int:
    extension = next(extension for extension in LABELS if extension in members)
    text = members[extension]
    try:
        value = json.loads(text) if extension == "json" else int(text) if text.strip().isdigit() else None
    except (ValueError, RecursionError):
        value = None
    if extension == "json":
        value = _from_object(f"{name}.json", value, column)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        shown = repr(text[:40].decode("utf-8", "replace"))
        raise UserError(f"{name}.{extension} holds {shown}; expected the number of a class, from 0")
    return value


def _from_object(name: str, found: object, column: str | None) -> object:
    keys = [column] if column else LABEL_COLUMNS
    for key in keys:
        if isinstance(found, dict) and key in found:
            return found[key]
    raise UserError(f"{name} is not a JSON object with the key {' or '.join(keys)} (source.label_column)")


def _read_names(file: Path) -> list[str]:
    text = read_text(file)
    if file.suffix == ".txt":
        return [line.strip() for line in text.strip().splitlines()]
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file} is not a JSON list of texts; expected the names of the classes, from class 0")
    return names
