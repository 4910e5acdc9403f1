"""Small .beton files for tests, written sample by sample without the worker processes of the real writer."""

from datetime import UTC, datetime
import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.encode import Encoded
from data_prep.pages import PageWriter
from rlp.data.beton import Card, file_sha256, word_names
from rlp.data.format import FIELDS, JPG, RAW, read_index
from rlp.labels import baked_words

SEED = 5


def random_images(count: int, height: int, width: int, seed: int = 0) -> list[np.ndarray]:
    """Noise, uint8 [height, width, 3] each: no two samples and no two pixels are alike."""
    return list(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def write_set(
    path: Path, images: list[np.ndarray], classes: int = 4, draws: int = 3, split: str = "train", jpeg: bool = False
) -> Path:
    """Write images with labels 0, 1, ..., classes - 1, 0, ... and the words of seed 5; returns ``path``."""
    words = baked_words(SEED, np.arange(len(images)), draws, split)
    with open(path, "wb", buffering=0) as file:
        writer = PageWriter(file, words.astype(np.uint32).view(np.int32), page_size=1 << 20)
        for row, image in enumerate(images):
            height, width = image.shape[:2]
            content = _to_jpeg(image) if jpeg else image.tobytes()
            writer.add(Encoded(JPG if jpeg else RAW, height, width, content), row % classes)
        writer.finish()
    write_card(path, images, classes, draws, split, jpeg)
    return path


def write_card(path: Path, images: list[np.ndarray], classes: int, draws: int, split: str, jpeg: bool) -> None:
    """The card of :func:`write_set`; call it again after changing the file on purpose."""
    heights, widths = {image.shape[0] for image in images}, {image.shape[1] for image in images}
    constant = len(heights) == len(widths) == 1
    Card(
        split=split,
        num_samples=len(images),
        classes=tuple(f"class{c}" for c in range(classes)),
        image_mode="jpg" if jpeg else "raw",
        height=max(heights) if constant else 0,
        width=max(widths) if constant else 0,
        max_height=max(heights),
        max_width=max(widths),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        columns=tuple(name for name, _ in FIELDS),
        draws=draws,
        word_names=word_names(draws),
        words_seed=SEED,
        source={"kind": "test", "name": "test", "fingerprint": "", "listing": ""},
        size=path.stat().st_size,
        sha256=file_sha256(path),
        sha256_index=read_index(path).sha256,
        written_by={},
        created=datetime.now(UTC).isoformat(),
        request={},
    ).write(path)


def _to_jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
