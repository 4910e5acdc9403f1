"""Small .beton files for tests, written sample by sample without the worker processes of the real writer."""

from datetime import UTC, datetime
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.encode import Encoded
from data_prep.pages import PageWriter
from rlp.data.beton import Card, card_path, file_sha256, word_names
from rlp.data.format import FIELDS, JPG, RAW, read_index
from rlp.data.shards import merge_cards, shard_bounds, shard_path
from rlp.labels import baked_words

SEED = 5


def random_images(count: int, height: int, width: int, seed: int = 0) -> list[np.ndarray]:
    """Noise, uint8 [height, width, 3] each: no two samples and no two pixels are alike."""
    return list(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def write_set(
    path: Path,
    images: list[np.ndarray],
    classes: int = 4,
    draws: int = 3,
    split: str = "train",
    jpeg: bool = False,
    page_size: int = 1 << 20,
    first_sample: int = 0,
) -> Path:
    """Write images with labels 0, 1, ..., classes - 1, 0, ... and the words of seed 5; returns ``path``."""
    ids = first_sample + np.arange(len(images))
    words = baked_words(SEED, ids, draws, split)
    with open(path, "wb", buffering=0) as file:
        writer = PageWriter(file, words.astype(np.uint32).view(np.int32), page_size, first_sample)
        for sample, image in zip(ids.tolist(), images, strict=True):
            height, width = image.shape[:2]
            content = _to_jpeg(image) if jpeg else image.tobytes()
            writer.add(Encoded(JPG if jpeg else RAW, height, width, content), sample % classes)
        writer.finish()
    write_card(path, images, classes, draws, split, jpeg, first_sample)
    return path


def write_shards(beton: Path, images: list[np.ndarray], count: int, merge: bool = True, **options: Any) -> Path:
    """:func:`write_set` in ``count`` shards, with their cards merged; returns ``beton``, which opens the set."""
    options = {"page_size": 4096, **options}
    for number in range(count):
        first, last = shard_bounds(number, count, len(images))
        write_set(shard_path(beton, number, count), images[first:last], first_sample=first, **options)
    if merge:
        merge_cards(beton)
    return beton


def write_card(
    path: Path, images: list[np.ndarray], classes: int, draws: int, split: str, jpeg: bool, first_sample: int = 0
) -> Card:
    """The card of :func:`write_set`; call it again after changing the file on purpose."""
    heights, widths = {image.shape[0] for image in images}, {image.shape[1] for image in images}
    constant = len(heights) == len(widths) == 1
    card = Card(
        split=split,
        num_samples=len(images),
        first_sample=first_sample,
        classes=tuple(f"class{c}" for c in range(classes)),
        image_mode="jpg" if jpeg else "raw",
        height=max(heights) if constant else 0,
        width=max(widths) if constant else 0,
        max_height=max(heights),
        max_width=max(widths),
        pixels=pixel_sums([np.asarray(Image.open(io.BytesIO(_to_jpeg(i)))) for i in images] if jpeg else images),
        columns=tuple(name for name, _ in FIELDS),
        draws=draws,
        word_names=word_names(draws),
        words_seed=SEED,
        source={"kind": "test", "name": "test", "fingerprint": f"{first_sample:064x}", "listing": ""},
        size=path.stat().st_size,
        sha256=file_sha256(path),
        sha256_index=read_index(path).sha256,
        written_by={},
        created=datetime.now(UTC).isoformat(),
        request={},
    )
    card.write(path)
    return card


def change_card(path: Path, **changes: Any) -> None:
    """Give keys of a .beton's card other values of any type, and a hash that fits the text."""
    content = {**json.loads(card_path(path).read_text("utf-8")), **changes}
    text = json.dumps({k: v for k, v in content.items() if k != "sha256_card"}, indent=2, ensure_ascii=False) + "\n"
    if "sha256_card" not in changes:
        content["sha256_card"] = hashlib.sha256(text.encode()).hexdigest()
    card_path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def pixel_sums(images: list[np.ndarray]) -> dict[str, Any]:
    """The card's ``pixels`` of some images."""
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]).astype(np.int64)
    return {"count": len(pixels), "sum": pixels.sum(0).tolist(), "square_sum": (pixels**2).sum(0).tolist()}


def _to_jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
