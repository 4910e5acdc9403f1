"""What worker processes do: read, check, resize and encode images. Imports little, since every worker pays for it."""

from collections.abc import Callable
from dataclasses import dataclass
import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rlp.data.format import JPG, RAW
from rlp.errors import UserError

LARGEST_SIDE = 65535  # the format keeps sides in 16 bits
_CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr")


class ByteRange(NamedTuple):
    """An image file inside another file: ``size`` bytes from byte ``offset`` on."""

    path: Path
    offset: int
    size: int


Content = np.ndarray | bytes | Path | ByteRange
"""Pixels (uint8 [H, W] or [H, W, 3]), or an image file: its bytes, its path, or its place inside another file."""


class Sample(NamedTuple):
    """One image to write: its name, its class, and its content."""

    name: str
    label: int
    content: Content


@dataclass(frozen=True)
class ImageOptions:
    """How images are stored.

    Attributes:
        mode: raw (uint8 pixels), jpg, or smart (raw up to ``smart_threshold`` bytes of pixels, else jpg).
        size: resize every image to size x size pixels (0 = keep).
        max_side: shrink images whose longer side exceeds this many pixels (0 = keep).
        quality: of JPEGs that are encoded here, 1 to 100.
        smart_threshold: bytes.
        convert_rgb: turn grey, palette, CMYK and transparent images into RGB instead of stopping.
    """

    mode: str = "raw"
    size: int = 0
    max_side: int = 0
    quality: int = 90
    smart_threshold: int = 0
    convert_rgb: bool = False


class Encoded(NamedTuple):
    """One image as it is stored."""

    mode: int
    height: int
    width: int
    content: bytes


class Chunk(NamedTuple):
    """What a worker hands back for some samples in a row.

    Attributes:
        images: in order.
        histogram: how often each value occurs in the stored pixels, int64 [3 channels, 256]; counts are exact, so
            means do not depend on how samples were spread over workers.
        digests: SHA-256 over name, label and content of each sample.
    """

    images: list[Encoded]
    histogram: np.ndarray
    digests: list[bytes]


def _never() -> bool:
    return False


def encode_chunk(samples: list[Sample], options: ImageOptions, stopped: Callable[[], bool] = _never) -> Chunk:
    """Encode samples in order.

    Args:
        samples: in the order in which they are written.
        options: how they are stored.
        stopped: asked before each sample; when True the rest is left out, for nobody waits for it any more.

    Raises:
        UserError: an image cannot be read or is not RGB; the sentence names it.
    """
    histogram = np.zeros((3, 256), np.int64)
    images, digests = [], []
    for sample in samples:
        if stopped():
            break
        content = _read(sample)
        digests.append(_digest(sample, content))
        try:
            encoded, pixels = _encode(sample, content, options)
        except (MemoryError, OSError, ValueError) as error:
            raise UserError(f"{sample.name} cannot be encoded: {type(error).__name__} {error}") from error
        images.append(encoded)
        for channel in range(3):
            histogram[channel] += np.bincount(pixels[..., channel].ravel(), minlength=256)
    return Chunk(images, histogram, digests)


def _read(sample: Sample) -> np.ndarray | bytes:
    content = sample.content
    if isinstance(content, np.ndarray | bytes):
        return content
    path, offset, size = content if isinstance(content, ByteRange) else (content, 0, -1)
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            found = file.read(size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(found) < size:
        raise UserError(f"{sample.name} cannot be read: {path} ends before byte {offset + size}")
    return found


def _digest(sample: Sample, content: np.ndarray | bytes) -> bytes:
    """Each part is preceded by its length, so that no two different samples give the same text to hash."""
    name = sample.name.encode("utf-8", "surrogateescape")
    shape = repr(content.shape).encode() if isinstance(content, np.ndarray) else b"file"
    data = content.tobytes() if isinstance(content, np.ndarray) else content
    digest = hashlib.sha256()
    for part in (name, str(sample.label).encode(), shape, data):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _encode(sample: Sample, content: np.ndarray | bytes, options: ImageOptions) -> tuple[Encoded, np.ndarray]:
    """The stored image and its pixels, uint8 [H, W, 3]."""
    where = sample.content if isinstance(sample.content, Path) else sample.name
    picture = _open(content, where)
    source_format, source_mode = picture.format, picture.mode
    picture = _to_rgb(picture, where, options.convert_rgb)
    resized = _resize(picture, options)
    if max(resized.size) > LARGEST_SIDE:
        raise UserError(f"{where} is {resized.width}x{resized.height} pixels; the format holds {LARGEST_SIDE} a side")
    pixels = np.asarray(resized)
    mode = _mode(options, pixels.nbytes)
    if mode == RAW:
        stored = pixels.tobytes()
    else:
        # A JPEG that stays as it is is stored as it is: encoding it again would only lose quality.
        untouched = resized is picture and (source_format, source_mode) == ("JPEG", "RGB")
        stored = content if isinstance(content, bytes) and untouched else _to_jpeg(resized, options.quality)
        pixels = np.asarray(Image.open(io.BytesIO(stored)))
    return Encoded(mode, resized.height, resized.width, stored), pixels


def _open(content: np.ndarray | bytes, where: str | Path) -> Image.Image:
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except Exception as error:  # Pillow raises many kinds on broken files; each is an unreadable image to the user
        reason = "it is not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise UserError(f"{where} cannot be read as an image: {reason}") from None
    return picture


def _to_rgb(picture: Image.Image, where: str | Path, convert: bool) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if picture.mode not in _CONVERTIBLE:
        raise UserError(f"{where} has pixels of Pillow's mode '{picture.mode}'; expected 8-bit RGB")
    if not convert:
        kind = {"1": "black and white", "L": "grey", "LA": "grey", "P": "palette", "PA": "palette"}
        raise UserError(
            f"{where} is not RGB but {kind.get(picture.mode, picture.mode)}; --source.convert_rgb true converts"
        )
    return picture.convert("RGB")


def _resize(picture: Image.Image, options: ImageOptions) -> Image.Image:
    """Shrink by averaging over areas, enlarge by bicubic interpolation; the same object if nothing is to do."""
    width, height = picture.size
    if options.size:
        size = (options.size, options.size)
    elif options.max_side and max(width, height) > options.max_side:
        longest = max(width, height)
        size = (max(1, width * options.max_side // longest), max(1, height * options.max_side // longest))
    else:
        return picture
    if size == picture.size:
        return picture
    shrinks = size[0] <= width and size[1] <= height
    return picture.resize(size, Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)


def _mode(options: ImageOptions, num_bytes: int) -> int:
    if options.mode == "smart":
        return JPG if num_bytes > options.smart_threshold else RAW
    return JPG if options.mode == "jpg" else RAW


def _to_jpeg(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
