"""Write a pair of .betons with their cards: whole or not at all, the same bytes for any number of workers.

FFCV's own writer waits for ever when one of its workers raises or dies or the disk is full, and orders the samples by
the workers' timing. Here workers only encode; this process alone writes, in order.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
import errno
import hashlib
import os
from pathlib import Path
import platform
import shutil
from typing import Any

import numpy as np
import PIL
from tqdm import tqdm

from data_prep.encode import ImageOptions
from data_prep.pages import PageWriter
from data_prep.partial import PartialPair, partial_path
from data_prep.samples import Samples
from data_prep.workers import Encoder
import rlp
from rlp.data.beton import file_sha256, word_names
from rlp.data.card import Card, fingerprint_text, pixel_sums
from rlp.data.format import FIELDS, PAGE_SIZE, WORD_BYTES, align_up, metadata_end, read_index
from rlp.errors import UserError
from rlp.labels import baked_words


@dataclass(frozen=True)
class Split:
    """One .beton to write.

    Attributes:
        name: ``train`` or ``val``; the stream of its random words.
        path: the .beton.
        samples: its images, in order.
        first_sample: id of the first of them; above 0 in the later shards of a split.
    """

    name: str
    path: Path
    samples: Samples
    first_sample: int = 0


@dataclass(frozen=True)
class Contents:
    """What the splits of one write have in common.

    Attributes:
        classes: names, in the order of the labels.
        image: how images are stored.
        draws: columns of random words.
        words_seed: their seed.
        source: ``kind``, ``name`` and ``listing`` for the cards.
        request: the configuration, for the cards.
    """

    classes: tuple[str, ...]
    image: ImageOptions
    draws: int
    words_seed: int
    source: dict[str, str]
    request: dict[str, Any]


def write_splits(splits: list[Split], contents: Contents, encoder: Encoder, progress: bool = False) -> list[Card]:
    """Write every split and its card; nothing takes its name before all are whole. Returns the cards.

    Args:
        splits: each to a path of its own.
        contents: what they share.
        encoder: encodes the images; it may serve several writes.
        progress: show a bar per split on a terminal.

    Raises:
        UserError: an image is unreadable, a name is not text, a worker died, or the disk is full or not writable.
    """
    _check_names(contents)
    try:
        with PartialPair([split.path for split in splits]) as partial:
            _check_space(splits, contents)
            cards = [_write_split(split, contents, partial, encoder, progress) for split in splits]
            partial.commit([card.to_json() for card in cards])
    except OSError as error:
        raise _explained(error, splits) from error
    return cards


def _write_split(split: Split, contents: Contents, partial: PartialPair, encoder: Encoder, progress: bool) -> Card:
    ids = split.first_sample + np.arange(len(split.samples))
    words = baked_words(contents.words_seed, ids, contents.draws, split.name).astype(np.uint32).view(np.int32)
    histogram = np.zeros((3, 256), np.int64)
    fingerprint = 0
    with tqdm(total=len(ids), desc=split.path.stem, unit=" images", disable=None if progress else True) as bar:
        writer = PageWriter(partial.file(split.path), words, first_sample=split.first_sample)
        sample_id = split.first_sample
        for samples, chunk in encoder.chunks(split.samples, contents.image):
            for sample, image, digest in zip(samples, chunk.images, chunk.digests, strict=True):
                writer.add(image, sample.label)
                fingerprint += sample_fingerprint(sample_id, digest)
                sample_id += 1
            histogram += chunk.histogram
            bar.update(len(samples))
        writer.finish()
    return _card(split, contents, partial_path(split.path), histogram, fingerprint)


def sample_fingerprint(sample_id: int, digest: bytes) -> int:
    """What one sample adds to the fingerprint of its set: SHA-256 of its id and its digest, as a number."""
    return int.from_bytes(hashlib.sha256(sample_id.to_bytes(8, "little") + digest).digest(), "big")


def _card(split: Split, contents: Contents, path: Path, histogram: np.ndarray, fingerprint: int) -> Card:
    """The card of what was written to ``path``, which is read back: what the card promises is what is there."""
    index = read_index(path)
    heights, widths = index.metadata["image"]["height"], index.metadata["image"]["width"]
    constant = heights.min() == heights.max() and widths.min() == widths.max()
    return Card(
        split=split.name,
        num_samples=len(split.samples),
        first_sample=split.first_sample,
        classes=contents.classes,
        image_mode=contents.image.mode,
        height=int(heights[0]) if constant else 0,
        width=int(widths[0]) if constant else 0,
        max_height=int(heights.max()),
        max_width=int(widths.max()),
        pixels=pixel_sums(histogram),
        columns=tuple(name for name, _ in FIELDS),
        draws=contents.draws,
        word_names=word_names(contents.draws),
        words_seed=contents.words_seed,
        source={**contents.source, "fingerprint": fingerprint_text(fingerprint)},
        size=path.stat().st_size,
        sha256=file_sha256(path),
        sha256_index=index.sha256,
        written_by=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        request=contents.request,
    )


def _versions() -> dict[str, str]:
    return {
        "random-label-heads": rlp.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def _check_names(contents: Contents) -> None:
    """Linux allows any bytes in the name of a folder; a card is UTF-8."""
    for name in (*contents.classes, *contents.source.values()):
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"the name {name!a} cannot stand in a card; expected text in UTF-8") from None


def _check_space(splits: list[Split], contents: Contents) -> None:
    """Stop before the work when the size is known beforehand and the disk is too small for it."""
    needed: dict[Path, int] = {}
    for split in splits:
        needed[split.path.parent] = needed.get(split.path.parent, 0) + (_raw_bytes(split, contents) or 0)
    for folder, size in needed.items():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise UserError(f"{folder} has {free / 1e9:.2f} GB free; the .betons to write there take {size / 1e9:.2f}")


def _raw_bytes(split: Split, contents: Contents) -> int | None:
    """Bytes of the .beton when every image is raw and of one known size, else None."""
    options, pixels = contents.image, split.samples.contents
    if options.size:
        height = width = options.size
    elif isinstance(pixels, np.ndarray) and not options.max_side:
        height, width = pixels.shape[1:3]
    else:
        return None
    if options.mode != "raw":
        return None
    sample = 3 * height * width + WORD_BYTES * (contents.draws + 3)
    return len(split.samples) * sample + align_up(metadata_end(len(split.samples)), PAGE_SIZE)


def _explained(error: OSError, splits: list[Split]) -> UserError:
    where = " and ".join(str(split.path) for split in splits)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"the disk is full: {where} could not be written; no part of them was left")
    return UserError(f"{where} could not be written: {error.strerror or error}" + _named(error))


def _named(error: OSError) -> str:
    return f" ({os.fspath(error.filename)})" if error.filename else ""
