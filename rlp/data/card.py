"""The card: a JSON file beside a .beton, or beside the shards of one, that says what is in it."""

from dataclasses import asdict, dataclass, field, fields
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from rlp.errors import UserError
from rlp.files import write_atomically

SCHEMA = 2
IMAGE_MODES = ("raw", "jpg", "smart")
Channels = tuple[float, float, float]


def card_path(beton: str | Path) -> Path:
    """Where the card of a .beton lies: the same name, ending in .json."""
    return Path(beton).with_suffix(".json")


def pixel_sums(histogram: np.ndarray) -> dict[str, Any]:
    """A card's ``pixels`` from how often each value occurs in each channel, int64 [3, 256]."""
    values = range(256)
    counts = histogram.tolist()
    return {
        "count": sum(counts[0]),
        "sum": [sum(v * n for v, n in zip(values, channel, strict=True)) for channel in counts],
        "square_sum": [sum(v * v * n for v, n in zip(values, channel, strict=True)) for channel in counts],
    }


def moments(pixels: dict[str, Any]) -> tuple[Channels, Channels]:
    """Mean and standard deviation per channel of pixels scaled to 0..1, from the exact sums of :class:`Card`."""
    n = pixels["count"]
    pairs = [
        (first / (255 * n), math.sqrt(n * second - first * first) / (255 * n))
        for first, second in zip(pixels["sum"], pixels["square_sum"], strict=True)
    ]
    (r, dr), (g, dg), (b, db) = pairs
    return (r, g, b), (dr, dg, db)


def combined_sha256(digests: list[str]) -> str:
    """What stands for the hash of several files: SHA-256 of their hexadecimal SHA-256s, one a line."""
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def fingerprint_text(total: int) -> str:
    """A set's fingerprint from the sum of its samples': modulo 2^256, in 64 hexadecimal digits."""
    return f"{total % 2**256:064x}"


@dataclass(frozen=True)
class Card:
    """What a .beton holds.

    Attributes:
        schema: version of these keys.
        split: ``train`` or ``val``; also the stream of the random words.
        num_samples: samples in the file, or in all shards.
        first_sample: id of the first sample, 0 unless this is a shard.
        classes: class names, in the order of the labels.
        image_mode: raw (uint8 pixels), jpg, or smart (either, by size).
        height, width: pixels, or 0 when they vary.
        max_height, max_width: the largest, in pixels.
        pixels: exact sums over the stored pixels: ``count`` (pixels), ``sum`` and ``square_sum`` (of the values 0..255
            per channel red, green, blue); :attr:`mean` and :attr:`std` follow from them.
        columns: names of the fields.
        draws: columns of random words that are draws.
        word_names: names of all word columns, ``draw0`` ... then :data:`rlp.labels.NAMED_WORDS`.
        words_seed: seed of the random words.
        source: ``kind``, ``name``, ``fingerprint`` (over every sample's id, name, label and content: the sum of their
            SHA-256s modulo 2^256, so that those of shards add up to that of the set) and ``listing`` (hash of what
            tells, without reading the images, that the source is unchanged).
        size: bytes of the .beton, or of all shards.
        sha256: of the whole .beton; of shards: :func:`combined_sha256`.
        sha256_index: of its header, field descriptors, metadata and allocation table; of shards: likewise.
        written_by: versions of what wrote it.
        created: UTC time, ISO 8601.
        request: the configuration that asked for it (sections source, image and words).
        shards: ``name`` (of a file beside the card), ``num_samples``, ``size``, ``sha256`` and ``sha256_index`` of
            every shard, in the order of the samples; empty when the .beton beside the card is the set.
        duplicates: near-duplicate samples; empty when they have not been looked for.
    """

    split: str
    num_samples: int
    first_sample: int
    classes: tuple[str, ...]
    image_mode: str
    height: int
    width: int
    max_height: int
    max_width: int
    pixels: dict[str, Any]
    columns: tuple[str, ...]
    draws: int
    word_names: tuple[str, ...]
    words_seed: int
    source: dict[str, str]
    size: int
    sha256: str
    sha256_index: str
    written_by: dict[str, str]
    created: str
    request: dict[str, Any]
    shards: tuple[dict[str, Any], ...] = ()
    duplicates: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def mean(self) -> Channels:
        """Per channel (red, green, blue), of the stored pixels scaled to 0..1."""
        return moments(self.pixels)[0]

    @property
    def std(self) -> Channels:
        """Population standard deviation, like :attr:`mean`."""
        return moments(self.pixels)[1]

    @property
    def sha256_card(self) -> str:
        """SHA-256 of the card's text without the line that holds this hash."""
        return hashlib.sha256(_text(self._content()).encode("utf-8", "surrogatepass")).hexdigest()

    def to_json(self) -> str:
        """The card's canonical text, keys in their order, ending in a newline; any other text is refused."""
        content = self._content()
        return _text({"schema": content.pop("schema"), "sha256_card": self.sha256_card, **content})

    def write(self, beton: str | Path) -> Path:
        """Write the card of a .beton in one step and return its path."""
        return write_atomically(card_path(beton), self.to_json())

    def _content(self) -> dict[str, Any]:
        mean, std = moments(self.pixels)
        content: dict[str, Any] = {"schema": self.schema}
        for name, value in asdict(self).items():
            content[name] = value
            if name == "pixels":
                content.update(mean=mean, std=std)
        return content

    @classmethod
    def read(cls, beton: str | Path) -> "Card":
        """The card of a .beton.

        Raises:
            UserError: no card, not JSON, of another schema, with missing, unknown or mistyped keys, contradictory, or
                changed after it was written.
        """
        path = card_path(beton)
        try:
            text = path.read_bytes().decode("utf-8")
            content = json.loads(text)
        except FileNotFoundError:
            raise UserError(f"{path} is missing: {beton} has no card; write it with write_datasets.py") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not a card: it is not valid JSON ({error})") from None
        card = cls._checked(content, path)
        try:
            canonical = card.to_json()
        except (ValueError, RecursionError):  # infinite numbers, or nested deeper than Python goes
            canonical = ""
        if canonical != text:
            raise UserError(f"{path} was changed after it was written: its text does not fit its sha256_card")
        return card

    @classmethod
    def _checked(cls, content: Any, path: Path) -> "Card":
        schema = content.get("schema") if isinstance(content, dict) else type(content).__name__
        if schema == 1:
            raise UserError(f"{path} has schema 1, of an older version; write the set again with write_datasets.py")
        if not isinstance(content, dict) or schema != SCHEMA:
            raise UserError(f"{path} has schema {schema!r}; this version reads cards of schema {SCHEMA}")
        names = [field.name for field in fields(cls)]
        expected = [*names, "mean", "std", "sha256_card"]
        if odd := [name for name in expected if name not in content] + [n for n in content if n not in expected]:
            raise UserError(f"{path} is not a card of schema {SCHEMA}: key '{odd[0]}' is missing or unknown")
        for name in expected:
            _check_type(name, content[name], path)
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in content.items()}
        card = cls(**{name: values[name] for name in names})
        for name in ("mean", "std"):
            if values[name] != getattr(card, name):
                raise UserError(f"{path}: '{name}' is {content[name]}, but 'pixels' give {list(getattr(card, name))}")
        _check_shards(card, path)
        return card


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


_INTEGERS = (
    "schema",
    "num_samples",
    "first_sample",
    "height",
    "width",
    "max_height",
    "max_width",
    "draws",
    "words_seed",
    "size",
)
_NUMBERS = ("mean", "std")
_NAMES = ("classes", "columns", "word_names")
_TEXTS = ("source", "written_by")
_TABLES = ("request", "duplicates")
_SHARD = {"name": str, "num_samples": int, "size": int, "sha256": str, "sha256_index": str}


def _check_type(name: str, value: Any, path: Path) -> None:
    """Cards come from elsewhere too: a wrong type is named here, not met as a traceback in the middle of a run."""
    if name in _INTEGERS:
        right, expected = _is_count(value), "a whole number"
    elif name in _NUMBERS:
        right = isinstance(value, list) and len(value) == 3 and all(isinstance(v, int | float) for v in value)
        expected = "three numbers"
    elif name in _NAMES:
        right, expected = isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of names"
    elif name in _TABLES:
        right, expected = isinstance(value, dict), "a mapping"
    elif name in _TEXTS:
        right = isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
        expected = "a mapping of texts"
    elif name == "pixels":
        right, expected = _are_pixels(value), "sums that pixels from 0 to 255 can have"
    elif name == "shards":
        right, expected = isinstance(value, list) and all(_is_shard(v) for v in value), "a list of shards"
    else:
        right, expected = isinstance(value, str), "a text"
    if not right:
        raise UserError(f"{path}: '{name}' is {value!r}; expected {expected}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _are_pixels(value: Any) -> bool:
    if not isinstance(value, dict) or list(value) != ["count", "sum", "square_sum"]:
        return False
    count, sums, squares = value.values()
    if not _is_count(count) or count == 0 or not (isinstance(sums, list) and isinstance(squares, list)):
        return False
    if not len(sums) == len(squares) == 3 or not all(isinstance(v, int) for v in (*sums, *squares)):
        return False
    return all(
        0 <= s <= 255 * count and s * s <= count * q and s <= q <= 255 * s for s, q in zip(sums, squares, strict=True)
    )


def _is_shard(value: Any) -> bool:
    if not isinstance(value, dict) or list(value) != list(_SHARD):
        return False
    right = all(_is_count(value[key]) if kind is int else isinstance(value[key], kind) for key, kind in _SHARD.items())
    return right and Path(value["name"]).name == value["name"] and value["name"].endswith(".beton")


def _check_shards(card: Card, path: Path) -> None:
    """What a merged card says of the set must follow from what it says of the shards."""
    if not card.shards:
        return
    told = {
        "num_samples": sum(shard["num_samples"] for shard in card.shards),
        "size": sum(shard["size"] for shard in card.shards),
        "sha256": combined_sha256([shard["sha256"] for shard in card.shards]),
        "sha256_index": combined_sha256([shard["sha256_index"] for shard in card.shards]),
        "first_sample": 0,
    }
    for key, expected in told.items():
        if getattr(card, key) != expected:
            raise UserError(f"{path}: '{key}' is {getattr(card, key)!r}, but its shards give {expected!r}")
    if len({shard["name"] for shard in card.shards}) < len(card.shards):
        raise UserError(f"{path}: 'shards' names a file twice")
