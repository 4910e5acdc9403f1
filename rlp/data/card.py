"""The card: a JSON file beside a .beton that says what is in it."""

from dataclasses import asdict, dataclass, fields
import json
from pathlib import Path
from typing import Any

from rlp.errors import UserError
from rlp.files import write_atomically

SCHEMA = 1
IMAGE_MODES = ("raw", "jpg", "smart")


def card_path(beton: str | Path) -> Path:
    """Where the card of a .beton lies: the same name, ending in .json."""
    return Path(beton).with_suffix(".json")


@dataclass(frozen=True)
class Card:
    """What a .beton holds.

    Attributes:
        schema: version of these keys.
        split: ``train`` or ``val``; also the stream of the random words.
        num_samples: samples in the file.
        classes: class names, in the order of the labels.
        image_mode: raw (uint8 pixels), jpg, or smart (either, by size).
        height, width: pixels, or 0 when they vary.
        max_height, max_width: the largest, in pixels.
        mean, std: per channel (red, green, blue), of the stored pixels scaled to 0..1.
        columns: names of the fields.
        draws: columns of random words that are draws.
        word_names: names of all word columns, ``draw0`` ... then :data:`rlp.labels.NAMED_WORDS`.
        words_seed: seed of the random words.
        source: ``kind``, ``name``, ``fingerprint`` (SHA-256 over every sample's name, label and content, in order) and
            ``listing`` (hash of what tells, without reading the images, that the source is unchanged).
        size: bytes of the .beton.
        sha256: of the whole .beton.
        sha256_index: of its header, field descriptors, metadata and allocation table.
        written_by: versions of what wrote it.
        created: UTC time, ISO 8601.
        request: the configuration that asked for it (sections source, image and words).
    """

    split: str
    num_samples: int
    classes: tuple[str, ...]
    image_mode: str
    height: int
    width: int
    max_height: int
    max_width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
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
    schema: int = SCHEMA

    @classmethod
    def read(cls, beton: str | Path) -> "Card":
        """The card of a .beton.

        Raises:
            UserError: no card, not JSON, of another schema, or with missing, unknown or mistyped keys.
        """
        path = card_path(beton)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} is missing: {beton} has no card; write it with write_datasets.py") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            raise UserError(f"{path} is not a card: it is not valid JSON ({error})") from None
        return cls._checked(content, path)

    @classmethod
    def _checked(cls, content: Any, path: Path) -> "Card":
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            found = content.get("schema") if isinstance(content, dict) else type(content).__name__
            raise UserError(f"{path} has schema {found!r}; this version reads cards of schema {SCHEMA}")
        names = [field.name for field in fields(cls)]
        if odd := [name for name in names if name not in content] + [name for name in content if name not in names]:
            raise UserError(f"{path} is not a card of schema {SCHEMA}: key '{odd[0]}' is missing or unknown")
        for name in names:
            _check_type(name, content[name], path)
        lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
        return cls(**{**content, **lists})

    def to_json(self) -> str:
        """The text of the card, keys in their order, ending in a newline."""
        content = asdict(self)
        return json.dumps({"schema": content.pop("schema"), **content}, indent=2, ensure_ascii=False) + "\n"

    def write(self, beton: str | Path) -> Path:
        """Write the card of a .beton in one step and return its path."""
        return write_atomically(card_path(beton), self.to_json())


_INTEGERS = (
    "schema",
    "num_samples",
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
_TABLES = ("source", "written_by", "request")


def _check_type(name: str, value: Any, path: Path) -> None:
    """Cards come from elsewhere too: a wrong type is named here, not met as a traceback in the middle of a run."""
    if name in _INTEGERS:
        right, expected = (
            isinstance(value, int) and not isinstance(value, bool) and value >= 0,
            "a whole number",
        )
    elif name in _NUMBERS:
        right = isinstance(value, list) and len(value) == 3 and all(isinstance(v, int | float) for v in value)
        expected = "three numbers"
    elif name in _NAMES:
        right, expected = (
            isinstance(value, list) and all(isinstance(v, str) for v in value),
            "a list of names",
        )
    elif name in _TABLES:
        right, expected = isinstance(value, dict), "a mapping"
    else:
        right, expected = isinstance(value, str), "a text"
    if not right:
        raise UserError(f"{path}: '{name}' is {value!r}; expected {expected}")
