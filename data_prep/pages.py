"""Lay encoded samples out in a .beton: pages, metadata, allocation table, header."""

from typing import BinaryIO
import zlib

import numpy as np

from data_prep.encode import Encoded
from rlp.data.format import (
    ALLOC,
    FIELDS,
    HEADER,
    LARGEST_PAGE,
    METADATA,
    PAGE_SIZE,
    VERSION,
    WORD_BYTES,
    align_up,
    field_descriptors,
    metadata_end,
)
from rlp.errors import UserError


class PageWriter:
    """Writes the bytes of one .beton into an open file; samples come in order, one page is held in memory.

    Within a page all images come first and then their words, so that a reader gets the words of many samples from
    one place, and still each sample lies on one page, as FFCV's page cache and page-wise order expect.

    Args:
        file: open for binary writing, unbuffered, empty.
        words: random words of all samples as stored, int32 [N, K + 3].
        page_size: bytes of a page, a power of two; grows when a sample needs it.
        first_sample: id of the first sample; above 0 in the later shards of a set.
    """

    def __init__(self, file: BinaryIO, words: np.ndarray, page_size: int = PAGE_SIZE, first_sample: int = 0) -> None:
        self._file = file
        self._first_sample = first_sample
        self._words = words.astype("<i4", copy=False)
        self._num_samples = len(words)
        self._page_size = page_size
        self._metadata = np.zeros(len(words), METADATA)
        self._allocations = np.zeros((len(words), 2), ALLOC)
        self._page = bytearray()
        self._first = self._next = 0  # samples on the page in memory: first, ..., next - 1
        self._page_start = align_up(metadata_end(len(words)), page_size)
        self._write_zeros(self._page_start)

    def add(self, image: Encoded, label: int) -> None:
        """Append one sample."""
        row, size = self._next, len(image.content)
        if self._bytes_with(size) > self._page_size:
            self._flush()
            self._grow(size)
        pointer = self._page_start + len(self._page)
        self._page += image.content
        record = (image.mode, image.width, image.height, pointer)
        # The words' place and their part of the crc32 follow when the page is closed.
        self._metadata[row] = (record, label, self._first_sample + row, 0, zlib.crc32(image.content))
        self._allocations[row, 0] = (row, pointer, size)
        self._next += 1

    def finish(self) -> None:
        """Write the last page, the allocation table, the header and the metadata."""
        if self._next != self._num_samples:
            raise ValueError(f"{self._next} samples were added; expected {self._num_samples}")
        self._flush()
        header = np.zeros(1, HEADER)
        header[0] = (VERSION, len(FIELDS), self._page_size, self._num_samples, self._page_start)
        self._write(self._allocations.tobytes())
        self._file.seek(0)
        self._write(header.tobytes() + field_descriptors(self._words.shape[1]).tobytes())
        self._write(self._metadata.tobytes())

    def _bytes_with(self, size: int) -> int:
        """Bytes of the page in memory were an image of ``size`` bytes added, words included."""
        rows = self._next - self._first + 1
        return _align_words(len(self._page) + size) + rows * self._words.shape[1] * WORD_BYTES

    def _flush(self) -> None:
        """Close the page: add its samples' words, fill up with zeros, write."""
        rows = np.arange(self._first, self._next)
        if not len(rows):
            return
        offset = _align_words(len(self._page))
        row_bytes = self._words.shape[1] * WORD_BYTES
        pointer = self._page_start + offset + (rows - self._first) * row_bytes
        self._metadata["words"][rows] = pointer
        self._allocations[rows, 1] = np.rec.fromarrays([rows, pointer, np.full(len(rows), row_bytes)], dtype=ALLOC)
        self._page += bytes(offset - len(self._page)) + self._words[rows].tobytes()
        crc32 = self._metadata["crc32"]
        for row in rows:
            crc32[row] = zlib.crc32(self._words[row].tobytes(), int(crc32[row]))
        self._page += bytes(self._page_size - len(self._page))
        self._write(self._page)
        self._page_start += self._page_size
        self._page = bytearray()
        self._first = self._next

    def _grow(self, size: int) -> None:
        """Double the page size until the sample fits. Old pages stay valid: what lies within a page lies within one
        of twice the size; new ones begin at a multiple of the new size."""
        needed = self._bytes_with(size)
        if needed > LARGEST_PAGE:
            raise UserError(f"sample {self._next} takes {size} bytes; the format holds {LARGEST_PAGE} per sample")
        while self._page_size < needed:
            self._page_size *= 2
        start = align_up(self._page_start, self._page_size)
        self._write_zeros(start - self._page_start)
        self._page_start = start

    def _write_zeros(self, count: int) -> None:
        while count > 0:
            self._write(bytes(min(count, PAGE_SIZE)))
            count -= PAGE_SIZE

    def _write(self, data: bytes | bytearray) -> None:
        """Write all of it: an unbuffered file may take a part, and says so only in what it returns."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]


def _align_words(offset: int) -> int:
    return -(-offset // WORD_BYTES) * WORD_BYTES
