"""Colour jitter against torchvision, and against a slow oracle, sample by sample."""

import colorsys
from importlib.util import find_spec
from types import ModuleType

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlp.data.color import ColorJitter
from rlp.errors import UserError
from rlp.models.backbone import import_timm

TOLERANCE = 1e-3  # of 255: float32 in another order


@pytest.fixture(scope="module")
def torchvision() -> ModuleType:
    """torchvision's functional transforms, imported behind timm, which knows how to."""
    if find_spec("timm") is None or find_spec("torchvision") is None:
        pytest.skip("timm or torchvision is not installed")
    import_timm()
    from torchvision.transforms import functional

    return functional


def batch(count: int, height: int, width: int) -> torch.Tensor:
    """float32 in 0..255: noise between the whole numbers, a grey, a black and a white image, and pure colours."""
    random = np.random.default_rng(count)
    image = torch.from_numpy(random.uniform(0, 255, (count, 3, height, width)).astype(np.float32))
    image[0] = image[0, :1]
    if count > 4:
        image[1], image[2] = 0, 255
        image[3] = image[3].div(128).round().mul(127.5)
    return image


def oracle(image: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """One image [3, H, W] in 0..255, float64, pixel by pixel where it matters."""
    weights = np.array([0.2989, 0.587, 0.114])[:, None, None]
    image = np.clip(image.astype(np.float64) * brightness, 0, 255)
    mean = (image * weights).sum(axis=0).mean()
    image = np.clip(contrast * image + (1 - contrast) * mean, 0, 255)
    grey = (image * weights).sum(axis=0)
    image = np.clip(saturation * image + (1 - saturation) * grey, 0, 255)
    for y, x in np.ndindex(image.shape[1:]):
        h, s, v = colorsys.rgb_to_hsv(*(image[:, y, x] / 255))
        image[:, y, x] = np.array(colorsys.hsv_to_rgb((h + hue) % 1, s, v)) * 255
    return image


AMOUNTS = [(0.4, 0.4, 0.4, 0.1), (1.5, 0, 0, 0), (0, 2.0, 0, 0), (0, 0, 3.0, 0), (0, 0, 0, 0.5), (1.0, 1.0, 1.0, 0.5)]


@pytest.mark.parametrize("amounts", AMOUNTS)
def test_equals_torchvision(torchvision: ModuleType, amounts: tuple[float, ...]) -> None:
    image, index = batch(24, 9, 14), torch.arange(24) * 11
    jitter = ColorJitter(*amounts, seed=4)
    got = jitter(image, index, 3)
    for row, factors in enumerate(jitter.factors(index, 3).tolist()):
        expected = image[row] / 255
        for name, factor in zip(("brightness", "contrast", "saturation", "hue"), factors, strict=True):
            expected = getattr(torchvision, f"adjust_{name}")(expected, factor)
        torch.testing.assert_close(got[row], expected * 255, atol=TOLERANCE, rtol=0)


@given(
    st.integers(1, 5), st.integers(1, 5),
    st.tuples(st.floats(0, 3), st.floats(0, 3), st.floats(0, 3), st.floats(0, 0.5)),
    st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6),
)  # fmt: skip
@settings(deadline=None)
def test_equals_the_oracle(
    height: int, width: int, amounts: tuple[float, ...], seed: int, epoch: int, ids: list[int]
) -> None:
    image, index = batch(len(ids), height, width), torch.tensor(ids)
    jitter = ColorJitter(*amounts, seed=seed)
    got = jitter(image, index, epoch)
    for row, factors in enumerate(jitter.factors(index, epoch).tolist()):
        expected = torch.from_numpy(oracle(image[row].numpy(), *factors)).float()
        torch.testing.assert_close(got[row], expected, atol=TOLERANCE, rtol=0)


def test_factors_are_uniform_in_their_ranges() -> None:
    count = 20_000
    factors = ColorJitter(0.4, 1.5, 0.1, 0.2, seed=1).factors(torch.arange(count), 0).double()
    for column, (low, high) in zip(factors.unbind(1), [(0.6, 1.4), (0, 2.5), (0.9, 1.1), (-0.2, 0.2)], strict=True):
        assert low - 1e-6 <= column.min()
        assert column.max() <= high + 1e-6
        shares = torch.histc(column, bins=10, min=low, max=high) / count
        assert (shares - 0.1).abs().max() < 5 * (0.09 / count) ** 0.5  # five standard deviations
    assert torch.corrcoef(factors.T).triu(1).abs().max() < 5 / count**0.5


def test_an_amount_of_zero_leaves_out_the_step_and_the_factors_of_the_others() -> None:
    image, index = batch(8, 5, 5), torch.arange(8)
    assert torch.equal(ColorJitter(0, 0, 0, 0, seed=1)(image, index, 0), image)
    whole = ColorJitter(0.4, 0.3, 0.2, 0.1, seed=1).factors(index, 0)
    for place, neutral in enumerate((1, 1, 1, 0)):
        amounts = [0.4, 0.3, 0.2, 0.1]
        amounts[place] = 0
        expected = whole.clone()
        expected[:, place] = neutral
        assert torch.equal(ColorJitter(*amounts, seed=1).factors(index, 0), expected)


def test_a_sample_does_not_depend_on_its_batch_nor_on_strides() -> None:
    image, index = batch(33, 13, 17), torch.arange(33) * 7
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1, seed=1)
    whole = jitter(image, index, 3)
    for chosen in (torch.tensor([5]), torch.arange(32, -1, -1), torch.tensor([3, 3, 30])):
        assert torch.equal(jitter(image[chosen], index[chosen], 3), whole[chosen])
        last = image[chosen].contiguous(memory_format=torch.channels_last)
        assert torch.equal(jitter(last, index[chosen], 3), whole[chosen])
    wide = torch.zeros(33, 3, 13, 40)
    wide[..., 3:20] = image
    assert torch.equal(jitter(wide[..., 3:20], index, 3), whole)
    assert torch.equal(jitter(image.transpose(2, 3).contiguous().transpose(2, 3), index, 3), whole)


@pytest.mark.parametrize("amounts", AMOUNTS)
def test_channels_last_stays_the_range_holds_and_the_input_too(amounts: tuple[float, ...]) -> None:
    image = batch(16, 6, 8).contiguous(memory_format=torch.channels_last)
    before = image.clone()
    got = ColorJitter(*amounts, seed=1)(image, torch.arange(16), 0)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert got.dtype == torch.float32
    assert got.min() >= 0
    assert got.max() <= 255
    assert torch.equal(image, before)


def test_epochs_seeds_and_samples_differ() -> None:
    index = torch.arange(64)
    first = ColorJitter(0.4, 0.4, 0.4, 0.1, seed=1).factors(index, 0)
    assert torch.equal(first, ColorJitter(0.4, 0.4, 0.4, 0.1, seed=1).factors(index, 0))
    assert len(first.unique(dim=0)) == 64
    assert (first != ColorJitter(0.4, 0.4, 0.4, 0.1, seed=1).factors(index, 1)).all()
    assert (first != ColorJitter(0.4, 0.4, 0.4, 0.1, seed=2).factors(index, 0)).all()


def test_an_empty_batch_passes() -> None:
    got = ColorJitter(0.4, 0.4, 0.4, 0.1, seed=1)(torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64), 0)
    assert got.shape == (0, 3, 4, 4)


def test_python_asks_for_no_value() -> None:
    """Fake tensors have none: whatever would wait for the device raises."""
    image, index = batch(8, 6, 6), torch.arange(8)
    with FakeTensorMode() as fake:
        got = ColorJitter(0.4, 0.4, 0.4, 0.1, seed=1)(fake.from_tensor(image), fake.from_tensor(index), 0)
    assert got.shape == image.shape


@pytest.mark.parametrize(
    "amounts",
    [(-0.1, 0, 0, 0), (0, -1, 0, 0), (0, 0, -1, 0), (0, 0, 0, -0.1), (0, 0, 0, 0.6), (float("nan"), 0, 0, 0),
     (0, float("inf"), 0, 0), (0, 0, 0, float("nan"))],
)  # fmt: skip
def test_bad_amounts_name_the_key(amounts: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"data\.color_jitter is .*expected four numbers"):
        ColorJitter(*amounts, seed=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_device_gives_the_same_and_never_waits_for_the_host() -> None:
    image, index = batch(64, 32, 32).contiguous(memory_format=torch.channels_last), torch.arange(64)
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1, seed=1)
    expected = jitter(image, index, 2)
    on_device, index = image.cuda(), index.cuda()
    jitter(on_device, index, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = jitter(on_device, index, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.cpu(), expected, atol=TOLERANCE, rtol=0)
