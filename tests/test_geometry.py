"""Mirror and shift: the tensor version and the compiled one against a slow and obvious oracle, pixel by pixel."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from rlp.data.geometry import Geometry, fill_of, move
from rlp.errors import UserError
from rlp.philox import random_bits

FILL = (7, 100, 255)


def oracle(image: np.ndarray, sample: int, epoch: int, seed: int, flip: bool, padding: int) -> np.ndarray:
    """One image uint8 [H, W, 3], moved."""
    height, width = image.shape[:2]
    words = [int(word) for word in random_bits(seed, "moves", np.array(sample), 3, epoch)]
    mirrored = image[:, ::-1] if flip and words[0] >= 2**31 else image
    padded = np.empty((height + 2 * padding, width + 2 * padding, 3), np.uint8)
    padded[:] = FILL
    padded[padding : padding + height, padding : padding + width] = mirrored
    top, left = words[1] * (2 * padding + 1) >> 32, words[2] * (2 * padding + 1) >> 32
    return padded[top : top + height, left : left + width]


def pictures(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def gathered(images: np.ndarray, rows: np.ndarray, ids: np.ndarray, epoch: int, seed: int, flip: bool, padding: int):
    from rlp.data.decode import gather_images, plan_of

    out = np.full((len(rows), *images.shape[1:]), 99, np.uint8)
    plan = plan_of(Geometry(flip, padding), True, seed, epoch)
    gather_images(images, rows, ids, plan, np.array(FILL, np.uint8), out)
    return out


shapes: Any = given(
    st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 45),
    st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6),
)  # fmt: skip


@shapes
def test_tensors_equal_the_oracle(
    height: int, width: int, flip: bool, padding: int, seed: int, epoch: int, ids: list[int]
) -> None:
    images = pictures(len(ids), height, width)
    got = move(torch.from_numpy(images), torch.tensor(ids), epoch, seed, Geometry(flip, padding), FILL)
    assert got.is_contiguous()
    for row, sample in enumerate(ids):
        assert np.array_equal(got[row].numpy(), oracle(images[row], sample, epoch, seed, flip, padding))


@shapes
def test_compiled_code_equals_the_oracle(
    height: int, width: int, flip: bool, padding: int, seed: int, epoch: int, ids: list[int]
) -> None:
    pytest.importorskip("numba")
    images = pictures(len(ids), height, width)
    rows = np.random.default_rng(1).permutation(len(ids))
    got = gathered(images, rows, np.array(ids)[rows], epoch, seed, flip, padding)
    for place, row in enumerate(rows):
        assert np.array_equal(got[place], oracle(images[row], ids[row], epoch, seed, flip, padding))


def test_compiled_code_writes_nowhere_else() -> None:
    """Mirroring copies whole vectors; nothing before or behind the batch may change."""
    pytest.importorskip("numba")
    from rlp.data.decode import gather_images, plan_of

    images, ids = pictures(3, 5, 13), np.arange(3)
    plan = plan_of(Geometry(True, 2), True, 1, 1)
    memory = np.full(5 * 5 * 13 * 3, 77, np.uint8)
    out = memory.reshape(5, 5, 13, 3)
    for epoch in range(30):
        gather_images(images, ids, ids, plan._replace(epoch=epoch), np.array(FILL, np.uint8), out[1:4])
        assert (out[0] == 77).all()
        assert (out[4] == 77).all()


def test_a_sample_does_not_depend_on_its_batch() -> None:
    image, index, geometry = torch.from_numpy(pictures(32, 8, 8)), torch.arange(32) * 7, Geometry(True, 2)
    whole = move(image, index, 3, 1, geometry, FILL)
    for chosen in (torch.tensor([5]), torch.arange(31, -1, -1), torch.tensor([3, 3, 30])):
        assert torch.equal(move(image[chosen], index[chosen], 3, 1, geometry, FILL), whole[chosen])


def test_epochs_seeds_and_samples_differ() -> None:
    image, index, geometry = (
        torch.from_numpy(pictures(1, 8, 8)).expand(64, 8, 8, 3),
        torch.arange(64),
        Geometry(True, 4),
    )
    first = move(image, index, 0, 1, geometry, FILL)
    assert len({sample.numpy().tobytes() for sample in first}) > 32
    assert not torch.equal(first, move(image, index, 1, 1, geometry, FILL))
    assert not torch.equal(first, move(image, index, 0, 2, geometry, FILL))


def test_half_of_the_samples_are_mirrored() -> None:
    image = torch.from_numpy(pictures(1, 1, 2)).expand(4000, 1, 2, 3)
    got = move(image, torch.arange(4000), 0, 0, Geometry(flip=True), FILL)
    share = (got != image).flatten(1).any(1).float().mean().item()
    assert abs(share - 0.5) < 0.04  # five standard deviations


def test_the_fill_is_the_mean() -> None:
    assert fill_of((0.0, 0.5, 1.0)) == (0, 128, 255)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"image_size": -1}, r"data\.image_size is -1"),
        ({"crop_padding": -1}, r"data\.crop_padding is -1"),
        ({"crop_scale": (0.5, 0.2)}, r"data\.crop_scale is \[0\.5, 0\.2\]"),
        ({"crop_scale": (0.0, 0.2)}, r"data\.crop_scale"),
        ({"center_ratio": 0.0}, r"data\.center_ratio is 0"),
        ({"interpolation": "cubic"}, r"data\.interpolation is 'cubic'; expected one of area, bilinear"),
    ],
)
def test_bad_settings_name_their_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        Geometry(**changes)
