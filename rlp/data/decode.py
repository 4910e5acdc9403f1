"""Compiled crop arithmetic for the FFCV decoders: Philox4x32-10 in numba, and crops drawn from it.

Needs numba, which comes with FFCV; imported only together with it. The words equal those of :mod:`rlp.philox` to the
bit, so that a crop is a function of (seed, epoch, sample id), never of the worker that cuts it.
"""

import math

import numba
import numpy as np

from rlp.philox import stream_id

Int = int | np.integer

CROP_STREAM = stream_id("crop")
ATTEMPTS = 10
ASPECTS = (3.0 / 4.0, 4.0 / 3.0)
"""Width over height of a random crop, uniform in the logarithm (Szegedy et al., arXiv 1409.4842)."""

_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@numba.njit(nogil=True, cache=True)
def philox(c0: Int, c1: Int, c2: Int, c3: Int, seed: Int) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """One block of four random words (values in [0, 2^32)) from a counter of four words and a 64-bit seed."""
    a, b, c, d = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(c3)
    k0, k1 = np.uint64(seed) & _MASK, np.uint64(seed) >> _HALF
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = (product1 >> _HALF) ^ b ^ k0, product1 & _MASK, (product0 >> _HALF) ^ d ^ k1, product0 & _MASK
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _MASK, (k1 + np.uint64(0xBB67AE85)) & _MASK
    return a, b, c, d


@numba.njit(nogil=True, cache=True)
def _uniform(word: np.uint64) -> float:
    return (np.float64(word) + 0.5) / 4294967296.0


@numba.njit(nogil=True, cache=True)
def _below(word: np.uint64, count: Int) -> Int:
    return np.int64((np.uint64(word) * np.uint64(count)) >> _HALF)


@numba.njit(nogil=True, cache=True)
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


@numba.njit(nogil=True, cache=True)
def center_crop(height: int, width: int, ratio: float) -> tuple[int, int, int, int]:
    """The square in the middle whose side is ``ratio`` of the shorter side, as (top, left, height, width)."""
    side = max(1, int(ratio * min(height, width)))
    return (height - side) // 2, (width - side) // 2, side, side
