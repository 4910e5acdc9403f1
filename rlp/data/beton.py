"""A .beton (or the shards of one) with its card, read with NumPy alone: what a loader reads, and what is read without.

Opening checks everything that later reading relies on, so a damaged file is one sentence and never a crash.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
import math
import os
from pathlib import Path

import numpy as np

from rlp.data.card import Card, card_path
from rlp.data.format import FIELDS, RAW, WORD_BYTES, Index, sample_crc32
from rlp.data.open_file import OpenFile, decode_jpeg, file_sha256, open_file
from rlp.errors import UserError
from rlp.labels import NAMED_WORDS

__all__ = ["LAYOUT", "Beton", "Card", "card_path", "file_sha256", "word_names"]

LAYOUT = np.dtype(
    [
        ("file", "<i4"),
        ("mode", "u1"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("image", "<i8"),
        ("image_size", "<i8"),
        ("words", "<i8"),
        ("crc32", "<u4"),
    ],
    align=True,
)
"""Where a sample lies: number of its file, image mode (RAW or JPG), pixels, byte offsets and size, checksum."""

_GATHER_BYTES = 32 << 20  # copied at once, between two steps of the progress bar
_DECODE_ROWS = 1024  # images handed to the decoding threads at once


def word_names(draws: int) -> tuple[str, ...]:
    """Names of the word columns: ``draw0`` ... ``draw{K-1}``, then :data:`rlp.labels.NAMED_WORDS`."""
    return (*(f"draw{k}" for k in range(draws)), *NAMED_WORDS)


class Beton:
    """An open set: columns as arrays, images one by one or all at once. Made by :meth:`open`.

    A set is one .beton, or several shards that hold consecutive samples. Rows are counted over all of them, and row
    r is the sample with id ``card.first_sample + r``; ids are rows unless one shard of a set is opened alone.

    Attributes:
        path: the .beton; of shards: the name that their merged card goes by.
        card: its card.
        files: the open files, in the order of the samples.
        layout: where every sample lies, :data:`LAYOUT` [N].
        label: true class of every sample, int64 [N] in [0, number of classes).
    """

    def __init__(self, path: Path, card: Card, opened: list[tuple[OpenFile, Index]]) -> None:
        self.path = path
        self.card = card
        self._hashed = False
        self.files = [file for file, _ in opened]
        # The layout says all that the indices do, in half the memory: they are not kept.
        indices = [index for _, index in opened]
        self.layout = _layout(indices)
        self.label = np.concatenate([index.metadata["label"] for index in indices])
        _check_card(path, card, indices, self.layout, self.label)

    @classmethod
    def open(cls, path: str | Path, full_hash: bool = False) -> "Beton":
        """Open a .beton and hold it to its card.

        Args:
            path: the .beton; its card lies beside it. A sharded set is opened by the name ``NAME.beton`` of its
                merged card ``NAME.json``, though there is no such file.
            full_hash: read everything and compare hashes too, which finds damage inside images.

        Raises:
            UserError: no file or card, or the file is damaged, half-written, or not the one the card describes.
        """
        path = Path(path)
        if not path.is_file() and not card_path(path).is_file():
            raise UserError(f"{path} does not exist; write it with write_datasets.py")
        card = Card.read(path)
        if card.shards and path.exists():
            raise UserError(f"{path} is in the way of the shards that {card_path(path)} describes; remove one of both")
        told = [(path.parent / s["name"], s["size"], s["sha256_index"]) for s in card.shards]
        told = told or [(path, card.size, card.sha256_index)]
        opened = [open_file(*each, card=card_path(path)) for each in told]
        beton = cls(path, card, opened)
        if full_hash:
            beton.check_hashes()
        return beton

    @property
    def num_samples(self) -> int:
        """Samples in the set, N."""
        return len(self.layout)

    @property
    def maps(self) -> list[np.memmap]:
        """The bytes of every file, read-only uint8 memory maps; :attr:`layout` says what lies where."""
        return [file.data for file in self.files]

    @cached_property
    def index(self) -> np.ndarray:
        """Id of every sample, int64 [N]: ``card.first_sample`` + row."""
        return self.card.first_sample + np.arange(self.num_samples)

    @cached_property
    def words(self) -> np.ndarray:
        """All random words, int64 [N, K + 3] in [0, 2^32): draws first, then the named words."""
        return self.stored_words(np.arange(self.num_samples)).astype(np.int64)

    def stored_words(self, rows: np.ndarray) -> np.ndarray:
        """The random words of the given rows (int64 [n]) as stored, uint32 [n, K + 3]."""
        words = np.empty((len(rows), len(self.card.word_names)), "<u4")
        self._gather(rows, "words", words.view(np.uint8), lambda count: None)
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
        """Image of row ``i``, uint8 [H, W, 3]; JPEGs are decoded by Pillow.

        Raises:
            IndexError: ``i`` is not in [0, N).
            UserError: the stored JPEG is damaged, or the file was truncated.
        """
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of {self.path}: expected 0 to {self.num_samples - 1}")
        place = self.layout[i]
        content = self.files[place["file"]].read(int(place["image"]), int(place["image_size"]))
        shape = (int(place["height"]), int(place["width"]), 3)
        if place["mode"] == RAW:
            return np.frombuffer(bytearray(content), np.uint8).reshape(shape)
        try:
            return decode_jpeg(content, shape)
        except ValueError as error:
            sample = self.card.first_sample + i
            raise UserError(f"{self.path} is damaged: the JPEG of sample {sample} {error}") from None

    def images(self, indices: np.ndarray | None = None, progress: bool = False) -> np.ndarray:
        """Images of the given rows (all by default), uint8 [n, H, W, 3]; JPEGs are decoded by several threads.

        Raises:
            IndexError: a row is not in [0, N).
            UserError: the images are not all of one size, a stored JPEG is damaged, or the file was changed.
        """
        if not self.card.height:
            raise UserError(f"{self.path} holds images of different sizes, which cannot be read as one array")
        rows = np.arange(self.num_samples) if indices is None else np.asarray(indices, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_samples:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {self.path}: expected 0 to {self.num_samples - 1}")
        images = np.empty((len(rows), self.card.height, self.card.width, 3), np.uint8)
        read = self._gather_images if (self.layout["mode"][rows] == RAW).all() else self._decode
        if not progress:
            read(rows, images, lambda count: None)
            return images
        from tqdm import tqdm

        with tqdm(total=len(rows), desc=self.path.name, unit=" images", disable=None) as bar:
            read(rows, images, bar.update)
        return images

    def _gather_images(self, rows: np.ndarray, images: np.ndarray, advance: Callable[[int], object]) -> None:
        self._gather(rows, "image", images.reshape(len(rows), math.prod(images.shape[1:])), advance)

    def _gather(self, rows: np.ndarray, column: str, out: np.ndarray, advance: Callable[[int], object]) -> None:
        """Copy the bytes at ``layout[column]`` of ``rows`` into ``out``, uint8 [n, bytes of each].

        By system calls, one for each run of bytes: a map of a file that was truncated would kill the interpreter.
        """
        self.check_unchanged()
        size = out.shape[1]
        order = np.lexsort((self.layout[column][rows], self.layout["file"][rows]))
        place, number = self.layout[column][rows[order]], self.layout["file"][rows[order]]
        breaks = np.flatnonzero((np.diff(place) != size) | (np.diff(number) != 0)) + 1
        step = max(1, _GATHER_BYTES // size)
        for first, last in pairwise([0, *breaks.tolist(), len(rows)]):
            for start in range(first, last, step):
                stop = min(start + step, last)
                content = self.files[number[start]].read(int(place[start]), (stop - start) * size)
                out[order[start:stop]] = np.frombuffer(content, np.uint8).reshape(-1, size)
                advance(stop - start)

    def _decode(self, rows: np.ndarray, images: np.ndarray, advance: Callable[[int], object]) -> None:
        """Pillow decodes without Python's lock, so threads do."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="images") as pool:
            for start in range(0, len(rows), _DECODE_ROWS):
                for place, image in enumerate(pool.map(self.image, rows[start : start + _DECODE_ROWS].tolist()), start):
                    images[place] = image
                    advance(1)

    def check_unchanged(self) -> None:
        """Raise :class:`UserError` when a file was removed, replaced, truncated or rewritten since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def crc32(self, row: int) -> int:
        """Checksum of the stored bytes of a row as they are now; undamaged when it equals ``layout["crc32"]``."""
        place = self.layout[row]
        file = self.files[place["file"]]
        words = file.read(int(place["words"]), WORD_BYTES * len(self.card.word_names))
        return sample_crc32(file.read(int(place["image"]), int(place["image_size"])), words)

    def check_hashes(self) -> None:
        """Hash every file, once, and read the shards' own cards.

        Raises:
            UserError: a hash differs; the checksums tell which samples are damaged.
        """
        if self._hashed:
            return
        from rlp.data.shards import check_shard_cards  # which stands on this module

        check_shard_cards(self.path, self.card)
        told = [shard["sha256"] for shard in self.card.shards] or [self.card.sha256]
        for number, (file, sha256) in enumerate(zip(self.files, told, strict=True)):
            if file.sha256() == sha256:
                continue
            rows = np.flatnonzero(self.layout["file"] == number)
            damaged = [row for row in rows.tolist() if self.crc32(row) != self.layout["crc32"][row]]
            where = "outside of the samples"
            if damaged:
                where = f"at sample {self.card.first_sample + damaged[0]}"
                where += f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            raise UserError(f"{file.path} is damaged {where}: its contents differ from the card's sha256")
        self._hashed = True


def _layout(indices: list[Index]) -> np.ndarray:
    layout = np.empty(sum(index.num_samples for index in indices), LAYOUT)
    start = 0
    for number, index in enumerate(indices):
        part = layout[start : start + index.num_samples]
        image = index.metadata["image"]
        part["file"] = number
        for name in ("mode", "height", "width"):
            part[name] = image[name]
        part["image"], part["image_size"] = image["ptr"], index.image_size
        part["words"], part["crc32"] = index.metadata["words"], index.metadata["crc32"]
        start += index.num_samples
    layout.flags.writeable = False
    return layout


def _check_card(path: Path, card: Card, indices: list[Index], layout: np.ndarray, label: np.ndarray) -> None:
    """The card and the files must tell the same story: counts, classes, sizes, columns."""
    heights, widths = ((layout[name].min(), layout[name].max()) for name in ("height", "width"))
    constant = heights[0] == heights[1] and widths[0] == widths[1]
    told = {
        "num_samples": (card.num_samples, len(layout)),
        "columns": (card.columns, tuple(name for name, _ in FIELDS)),
        "draws": (card.draws, indices[0].num_words - len(NAMED_WORDS)),
        "max_height": (card.max_height, int(heights[1])),
        "max_width": (card.max_width, int(widths[1])),
        "height": (card.height, int(heights[1]) if constant else 0),
        "width": (card.width, int(widths[1]) if constant else 0),
    }
    for key, (said, found) in told.items():
        if said != found:
            raise UserError(f"{card_path(path)}: '{key}' is {said!r}, but {path} has {found!r}")
    if card.word_names != word_names(card.draws):
        raise UserError(f"{card_path(path)}: 'word_names' are not those of {card.draws} draws")
    if any(index.num_words != indices[0].num_words for index in indices):
        raise UserError(f"{card_path(path)}: the shards of {path} have different numbers of words")
    if label.min() < 0 or label.max() >= len(card.classes):
        raise UserError(
            f"{path} has label {label.max() if label.min() >= 0 else label.min()}, but its card names "
            f"{len(card.classes)} classes"
        )
    first = card.first_sample
    for index in indices:
        if not np.array_equal(index.metadata["index"], np.arange(first, first + index.num_samples)):
            raise UserError(f"{path}: the column 'index' is not the sample id, {first} and so on")
        first += index.num_samples
