"""CIFAR-10 and CIFAR-100 in their published Python format (Krizhevsky, 2009): an archive or an unpacked folder."""

from dataclasses import dataclass
import hashlib
import io
from pathlib import Path
import pickle
import tarfile
from typing import Any

import numpy as np

from data_prep.samples import Samples
from rlp.errors import UserError


@dataclass(frozen=True)
class Release:
    """What was published.

    Attributes:
        archive_md5: of the .tar.gz.
        folder: folder inside the archive.
        train, test: data files.
        meta: file with the class names, under ``names_key``.
        labels_key: key of the labels in a data file.
        md5: of every file.
    """

    archive_md5: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    names_key: str
    labels_key: str
    md5: dict[str, str]


RELEASES = {
    "cifar10": Release(
        archive_md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        train=("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"),
        test=("test_batch",),
        meta="batches.meta",
        names_key="label_names",
        labels_key="labels",
        md5={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
    ),
    "cifar100": Release(
        archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        train=("train",),
        test=("test",),
        meta="meta",
        names_key="fine_label_names",
        labels_key="fine_labels",
        md5={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
    ),
}
"""The published releases by source kind, with the MD5 sums of the authors' page."""


def read_cifar(kind: str, path: Path) -> tuple[tuple[str, ...], Samples, Samples]:
    """Class names, training and test samples.

    Args:
        kind: ``cifar10`` or ``cifar100`` (fine labels).
        path: the .tar.gz, or the unpacked folder, or the folder that holds it.

    Raises:
        UserError: a file is missing or is not the published one.
    """
    release = RELEASES[kind]
    files = _from_folder(path, release) if path.is_dir() else _from_archive(path, release)
    names = tuple(name.decode() for name in _unpickle(files[release.meta], release.meta)[release.names_key.encode()])
    train = _samples([(name, files[name]) for name in release.train], release)
    test = _samples([(name, files[name]) for name in release.test], release)
    return names, train, test


def _from_folder(path: Path, release: Release) -> dict[str, bytes]:
    folder = path / release.folder if (path / release.folder).is_dir() else path
    files = {}
    for name, expected in release.md5.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing; expected the files of {release.folder} in {path}")
        files[name] = _checked(file.read_bytes(), expected, file)
    return files


def _from_archive(path: Path, release: Release) -> dict[str, bytes]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; source.path must name the archive or the folder {release.folder}")
    content = _checked(path.read_bytes(), release.archive_md5, path)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        return {name: _member(archive, f"{release.folder}/{name}", path) for name in release.md5}


def _member(archive: tarfile.TarFile, name: str, path: Path) -> bytes:
    try:
        member = archive.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise UserError(f"{path} has no file {name}")
    return member.read()


def _checked(content: bytes, expected: str, path: Path) -> bytes:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise UserError(f"{path} is not the published file: its MD5 is {found}, expected {expected}")
    return content


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
"""What the published pickles name; anything else could run code."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}") from None


def _unpickle(content: bytes, name: str) -> dict[bytes, Any]:
    try:
        return _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # unpickling damaged bytes raises almost anything
        raise UserError(f"{name} is not a CIFAR file: {error}") from None


def _samples(files: list[tuple[str, bytes]], release: Release) -> Samples:
    names, labels, pixels = [], [], []
    for file, content in files:
        batch = _unpickle(content, file)
        names += [f"{file}/{name.decode()}" for name in batch[b"filenames"]]
        labels += batch[release.labels_key.encode()]
        pixels.append(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Samples(names, np.array(labels, np.int64), np.concatenate(pixels))
