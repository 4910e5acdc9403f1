"""Folders of images: one folder per class, in train/ and val/ (or test/), or in one folder that is split."""

from collections.abc import Iterable, Iterator
import hashlib
from pathlib import Path
import re

import numpy as np

from data_prep.samples import Samples
from rlp.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
TRAIN = "train"
VALIDATION = ("val", "test")
"""Names of the folder of the validation split; the first that is there is taken."""
NAMES = ("LOC_synset_mapping.txt", "synset_words.txt", "classes.txt")
"""Files beside the folders that may say what the classes are called, as ImageNet's do; the first is taken."""

ClassFiles = dict[str, list[Path]]


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which ``2.jpg`` comes before ``10.jpg``; equal on every machine."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def find_splits(root: Path) -> tuple[Path, Path | None]:
    """The folders of the training and the validation split; the latter is None when ``root`` itself holds classes.

    Raises:
        UserError: no such folder, or a training without a validation split.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; source.path must name a folder of images")
    if not (root / TRAIN).is_dir():
        return root, None
    for name in VALIDATION:
        if (root / name).is_dir():
            return root / TRAIN, root / name
    raise UserError(
        f"{root} has {TRAIN}/ but neither val/ nor test/; --source.path {root / TRAIN} splits off source.val_fraction"
    )


def list_classes(folder: Path, names: Path | None = None) -> ClassFiles:
    """Image files by class folder, both in natural order; ``names`` is a file that may be among the folders.

    Raises:
        UserError: no classes, a class without images, or something else than an image where images belong.
    """
    classes = {}
    for entry in _entries(folder):
        if entry.is_dir():
            classes[entry.name] = _images(entry)
        elif entry != names:
            raise UserError(f"{entry} is a file where folders of classes were expected")
    if not classes:
        raise UserError(f"{folder} is empty; expected one folder of images per class")
    return classes


def _images(folder: Path) -> list[Path]:
    files = list(_entries(folder))
    for file in files:
        if file.suffix.lower() not in SUFFIXES or file.is_dir():
            raise UserError(f"{file} is not an image file; expected files that end in {', '.join(SUFFIXES)}")
    if not files:
        raise UserError(f"{folder} has no images; every class needs some")
    return files


def _entries(folder: Path) -> Iterator[Path]:
    """What is in a folder, hidden files aside, in natural order."""
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from None
    return iter(sorted(entries, key=lambda entry: natural_key(entry.name)))


def find_names(root: Path) -> Path | None:
    """The file of :data:`NAMES` in a folder, None if there is none."""
    return next((root / name for name in NAMES if (root / name).is_file()), None)


def read_names(file: Path, folders: Iterable[str]) -> tuple[str, ...]:
    """What a file of lines ``n01440764 tench, Tinca tinca`` calls each folder: the whole line, so that classes of one
    name (ImageNet has two cranes) stay apart.

    Raises:
        UserError: the file is not text, or has no line for a folder.
    """
    lines = [" ".join(line.split()) for line in read_text(file).splitlines() if line.strip()]
    names = {line.split()[0]: line for line in lines} | {line: line for line in lines}
    found = []
    for folder in folders:
        if folder not in names:
            raise UserError(f"{file} has no line for the class '{folder}'; expected lines like '{folder} its name'")
        found.append(names[folder])
    return tuple(found)


def read_text(file: Path) -> str:
    """A small UTF-8 file, whole."""
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not text in UTF-8") from None


def to_samples(classes: ClassFiles, numbers: dict[str, int], root: Path) -> Samples:
    """All files as samples, class after class, named relative to ``root``."""
    files = [file for listed in classes.values() for file in listed]
    labels = [numbers[name] for name, listed in classes.items() for _ in listed]
    return Samples([file.relative_to(root).as_posix() for file in files], np.array(labels, np.int64), files)


def listing_hash(root: Path, *splits: Samples, names: Path | None = None) -> str:
    """:func:`files_hash` of all images with their labels, and of the file with the names of the classes."""
    files = []
    for samples in splits:
        for _, label, file in samples.rows(0, len(samples)):
            assert isinstance(file, Path)
            files.append((f"{file.relative_to(root).as_posix()!r} {label}", file))
    return files_hash([*files, *([(names.name, names)] if names else [])])


def files_hash(files: Iterable[tuple[str, Path]]) -> str:
    """Hash of texts and the sizes and times of change of their files: tells a changed source without reading it."""
    digest = hashlib.sha256()
    for text, file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
        line = f"{text} {status.st_size} {status.st_mtime_ns}\n"
        digest.update(line.encode("utf-8", "backslashreplace"))
    return digest.hexdigest()
