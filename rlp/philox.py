"""Counter-based random bits (Philox4x32-10), equal to the bit in NumPy and in torch, on the CPU and on the GPU.

Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. A counter-based generator has no
state: the bits of a sample depend on (seed, stream, epoch, sample id) alone, never on the order or place of asking.
"""

from typing import Any, TypeVar
import zlib

import numpy as np
import torch

Array = TypeVar("Array", np.ndarray, torch.Tensor)

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


_stream_ids: dict[str, int] = {}


def stream_id(name: str) -> int:
    """32-bit number of a named stream (CRC-32 of the name), so that streams need no central list."""
    # Remembered because torch.compile can look up a number in a dict, but not trace into zlib.
    if name not in _stream_ids:
        _stream_ids[name] = zlib.crc32(name.encode())
    return _stream_ids[name]


def philox4x32(counter: tuple[Array, Array, Array, Array], key: tuple[int, int]) -> tuple[Array, Array, Array, Array]:
    """Ten rounds of Philox4x32 on int64 arrays that hold 32-bit words (values in [0, 2^32)).

    The 32 x 32 -> 64 bit product is formed in int64: it may wrap, but its bits are those of the unsigned product,
    and masks after every shift keep the words unsigned. torch has no complete uint32 or uint64 arithmetic.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        high0, low0 = (product0 >> 32) & _MASK, product0 & _MASK
        high1, low1 = (product1 >> 32) & _MASK, product1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_bits(seed: int, stream: str, index: Array, count: int, epoch: int = 0, first: int = 0) -> Array:
    """``count`` random 32-bit words for every sample id.

    Args:
        seed: any integer in [0, 2^64).
        stream: name of the use, e.g. ``"train.draw"``; different names give independent bits.
        index: int64 sample ids in [0, 2^32), any shape, NumPy or torch on any device.
        count: words per sample; the first words do not depend on it.
        epoch: integer in [0, 2^32); 0 for what never changes.
        first: leave out so many words at the start.

    Returns:
        int64, shape ``[*index.shape, count]``, values in [0, 2^32), of the same kind and on the device of ``index``.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; expected an integer in [0, 2^64)")
    is_torch = isinstance(index, torch.Tensor)
    ids: Any = index.long() if is_torch else np.asarray(index, dtype=np.int64)
    skip, begin = first % 4, first // 4
    end = -(-(first + count) // 4)
    block: Any = torch.arange(begin, end, device=ids.device) if is_torch else np.arange(begin, end, dtype=np.int64)
    zero = ids[..., None] * 0 + block * 0  # [*index.shape, end - begin]
    counter = (zero + ids[..., None], zero + epoch, zero + block, zero + stream_id(stream))
    words: Any = philox4x32(counter, (seed & _MASK, seed >> 32))
    stacked: Any = torch.stack(words, dim=-1) if is_torch else np.stack(words, axis=-1)
    return stacked.reshape(*ids.shape, 4 * (end - begin))[..., skip : skip + count]
