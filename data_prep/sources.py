"""From a kind of source and a path to two lists of samples: one small reader per kind."""

from collections.abc import Callable
from dataclasses import dataclass
import hashlib
from pathlib import Path

import numpy as np

from data_prep.cifar import read_cifar
from data_prep.folder import files_hash, find_names, find_splits, list_classes, listing_hash, read_names, to_samples
from data_prep.npz import read_npz
from data_prep.parquet import read_parquet
from data_prep.samples import Samples, hold_out, limited, name_classes
from data_prep.schema import SourceConfig
from data_prep.tiny_imagenet import read_tiny_imagenet
from data_prep.webdataset import read_webdataset
from rlp.errors import UserError


@dataclass(frozen=True)
class Source:
    """Images with their classes, listed but not yet read.

    Attributes:
        kind: of :class:`~data_prep.schema.SourceConfig`.
        name: last part of the path, or of what was embedded.
        classes: class names, in the order of the labels.
        train, val: the two splits.
        listing: hash that changes when the source does; found without decoding images.
    """

    kind: str
    name: str
    classes: tuple[str, ...]
    train: Samples
    val: Samples
    listing: str


def open_source(config: SourceConfig) -> Source:
    """List a source's images.

    Raises:
        UserError: the source is missing or damaged, or a class is missing in one of the splits.
    """
    source = READERS[config.kind](config)
    for split, samples in (("train", source.train), ("val", source.val)):
        _check_split(source, split, samples)
    if config.limit and config.limit < len(source.classes):
        raise UserError(
            f"source.limit is {config.limit}, fewer than the {len(source.classes)} classes; every class needs a sample"
        )
    train, val = (limited(samples, config.limit, config.split_seed) for samples in (source.train, source.val))
    return Source(source.kind, source.name, source.classes, train, val, source.listing)


def _check_split(source: Source, split: str, samples: Samples) -> None:
    if not len(samples):
        raise UserError(f"{source.name} has no images in the {split} split")
    count = len(source.classes)
    if samples.labels.min() < 0 or samples.labels.max() >= count:
        raise UserError(f"{source.name} has a label outside 0 to {count - 1} in the {split} split")
    absent = np.flatnonzero(np.bincount(samples.labels, minlength=count) == 0)
    if len(absent):
        raise UserError(
            f"class '{source.classes[absent[0]]}' of {source.name} has no images in the {split} split; "
            f"every class needs some in both"
        )


def _read_digits(config: SourceConfig) -> Source:
    """The scans of handwritten digits that come with scikit-learn: 1,797 grey images of 8 x 8 pixels, values 0 to 16
    (Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("source.kind digits needs scikit-learn; pip install scikit-learn") from None
    values, labels = load_digits(return_X_y=True)
    grey = np.rint(np.asarray(values).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    names = [f"digit {i:04d}" for i in range(len(grey))]
    samples = Samples(names, np.asarray(labels, np.int64), np.repeat(grey[..., None], 3, axis=3))
    train, val = hold_out(samples, config.val_fraction, config.split_seed)
    return Source("digits", "scikit-learn digits", tuple("0123456789"), train, val, _array_hash(train, val))


def _read_cifar(config: SourceConfig) -> Source:
    path = _path(config)
    classes, train, val = read_cifar(config.kind, path)
    return Source(config.kind, path.name, classes, train, val, _array_hash(train, val))


def _read_folder(config: SourceConfig) -> Source:
    root = _path(config)
    train_folder, val_folder = find_splits(root)
    names = find_names(root)
    listed = list_classes(train_folder, names)
    numbers = {name: number for number, name in enumerate(listed)}
    samples = to_samples(listed, numbers, root)
    if val_folder is None:
        train, val = hold_out(samples, config.val_fraction, config.split_seed)
    else:
        held = list_classes(val_folder)
        if odd := [name for name in held if name not in numbers]:
            raise UserError(f"class '{odd[0]}' is in {val_folder} but not in {train_folder}")
        if odd := [name for name in numbers if name not in held]:
            raise UserError(f"class '{odd[0]}' is in {train_folder} but not in {val_folder}")
        train, val = samples, to_samples(held, numbers, root)
    classes = read_names(names, listed) if names else tuple(listed)
    return Source("folder", root.absolute().name, classes, train, val, listing_hash(root, train, val, names=names))


def _read_npz(config: SourceConfig) -> Source:
    path = _path(config)
    classes, train, val = read_npz(path, config.convert_rgb)
    if val is None:
        train, val = hold_out(train, config.val_fraction, config.split_seed)
    return Source("npz", path.name, classes, train, val, _array_hash(train, val))


def _read_tiny_imagenet(config: SourceConfig) -> Source:
    return _from_files(config, *read_tiny_imagenet(_path(config)))


def _read_parquet(config: SourceConfig) -> Source:
    return _from_files(config, *read_parquet(_path(config), config.image_column, config.label_column))


def _read_webdataset(config: SourceConfig) -> Source:
    return _from_files(config, *read_webdataset(_path(config), config.label_column))


def _from_files(
    config: SourceConfig, names: list[str] | None, train: Samples, val: Samples | None, files: list[Path]
) -> Source:
    """The source that a reader of files found, split where it has no validation set."""
    classes = name_classes(names, *(samples for samples in (train, val) if samples is not None))
    if val is None:
        train, val = hold_out(train, config.val_fraction, config.split_seed)
    listing = files_hash((repr(file.name), file) for file in files)
    return Source(config.kind, _path(config).absolute().name, classes, train, val, listing)


READERS: dict[str, Callable[[SourceConfig], Source]] = {
    "digits": _read_digits,
    "cifar10": _read_cifar,
    "cifar100": _read_cifar,
    "folder": _read_folder,
    "npz": _read_npz,
    "tiny-imagenet": _read_tiny_imagenet,
    "parquet": _read_parquet,
    "webdataset": _read_webdataset,
}


def _path(config: SourceConfig) -> Path:
    assert config.path is not None  # SourceConfig sees to it
    return Path(config.path)


def _array_hash(*splits: Samples) -> str:
    digest = hashlib.sha256()
    for samples in splits:
        pixels = np.ascontiguousarray(samples.contents)
        digest.update(f"{pixels.shape}".encode())
        digest.update(pixels.tobytes())
        digest.update(samples.labels.tobytes())
        digest.update("\n".join(samples.names).encode())
    return digest.hexdigest()
