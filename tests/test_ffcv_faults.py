"""What FFCV gets wrong and the loader must not: hangs, leaks, seeds, threads, silent damage."""

import gc
import hashlib
import math
from pathlib import Path
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from small_sets import random_images, write_card, write_set
import torch

from rlp.data.batch import Loader
from rlp.data.geometry import Geometry
from rlp.data.loader import open_loader
from rlp.data.prefetch import Prefetcher
from rlp.distributed import World
from rlp.errors import UserError
from rlp.philox import random_bits, stream_id

pytestmark = pytest.mark.timeout(120)


def open_ffcv(path: Path, **changes: Any) -> Loader:
    pytest.importorskip("ffcv")
    options = {"train": True, "batch_size": 4, "seed": 3, "world": World(), "kind": "ffcv", "workers": 2}
    return open_loader(path, **options | changes)


def mixed_images(count: int) -> list[np.ndarray]:
    sides = np.random.default_rng(1).integers(20, 60, (count, 2))
    return [random_images(1, int(h), int(w), seed=i)[0] for i, (h, w) in enumerate(sides)]


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def digest(loader: Loader, epoch: int) -> str:
    content = hashlib.sha256()
    for batch in loader.epoch(epoch):
        for column in batch:
            content.update(column.contiguous().numpy().tobytes())
    return content.hexdigest()


# Prefetching: no hang, no leak.


def test_prefetched_results_come_in_order() -> None:
    assert list(Prefetcher(lambda i: i * i, range(50), ahead=2)) == [i * i for i in range(50)]


@pytest.mark.parametrize("error", [KeyError("no such sample"), MemoryError(), SystemExit(3)])
def test_an_error_in_the_thread_is_raised_in_the_main_thread(error: BaseException) -> None:
    def work(item: int) -> int:
        if item == 3:
            raise error
        return item

    results = Prefetcher(work, range(9))
    got = []
    with pytest.raises(type(error)) as caught:
        got.extend(results)
    assert caught.value is error
    assert prefetch_threads() == []
    with pytest.raises(StopIteration):
        next(results)


def test_a_thread_that_dies_in_silence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prefetcher, "_run", lambda self: None)
    with pytest.raises(RuntimeError, match=r"loads a\.beton ended without a word"):
        next(Prefetcher(lambda i: i, range(3), name="a.beton"))


def test_a_stuck_thread_is_noticed() -> None:
    release = threading.Event()
    results = Prefetcher(lambda i: release.wait(60), range(3), name="a.beton", patience=0.5)
    with pytest.raises(RuntimeError, match=r"no batch of a\.beton came for 0\.5 s"):
        next(results)
    release.set()
    results.close()
    assert prefetch_threads() == []


def test_closing_is_possible_at_any_time_and_twice() -> None:
    results = Prefetcher(lambda i: i, range(1000), ahead=1)
    assert next(results) == 0
    results.close()
    results.close()
    assert prefetch_threads() == []


# The loader.


def test_an_error_in_the_pipeline_reaches_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = open_ffcv(write_set(tmp_path / "a.beton", random_images(20, 4, 4)))

    def broken(*arguments: Any) -> None:
        raise TypeError("float16 columns fail in FFCV's thread")

    monkeypatch.setattr("rlp.data.ffcv_loader.decode_images", broken)
    with pytest.raises(TypeError, match="float16"):
        list(loader.epoch(0))
    assert prefetch_threads() == []


@pytest.mark.parametrize("image_size", [0, 16])
def test_a_damaged_jpeg_names_its_sample(tmp_path: Path, image_size: int) -> None:
    """FFCV hands on another sample's pixels."""
    images = random_images(12, 24, 24)
    path = write_set(tmp_path / "a.beton", images, jpeg=True)
    content = bytearray(path.read_bytes())
    starts = [at for at in range(len(content) - 3) if content[at : at + 3] == b"\xff\xd8\xff"]
    content[starts[7] : starts[7] + 2] = b"\0\0"
    path.write_bytes(content)
    write_card(path, images, 4, 3, "train", True)
    with pytest.raises(UserError, match=r"a\.beton is damaged: the JPEG of sample 7 cannot be decoded"):
        list(open_ffcv(path, geometry=Geometry(image_size=image_size)).epoch(0))


def test_leaving_early_leaks_neither_threads_nor_memory(tmp_path: Path) -> None:
    """Twenty times up to four batches of 6 MB would be 500 MB."""
    loader = open_ffcv(write_set(tmp_path / "a.beton", random_images(128, 256, 256)), batch_size=32)

    def resident_bytes() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = 0
    for turn in range(22):
        for _ in loader.epoch(turn):
            break
        assert prefetch_threads() == []
        if turn == 1:
            before = resident_bytes()
    assert resident_bytes() - before < 100e6
    threads = threading.active_count()
    loader.close()
    assert threading.active_count() < threads


def test_two_loaders_take_turns_and_run_at_once(tmp_path: Path) -> None:
    first = open_ffcv(write_set(tmp_path / "a.beton", random_images(40, 8, 8)))
    second = open_ffcv(write_set(tmp_path / "b.beton", random_images(40, 8, 8, seed=1)), train=False)
    expected = [digest(first, 0), digest(second, 0)]
    for a, b in zip(first.epoch(0), second.epoch(0), strict=True):
        assert not torch.equal(a.image, b.image)
    found: dict[int, list[str]] = {0: [], 1: []}

    def repeat(place: int, loader: Loader) -> None:
        for _ in range(10):
            found[place].append(digest(loader, 0))

    threads = [threading.Thread(target=repeat, args=pair) for pair in ((0, first), (1, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: expected[:1] * 10, 1: expected[1:] * 10}


def test_one_loader_serves_two_loops(tmp_path: Path) -> None:
    loader = open_ffcv(write_set(tmp_path / "a.beton", random_images(20, 4, 4)))
    for a, b in zip(loader.epoch(0), loader.epoch(0), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_pixels_depend_on_seed_epoch_and_sample_alone(tmp_path: Path) -> None:
    """Random crops: equal for any number of workers and ranks and in a fresh process; torch keeps its threads there."""
    pytest.importorskip("ffcv")
    path = write_set(tmp_path / "a.beton", mixed_images(24), jpeg=True)
    options: dict[str, Any] = {"geometry": Geometry(True, 3, 16), "batch_size": 6}
    loader = open_ffcv(path, workers=1, **options)
    expected = digest(loader, 5)
    assert digest(loader, 5) == expected
    assert len({expected, digest(loader, 6), digest(open_ffcv(path, seed=4, **options), 5)}) == 3
    for workers in (2, 5):
        assert digest(open_ffcv(path, workers=workers, **options), 5) == expected
    alone = list(loader.epoch(5))
    for size in (2, 3):
        ranks = [open_ffcv(path, world=World(rank, size), **options) for rank in range(size)]
        for whole, *parts in zip(alone, *(rank.epoch(5) for rank in ranks), strict=True):
            assert torch.equal(torch.cat([part.image for part in parts]), whole.image)
    for start in range(loader.steps + 1):  # resumed in mid-epoch
        rest = list(loader.epoch(5, start))
        assert len(rest) == loader.steps - start
        assert all(torch.equal(a.image, b.image) for a, b in zip(rest, alone[start:], strict=True))
    program = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
torch.set_num_threads(3)
from test_ffcv_faults import Geometry, World, digest, open_loader
world, options = World(), dict(train=True, kind="ffcv", workers=2)
loader = open_loader({str(path)!r}, batch_size=6, seed=3, world=world, geometry=Geometry(True, 3, 16), **options)
print(digest(loader, 5), torch.get_num_threads())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == [expected, "3"], result.stderr


def test_evaluation_takes_the_middle(tmp_path: Path) -> None:
    images = [np.full((20, 30, 3), 9, np.uint8), np.full((33, 21, 3), 9, np.uint8)]
    for image in images:
        side = min(image.shape[:2]) // 2
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        image[top : top + side, left : left + side] = 200
    path = write_set(tmp_path / "a.beton", images)
    (batch,) = open_ffcv(path, train=False, geometry=Geometry(image_size=8, center_ratio=0.5)).epoch(0)
    assert (batch.image == 200).all()


# The compiled crops.


def test_compiled_words_equal_the_definition() -> None:
    pytest.importorskip("numba")
    from rlp.data.decode import CROP_STREAM, philox

    assert stream_id("crop") == CROP_STREAM
    for seed in (0, 1, 2**63, 2**64 - 1):
        for epoch in (0, 3, 2**32 - 1):
            for sample in (0, 1, 77, 2**32 - 1):
                words = random_bits(seed, "crop", np.array(sample), 40, epoch).tolist()
                for block in (0, 9):
                    got = philox(sample, epoch, block, CROP_STREAM, np.uint64(seed))
                    assert [int(word) for word in got] == words[4 * block : 4 * block + 4]


def crop_oracle(height: int, width: int, low: float, high: float, words: list[int]) -> tuple[int, int, int, int]:
    """Random resized crop from 40 words, in plain Python."""
    for attempt in range(10):
        area_word, aspect_word, top_word, left_word = words[4 * attempt : 4 * attempt + 4]
        area = height * width * (low + (high - low) * ((area_word + 0.5) / 2**32))
        span = math.log(4 / 3) - math.log(3 / 4)
        aspect = math.exp(math.log(3 / 4) + span * ((aspect_word + 0.5) / 2**32))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return top_word * (height - h + 1) >> 32, left_word * (width - w + 1) >> 32, h, w
    w, h = max(1, min(width, round(height * 4 / 3))), max(1, min(height, round(width / 0.75)))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("scale", [(0.08, 1.0), (1.0, 1.0), (0.3, 0.4)])
def test_compiled_crops_equal_the_oracle_and_stay_inside(scale: tuple[float, float]) -> None:
    pytest.importorskip("numba")
    from rlp.data.decode import random_crop

    sizes = [(1, 1), (1, 40), (300, 2), (37, 53), (500, 375), (2, 2)]
    crops: set[tuple[int, ...]] = set()
    for sample in range(120):
        height, width = sizes[sample % len(sizes)]
        words = random_bits(7, "crop", np.array(sample), 40, 2).tolist()
        got = tuple(int(v) for v in random_crop(height, width, *scale, np.uint64(7), 2, sample))
        assert got == crop_oracle(height, width, *scale, words)
        top, left, tall, wide = got
        assert 0 <= top <= height - tall
        assert 0 <= left <= width - wide
        assert min(tall, wide) >= 1
        crops.add(got)
    assert len(crops) > 20 or scale == (1.0, 1.0)
