"""A .beton with its card, read with NumPy alone: what FFCV reads, and what it cannot do without a loader.

Opening checks everything that later reading relies on, so a damaged file is one sentence and never a crash.
"""

from functools import cached_property
import hashlib
import io
from pathlib import Path

import numpy as np

from rlp.data.card import Card, card_path
from rlp.data.format import FIELDS, RAW, WORD_BYTES, Index, read_index
from rlp.errors import UserError
from rlp.labels import NAMED_WORDS

__all__ = ["Beton", "Card", "card_path", "file_sha256", "word_names"]

_GATHER_ROWS = 8192  # samples whose words are gathered at once: bounds the table of byte positions


def word_names(draws: int) -> tuple[str, ...]:
    """Names of the word columns: ``draw0`` ... ``draw{K-1}``, then :data:`rlp.labels.NAMED_WORDS`."""
    return (*(f"draw{k}" for k in range(draws)), *NAMED_WORDS)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a whole file, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Beton:
    """An open .beton: columns as arrays, images one by one or all at once. Made by :meth:`open`.

    Attributes:
        path: the .beton.
        card: its card.
    """

    def __init__(self, path: Path, card: Card, index: Index) -> None:
        self.path = path
        self.card = card
        self._index = index
        self._bytes = np.memmap(path, np.uint8, mode="r")

    @classmethod
    def open(cls, path: str | Path, full_hash: bool = False) -> "Beton":
        """Open a .beton and hold it to its card.

        Args:
            path: the .beton; its card lies beside it.
            full_hash: read the whole file and compare its hash too, which finds damage inside images.

        Raises:
            UserError: no file or card, or the file is damaged, half-written, or not the one the card describes.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path} does not exist; write it with write_datasets.py")
        card = Card.read(path)
        size = path.stat().st_size
        if size != card.size:
            raise UserError(f"{path} has {size} bytes, its card says {card.size}: it is damaged or another file")
        index = read_index(path)
        if index.sha256 != card.sha256_index:
            raise UserError(f"{path} is not the file its card {card_path(path)} describes (sha256_index differs)")
        _check_card(path, card, index)
        if full_hash and file_sha256(path) != card.sha256:
            raise UserError(f"{path} is damaged: its contents differ from the card's sha256")
        return cls(path, card, index)

    @property
    def num_samples(self) -> int:
        """Samples in the file, N."""
        return self._index.num_samples

    @cached_property
    def label(self) -> np.ndarray:
        """True class of every sample, int64 [N] in [0, number of classes)."""
        return self._index.metadata["label"].astype(np.int64)

    @cached_property
    def index(self) -> np.ndarray:
        """Row number of every sample, int64 [N]: 0 .. N-1."""
        return self._index.metadata["index"].astype(np.int64)

    @cached_property
    def words(self) -> np.ndarray:
        """All random words, int64 [N, K + 3] in [0, 2^32): draws first, then the named words."""
        pointer = self._index.metadata["words"].astype(np.int64)
        offset = np.arange(self._index.num_words * WORD_BYTES)
        words = np.empty((self.num_samples, self._index.num_words), np.int64)
        for start in range(0, self.num_samples, _GATHER_ROWS):
            rows = slice(start, start + _GATHER_ROWS)
            words[rows] = self._bytes[pointer[rows, None] + offset].view("<u4")
        return words

    @property
    def draw_words(self) -> np.ndarray:
        """The draws alone, int64 [N, K] in [0, 2^32)."""
        return self.words[:, : self.card.draws]

    def named(self, name: str) -> np.ndarray:
        """One word column by name (``noise``, ``noise_class``, ``member``, ``draw0`` ...), int64 [N] in [0, 2^32)."""
        if name not in self.card.word_names:
            raise UserError(f"{self.path} has no words '{name}'; it has {', '.join(self.card.word_names)}")
        return self.words[:, self.card.word_names.index(name)]

    def image(self, i: int) -> np.ndarray:
        """Image of sample ``i``, uint8 [H, W, 3]; JPEGs are decoded by Pillow.

        Raises:
            IndexError: ``i`` is not in [0, N).
            UserError: the stored JPEG is damaged.
        """
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of {self.path}: expected 0 to {self.num_samples - 1}")
        record = self._index.metadata[i]["image"]
        start, shape = int(record["ptr"]), (int(record["height"]), int(record["width"]), 3)
        content = self._bytes[start : start + int(self._index.image_size[i])]
        if record["mode"] == RAW:
            return np.array(content).reshape(shape)
        return self._decode(content.tobytes(), shape, i)

    def _decode(self, content: bytes, shape: tuple[int, int, int], i: int) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(content), formats=["JPEG"]) as picture:
                pixels = np.asarray(picture)
        except Exception as error:  # Pillow raises many kinds on damaged input; each is a damaged image to the user
            raise UserError(f"{self.path} is damaged: the JPEG of sample {i} cannot be decoded ({error})") from None
        if pixels.shape != shape:
            raise UserError(f"{self.path} is damaged: the JPEG of sample {i} is {pixels.shape}, expected {shape}")
        return pixels

    def images(self, indices: np.ndarray | None = None, progress: bool = False) -> np.ndarray:
        """Images of the given samples (all by default), uint8 [n, H, W, 3].

        Raises:
            UserError: the images are not all of one size.
        """
        if not self.card.height:
            raise UserError(f"{self.path} holds images of different sizes, which cannot be read as one array")
        rows = range(self.num_samples) if indices is None else indices
        if progress:
            from tqdm import tqdm

            rows = tqdm(rows, desc=self.path.name, unit=" images", disable=None)
        images = np.empty((len(rows), self.card.height, self.card.width, 3), np.uint8)
        for place, row in enumerate(rows):
            images[place] = self.image(int(row))
        return images


def _check_card(path: Path, card: Card, index: Index) -> None:
    """The card and the file must tell the same story: counts, classes, sizes, columns."""
    image, label = index.metadata["image"], index.metadata["label"]
    heights, widths = (
        (image["height"].min(), image["height"].max()),
        (image["width"].min(), image["width"].max()),
    )
    constant = heights[0] == heights[1] and widths[0] == widths[1]
    told = {
        "num_samples": (card.num_samples, index.num_samples),
        "columns": (card.columns, tuple(name for name, _ in FIELDS)),
        "word_names": (card.word_names, word_names(card.draws)),
        "draws": (card.draws, index.num_words - len(NAMED_WORDS)),
        "max_height": (card.max_height, int(heights[1])),
        "max_width": (card.max_width, int(widths[1])),
        "height": (card.height, int(heights[1]) if constant else 0),
        "width": (card.width, int(widths[1]) if constant else 0),
    }
    for key, (said, found) in told.items():
        if said != found:
            raise UserError(f"{card_path(path)}: '{key}' is {said!r}, but {path} has {found!r}")
    if label.min() < 0 or label.max() >= len(card.classes):
        raise UserError(
            f"{path} has label {label.max() if label.min() >= 0 else label.min()}, but its card names "
            f"{len(card.classes)} classes"
        )
    if not np.array_equal(index.metadata["index"], np.arange(index.num_samples)):
        raise UserError(f"{path}: the column 'index' is not the row number 0 to {index.num_samples - 1}")
