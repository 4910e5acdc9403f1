"""Read a whole set once and say what is damaged: which samples, or what else of the files."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlp.data.beton import Beton
from rlp.data.card import pixel_sums
from rlp.data.format import RAW, WORD_BYTES, sample_crc32
from rlp.data.open_file import OpenFile, decode_jpeg
from rlp.data.shards import check_shard_cards
from rlp.errors import UserError
from rlp.labels import baked_words

_WINDOW = 16 << 20  # bytes in memory at once; a multiple of the pages, so that few samples lie across its ends
_COUNTED = 1 << 20  # bytes of pixels counted at once
_SHOWN = 20  # damaged samples in the text


@dataclass
class Report:
    """What :func:`verify` found.

    Attributes:
        path: the set.
        num_samples: samples that were read, 0 when the set cannot be opened.
        size: bytes that were read.
        damaged: id and what is wrong, for every damaged sample, by id.
        findings: what is wrong with a file or the card as a whole, a sentence each.
    """

    path: Path
    num_samples: int = 0
    size: int = 0
    damaged: list[tuple[int, str]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.damaged and not self.findings

    @property
    def text(self) -> str:
        """A line for each finding and damaged sample (the first of many)."""
        if self.ok:
            return f"{self.path}: {self.num_samples} samples, {self.size} bytes: all as they were written"
        lines = [*self.findings, *(f"{self.path}: sample {sample}: {what}" for sample, what in self.damaged[:_SHOWN])]
        if len(self.damaged) > _SHOWN:
            lines.append(f"{self.path}: {len(self.damaged) - _SHOWN} more damaged samples")
        return "\n".join(lines)


def verify(path: str | Path, progress: bool = False) -> Report:
    """Check every byte of a set against its card: checksums, hashes, words, JPEGs, mean and standard deviation.

    Reads the files once, some MB at a time, with as many threads as there are cores. Damage is reported, never raised.

    Args:
        path: as for :meth:`rlp.data.beton.Beton.open`.
        progress: show a bar on a terminal.
    """
    report = Report(Path(path))
    try:
        beton = Beton.open(path)
    except UserError as error:
        report.findings.append(str(error))
        return report
    report.num_samples, report.size = beton.num_samples, beton.card.size
    try:
        check_shard_cards(beton.path, beton.card)
    except UserError as error:
        report.findings.append(str(error))
    _verify_samples(beton, report, progress)
    try:
        beton.check_unchanged()
    except UserError as error:
        report.findings.append(str(error))
    return report


def _verify_samples(beton: Beton, report: Report, progress: bool) -> None:
    from tqdm import tqdm

    histogram = np.zeros((3, 256), np.int64)
    told = [shard["sha256"] for shard in beton.card.shards] or [beton.card.sha256]
    bar = tqdm(total=report.size, desc=beton.path.name, unit="B", unit_scale=True, disable=None if progress else True)
    threads = len(os.sched_getaffinity(0))
    with bar, ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        for number, (file, sha256) in enumerate(zip(beton.files, told, strict=True)):
            known = len(report.damaged)
            digest = hashlib.sha256()
            for window in _windows(beton, number, report):
                hashed = pool.submit(digest.update, window.content)
                parts = [rows for rows in np.array_split(window.rows, threads) if len(rows)]
                for damaged, counts in pool.map(lambda rows, w=window: _check_rows(beton, w, rows), parts):
                    report.damaged += damaged
                    histogram += counts
                hashed.result()
                bar.update(len(window.content))
            if digest.hexdigest() != sha256:
                where = "its samples" if len(report.damaged) > known else "what lies between its samples"
                report.findings.append(f"{file.path} is damaged in {where}: its contents differ from the card's sha256")
    report.damaged.sort()
    if report.ok and pixel_sums(histogram) != beton.card.pixels:
        report.findings.append(f"{report.path}: mean and std of its card are not those of the pixels")


class _Window(NamedTuple):
    """Consecutive bytes of a file, and the rows whose images begin there."""

    file: OpenFile
    offset: int
    content: bytes
    rows: np.ndarray

    def bytes_at(self, offset: int, size: int) -> bytes:
        """From memory where it is there whole, else from the file."""
        start = offset - self.offset
        if start >= 0 and start + size <= len(self.content):
            return self.content[start : start + size]
        return self.file.read(offset, size)


def _windows(beton: Beton, number: int, report: Report) -> Iterator[_Window]:
    """The file from its first byte to its last."""
    file = beton.files[number]
    rows = np.flatnonzero(beton.layout["file"] == number)
    rows = rows[np.argsort(beton.layout["image"][rows], kind="stable")]
    image = beton.layout["image"][rows]
    for offset in range(0, file.size, _WINDOW):
        first, last = np.searchsorted(image, (offset, offset + _WINDOW))
        try:
            content = file.read(offset, min(_WINDOW, file.size - offset))
        except UserError as error:
            report.findings.append(str(error))
            content = b""  # its samples are read one by one: some of them may be readable
        yield _Window(file, offset, content, rows[first:last])


def _check_rows(beton: Beton, window: _Window, rows: np.ndarray) -> tuple[list[tuple[int, str]], np.ndarray]:
    """What is wrong with samples, by id, and how often each value occurs in their pixels, int64 [3, 256]."""
    card = beton.card
    ids = card.first_sample + rows
    words = baked_words(card.words_seed, ids, card.draws, card.split).astype("<u4")
    damaged, counts = [], _Counts()
    for sample, place, expected in zip(ids.tolist(), beton.layout[rows], words, strict=True):
        shape = (int(place["height"]), int(place["width"]), 3)
        try:
            image = window.bytes_at(int(place["image"]), int(place["image_size"]))
            stored = window.bytes_at(int(place["words"]), WORD_BYTES * len(card.word_names))
            if stored != expected.tobytes():
                damaged.append((sample, f"its random words are not those of seed {card.words_seed}"))
            elif sample_crc32(image, stored) != place["crc32"]:
                damaged.append((sample, "its image is damaged: the crc32 differs"))
            elif place["mode"] == RAW:
                counts.add(image)
            else:
                counts.add(decode_jpeg(image, shape).tobytes())
        except ValueError as error:
            damaged.append((sample, f"its JPEG {error}"))
        except UserError as error:
            damaged.append((sample, str(error)))
    return damaged, counts.total()


class _Counts:
    """How often each value occurs per channel, counted a megabyte at a time."""

    def __init__(self) -> None:
        self._histogram = np.zeros((3, 256), np.int64)
        self._waiting = bytearray()

    def add(self, pixels: bytes) -> None:
        self._waiting += pixels
        if len(self._waiting) >= _COUNTED:
            self._count()

    def total(self) -> np.ndarray:
        self._count()
        return self._histogram

    def _count(self) -> None:
        pixels = np.frombuffer(bytes(self._waiting), np.uint8)
        for channel in range(3):
            self._histogram[channel] += np.bincount(pixels[channel::3], minlength=256)
        self._waiting.clear()
