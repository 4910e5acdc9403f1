"""The .beton file format (FFCV, version 2) in plain NumPy: its records, and a reader that checks before it believes.

A file is: header, field descriptors, one metadata record per sample, zeros up to a page boundary, pages of data,
allocation table. Numbers are little-endian. A page holds the bytes of whole samples; no allocation crosses a page.
The layout is FFCV's (Leclerc et al., "FFCV: Accelerating Training by Removing Data Bottlenecks", CVPR 2023); the five
fields, in order, are ours: image, label, index (global sample id), words, crc32 (of the sample's stored bytes).
"""

from dataclasses import dataclass
import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO
import zlib

import numpy as np

from rlp.errors import UserError

VERSION = 2
PAGE_SIZE = 8 << 20
"""Bytes of a page, unless one sample needs more; always a power of two."""
LARGEST_PAGE = 1 << 31  # the largest power of two in the header's 32 bits

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table", "<u8"),
    ],
    align=True,
)
FIELD_DESC = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
ALLOC = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8")])
METADATA = np.dtype(
    [("image", IMAGE), ("label", "<i8"), ("index", "<i8"), ("words", "<u8"), ("crc32", "<i8")], align=True
)
ARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])

FIELDS = (("image", 2), ("label", 1), ("index", 1), ("words", 4), ("crc32", 1))
"""Names and FFCV type numbers: RGBImageField, IntField, IntField, NDArrayField (int32, one dimension), IntField."""
WORDS_FIELD = 3
JPG, RAW = 0, 1
"""Values of the image record's ``mode``."""
WORD_BYTES = 4
MOST_WORDS = 1 << 16
_MASK = 0xFFFFFFFF
DESCRIPTORS_END = HEADER.itemsize + len(FIELDS) * FIELD_DESC.itemsize


def field_descriptors(num_words: int) -> np.ndarray:
    """The five field descriptors of a file with ``num_words`` words per sample, FIELD_DESC [4]."""
    descriptors = np.zeros(len(FIELDS), FIELD_DESC)
    for descriptor, (name, type_id) in zip(descriptors, FIELDS, strict=True):
        descriptor["type_id"] = type_id
        descriptor["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    arguments = np.zeros(1, ARRAY_ARGUMENTS)
    type_text = json.dumps(np.dtype("<i4").descr).encode("ascii")
    arguments["shape"][0, 0] = num_words
    arguments["type_length"] = len(type_text)
    content = np.frombuffer(arguments.tobytes() + type_text, np.uint8)
    descriptors[WORDS_FIELD]["arguments"][: len(content)] = content
    return descriptors


def sample_crc32(image: bytes | memoryview, words: bytes | memoryview) -> int:
    """The ``crc32`` of a sample: CRC-32 of its stored image followed by its stored words, in [0, 2^32)."""
    return zlib.crc32(words, zlib.crc32(image))


def metadata_end(num_samples: int) -> int:
    """Offset of the first byte after the metadata."""
    return DESCRIPTORS_END + num_samples * METADATA.itemsize


def align_up(offset: int, page_size: int) -> int:
    """The first page boundary at or after ``offset``."""
    return -(-offset // page_size) * page_size


@dataclass(frozen=True)
class Index:
    """Everything in a .beton but the pages, checked: reading at these places stays inside the file.

    Attributes:
        metadata: METADATA [N].
        image_size: bytes of each sample's image, int64 [N].
        num_words: random words per sample.
        sha256: hash of header, descriptors, metadata and allocation table.
    """

    metadata: np.ndarray
    image_size: np.ndarray
    num_words: int
    page_size: int
    sha256: str

    @property
    def num_samples(self) -> int:
        return len(self.metadata)


def read_index(path: str | Path) -> Index:
    """Read and check everything but the pages.

    Raises:
        UserError: the file is missing, truncated, of another format, or points outside itself.
    """
    try:
        with open(path, "rb") as file:
            return read_open_index(file, path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def read_open_index(file: BinaryIO, path: str | Path) -> Index:
    """:func:`read_index` of a file opened for reading at its beginning; ``path`` is what errors call it."""
    size = os.fstat(file.fileno()).st_size
    if size < DESCRIPTORS_END:
        raise UserError(f"{path} is not a .beton file: it has {size} bytes, fewer than the header of one")
    head = file.read(DESCRIPTORS_END)
    header = np.frombuffer(head, HEADER, 1)[0]
    num_samples, page_size, table = (int(header[name]) for name in ("num_samples", "page_size", "alloc_table"))
    _check_header(header, path)
    num_words = _check_fields(np.frombuffer(head, FIELD_DESC, len(FIELDS), HEADER.itemsize), path)
    end = metadata_end(num_samples)
    if num_samples < 1 or table < end or table + 2 * num_samples * ALLOC.itemsize != size:
        raise UserError(
            f"{path} is damaged or was not written to its end: {num_samples} samples with the allocation table at "
            f"byte {table} do not make a file of {size} bytes"
        )
    records = file.read(end - DESCRIPTORS_END)
    file.seek(table)
    allocations = file.read(2 * num_samples * ALLOC.itemsize)
    digest = hashlib.sha256(head)
    for part in (records, allocations):
        digest.update(part)
    metadata = np.frombuffer(records, METADATA)
    image_size = _check_places(metadata, np.frombuffer(allocations, ALLOC), (end, table), page_size, num_words, path)
    return Index(metadata, image_size, num_words, page_size, digest.hexdigest())


def _check_header(header: np.void, path: str | Path) -> None:
    version, num_fields, page_size = (int(header[name]) for name in ("version", "num_fields", "page_size"))
    if version != VERSION or num_fields != len(FIELDS) or page_size < 1 or page_size & (page_size - 1):
        raise UserError(
            f"{path} is not a .beton of this project: version {version} with {num_fields} fields and pages of "
            f"{page_size} bytes; expected version {VERSION} with {len(FIELDS)} fields and a power of two"
        )


def _check_fields(descriptors: np.ndarray, path: str | Path) -> int:
    """Number of words per sample, once the fields are the expected ones."""
    shape = descriptors[WORDS_FIELD]["arguments"][: ARRAY_ARGUMENTS.itemsize].copy().view(ARRAY_ARGUMENTS)[0]["shape"]
    num_words = int(shape[0])
    if 1 <= num_words <= MOST_WORDS and descriptors.tobytes() == field_descriptors(num_words).tobytes():
        return num_words
    found = [bytes(d["name"]).rstrip(b"\0").decode("ascii", "replace") for d in descriptors]
    expected = ", ".join(name for name, _ in FIELDS)
    raise UserError(f"{path} has other fields ({', '.join(found)}) than {expected} (int32 words) in FFCV's types")


def _check_places(
    metadata: np.ndarray,
    table: np.ndarray,
    region: tuple[int, int],
    page_size: int,
    num_words: int,
    path: str | Path,
) -> np.ndarray:
    """Bytes of every image, once every allocation is inside the data region and belongs to its sample."""
    table = table[np.argsort(table["ptr"], kind="stable")]
    pointer, length = table["ptr"], table["size"]
    begin, end = np.uint64(region[0]), np.uint64(region[1])
    inside = (pointer >= begin) & (pointer <= end) & (length >= 1)
    inside &= length <= np.where(inside, end - pointer, 0)  # no sum before this line, so none can wrap around
    if not inside.all():
        _damaged(path, table[~inside][0]["sample_id"], "lies outside the data")
    if (pointer[1:] < pointer[:-1] + length[:-1]).any():
        raise UserError(f"{path} is damaged: allocations overlap")
    crossing = pointer // np.uint64(page_size) != (pointer + length - np.uint64(1)) // np.uint64(page_size)
    if crossing.any():
        _damaged(path, table[crossing][0]["sample_id"], "crosses a page")
    image_size = _allocated(table, metadata["image"]["ptr"], path)
    wrong_words = _allocated(table, metadata["words"], path) != WORD_BYTES * num_words
    image = metadata["image"]
    pixels = 3 * image["height"].astype(np.int64) * image["width"]
    wrong_image = (image["mode"] > RAW) | (pixels == 0) | ((image["mode"] == RAW) & (pixels != image_size))
    wrong = np.flatnonzero(wrong_words | wrong_image)
    if len(wrong):
        _damaged(path, wrong[0], "has a size that does not fit its bytes")
    wrong = np.flatnonzero((metadata["crc32"] < 0) | (metadata["crc32"] > _MASK))
    if len(wrong):
        _damaged(path, wrong[0], "has a crc32 of more than 32 bits")
    return image_size


def _allocated(table: np.ndarray, pointer: np.ndarray, path: str | Path) -> np.ndarray:
    """Bytes allocated at each sample's pointer, int64 [N]; the table is sorted by pointer."""
    place = np.minimum(np.searchsorted(table["ptr"], pointer), len(table) - 1)
    found = table[place]
    stray = np.flatnonzero((found["ptr"] != pointer) | (found["sample_id"] != np.arange(len(pointer), dtype=np.uint64)))
    if len(stray):
        _damaged(path, stray[0], "points to bytes that are not its own")
    return found["size"].astype(np.int64)


def _damaged(path: str | Path, sample: int | np.integer, what: str) -> None:
    raise UserError(f"{path} is damaged: sample {int(sample)} {what}")
