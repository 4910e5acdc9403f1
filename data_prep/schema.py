"""What can be asked of write_datasets.py: one frozen dataclass per section."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rlp.errors import UserError

MOST_DRAWS = 4096


def _check(right: bool, key: str, value: object, expected: str) -> None:
    if not right:
        raise UserError(f"{key} is {value!r}; expected {expected}")


@dataclass(frozen=True)
class SourceConfig:
    """Where the images come from.

    Attributes:
        kind: digits (scikit-learn's, 1,797 scans), cifar10 or cifar100 (published Python format), folder, npz.
        path: archive or folder (cifar), folder of images, .npz file; none for digits.
        val_fraction: share of every class that is held out where the source has no validation split.
        split_seed: seed of that split and of `limit`'s choice.
        convert_rgb: turn grey, palette, CMYK and transparent images into RGB instead of stopping.
        limit: at most this many samples per split, classes in balance, chosen at random, nested (0 = all).
    """

    kind: Literal["digits", "cifar10", "cifar100", "folder", "npz"] = "digits"
    path: str | None = None
    val_fraction: float = 0.2
    split_seed: int = 0
    convert_rgb: bool = False
    limit: int = 0

    def __post_init__(self) -> None:
        _check(
            (self.path is None) == (self.kind == "digits"),
            "source.path",
            self.path,
            "no path for digits" if self.kind == "digits" else f"a path, which source.kind {self.kind} needs",
        )
        _check(0.0 < self.val_fraction < 1.0, "source.val_fraction", self.val_fraction, "a number between 0 and 1")
        _check(0 <= self.split_seed < 2**64, "source.split_seed", self.split_seed, "0 to 2^64 - 1")
        _check(self.limit >= 0, "source.limit", self.limit, "0 (all) or a number of samples")


@dataclass(frozen=True)
class ImageConfig:
    """How images are stored.

    Attributes:
        mode: raw (uint8 pixels), jpg, or smart (raw up to `smart_threshold` bytes of pixels, else jpg).
        max_side: shrink images whose longer side is longer than this, in pixels, keeping their shape (0 = keep).
        quality: of JPEGs encoded here, 1 to 100; JPEGs that need no change are stored as they are.
        smart_threshold: bytes of pixels up to which smart stores them raw.
        size: resize every image to size x size pixels (0 = keep).
    """

    mode: Literal["raw", "jpg", "smart"] = "raw"
    max_side: int = 0
    quality: int = 90
    smart_threshold: int = 0
    size: int = 0

    def __post_init__(self) -> None:
        _check(0 <= self.max_side <= 65535, "image.max_side", self.max_side, "0 (keep) to 65535 pixels")
        _check(0 <= self.size <= 65535, "image.size", self.size, "0 (keep) to 65535 pixels")
        _check(not (self.size and self.max_side), "image.max_side", self.max_side, "0 when image.size is given")
        _check(1 <= self.quality <= 100, "image.quality", self.quality, "1 to 100")
        _check(self.smart_threshold >= 0, "image.smart_threshold", self.smart_threshold, "a number of bytes")
        _check(
            (self.mode == "smart") == (self.smart_threshold > 0),
            "image.smart_threshold",
            self.smart_threshold,
            "a number of bytes above 0 with image.mode smart, and 0 without",
        )


@dataclass(frozen=True)
class WordsConfig:
    """Random words per sample.

    Attributes:
        draws: columns of random words, each one labelling of the whole set.
        seed: of all words; train and val have streams of their own.
    """

    draws: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        _check(1 <= self.draws <= MOST_DRAWS, "words.draws", self.draws, f"1 to {MOST_DRAWS}")
        _check(0 <= self.seed < 2**64, "words.seed", self.seed, "0 to 2^64 - 1")


@dataclass(frozen=True)
class OutputConfig:
    """Where the .betons go; each has its card (.json) beside it.

    Attributes:
        train: path of the training split, ending in .beton.
        val: path of the validation split, ending in .beton.
        workers: processes that read and encode (0 = as many as are worth it).
        overwrite: replace files of another request or source; the old pair stays until the new one is whole.
    """

    train: str
    val: str
    workers: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        for key, value in (("output.train", self.train), ("output.val", self.val)):
            _check(Path(value).suffix == ".beton", key, value, "a path that ends in .beton")
        _check(
            Path(self.train).absolute() != Path(self.val).absolute(),
            "output.val",
            self.val,
            "another path than output.train",
        )
        _check(self.workers >= 0, "output.workers", self.workers, "0 (automatic) or a number of processes")


@dataclass(frozen=True)
class PrepareConfig:
    """The configuration of write_datasets.py.

    Attributes:
        output: where the .betons go.
        source: where the images come from.
        image: how they are stored.
        words: random words per sample.
    """

    output: OutputConfig
    source: SourceConfig = field(default_factory=SourceConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    words: WordsConfig = field(default_factory=WordsConfig)
