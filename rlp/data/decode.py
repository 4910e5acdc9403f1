"""The compiled decoder: rows of a .beton in, cropped, resized, mirrored and shifted images out.

Needs numba; decoding JPEGs and ``area`` resizing also need :func:`rlp.data.native.register`. The random words equal
those of :mod:`rlp.philox` to the bit, so that an image is a function of (seed, epoch, sample id), never of the worker
that made it. Files are read with ``pread`` into memory of ours: a file that is cut short meanwhile is a short read,
where a mapping would end the process.

All compiled code, and every constant that enters it, is in this one file: numba keeps the result until the file
changes, and notices no change elsewhere. A test holds the constants to those of other modules.
"""

import math
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic
import numpy as np

from rlp.data.compiled import compiled
from rlp.data.geometry import Geometry

Int = int | np.integer

JPG = 0
CROP_STREAM = 0xEDC23D9B  # rlp.philox.stream_id("crop")
MOVE_STREAM = 0x453F0832  # rlp.philox.stream_id(rlp.data.geometry.MOVES)
PREFIX = "rlp_native_"
ATTEMPTS = 10
ASPECTS = (3.0 / 4.0, 4.0 / 3.0)
"""Width over height of a random crop, uniform in the logarithm (Szegedy et al., arXiv 1409.4842)."""

GOOD, SUSPECT, DAMAGED, GONE = 0, 1, 2, 3
"""What becomes of an image: decoded; decoded with a warning; not decodable; cut off by the end of the file."""

_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_BITS = 22  # of a weight's fraction in `resample`, as in Pillow

_c_int, _pointer, _size = types.int32, types.int64, types.uint64
_read_at = types.ExternalFunction("pread", signature(_pointer, _c_int, _pointer, _size, _pointer))
_copy_bytes = types.ExternalFunction("memcpy", signature(_pointer, _pointer, _pointer, _size))
_jpeg_header = types.ExternalFunction(
    PREFIX + "tjDecompressHeader3",
    signature(_c_int, _pointer, _pointer, _size, _pointer, _pointer, _pointer, _pointer),
)
_jpeg_pixels = types.ExternalFunction(
    PREFIX + "tjDecompress2",
    signature(_c_int, _pointer, _pointer, _size, _pointer, _c_int, _c_int, _c_int, _c_int, _c_int),
)
_jpeg_error = types.ExternalFunction(PREFIX + "tjGetErrorCode", signature(_c_int, _pointer))
_resize_area = types.ExternalFunction(PREFIX + "resize", signature(types.void, *[types.int64] * 11))


class Plan(NamedTuple):
    """What :func:`decode_images` does: :class:`rlp.data.geometry.Geometry` in numbers that numba knows.

    ``size`` is 0 for whole images; ``random`` chooses random crops and moves, else the middle; ``area`` the resizing.
    """

    random: bool
    size: int
    area: bool
    smallest: float
    largest: float
    ratio: float
    flip: bool
    padding: int
    seed: np.uint64
    epoch: int


def plan_of(geometry: Geometry, train: bool, seed: int, epoch: int) -> Plan:
    """The numbers of ``geometry`` for compiled code."""
    low, high = geometry.crop_scale
    return Plan(  # every number in one type: another would compile everything once more
        random=bool(train),
        size=int(geometry.image_size),
        area=geometry.interpolation == "area",
        smallest=float(low),
        largest=float(high),
        ratio=float(geometry.center_ratio),
        flip=bool(geometry.flip),
        padding=int(geometry.crop_padding),
        seed=np.uint64(seed),
        epoch=int(epoch),
    )


@compiled
def philox(c0: Int, c1: Int, c2: Int, c3: Int, seed: Int) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """One block of four random words (values in [0, 2^32)) from a counter of four words and a 64-bit seed."""
    a, b, c, d = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(c3)
    k0, k1 = np.uint64(seed) & _MASK, np.uint64(seed) >> _HALF
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = (product1 >> _HALF) ^ b ^ k0, product1 & _MASK, (product0 >> _HALF) ^ d ^ k1, product0 & _MASK
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _MASK, (k1 + np.uint64(0xBB67AE85)) & _MASK
    return a, b, c, d


@compiled
def _uniform(word: np.uint64) -> float:
    return (np.float64(word) + 0.5) / 4294967296.0


@compiled
def _below(word: np.uint64, count: Int) -> Int:
    return np.int64((np.uint64(word) * np.uint64(count)) >> _HALF)


@compiled
def random_crop(
    height: int, width: int, smallest: float, largest: float, seed: Int, epoch: int, sample: int
) -> tuple[Int, Int, int, int]:
    """Random resized crop as (top, left, height, width) in pixels, from the words of (seed, epoch, sample).

    Up to ten attempts with one block of words each: area a uniform share from ``smallest`` to ``largest`` of the
    image, aspect log-uniform in :data:`ASPECTS`, place uniform. When none fits, the largest crop in the middle whose
    aspect is allowed.
    """
    low, high = math.log(ASPECTS[0]), math.log(ASPECTS[1])
    for attempt in range(ATTEMPTS):
        size_word, aspect_word, top_word, left_word = philox(sample, epoch, attempt, CROP_STREAM, seed)
        area = height * width * (smallest + (largest - smallest) * _uniform(size_word))
        aspect = math.exp(low + (high - low) * _uniform(aspect_word))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = _below(top_word, height - crop_height + 1)
            return top, _below(left_word, width - crop_width + 1), crop_height, crop_width
    crop_width = max(1, min(width, round(height * ASPECTS[1])))
    crop_height = max(1, min(height, round(width / ASPECTS[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


@compiled
def center_crop(height: int, width: int, ratio: float) -> tuple[int, int, int, int]:
    """The square in the middle whose side is ``ratio`` of the shorter side, as (top, left, height, width)."""
    side = max(1, int(ratio * min(height, width)))
    return (height - side) // 2, (width - side) // 2, side, side


@compiled
def _triangle_taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First pixel, number of pixels and integer weights for every output pixel of Pillow's bilinear filter."""
    scale = source / target
    half = max(scale, 1.0)  # antialiasing: the triangle is as wide as the output pixel
    inverse = 1.0 / half
    first, count = np.empty(target, np.int32), np.empty(target, np.int32)
    weight = np.zeros((target, math.ceil(half) * 2 + 1), np.int32)
    exact = np.empty(weight.shape[1], np.float64)
    for place in range(target):
        center = (place + 0.5) * scale
        low = max(0, int(center - half + 0.5))
        high = min(source, int(center + half + 0.5))
        total = 0.0
        for k in range(high - low):
            exact[k] = max(0.0, 1.0 - abs((k + low - center + 0.5) * inverse))
            total += exact[k]
        for k in range(high - low):
            weight[place, k] = int(0.5 + exact[k] / total * (1 << _BITS))
        first[place], count[place] = low, high - low
    return first, count, weight


@compiled
def resample(source: np.ndarray, top: Int, left: Int, tall: Int, wide: Int, target: np.ndarray) -> None:
    """Pillow's antialiased bilinear resizing of the crop of ``source`` to ``target``, both uint8 [H, W, 3].

    Rows first, rounded to 8 bits, then columns: to the bit what Pillow gives for one direction after the other. (Pillow
    itself does so up to version 12; version 13 begins with the columns of tall images, which moves values by one.)
    """
    height, width = target.shape[:2]
    narrow = np.empty((tall, width * 3), np.uint8)
    half = np.int32(1 << (_BITS - 1))
    first, count, weight = _triangle_taps(wide, width)
    for y in range(tall):
        row, out = source[top + y], narrow[y]
        for x in range(width):
            red, green, blue = half, half, half
            for k in range(count[x]):
                pixel, scale = row[left + first[x] + k], weight[x, k]
                red += scale * np.int32(pixel[0])
                green += scale * np.int32(pixel[1])
                blue += scale * np.int32(pixel[2])
            out[3 * x], out[3 * x + 1], out[3 * x + 2] = red >> _BITS, green >> _BITS, blue >> _BITS
    first, count, weight = _triangle_taps(tall, height)
    total = np.empty(width * 3, np.int32)
    for y in range(height):
        total[:] = half
        for k in range(count[y]):
            scale, row = weight[y, k], narrow[first[y] + k]
            for j in range(width * 3):
                total[j] += scale * np.int32(row[j])
        out = target[y].reshape(width * 3)
        for j in range(width * 3):
            out[j] = total[j] >> _BITS


@compiled
def _resize(source: np.ndarray, top: Int, left: Int, tall: Int, wide: Int, target: np.ndarray, area: bool) -> None:
    if area:
        height, width = source.shape[:2]
        size = target.shape[0]
        bottom, right = top + tall, left + wide
        begin, end = source.ctypes.data, target.ctypes.data
        _resize_area(0, begin, height, width, top, bottom, left, right, end, size, size)
    else:
        resample(source, top, left, tall, wide, target)


@compiled
def _read(file: int, target: np.ndarray, offset: Int) -> bool:
    """Fill ``target`` from ``offset`` of the file; False where it ends before or cannot be read."""
    done = 0
    while done < target.size:
        count = _read_at(file, target.ctypes.data + done, target.size - done, offset + done)
        if count <= 0:
            return False
        done += count
    return True


@compiled
def _jpeg(decoder: int, content: np.ndarray, pixels: np.ndarray) -> int:
    """Decode ``content`` into ``pixels`` uint8 [H, W, 3], whose size the JPEG must have; returns its state.

    After another state than :data:`GOOD` the decoder is not to be used again.
    """
    height, width = pixels.shape[:2]
    found = np.full(4, -1, np.int32)  # width, height, subsampling, colour space
    at, state = found.ctypes.data, GOOD
    if _jpeg_header(decoder, content.ctypes.data, content.size, at, at + 4, at + 8, at + 12) != 0:
        state = SUSPECT if _jpeg_error(decoder) == 0 else DAMAGED
    colour = found[3] == 0 or found[3] == 1  # RGB or YCbCr, as the writer lets pass
    if state == DAMAGED or found[0] != width or found[1] != height or not colour:
        return DAMAGED
    if _jpeg_pixels(decoder, content.ctypes.data, content.size, pixels.ctypes.data, width, 0, height, 0, 0) != 0:
        state = SUSPECT if _jpeg_error(decoder) == 0 else DAMAGED
    return state


@compiled
def _choices(plan: Plan, sample: Int) -> tuple[bool, int, int]:
    """Mirrored?, and the shift down and right that padding and cropping make."""
    flip, shift_y, shift_x, _ = philox(sample, plan.epoch, 0, MOVE_STREAM, plan.seed)
    offsets = 2 * plan.padding + 1
    down, right = plan.padding - _below(shift_y, offsets), plan.padding - _below(shift_x, offsets)
    return plan.flip and _below(flip, 2) == 1, down, right


def _reverser(pixels: int) -> Any:
    """An operation (target address, source address) that copies so many pixels, the last one first.

    They go through one shuffle of a vector; numba has no vectors, so this is LLVM's own language.
    """
    vector = ir.VectorType(ir.IntType(8), 3 * pixels)
    order = [3 * (pixels - 1 - pixel) + channel for pixel in range(pixels) for channel in range(3)]
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order)

    def generate(_context: Any, builder: Any, _signature: Any, addresses: Any) -> Any:
        target, source = (builder.inttoptr(address, vector.as_pointer()) for address in addresses)
        pixels_in = builder.load(source, align=1)
        builder.store(builder.shuffle_vector(pixels_in, pixels_in, mask), target, align=1)
        return ir.Constant(ir.IntType(32), 0)

    def reverse(_context: Any, target: Any, source: Any) -> Any:
        return types.int32(types.int64, types.int64), generate

    return intrinsic(reverse)


_reverse_one, _reverse_eight = _reverser(1), _reverser(8)


@compiled
def _mirror(target: Int, source: Int, count: Int) -> None:
    """Copy ``count`` pixels that lie from address ``source`` on to ``target``, the last one first."""
    done = 0
    while done + 8 <= count:
        _reverse_eight(target + 3 * done, source + 3 * (count - done - 8))
        done += 8
    if count >= 8:  # the rest as eight again, some of them for the second time
        _reverse_eight(target + 3 * (count - 8), source)
        return
    while done < count:
        _reverse_one(target + 3 * done, source + 3 * (count - done - 1))
        done += 1


@compiled
def _fill(image: np.ndarray, top: int, bottom: int, left: int, right: int, fill: np.ndarray) -> None:
    for y in range(top, bottom):
        row = image[y]
        for x in range(left, right):
            row[x, 0], row[x, 1], row[x, 2] = fill[0], fill[1], fill[2]


@compiled
def _move(source: np.ndarray, target: np.ndarray, mirrored: bool, down: int, right: int, fill: np.ndarray) -> None:
    """Copy uint8 [H, W, 3], mirrored, then shifted; what comes from outside is ``fill``, uint8 [3]."""
    height, width = source.shape[:2]
    top, bottom = min(height, max(0, down)), max(0, min(height, height + down))
    first, last = min(width, max(0, right)), max(0, min(width, width + right))
    begin, end = source.ctypes.data, target.ctypes.data
    count = last - first
    if bottom > top and count > 0:
        if mirrored:
            left = width - last + right  # of what is seen, in the source
            for y in range(top, bottom):
                _mirror(end + 3 * (width * y + first), begin + 3 * (width * (y - down) + left), count)
        else:  # one piece: what wraps around from row to row is filled below
            pixels = (bottom - top - 1) * width + count
            place = width * top + first
            _copy_bytes(end + 3 * place, begin + 3 * (place - width * down - right), 3 * pixels)
    _fill(target, 0, top, 0, width, fill)
    _fill(target, bottom, height, 0, width, fill)
    _fill(target, top, bottom, 0, first, fill)
    _fill(target, top, bottom, last, width, fill)


@compiled
def gather_images(images: np.ndarray, rows: np.ndarray, ids: np.ndarray, plan: Plan, fill: np.ndarray, out: np.ndarray):
    """Images that lie in memory, uint8 [N, H, W, 3], mirrored and shifted by ``plan`` into ``out`` [B, H, W, 3].

    ``rows`` int64 [B] are their places, ``ids`` int64 [B] their sample ids.
    """
    size = images[0].size
    for place in range(len(rows)):
        if plan.random:
            mirrored, down, right = _choices(plan, ids[place])
            _move(images[rows[place]], out[place], mirrored, down, right, fill)
        else:
            _copy_bytes(out[place].ctypes.data, images[rows[place]].ctypes.data, size)


@compiled
def decode_images(
    rows: np.ndarray,
    ids: np.ndarray,
    layout: np.ndarray,
    files: np.ndarray,
    decoder: int,
    plan: Plan,
    fill: np.ndarray,
    out: np.ndarray,
    state: np.ndarray,
) -> int:
    """Read, decode, crop, resize, mirror and shift the images of ``rows`` int64 [B] into ``out`` uint8 [B, H, W, 3].

    Stops after a JPEG that makes trouble, for then the decoder has to be renewed; returns how many rows are done.

    Args:
        rows: places in ``layout``.
        ids: int64 [B] sample ids, which the random decisions depend on.
        layout: where images lie (``Beton.layout``).
        files: int32 [F] descriptors of the open files.
        decoder: of :class:`rlp.data.native.JpegDecoder`, used by no other thread meanwhile.
        plan: what is done.
        fill: uint8 [3], the padding.
        out: whole images need their own height and width, others ``plan.size``.
        state: uint8 [B], receives :data:`GOOD`, :data:`SUSPECT`, :data:`DAMAGED` or :data:`GONE`.
    """
    largest, most = 0, 0
    for place in range(len(rows)):
        record = layout[rows[place]]
        largest = max(largest, np.int64(record["image_size"]))
        most = max(most, np.int64(record["height"]) * np.int64(record["width"]) * 3)
    buffer, scratch = np.empty(largest, np.uint8), np.empty(most, np.uint8)
    square = np.empty((plan.size, plan.size, 3), np.uint8)
    moves = plan.random and (plan.flip or plan.padding > 0)
    for place in range(len(rows)):
        record = layout[rows[place]]
        height, width, size = np.int64(record["height"]), np.int64(record["width"]), np.int64(record["image_size"])
        content = buffer[:size]
        if not _read(files[record["file"]], content, record["image"]):
            state[place] = GONE
            return place + 1
        state[place] = GOOD
        if record["mode"] == JPG:
            image = scratch[: height * width * 3].reshape(height, width, 3)
            state[place] = _jpeg(decoder, content, image)
            if state[place] == DAMAGED:
                return place + 1
        else:
            image = content.reshape(height, width, 3)
        if plan.size > 0:
            if plan.random:
                top, left, tall, wide = random_crop(
                    height, width, plan.smallest, plan.largest, plan.seed, plan.epoch, ids[place]
                )
            else:
                top, left, tall, wide = center_crop(height, width, plan.ratio)
            target = square if moves else out[place]
            _resize(image, top, left, tall, wide, target, plan.area)
            image = target
        if moves:
            mirrored, down, right = _choices(plan, ids[place])
            _move(image, out[place], mirrored, down, right, fill)
        elif plan.size == 0:
            out[place] = image
        if state[place] != GOOD:
            return place + 1
    return len(rows)


@compiled
def read_words(rows: np.ndarray, layout: np.ndarray, files: np.ndarray, out: np.ndarray, state: np.ndarray) -> None:
    """The first words of ``rows`` into ``out`` int32 [B, K]; a short read makes ``state`` of a row :data:`GONE`."""
    for place in range(len(rows)):
        record = layout[rows[place]]
        if not _read(files[record["file"]], out[place].view(np.uint8), record["words"]):
            state[place] = GONE
