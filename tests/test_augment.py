"""Augmentation on the device against a slow and obvious oracle, sample by sample, pixel by pixel."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from rlp.data.augment import Augment
from rlp.data.color import ColorJitter
from rlp.data.randaugment import RandAugment
from rlp.errors import UserError
from rlp.philox import random_bits

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def oracle(image: np.ndarray, sample: int, epoch: int, seed: int, cutout: int) -> np.ndarray:
    """One image uint8 [H, W, 3] to float64 [H, W, 3]."""
    height, width = image.shape[:2]
    words = [int(w) for w in random_bits(seed, "cutout", np.array(sample), 2, epoch)]
    result = (image / 255.0 - MEAN) / STD
    if cutout:
        top, left = (words[0] * height >> 32) - cutout // 2, (words[1] * width >> 32) - cutout // 2
        result[max(0, top) : max(0, top + cutout), max(0, left) : max(0, left + cutout)] = 0
    return result


def batch(count: int, height: int, width: int) -> torch.Tensor:
    pixels = np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 12), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6),
)  # fmt: skip
def test_equals_the_oracle(height: int, width: int, cutout: int, seed: int, epoch: int, ids: list[int]) -> None:
    image = batch(len(ids), height, width)
    got = Augment(MEAN, STD, seed, cutout)(image, torch.tensor(ids), epoch, train=True)
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    for row, sample in enumerate(ids):
        expected = oracle(image[row].permute(1, 2, 0).numpy(), sample, epoch, seed, cutout)
        np.testing.assert_allclose(got[row].permute(1, 2, 0).numpy(), expected, atol=2e-6)


def full(seed: int = 1, cutout: int = 3) -> Augment:
    return Augment(MEAN, STD, seed, cutout, (0.4, 0.4, 0.4, 0.1), (2, 9))


def test_the_steps_are_those_of_their_modules_in_the_order_given() -> None:
    image, index = batch(16, 12, 10), torch.arange(16)
    fill = tuple(round(255 * value) for value in MEAN)
    pixels = RandAugment(2, 9, 1, fill)(image, index, 4)
    jittered = ColorJitter(0.4, 0.4, 0.4, 0.1, seed=1)(pixels.float(), index, 4)
    expected = (jittered / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    got = full(cutout=0)(image, index, 4, train=True)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    image, index = batch(32, 8, 8), torch.arange(32) * 7
    whole = full()(image, index, 3, train=True)
    for chosen in (torch.tensor([5]), torch.arange(31, -1, -1), torch.tensor([3, 3, 30])):
        assert torch.equal(full()(image[chosen], index[chosen], 3, train=True), whole[chosen])


def test_epochs_seeds_and_samples_differ() -> None:
    image = batch(1, 8, 8).expand(64, 3, 8, 8)
    index = torch.arange(64)
    first = full()(image, index, 0, train=True)
    assert len({bytes(sample.numpy().tobytes()) for sample in first.contiguous()}) > 32
    assert not torch.equal(first, full()(image, index, 1, train=True))
    assert not torch.equal(first, full(seed=2)(image, index, 0, train=True))


def test_one_augmentation_leaves_the_decisions_of_the_others() -> None:
    image, index = batch(16, 8, 8), torch.arange(16)
    cut, whole = (full(cutout=cutout)(image, index, 0, train=True) for cutout in (3, 0))
    kept = cut != 0
    assert torch.equal(cut[kept], whole[kept])
    assert 0.5 < kept.float().mean() < 1


def test_evaluation_only_normalises_and_leaves_the_input() -> None:
    image = batch(4, 5, 7)
    before = image.clone()
    got = full()(image, torch.arange(4), 0, train=False)
    expected = (image / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    full()(image, torch.arange(4), 0, train=True)
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"mean": (0.5,)}, "data.mean"),
        ({"std": (0.1, 0.2)}, "data.std"),
        ({"std": (0.1, 0.0, 0.2)}, "data.std"),
        ({"cutout": -2}, "data.cutout"),
        ({"color_jitter": (0.1, 0.1, 0.1, 0.6)}, "data.color_jitter"),
        ({"randaugment": (2, 11)}, "data.randaugment"),
        ({"randaugment": (1.5, 9)}, "data.randaugment"),
    ],
)
def test_bad_settings_name_their_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        Augment(**{"mean": MEAN, "std": STD, "seed": 0, **changes})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_device_gives_the_same_and_never_waits_for_the_host() -> None:
    image, index = batch(64, 32, 32), torch.arange(64)
    augment = full(cutout=8)
    expected = augment(image, index, 2, train=True)
    on_device, index = image.cuda(), index.cuda()
    augment(on_device, index, 2, train=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = augment(on_device, index, 2, train=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), expected, atol=0.05, rtol=0)
