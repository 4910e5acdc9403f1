"""The compiled decoder's pixels against Pillow, OpenCV and torchvision."""

from importlib.util import find_spec
import io
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import numpy as np
from PIL import Image
import pytest
from small_sets import random_images, write_set
import torch

pytest.importorskip("ffcv")
pytest.importorskip("numba")

from rlp import import_timm
from rlp.data.batch import Schedule
from rlp.data.beton import Beton
from rlp.data.decode import center_crop, random_crop, resample
from rlp.data.ffcv_loader import HostReader
from rlp.data.geometry import Geometry, fill_of, move

SEED, EPOCH = 2**63 + 11, 5
SIDES = [(40, 56), (56, 40), (31, 31), (70, 24), (17, 90)]


def smooth_images(count: int) -> list[np.ndarray]:
    """Pictures of several sizes that JPEG keeps well: noise, blurred."""
    small = random_images(count, 6, 7, seed=3)
    sizes = [SIDES[i % len(SIDES)] for i in range(count)]
    return [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        for image, (height, width) in zip(small, sizes, strict=True)
    ]


def decoded(path: Path, geometry: Geometry, train: bool = True, epoch: int = EPOCH) -> torch.Tensor:
    beton = Beton.open(path)
    rows = np.arange(beton.num_samples)
    reader = HostReader(beton, geometry, Schedule(rows, train, 1, SEED, 0, 1), 2, None)
    try:
        return reader.batch(rows, epoch)[0]
    finally:
        reader.close()


def crops(images: list[np.ndarray], geometry: Geometry, train: bool) -> list[np.ndarray]:
    """What is to be resized of each image."""
    found = []
    for sample, image in enumerate(images):
        height, width = image.shape[:2]
        if train:
            low, high = geometry.crop_scale
            top, left, tall, wide = random_crop(height, width, low, high, np.uint64(SEED), EPOCH, sample)
        else:
            top, left, tall, wide = center_crop(height, width, geometry.center_ratio)
        found.append(image[top : top + tall, left : left + wide])
    return found


def two_steps(image: np.ndarray, size: int) -> np.ndarray:
    """Pillow's antialiased bilinear resizing, rows before columns in every version."""
    picture = Image.fromarray(image).resize((size, image.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))


def test_jpegs_equal_pillow_to_the_bit(tmp_path: Path) -> None:
    """FFCV's own call of the same library is up to six levels off."""
    images = [image for image in smooth_images(40) if image.shape[:2] == SIDES[0]]
    beton = Beton.open(path := write_set(tmp_path / "a.beton", images, jpeg=True))
    assert np.array_equal(decoded(path, Geometry()).numpy(), beton.images())


@pytest.mark.parametrize("quality", [30, 90, 100])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"progressive": True}, {"subsampling": 1, "optimize": True}]
)
def test_every_kind_of_jpeg_equals_pillow(tmp_path: Path, quality: int, options: dict[str, Any]) -> None:
    from rlp.data.decode import GOOD, _jpeg
    from rlp.data.native import JpegDecoder, register

    register()
    buffer = io.BytesIO()
    Image.fromarray(smooth_images(1)[0]).save(buffer, "JPEG", quality=quality, **options)
    content = buffer.getvalue()
    expected = np.asarray(Image.open(io.BytesIO(content)))
    pixels, decoder = np.empty_like(expected), JpegDecoder()
    assert _jpeg(decoder.handle, np.frombuffer(content, np.uint8).copy(), pixels) == GOOD
    decoder.close()
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("jpeg", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("size", [9, 48])
def test_bilinear_equals_pillow_to_the_bit(tmp_path: Path, jpeg: bool, train: bool, size: int) -> None:
    images = smooth_images(30)
    beton = Beton.open(path := write_set(tmp_path / "a.beton", images, jpeg=jpeg))
    geometry = Geometry(image_size=size, interpolation="bilinear")
    got = decoded(path, geometry, train).numpy()
    stored = [beton.image(row) for row in range(len(images))]
    for image, crop in zip(got, crops(stored, geometry, train), strict=True):
        assert np.array_equal(image, two_steps(crop, size))
        one_step = np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BILINEAR))
        assert np.abs(image.astype(int) - one_step).max() <= 1  # Pillow 13 begins with columns in tall images


def test_bilinear_is_torchvisions_within_one_level() -> None:
    if find_spec("timm") is None or find_spec("torchvision") is None:
        pytest.skip("timm or torchvision is not installed")
    import_timm()
    from torchvision.transforms.v2 import functional

    for image in smooth_images(10):
        for size in (8, 30, 100):
            target = np.empty((size, size, 3), np.uint8)
            resample(image, 0, 0, *image.shape[:2], target)
            tensor = torch.from_numpy(image).permute(2, 0, 1)
            expected = functional.resize(tensor, [size, size], antialias=True).permute(1, 2, 0).numpy()
            assert np.abs(target.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("size", [9, 48])
def test_area_equals_opencv(tmp_path: Path, train: bool, size: int) -> None:
    cv2 = pytest.importorskip("cv2")
    images = smooth_images(30)
    path = write_set(tmp_path / "a.beton", images)
    geometry = Geometry(image_size=size)
    for image, crop in zip(decoded(path, geometry, train).numpy(), crops(images, geometry, train), strict=True):
        expected = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
        assert np.abs(image.astype(int) - expected).max() <= 1  # another version of OpenCV may round otherwise


@pytest.mark.parametrize("size", [0, 20])
def test_moves_come_after_resizing_and_equal_those_of_tensors(tmp_path: Path, size: int) -> None:
    images = random_images(25, 20, 20)
    path = write_set(tmp_path / "a.beton", images)
    plain, moved = Geometry(image_size=size), Geometry(True, 3, size)
    fill = fill_of(Beton.open(path).card.mean)
    ids = torch.arange(25)
    expected = move(decoded(path, plain), ids, EPOCH, SEED, moved, fill)
    assert torch.equal(decoded(path, moved), expected)
    assert torch.equal(decoded(path, moved, train=False), decoded(path, plain, train=False))
    other = decoded(path, Geometry(True, 3, size, fill=(1, 2, 3)))
    assert torch.equal(other, move(decoded(path, plain), ids, EPOCH, SEED, moved, (1, 2, 3)))


def test_raw_images_come_out_as_they_are(tmp_path: Path) -> None:
    images = random_images(7, 5, 9)
    got = decoded(write_set(tmp_path / "a.beton", images), Geometry(), train=False)
    assert np.array_equal(got.numpy(), np.stack(images))


def test_the_constants_of_compiled_code_are_those_of_the_other_modules() -> None:
    """They are written out there, because numba keeps compiled code until that file itself changes."""
    from rlp.data import decode, format, native
    from rlp.data.geometry import MOVES
    from rlp.philox import stream_id

    assert (decode.JPG, decode.PREFIX) == (format.JPG, native.PREFIX)
    assert (stream_id("crop"), stream_id(MOVES)) == (decode.CROP_STREAM, decode.MOVE_STREAM)


USE = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from rlp.data import decode
words = decode.philox(1, 2, 3, 4, np.uint64(5))
print(*map(int, words), sum(decode.philox.stats.cache_hits.values()))
"""


def test_compiled_code_is_kept_and_torn_files_of_it_do_no_harm(tmp_path: Path) -> None:
    def use() -> list[str]:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", USE, str(Path(__file__).resolve().parent.parent)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    *words, hits = use()
    assert hits == "0"
    assert use() == [*words, "1"]
    for pattern, content in (("*.nbi", b""), ("*.nbc", b"torn")):
        for file in tmp_path.rglob(pattern):
            file.write_bytes(content)
        assert use() == [*words, "0"]
        assert use() == [*words, "1"]
