"""Augmentation on the device against a slow and obvious oracle, sample by sample, pixel by pixel."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from rlp.data.augment import Augment
from rlp.errors import UserError
from rlp.philox import random_bits

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def oracle(image: np.ndarray, sample: int, epoch: int, seed: int, flip: bool, padding: int, cutout: int) -> np.ndarray:
    """One image uint8 [H, W, 3] to float64 [H, W, 3]."""
    height, width = image.shape[:2]
    words = [int(w) for w in random_bits(seed, "augment", np.array(sample), 5, epoch)]
    mirrored = image[:, ::-1] if flip and words[0] >= 2**31 else image
    normal = (mirrored / 255.0 - MEAN) / STD
    padded = np.zeros((height + 2 * padding, width + 2 * padding, 3))
    padded[padding : padding + height, padding : padding + width] = normal
    top, left = words[1] * (2 * padding + 1) >> 32, words[2] * (2 * padding + 1) >> 32
    result = padded[top : top + height, left : left + width].copy()
    if cutout:
        top, left = (words[3] * height >> 32) - cutout // 2, (words[4] * width >> 32) - cutout // 2
        result[max(0, top) : max(0, top + cutout), max(0, left) : max(0, left + cutout)] = 0
    return result


def batch(count: int, height: int, width: int) -> torch.Tensor:
    pixels = np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@given(
    st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 4), st.integers(0, 12),
    st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_equals_the_oracle(
    height: int, width: int, flip: bool, padding: int, cutout: int, seed: int, epoch: int, ids: list[int]
) -> None:
    image = batch(len(ids), height, width)
    augment = Augment(MEAN, STD, flip, padding, cutout, seed)
    got = augment(image, torch.tensor(ids), epoch, train=True)
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    for row, sample in enumerate(ids):
        expected = oracle(image[row].permute(1, 2, 0).numpy(), sample, epoch, seed, flip, padding, cutout)
        np.testing.assert_allclose(got[row].permute(1, 2, 0).numpy(), expected, atol=2e-6)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    image, index = batch(32, 8, 8), torch.arange(32) * 7
    augment = Augment(MEAN, STD, True, 2, 3, seed=1)
    whole = augment(image, index, 3, train=True)
    for chosen in (torch.tensor([5]), torch.arange(31, -1, -1), torch.tensor([3, 3, 30])):
        assert torch.equal(augment(image[chosen], index[chosen], 3, train=True), whole[chosen])


def test_epochs_seeds_and_samples_differ() -> None:
    image = batch(1, 8, 8).expand(64, 3, 8, 8)
    augment = Augment(MEAN, STD, True, 4, 0, seed=1)
    index = torch.arange(64)
    first = augment(image, index, 0, train=True)
    assert len({bytes(sample.numpy().tobytes()) for sample in first.contiguous()}) > 32
    assert not torch.equal(first, augment(image, index, 1, train=True))
    assert not torch.equal(first, Augment(MEAN, STD, True, 4, 0, seed=2)(image, index, 0, train=True))


def test_one_augmentation_leaves_the_decisions_of_the_others() -> None:
    image, index = batch(16, 8, 8), torch.arange(16)
    cut = Augment(MEAN, STD, True, 2, 3, seed=1)(image, index, 0, train=True)
    whole = Augment(MEAN, STD, True, 2, 0, seed=1)(image, index, 0, train=True)
    kept = cut != 0
    assert torch.equal(cut[kept], whole[kept])
    assert 0.5 < kept.float().mean() < 1


def test_evaluation_only_normalises_and_leaves_the_input() -> None:
    image = batch(4, 5, 7)
    before = image.clone()
    augment = Augment(MEAN, STD, True, 4, 4, seed=1)
    got = augment(image, torch.arange(4), 0, train=False)
    expected = (image / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    augment(image, torch.arange(4), 0, train=True)
    assert torch.equal(image, before)


def test_flip_mirrors_half_of_the_samples() -> None:
    image = batch(1, 1, 2).expand(4000, 3, 1, 2)
    got = Augment(MEAN, STD, True, 0, 0, seed=0)(image, torch.arange(4000), 0, train=True)
    share = (got[:, 0, 0, 0] != got[0, 0, 0, 0]).float().mean().item()
    assert abs(share - 0.5) < 0.04  # five standard deviations


@pytest.mark.parametrize(
    ("mean", "std", "padding", "cutout", "key"),
    [
        ((0.5,), STD, 0, 0, "data.mean"),
        (MEAN, (0.1, 0.2), 0, 0, "data.std"),
        (MEAN, (0.1, 0.0, 0.2), 0, 0, "data.std"),
        (MEAN, STD, -1, 0, "data.crop_padding"),
        (MEAN, STD, 0, -2, "data.cutout"),
    ],
)
def test_bad_settings_name_their_key(
    mean: tuple[float, ...], std: tuple[float, ...], padding: int, cutout: int, key: str
) -> None:
    with pytest.raises(UserError, match=key):
        Augment(mean, std, True, padding, cutout, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_device_gives_the_same_and_never_waits_for_the_host() -> None:
    image, index = batch(64, 32, 32), torch.arange(64)
    augment = Augment(MEAN, STD, True, 4, 8, seed=1)
    expected = augment(image, index, 2, train=True)
    on_device, index = image.cuda(), index.cuda()
    augment(on_device, index, 2, train=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = augment(on_device, index, 2, train=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.cpu(), expected)
