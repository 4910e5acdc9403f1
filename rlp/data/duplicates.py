"""Near-duplicates: found once from image hashes or given embeddings, kept in the card, left out by a view.

A sample is dropped when a sample with a lower id lies within the distance. So a larger distance drops more, and never
less: views at several distances are nested.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlp.data.beton import Beton
from rlp.data.card import Card
from rlp.errors import UserError

HASH_SIDE = 8
HASH_BITS = HASH_SIDE * HASH_SIDE
FLAT = np.uint64(2**64 - 1)
_LEAST_CONTRAST = 16
_BLOCK = 2048  # embeddings compared at once with all before them
_PAIRS = 1 << 22  # pairs of hashes compared at once
_ROUNDING = 1e-6  # of a cosine in float32: equal embeddings are duplicates also at distance 0


def dropped_samples(beton: Beton) -> np.ndarray:
    """Ids of the samples that the card lists as near-duplicates of an earlier one, int64.

    Raises:
        UserError: the card has no list, or that of another file.
    """
    found = beton.card.duplicates
    if "dropped" not in found:
        raise UserError(
            f"data.drop_duplicates is true, but the card of {beton.path} lists no near-duplicates; "
            f"run python -m rlp.data duplicates {beton.path} first"
        )
    if found.get("sha256", beton.card.sha256) != beton.card.sha256:
        raise UserError(
            f"data.drop_duplicates is true, but the near-duplicates in the card of {beton.path} are those of another "
            f"file; run python -m rlp.data duplicates {beton.path} again"
        )
    return np.array(found["dropped"], np.int64)


def record_duplicates(
    path: str | Path, distance: float | None = None, embeddings: str | Path | None = None, progress: bool = False
) -> Card:
    """Find the near-duplicates of a set and write them into its card; returns the new card.

    Args:
        path: the .beton, or the name of a sharded set.
        distance: bits of 64 in which each of the two hashes of duplicates may differ (default 6), or with embeddings
            1 - cosine (default 0.02).
        embeddings: .npy of float [N, D], one row for each sample; None to hash the images.
        progress: show a bar on a terminal.

    Raises:
        UserError: the set is damaged or changes meanwhile, the embeddings do not fit, or the distance is out of range.
    """
    beton = Beton.open(path)
    limit = 1.0 if embeddings is not None else HASH_BITS - 1
    distance = distance if distance is not None else (0.02 if embeddings is not None else 6)
    if not 0 <= distance <= limit:
        raise UserError(f"--distance is {distance}; expected a number from 0 to {limit}")
    if embeddings is None:
        if distance != int(distance):
            raise UserError(f"--distance is {distance}; expected a whole number of bits, or --embeddings")
        distance = int(distance)
        dropped = near_hashes(image_hashes(beton, progress), distance)
        method = f"two difference hashes of {HASH_BITS} bits"
    else:
        dropped = near_embeddings(_read_embeddings(embeddings, beton), distance, progress)
        method = "cosine of embeddings"
    dropped_ids = beton.index[dropped].tolist()
    found = {"method": method, "distance": distance, "sha256": beton.card.sha256, "dropped": dropped_ids}
    beton.check_unchanged()
    card = replace(beton.card, duplicates=found)
    card.write(beton.path)
    return card


def _read_embeddings(path: str | Path, beton: Beton) -> np.ndarray:
    try:
        values = np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a .npy of embeddings: {error}") from None
    if values.ndim != 2 or len(values) != beton.num_samples or values.dtype.kind != "f":
        raise UserError(
            f"{path} is {values.dtype} of shape {values.shape}; expected floats of shape "
            f"[{beton.num_samples}, D], a row for each sample of {beton.path}"
        )
    return values


def image_hashes(beton: Beton, progress: bool = False) -> np.ndarray:
    """Two difference hashes of every image, uint64 [N, 2]: signs of the differences between neighbouring grey averages,
    across 8 x 9 of them and down 9 x 8. One alone takes many a bright thing in the middle for another.

    A flat image, whose averages span less than 16 of 255 levels, has no structure to compare: both of its hashes are
    :data:`FLAT`, and it is no duplicate of anything."""
    from PIL import Image
    from tqdm import tqdm

    hashes = np.empty((beton.num_samples, 2), np.uint64)
    weights = np.uint64(1) << np.arange(HASH_BITS, dtype=np.uint64)
    bar = tqdm(range(beton.num_samples), desc="hashes", unit=" images", disable=None if progress else True)
    for row in bar:
        grey = Image.fromarray(beton.image(row)).convert("L")
        for column, axis in enumerate((1, 0)):
            size = (HASH_SIDE + axis, HASH_SIDE + 1 - axis)
            small = np.asarray(grey.resize(size, Image.Resampling.BOX), np.int16)
            hashes[row, column] = weights[(np.diff(small, axis=axis) > 0).ravel()].sum()
            if np.ptp(small) < _LEAST_CONTRAST:
                hashes[row] = FLAT
                break
    return hashes


def near_hashes(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Rows both of whose hashes (uint64 [N, 2]) differ from those of an earlier row in at most ``distance`` bits each.

    Sorted int64. Two such hashes agree in at least one of ``distance + 1`` bands of bits: only rows that agree in one
    are compared. Of rows with equal hashes only the first is: what is near the others is near it too. Many plain
    images share one hash, and would make as many pairs as the square of their number.
    """
    rows = np.flatnonzero((hashes != FLAT).any(1))
    dropped = np.ones(len(rows), bool)
    first = np.sort(np.unique(hashes[rows], axis=0, return_index=True)[1])
    dropped[first] = _near_distinct(hashes[rows[first]], distance)
    return rows[dropped]


def _near_distinct(hashes: np.ndarray, distance: int) -> np.ndarray:
    dropped = np.zeros(len(hashes), bool)
    for band in np.array_split(np.arange(HASH_BITS, dtype=np.uint64), min(distance + 1, HASH_BITS)):
        mask = np.bitwise_or.reduce(np.uint64(1) << band)
        for earlier, later in _pairs(hashes[:, 0] & mask):
            near = (np.bitwise_count(hashes[earlier] ^ hashes[later]) <= distance).all(1)
            dropped[later[near]] = True
    return dropped


def _pairs(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of rows (earlier, later) with equal keys, in portions."""
    order = np.argsort(keys, kind="stable")  # within a key the rows stay in order
    starts = np.flatnonzero(np.r_[True, keys[order][1:] != keys[order][:-1]])
    sizes = np.diff(np.r_[starts, len(order)])
    place = np.arange(len(order)) - np.repeat(starts, sizes)  # how many earlier rows have the key
    bounds = np.r_[0, np.cumsum(place)]
    first = 0
    while first < len(order):
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + _PAIRS, side="right")) - 1)
        count = place[first:last]
        later = np.repeat(np.arange(first, last), count)
        back = np.arange(len(later)) - np.repeat(np.cumsum(count) - count, count)
        yield order[later - 1 - back], order[later]
        first = last


def near_embeddings(embeddings: np.ndarray, distance: float, progress: bool = False) -> np.ndarray:
    """Rows whose cosine with an earlier row is at least 1 - ``distance``, sorted int64; compared by blocks."""
    from tqdm import tqdm

    unit = np.asarray(embeddings, np.float32)
    if odd := np.flatnonzero(~np.isfinite(unit).all(1)).tolist():
        raise UserError(f"row {odd[0]} of the embeddings is not finite; expected finite numbers for every sample")
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    dropped = np.zeros(len(unit), bool)
    blocks: Any = range(0, len(unit), _BLOCK)
    for start in tqdm(blocks, desc="embeddings", unit=" blocks", disable=None if progress else True):
        rows = slice(start, start + _BLOCK)
        for other in range(0, start + 1, _BLOCK):
            near = unit[rows] @ unit[other : other + _BLOCK].T >= 1 - distance - _ROUNDING
            if other == start:
                near = np.tril(near, -1)
            dropped[rows] |= near.any(1)
    return np.flatnonzero(dropped)
