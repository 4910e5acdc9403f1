"""What happens to a file, a process or a loop while a loader is at work: one clear error in seconds, never a hang."""

from collections.abc import Callable, Iterator
import gc
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import traceback
from typing import Any

import numpy as np
import pytest
from small_sets import random_images, write_card, write_set

from rlp.data.batch import Loader
from rlp.data.beton import Beton
from rlp.data.geometry import Geometry
from rlp.data.loader import open_loader
from rlp.data.prefetch import Prefetcher
from rlp.distributed import World
from rlp.errors import UserError

pytestmark = pytest.mark.timeout(60)

KINDS = ("resident", "ffcv")
IMAGES = random_images(200, 6, 6)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_set(tmp_path / "a.beton", IMAGES)


def opened(path: Path, kind: str, **changes: Any) -> Loader:
    if kind == "ffcv":
        pytest.importorskip("ffcv")
    options: dict[str, Any] = {"train": True, "batch_size": 4, "seed": 3, "world": World(), "workers": 2}
    return open_loader(path, kind=kind, **options | changes)  # type: ignore[arg-type]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    write_set(path.with_name("b.beton"), random_images(200, 6, 6, seed=1)).replace(path)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"x" * 100)
    os.utime(path)


@pytest.mark.parametrize("change", [truncate, replace, rewrite, Path.unlink])
def test_a_file_that_changes_meanwhile_is_named(path: Path, change: Callable[[Path], None]) -> None:
    loader = opened(path, "ffcv")
    batches = loader.epoch(0)
    next(batches)
    change(path)
    with pytest.raises(UserError, match=r"a\.beton .*(while it was in use|became shorter)"):
        list(batches)
    with pytest.raises(UserError, match=r"a\.beton "):
        next(loader.epoch(1))
    loader.close()


def test_a_file_cut_between_the_check_and_the_reading_ends_no_process(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a memory map past the new end would be a signal that kills the interpreter."""
    loader = opened(path, "ffcv")
    monkeypatch.setattr("rlp.data.beton.Beton.check_unchanged", lambda self: None)
    os.truncate(path, 4096)
    with pytest.raises(UserError, match=r"a\.beton was truncated while it was in use"):
        list(loader.epoch(0))


def test_a_resident_set_outlives_its_file(path: Path) -> None:
    loader = opened(path, "resident")
    path.unlink()
    assert sum(len(batch.label) for batch in loader.epoch(0)) == 200


def test_a_warning_is_no_damage_if_the_bytes_are_those_written(tmp_path: Path) -> None:
    """Old cameras wrote JPEGs with stray bytes, which every decoder forgives; a torn one is not forgiven."""
    pytest.importorskip("ffcv")
    path = write_set(tmp_path / "a.beton", random_images(12, 24, 24), jpeg=True)
    content = bytearray(path.read_bytes())
    starts = [at for at in range(len(content) - 3) if content[at : at + 3] == b"\xff\xd8\xff"]
    end = content.index(b"\xff\xd9", starts[5])
    content[end - 40 : end] = bytes(40)  # the last rows are lost
    path.write_bytes(content)
    images = random_images(12, 24, 24)
    damaged = Beton.open(path)
    with pytest.raises(UserError, match=r"a\.beton is damaged: the JPEG of sample 5 cannot be decoded"):
        list(opened(path, "ffcv", batch_size=12).epoch(0))
    assert damaged.crc32(5) != damaged.layout["crc32"][5]
    layout = damaged.layout.copy()
    layout["crc32"][5] = damaged.crc32(5)  # as if it had come like this
    loader = opened(path, "ffcv", batch_size=12)
    loader._reader._layout = layout  # type: ignore[attr-defined]
    assert len(list(loader.epoch(0))) == 1
    write_card(path, images, 4, 3, "train", True)


MARKERS = {"SOI": b"\xff\xd8", "DQT": b"\xff\xdb", "SOF": b"\xff\xc0", "DHT": b"\xff\xc4"}


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_header_is_blamed_on_its_sample_and_on_no_later_one(tmp_path: Path, marker: str, seed: int) -> None:
    """turbojpeg's decoder stays in the middle of a JPEG that it could not read."""
    pytest.importorskip("ffcv")
    path = write_set(tmp_path / "a.beton", random_images(40, 24, 24), jpeg=True)
    record = Beton.open(path).layout[7]
    content = bytearray(path.read_bytes())
    start = int(record["image"])
    at = content.index(MARKERS[marker], start)
    content[at + 4 : at + 9] = b"\xff" * 5
    if marker == "SOI":
        content[at : at + 2] = b"\0\0"
    path.write_bytes(content)
    loader = opened(path, "ffcv", seed=seed, workers=1)
    with pytest.raises(UserError, match=r"the JPEG of sample 7 cannot be decoded"):
        list(loader.epoch(0))
    reader = loader._reader  # type: ignore[attr-defined]
    healthy = np.array([3, 8, 0, 12])
    for _ in range(2):
        images, _ = reader.batch(healthy, 0)
        assert np.array_equal(images.numpy(), np.stack([Beton.open(path).image(row) for row in healthy]))


@pytest.mark.parametrize("what", ["stray bytes", "version"])
def test_a_warning_in_the_header_is_no_damage(tmp_path: Path, what: str) -> None:
    pytest.importorskip("ffcv")
    path = write_set(tmp_path / "a.beton", random_images(12, 24, 24), jpeg=True)
    beton = Beton.open(path)
    start, size = (int(beton.layout[5][name]) for name in ("image", "image_size"))
    content = bytearray(path.read_bytes())
    image = content[start : start + size]
    if what == "version":
        image[image.index(b"JFIF") + 5] = 9
    else:  # in place of the end of the pixels, so that the size stays
        at = image.index(b"\xff\xdb")
        image = (image[:at] + b"\x12\x34" + image[at:])[:size]
        image[-2:] = b"\xff\xd9"
    content[start : start + size] = image
    path.write_bytes(content)
    loader = opened(path, "ffcv", batch_size=12)
    with pytest.raises(UserError, match="sample 5"):  # its bytes are not those written
        list(loader.epoch(0))
    layout = beton.layout.copy()
    layout["crc32"][5] = Beton.open(path).crc32(5)
    loader._reader._layout = layout  # type: ignore[attr-defined]
    assert len(list(loader.epoch(0))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_loader_says_so(path: Path, kind: str) -> None:
    loader = opened(path, kind)
    batches = loader.epoch(0)
    next(batches)
    loader.close()
    loader.close()
    for again in (batches, loader.epoch(0)):
        with pytest.raises(RuntimeError, match=r"the loader of .*a\.beton was closed"):
            list(again)


def test_a_prefetcher_that_is_lost_takes_its_thread_along() -> None:
    """As by Ctrl-C between its making and its use."""
    lost = Prefetcher(lambda item: item, range(1000), ahead=1, name="lost")
    assert next(lost) == 0
    thread = lost._thread
    del lost
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_file_cut_while_it_is_read_as_a_whole_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a resident set is; through a memory map it would be a signal that kills the interpreter."""
    beton = Beton.open(path)
    monkeypatch.setattr("rlp.data.beton.Beton.check_unchanged", lambda self: None)
    os.truncate(path, 4096)
    for read in (beton.images, lambda: beton.words):
        with pytest.raises(UserError, match=r"a\.beton was truncated while it was in use"):
            read()


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_a_worker_reaches_the_loop(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    loader = opened(path, kind)

    def broken(*_: Any) -> None:
        raise MemoryError("too little")

    monkeypatch.setattr("rlp.data.decode.gather_images", broken)
    if kind == "ffcv":
        monkeypatch.setattr("rlp.data.ffcv_loader.decode_images", broken)
    with pytest.raises(MemoryError, match="too little"):
        list(loader.epoch(0))
    monkeypatch.undo()
    assert len(list(loader.epoch(0))) == 50  # the loader is as good as new


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_early_leaves_no_thread(path: Path, kind: str) -> None:
    before = threading.active_count()
    loader = opened(path, kind)
    for turn in range(20):
        for _ in loader.epoch(turn):
            break
    assert len(list(loader.epoch(99))) == 50
    loader.close()
    assert threading.active_count() == before


def in_fork(work: Callable[[], None]) -> str:
    """What a forked child prints; it ends by itself or is killed after ten seconds."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(10)
        try:
            work()
            said = "nothing"
        except BaseException:
            said = traceback.format_exc()
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_loader_from_before_a_fork_says_so(path: Path, kind: str) -> None:
    loader = opened(path, kind)
    next(loader.epoch(0))
    half = loader.epoch(0)
    next(half)
    for batches in (loader.epoch(0), half):
        said = in_fork(lambda batches=batches: print(list(batches)))
        assert "was opened before a fork; open it in the child process" in said
    assert len(list(half)) == 49
    assert len(list(loader.epoch(0))) == 50


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_loader_opened_in_a_forked_child_works(path: Path, kind: str) -> None:
    """FFCV's dies there with the usual threading layer."""
    next(opened(path, kind).epoch(0))

    def work() -> None:
        assert len(list(opened(path, kind).epoch(0))) == 50

    assert in_fork(work) == "nothing"


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "set"
    folder.mkdir()
    write_set(folder / "a.beton", IMAGES)
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)
    yield folder / "a.beton"
    folder.chmod(0o755)


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_only_set_is_read(read_only: Path, kind: str) -> None:
    assert len(list(opened(read_only, kind).epoch(0))) == 50


PROGRAM = """
import sys
import numba.core.caching as caching
def nowhere(cls, *_):
    return None
assert caching.CacheImpl._locator_classes
for locator in caching.CacheImpl._locator_classes:
    locator.from_function = classmethod(nowhere)
from rlp.data.loader import open_loader
from rlp.distributed import World
for kind in sys.argv[2:]:
    loader = open_loader(sys.argv[1], train=True, batch_size=50, seed=0, world=World(), kind=kind)
    print(len(list(loader.epoch(0))))
from rlp.data import decode
assert not hasattr(decode.decode_images._cache, "_cache")  # nothing keeps it
"""


@pytest.mark.slow
def test_without_a_place_for_compiled_code_it_is_compiled_anew(path: Path) -> None:
    pytest.importorskip("ffcv")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), *KINDS], capture_output=True, text=True, timeout=60
    )
    assert result.stdout.split() == ["4", "4"], result.stderr


def test_two_loaders_at_once_are_no_danger_to_one_another(path: Path) -> None:
    geometry = Geometry(flip=True, crop_padding=1)
    loaders = [opened(path, kind, geometry=geometry) for kind in KINDS]
    expected = [[batch.image.numpy() for batch in loader.epoch(0)] for loader in loaders]
    for a, b, *both in zip(*(loader.epoch(0) for loader in loaders), *expected, strict=True):
        assert np.array_equal(a.image.numpy(), both[0])
        assert np.array_equal(b.image.numpy(), both[1])
        assert np.array_equal(*both)
