"""Near-duplicates: what is planted is found, what all pairs say is what the fast search says, distances nest."""

from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest
from small_sets import random_images, write_set

from rlp.data import duplicates
from rlp.data.beton import Beton
from rlp.data.duplicates import near_embeddings, near_hashes, record_duplicates
from rlp.data.view import ViewOptions, make_view
from rlp.errors import UserError


def hashes_with_neighbours(count: int, seed: int) -> np.ndarray:
    """Random hashes, half of them a few bits away from an earlier one, in groups and chains."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, (count, 2), dtype=np.uint64)
    for row in range(1, count):
        if rng.random() < 0.5:
            hashes[row] = hashes[rng.integers(row)]
            for column in range(2):
                for bit in rng.choice(64, rng.integers(0, 9), replace=False).tolist():
                    hashes[row, column] ^= np.uint64(1 << bit)
    return hashes


def all_pairs(hashes: np.ndarray, distance: int) -> list[int]:
    near = (np.bitwise_count(hashes[:, None] ^ hashes[None]) <= distance).all(-1)
    return np.flatnonzero(np.tril(near, -1).any(1)).tolist()


@given(st.integers(1, 120), st.integers(0, 63), st.integers(0, 1000), st.sampled_from([1, 7, 1 << 22]))
def test_equals_all_pairs(count: int, distance: int, seed: int, portion: int) -> None:
    hashes = hashes_with_neighbours(count, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_PAIRS", portion)
        assert near_hashes(hashes, distance).tolist() == all_pairs(hashes, distance)


def test_distances_nest() -> None:
    hashes = hashes_with_neighbours(300, 1)
    found = [set(near_hashes(hashes, distance).tolist()) for distance in range(10)]
    assert all(a <= b for a, b in pairwise(found))
    assert len(found[0]) < len(found[-1])


@pytest.mark.parametrize("block", [3, 2048])
def test_embeddings_equal_all_pairs(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 6))
    values[11], values[30], values[31] = 3 * values[2], 2 * values[2] + 0.001, -values[2]
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    for distance in (0.001, 0.3, 1.0):
        expected = np.flatnonzero(np.tril(unit @ unit.T >= 1 - distance, -1).any(1))
        assert near_embeddings(values, distance).tolist() == expected.tolist()
    assert {11, 30} <= set(near_embeddings(values, 0.001).tolist())


def pictures() -> list[np.ndarray]:
    small = random_images(30, 5, 5, seed=4)
    images = [np.asarray(Image.fromarray(i).resize((32, 32), Image.Resampling.BICUBIC)) for i in small]
    images[20] = images[3]  # the same
    images[21] = np.clip(images[4].astype(int) + 9, 0, 255).astype(np.uint8)  # brighter
    images[22] = np.asarray(Image.fromarray(images[5]).resize((20, 20)).resize((32, 32)))  # blurred
    return images


def test_planted_duplicates_are_found_recorded_and_dropped(tmp_path: Path) -> None:
    path = write_set(tmp_path / "a.beton", pictures())
    card = record_duplicates(path, distance=6)
    assert card.duplicates["dropped"] == [20, 21, 22]
    assert card.duplicates["distance"] == 6
    beton = Beton.open(path, full_hash=True)
    assert beton.card == card
    kept = make_view(beton, ViewOptions(drop_duplicates=True)).ids
    assert sorted(set(range(30)) - set(kept.tolist())) == [20, 21, 22]


def test_embeddings_come_from_a_file(tmp_path: Path) -> None:
    path = write_set(tmp_path / "a.beton", pictures())
    values = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    values[7] = values[1]
    np.save(tmp_path / "e.npy", values)
    assert record_duplicates(path, embeddings=tmp_path / "e.npy").duplicates["dropped"] == [7]


@pytest.mark.parametrize(
    ("values", "distance", "message"),
    [
        (np.zeros((29, 4)), 0.1, r"float64 of shape \(29, 4\); expected floats of shape \[30, D\]"),
        (np.zeros((30, 4), int), 0.1, r"expected floats"),
        (np.zeros((30, 4)), 1.5, r"--distance is 1\.5; expected a number from 0 to 1"),
        (None, 64, r"--distance is 64; expected a number from 0 to 63"),
        ("no array", 0.1, r"cannot be read as a \.npy of embeddings"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, values: np.ndarray | str | None, distance: float, message: str
) -> None:
    path = write_set(tmp_path / "a.beton", pictures())
    before = path.with_suffix(".json").read_bytes()
    file = None if values is None else tmp_path / "e.npy"
    if isinstance(values, str):
        (tmp_path / "e.npy").write_text(values)
    elif values is not None:
        np.save(tmp_path / "e.npy", values)
    with pytest.raises(UserError, match=message):
        record_duplicates(path, distance, file)
    assert path.with_suffix(".json").read_bytes() == before


def test_flat_images_are_no_duplicates_whatever_their_colour(tmp_path: Path) -> None:
    """They have no structure to compare: blank pages, skies, digits that were lost."""
    flat = [np.full((32, 32, 3), level, np.uint8) for level in (0, 0, 90, 255)]
    flat += [np.broadcast_to(np.array(colour, np.uint8), (32, 32, 3)) for colour in ((255, 0, 0), (0, 0, 255))]
    path = write_set(tmp_path / "a.beton", [*pictures(), *flat])
    assert record_duplicates(path, distance=6).duplicates["dropped"] == [20, 21, 22]
