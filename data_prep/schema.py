"""The configuration of write_datasets.py: every key with its type, default, meaning and range."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rlp.config_keys import REQUIRED, Check, Section, at_least, between, key, not_empty
from rlp.errors import UserError

_LARGEST_SIDE = 65535  # pixels; the format keeps sides in 16 bits
_BETON = Check(lambda value: Path(value).suffix == ".beton", "ending in .beton")
_PART = Check(lambda value: 0 < value < 1, "above 0 and below 1")
_SEED = between(0, 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Section, name="source"):
    """Where the images come from."""

    kind: Literal["digits", "cifar10", "cifar100", "tiny-imagenet", "folder", "npz", "parquet", "webdataset"] = key(
        "digits",
        "scikit-learn's digits, CIFAR or Tiny ImageNet as published, image folders, NumPy arrays, parquet files as "
        "Hugging Face has them, or WebDataset's tars",
    )
    path: str | None = key(
        None, "archive, folder or file; for parquet and webdataset also a pattern of files; null for digits", not_empty
    )
    image_column: str | None = key(
        None, "parquet: column of encoded images; null for the first of image and img that is there", not_empty
    )
    label_column: str | None = key(
        None,
        "parquet: column of labels, webdataset: key in JSON members; null for the first of label, labels, fine_label "
        "and target that is there",
        not_empty,
    )
    val_fraction: float = key(0.2, "share of every class to hold out where the source has no validation set", _PART)
    split_seed: int = key(0, "seed of what is held out, and of source.limit's choice", _SEED)
    convert_rgb: bool = key(False, "turn grey, palette, CMYK and transparent images into RGB instead of stopping")
    limit: int = key(
        0, "at most so many samples a split, balanced by class, chosen at random, nested; 0 for all", at_least(0)
    )

    def check(self) -> None:
        """A path where one is needed, and no column where there are none."""
        if self.image_column is not None and self.kind != "parquet":
            raise UserError(f"source.image_column is '{self.image_column}', but source.kind {self.kind} has no columns")
        if self.label_column is not None and self.kind not in ("parquet", "webdataset"):
            raise UserError(f"source.label_column is '{self.label_column}', but source.kind {self.kind} has no columns")
        if self.kind == "digits" and self.path is not None:
            raise UserError(f"source.path is '{self.path}'; expected null, for source.kind digits needs none")
        if self.kind != "digits" and self.path is None:
            raise UserError(f"source.path is null; source.kind {self.kind} needs --source.path PATH")


@dataclass(frozen=True, kw_only=True)
class ImageConfig(Section, name="image"):
    """How images are stored."""

    mode: Literal["raw", "jpg", "smart"] = key(
        "raw", "uint8 pixels, JPEG, or smart: pixels up to image.smart_threshold, JPEG above"
    )
    max_side: int = key(
        0, "shrink images whose longer side has more pixels, keeping their shape; 0 keeps", between(0, _LARGEST_SIDE)
    )
    quality: int = key(90, "of JPEGs; a source's JPEG that needs no resizing is stored as it is", between(1, 100))
    smart_threshold: int = key(0, "bytes of pixels up to which mode smart stores them raw", at_least(0))
    size: int = key(0, "resize every image to squares of so many pixels a side; 0 keeps", between(0, _LARGEST_SIDE))

    def check(self) -> None:
        """One way to resize, and a threshold where one is needed."""
        if self.size and self.max_side:
            raise UserError(f"image.size is {self.size} and image.max_side is {self.max_side}; expected one to be 0")
        if (self.mode == "smart") != (self.smart_threshold > 0):
            raise UserError(
                f"image.smart_threshold is {self.smart_threshold} with image.mode {self.mode}; "
                "expected above 0 with smart and 0 without"
            )


@dataclass(frozen=True, kw_only=True)
class WordsConfig(Section, name="words"):
    """The random words of each sample."""

    draws: int = key(32, "columns of random words, each an independent labelling of the whole set", between(1, 4096))
    seed: int = key(0, "seed of all words; train and val have streams of their own", _SEED)


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Section, name="output"):
    """Where the .betons go, each with its card (.json) beside it."""

    train: str = key(REQUIRED, "path of the training set", _BETON)
    val: str = key(REQUIRED, "path of the validation set", _BETON)
    workers: int = key(0, "processes that read and encode; 0 for as many as are worth it", at_least(0))
    overwrite: bool = key(False, "replace a pair of another source or configuration, once the new one is whole")
    shards: int = key(0, "write each set as so many .betons with one merged card; 0 for one file", between(0, 99_999))
    shard: int | None = key(
        None, "write this shard alone, from 0 (merge with python -m rlp.data merge); null for all", at_least(0)
    )

    def check(self) -> None:
        """Two different files, and a shard that is one of them."""
        if self.shard is not None and self.shard >= self.shards:
            raise UserError(f"output.shard is {self.shard}; expected less than output.shards, which is {self.shards}")
        if Path(self.train).resolve() == Path(self.val).resolve():
            raise UserError(f"output.val is '{self.val}', the same file as output.train; expected another")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The configuration of write_datasets.py."""

    output: OutputConfig
    source: SourceConfig = field(default_factory=SourceConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    words: WordsConfig = field(default_factory=WordsConfig)
