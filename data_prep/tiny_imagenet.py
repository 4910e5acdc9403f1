"""Tiny ImageNet in Stanford's own layout (CS231n): the archive ``tiny-imagenet-200.zip``, unopened, or its folder.

``wnids.txt`` lists the classes and ``words.txt`` says what they are. Training images are ``train/WNID/images/*.JPEG``,
validation images ``val/images/*.JPEG`` with their classes in ``val/val_annotations.txt``; those of ``test`` have none.
"""

from pathlib import Path
import re
import zipfile
import zlib

import numpy as np

from data_prep.folder import natural_key, read_text
from data_prep.samples import OnDemand, Samples
from rlp.errors import UserError

FOLDER = "tiny-imagenet-200"
_ANNOTATIONS = "val/val_annotations.txt"
_TRAIN = re.compile(r"train/([^/]+)/images/([^/.][^/]*)")
_VAL = re.compile(r"val/images/([^/.][^/]*)")
_DAMAGED = (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
"""What zipfile raises on damaged, encrypted and unknown archives; NotImplementedError is a RuntimeError."""


def read_tiny_imagenet(path: Path) -> tuple[list[str], Samples, Samples, list[Path]]:
    """Class names, training and validation samples, and all files; images stay unread.

    Classes are in the order of their sorted WordNet ids, as they are where each has a folder, and are called by id and
    words, ``n01443537 goldfish, Carassius auratus``. Images are in the natural order of their names.

    Args:
        path: the .zip, or the unpacked folder, or the folder that holds it.

    Raises:
        UserError: a file is missing or not as published, or an image has no class.
    """
    tree = _Folder(path) if path.is_dir() else _Archive(path)
    wnids = sorted(set(tree.text("wnids.txt").split()))
    words = {wnid: text.strip() for wnid, _, text in (x.partition("\t") for x in tree.text("words.txt").splitlines())}
    if unnamed := [wnid for wnid in wnids if not words.get(wnid)]:
        raise UserError(f"words.txt of {path} has no words for {unnamed[0]}, which wnids.txt lists")
    numbers = {wnid: number for number, wnid in enumerate(wnids)}
    annotated = _annotations(tree, path)
    train, val = {}, {}
    for name in sorted(tree.images(), key=natural_key):
        if not name.lower().endswith(".jpeg"):
            raise UserError(f"{path}: {name} is not an image; expected files that end in .JPEG")
        if found := _TRAIN.fullmatch(name):
            train[name] = found[1]
        elif name in annotated:
            val[name] = annotated.pop(name)
        else:
            raise UserError(f"{path}: {_ANNOTATIONS} does not give the class of {name}")
    if annotated:
        raise UserError(f"{path}: {next(iter(annotated))} is missing, though {_ANNOTATIONS} names it")
    for name, wnid in (train | val).items():
        if wnid not in numbers:
            raise UserError(f"{path}: {name} is of the class {wnid}, which wnids.txt does not list")
    classes = [f"{wnid} {words[wnid]}" for wnid in wnids]
    return classes, _samples(tree, train, numbers), _samples(tree, val, numbers), tree.files([*train, *val])


def _samples(tree: "_Folder | _Archive", split: dict[str, str], numbers: dict[str, int]) -> Samples:
    names, labels = list(split), [numbers[wnid] for wnid in split.values()]
    return Samples(names, np.array(labels, np.int64), tree.contents(names))


def _annotations(tree: "_Folder | _Archive", path: Path) -> dict[str, str]:
    """The WordNet id of every validation image by its name; the boxes after it are left."""
    found = {}
    for number, line in enumerate(tree.text(_ANNOTATIONS).splitlines(), 1):
        file, tab, rest = line.partition("\t")
        if not tab:
            raise UserError(f"{path}: line {number} of {_ANNOTATIONS} is '{line[:40]}'; expected file, class and box")
        name, wnid = f"val/images/{file}", rest.split("\t")[0].strip()
        if found.setdefault(name, wnid) != wnid:
            raise UserError(f"{path}: {_ANNOTATIONS} gives {name} two classes, {found[name]} and {wnid}")
    return found


class _Folder:
    """The published files on disk."""

    def __init__(self, path: Path) -> None:
        self._root = path / FOLDER if (path / FOLDER).is_dir() else path

    def text(self, name: str) -> str:
        if not (self._root / name).is_file():
            raise UserError(f"{self._root / name} is missing; expected the published files of {FOLDER}")
        return read_text(self._root / name)

    def images(self) -> list[str]:
        found = [*self._root.glob("train/*/images/*"), *self._root.glob("val/images/*")]
        return [file.relative_to(self._root).as_posix() for file in found if not file.name.startswith(".")]

    def contents(self, names: list[str]) -> list[Path]:
        return [self._root / name for name in names]

    def files(self, names: list[str]) -> list[Path]:
        return self.contents([*names, "wnids.txt", "words.txt", _ANNOTATIONS])


class _Archive:
    """The published archive; each image is unpacked when it is written."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path} does not exist; source.path must name {FOLDER}.zip or the folder {FOLDER}")
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except _DAMAGED as error:
            raise UserError(f"{path} cannot be read as a .zip: {error}") from None
        names = self._zip.namelist()
        root = f"{FOLDER}/" if any(name.startswith(f"{FOLDER}/") for name in names) else ""
        self._members = {name.removeprefix(root): name for name in names}

    def text(self, name: str) -> str:
        if name not in self._members:
            raise UserError(f"{self._path} has no file {name}; expected the published files of {FOLDER}")
        try:
            return self._read(name).decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{name} of {self._path} is not text in UTF-8") from None

    def images(self) -> list[str]:
        return [name for name in self._members if _TRAIN.fullmatch(name) or _VAL.fullmatch(name)]

    def contents(self, names: list[str]) -> OnDemand:
        return OnDemand(lambda row: self._read(names[row]), np.arange(len(names)))

    def files(self, names: list[str]) -> list[Path]:
        return [self._path]

    def _read(self, name: str) -> bytes:
        try:
            return self._zip.read(self._members[name])
        except _DAMAGED as error:
            raise UserError(f"{name} of {self._path} cannot be unpacked: {error}") from None
