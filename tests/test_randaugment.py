"""RandAugment against timm's operations on PIL images, one by one and as a whole."""

from importlib.util import find_spec
from types import ModuleType

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlp.data.randaugment import NONE, OPERATIONS, RandAugment, apply_operation
from rlp.errors import UserError
from rlp.models.backbone import import_timm

FILL = (10, 128, 250)
SHIFTS = ("TranslateX", "TranslateY")
GEOMETRIC = ("Rotate", "ShearX", "ShearY", *SHIFTS)


@pytest.fixture(scope="module")
def timm_ops() -> ModuleType:
    """timm's operations on PIL images."""
    if find_spec("timm") is None or find_spec("torchvision") is None:
        pytest.skip("timm or torchvision is not installed")
    import_timm()
    from timm.data import auto_augment

    return auto_augment


def reference(ops: ModuleType, images: torch.Tensor, operation: int, direction: int, magnitude: float) -> torch.Tensor:
    """Each of uint8 ``[B, 3, H, W]`` through one operation of timm's ``rand-...-inc1``, in a given direction."""
    name = ops._RAND_INCREASING_TRANSFORMS[operation]
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BILINEAR}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_randomly_negate", lambda value: -value if direction else value)
        op = ops.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)
        results = [op(Image.fromarray(image)) for image in images.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack([np.asarray(result) for result in results])).permute(0, 3, 1, 2)


def operate(images: torch.Tensor, operation: int, direction: int, magnitude: float) -> torch.Tensor:
    """The same with ours."""
    chosen = torch.full((len(images),), operation), torch.full((len(images),), direction)
    return apply_operation(images.float().contiguous(), *chosen, magnitude, FILL)


def examples(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 ``[5, 3, height, width]``: noise, dark noise, something smooth, a stretch of few values, one colour."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    coarse = random.integers(0, 256, (-(-height // 6), -(-width // 6), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    few = random.integers(100, 103, (height, width, 3), dtype=np.uint8)
    flat = np.full((height, width, 3), (7, 77, 177), dtype=np.uint8)
    return torch.from_numpy(np.stack([noise, noise // 5, smooth, few, flat])).permute(0, 3, 1, 2)


def test_the_operations_are_those_of_timm(timm_ops: ModuleType) -> None:
    theirs = [name.removesuffix("Increasing").removesuffix("Rel") for name in timm_ops._RAND_INCREASING_TRANSFORMS]
    assert list(OPERATIONS) == theirs
    assert set(GEOMETRIC) < set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [0.0, 3.0, 7.5, 9.0])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (17, 40), (3, 5), (2, 9), (1, 1)])
def test_each_operation_equals_timm(timm_ops: ModuleType, name: str, magnitude: float, height: int, width: int) -> None:
    """To the bit, but for geometric ones: there by 1 on single pixels, as PIL drops the fraction after rounding errors.

    A shift may have a fraction such as 2/5, which makes every fifth of all differences whole, and these pixels a
    matter of rounding.
    """
    images, operation = examples(height, width), OPERATIONS.index(name)
    for direction in (0, 1):
        expected = reference(timm_ops, images, operation, direction, magnitude)
        difference = (operate(images, operation, direction, magnitude) - expected).abs()
        if name not in GEOMETRIC:
            assert difference.max() == 0
        else:
            assert difference.max() <= 1
            assert (difference > 0).sum() <= (0.15 if name in SHIFTS else 0.01) * difference.numel() + 1


@given(
    st.integers(0, NONE - 1), st.integers(0, 1), st.floats(0, 9.9), st.integers(1, 12), st.integers(1, 12),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_any_operation_on_any_image_equals_timm(
    timm_ops: ModuleType, operation: int, direction: int, magnitude: float, height: int, width: int, seed: int
) -> None:
    images = examples(height, width, seed)
    expected = reference(timm_ops, images, operation, direction, magnitude)
    got = operate(images, operation, direction, magnitude)
    assert (got - expected).abs().max() <= (1 if OPERATIONS[operation] in GEOMETRIC else 0)


def test_a_large_image_equals_timm(timm_ops: ModuleType) -> None:
    """Here equalize and autocontrast work on all values, and coordinates are less exact."""
    images = examples(225, 201)
    for operation, name in enumerate(OPERATIONS):
        difference = (operate(images, operation, 1, 9.0) - reference(timm_ops, images, operation, 1, 9.0)).abs()
        assert difference.max() <= (1 if name in GEOMETRIC else 0)


def test_one_round_as_a_whole_equals_timm(timm_ops: ModuleType) -> None:
    images, index = examples(16, 20).repeat(40, 1, 1, 1), torch.arange(200)
    augment = RandAugment(1, 9, seed=3, fill=FILL)
    got = augment(images, index, 5)
    assert got.dtype == torch.uint8
    for row, (operation, direction) in enumerate(torch.cat(augment.draw(index, 5), dim=1).tolist()):
        image = images[row : row + 1]
        expected = image if operation == NONE else reference(timm_ops, image, operation, direction, 9)
        assert (got[row].int() - expected[0].int()).abs().max() <= 1


def test_rounds_follow_each_other() -> None:
    images, index = examples(12, 9).repeat(10, 1, 1, 1), torch.arange(50)
    augment = RandAugment(3, 7, seed=3, fill=FILL)
    got, (operation, direction) = augment(images, index, 5), augment.draw(index, 5)
    for row in range(50):
        expected = images[row : row + 1]
        for number in range(3):
            drawn = int(operation[row, number]), int(direction[row, number])
            expected = expected if drawn[0] == NONE else operate(expected, *drawn, 7.0)
        assert torch.equal(got[row], expected[0].to(torch.uint8))


def test_magnitude_zero_is_the_identity_where_it_is_in_timm() -> None:
    images = examples(20, 31)
    changed = [
        name for number, name in enumerate(OPERATIONS) if not torch.equal(operate(images, number, 0, 0.0), images)
    ]
    assert changed == ["AutoContrast", "Equalize", "Invert", "Posterize"]
    assert torch.equal(operate(images, OPERATIONS.index("Posterize"), 0, 0.0), images & 0b11110000)


def test_the_largest_magnitude_keeps_one_bit_and_solarizes_all() -> None:
    images = examples(8, 8)
    assert torch.equal(operate(images, OPERATIONS.index("Posterize"), 0, 10.0), images & 0b10000000)
    assert torch.equal(operate(images, OPERATIONS.index("Solarize"), 0, 10.0), 255 - images)


def test_no_operation_leaves_every_value() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(5, 3, 2, 256)
    assert torch.equal(operate(images, NONE, 0, 9.0), images)


def test_operations_are_uniform_and_independent() -> None:
    count = 64_000
    operation, direction = RandAugment(2, 9, seed=1).draw(torch.arange(count), 0)
    expected = torch.full((NONE + 1,), 0.5 / NONE, dtype=torch.float64)
    expected[NONE] = 0.5
    for number in range(2):
        shares = operation[:, number].bincount(minlength=NONE + 1) / count
        assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()
        upwards = torch.zeros(NONE + 1, dtype=torch.int64).index_add_(0, operation[:, number], direction[:, number])
        chances = count * expected
        assert ((upwards - chances / 2).abs() < 5 * chances.sqrt()).all()  # per operation, half of them
    both = (operation[:, 0] * (NONE + 1) + operation[:, 1]).bincount(minlength=(NONE + 1) ** 2) / count
    joint = torch.outer(expected, expected).flatten()
    assert ((both - joint).abs() < 5.5 * (joint / count).sqrt()).all()


def test_further_rounds_leave_the_earlier_ones() -> None:
    index = torch.arange(100)
    for two, three in zip(
        RandAugment(2, 9, seed=1).draw(index, 4), RandAugment(3, 9, seed=1).draw(index, 4), strict=True
    ):
        assert torch.equal(two, three[:, :2])


def test_epochs_seeds_and_samples_differ() -> None:
    images, index = examples(8, 8)[:1].expand(64, 3, 8, 8), torch.arange(64)
    first = RandAugment(2, 9, seed=1)(images, index, 0)
    assert torch.equal(first, RandAugment(2, 9, seed=1)(images, index, 0))
    assert len(first.flatten(1).unique(dim=0)) > 20  # a quarter has no operation
    assert not torch.equal(first, RandAugment(2, 9, seed=1)(images, index, 1))
    assert not torch.equal(first, RandAugment(2, 9, seed=2)(images, index, 0))


def test_a_sample_does_not_depend_on_its_batch_nor_on_strides() -> None:
    images, index = examples(13, 18).repeat(20, 1, 1, 1), torch.arange(100) * 7
    augment = RandAugment(2, 9, seed=1)
    whole = augment(images.contiguous(), index, 3)
    for chosen in (torch.tensor([5]), torch.arange(99, -1, -1), torch.tensor([3, 3, 30])):
        for layout in (torch.contiguous_format, torch.channels_last):
            part = augment(images[chosen].contiguous(memory_format=layout), index[chosen], 3)
            assert torch.equal(part, whole[chosen])
            assert part.is_contiguous(memory_format=layout)
    wide = torch.zeros(100, 3, 13, 40, dtype=torch.uint8)
    wide[..., 3:21] = images
    assert torch.equal(augment(wide[..., 3:21], index, 3), whole)


def test_the_input_stays_as_it_is() -> None:
    images = examples(6, 6).contiguous()
    before = images.clone()
    RandAugment(8, 9, seed=1)(images, torch.arange(5), 0)
    assert torch.equal(images, before)
    planes = images.float()
    for operation in range(NONE + 1):
        apply_operation(planes, torch.full((5,), operation), torch.zeros(5, dtype=torch.int64), 9.0, FILL)
        assert torch.equal(planes, before)


def test_the_fill_is_rounded_and_bounded() -> None:
    assert RandAugment(1, 9, seed=0, fill=(-0.4, 124.6, 300.0)).fill == (0, 125, 255)
    with pytest.raises(ValueError, match="fill has 2 numbers"):
        RandAugment(1, 9, seed=0, fill=(1.0, 2.0))


def test_an_empty_batch_passes() -> None:
    empty = torch.zeros(0, 3, 4, 4, dtype=torch.uint8)
    assert RandAugment(2, 9, seed=1)(empty, torch.zeros(0, dtype=torch.int64), 0).shape == (0, 3, 4, 4)


def test_python_asks_for_no_value() -> None:
    """Fake tensors have none: whatever would wait for the device raises."""
    images, index, augment = examples(7, 6), torch.arange(5), RandAugment(2, 9, seed=1)
    augment(images, index, 0)  # the constants are kept, and must be real
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        got = augment(fake.from_tensor(images), fake.from_tensor(index), 0)
    assert got.shape == images.shape


@pytest.mark.parametrize(
    ("num_ops", "magnitude"),
    [(0, 9), (-1, 9), (1.5, 9), (float("nan"), 9), (float("inf"), 9), (2, -0.1), (2, 10.1), (2, float("nan"))],
)
def test_bad_settings_name_the_key(num_ops: float, magnitude: float) -> None:
    with pytest.raises(UserError, match=r"data\.randaugment is .*expected two numbers"):
        RandAugment(num_ops, magnitude, seed=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_device_gives_the_same_and_never_waits_for_the_host() -> None:
    images, index = examples(32, 32).repeat(20, 1, 1, 1), torch.arange(100)
    images = images.contiguous(memory_format=torch.channels_last)
    augment = RandAugment(1, 9, seed=1)
    expected = augment(images, index, 2)
    on_device, index = images.cuda(), index.cuda()
    augment(on_device, index, 2)  # brings the constants to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = augment(on_device, index, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, augment(on_device, index, 2))
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert (got.cpu().int() - expected.int()).abs().max() <= 1
