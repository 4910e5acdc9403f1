"""Writing data sets: nothing half-written is left or believed, however a write ends."""

from collections.abc import Callable
import errno
import functools
import io
import multiprocessing
import os
from pathlib import Path
import random
import shutil
import signal
import time

import numpy as np
from PIL import Image
import pytest
from small_sets import random_images

from data_prep import pages, partial, workers, writer
from data_prep.encode import ImageOptions, Sample, encode_chunk
from data_prep.partial import PartialPair, partial_path, was_interrupted
from data_prep.schema import PrepareConfig
from data_prep.write_datasets import prepare
from rlp.data.beton import Beton, card_path
from rlp.errors import UserError
from tests.image_folder import PAIR, left_in, make_source, options_of, request, run_script, seed_of


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path)


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests write hundreds of files; with pages of 8 MiB that would be gigabytes."""
    monkeypatch.setattr(writer, "PageWriter", functools.partial(pages.PageWriter, page_size=1 << 16))


def broken(kind: str, path: Path) -> None:
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-60])
    elif kind == "text":
        path.write_text("no image")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "deep":
        Image.fromarray(np.zeros((4, 4), np.uint16)).save(path.with_suffix(".png"))
        path.with_suffix(".png").replace(path)
    elif kind == "grey":
        Image.new("L", (12, 10)).save(path)
    else:
        path.unlink()
        path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("truncated", 0),
        ("text", 0),
        ("empty", 0),
        ("deep", 0),
        ("grey", 0),
        ("dangling", 0),
        ("truncated", 2),
        ("grey", 2),
    ],
)
def test_a_bad_image_is_named_and_nothing_is_left(tmp_path: Path, source: Path, kind: str, count: int) -> None:
    path = source / "train" / "bee" / "4.jpg"
    broken(kind, path)
    with pytest.raises(UserError, match=r"train/bee/4\.jpg"):
        prepare(request(source, tmp_path / "out", workers=count))
    assert left_in(tmp_path / "out") == []


def kill_in_worker(samples: list[Sample], options: ImageOptions) -> object:
    if any(sample.name == "train/bee/4.jpg" for sample in samples):
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_chunk(samples, options)


def fail_in_worker(samples: list[Sample], options: ImageOptions) -> object:
    raise UserError("bad luck")


@pytest.mark.parametrize(
    ("work", "sentence"), [(kill_in_worker, "a worker process died"), (fail_in_worker, "bad luck")]
)
def test_a_dead_or_failing_worker_ends_the_write(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[..., object], sentence: str
) -> None:
    monkeypatch.setattr(workers, "_work", work)
    monkeypatch.setattr(workers, "CHUNK", 2)
    with pytest.raises(UserError, match=sentence):
        prepare(request(source, tmp_path / "out", workers=2))
    assert left_in(tmp_path / "out") == []
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_is_one_sentence(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, step: int, old: bool
) -> None:
    out, left = tmp_path / "out", []
    if old:
        prepare(request(source, out))
        left = PAIR
    calls = iter(range(100))
    write = pages.PageWriter._write

    def full(self: pages.PageWriter, data: bytes) -> None:
        if next(calls) == step:
            self._file.write(data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(pages.PageWriter, "_write", full)
    with pytest.raises(UserError, match="the disk is full"):
        prepare(request(source, out, words={"seed": 7}, overwrite=True))
    assert left_in(out) == left
    if old:
        assert Beton.open(out / "train.beton", full_hash=True).card.words_seed == 0


def test_an_unbuffered_write_that_takes_a_part_is_continued() -> None:
    class Slow(io.BytesIO):
        def write(self, data: object) -> int:
            return super().write(memoryview(data)[:5])  # type: ignore[arg-type]

    file = Slow()
    page = pages.PageWriter.__new__(pages.PageWriter)
    page._file = file
    page._write(b"all of these bytes")
    assert file.getvalue() == b"all of these bytes"


def test_a_small_disk_is_noticed_beforehand(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"0\.00 GB free"):
        prepare(request(source, tmp_path / "out", {"size": 8}))
    assert left_in(tmp_path / "out") == []


def test_a_folder_that_cannot_be_made(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written"):
        prepare(request(source, tmp_path / "file" / "out"))


def test_a_class_whose_name_is_no_text(tmp_path: Path, source: Path) -> None:
    for split in ("train", "val"):
        os.rename(source / split / "bee", os.fsencode(source / split) + b"/b\xff")
    with pytest.raises(UserError, match=r"the name 'b\\udcff' cannot stand in a card"):
        prepare(request(source, tmp_path / "out"))
    assert left_in(tmp_path / "out") == []


def test_two_writers_of_one_output(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    with PartialPair([out / "train.beton", out / "val.beton"]):
        with pytest.raises(UserError, match="being written by another process"):
            prepare(request(source, out))
        assert left_in(out) == [".train.beton.partial", ".val.beton.partial"]
    prepare(request(source, out))


# Killed at any moment


STEPS = [
    (pages.PageWriter, "_write"),
    (os, "fsync"),
    (Path, "replace"),
    (Path, "unlink"),
    (partial, "_sync"),
    (partial, "_write_synced"),
]


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted() -> None:
    raise SystemExit(9)  # as SIGTERM's handler does


def end_at(step: int, end: Callable[[], None], config: PrepareConfig) -> None:
    """Write, and end this process before its ``step``-th change to the disk."""
    count = iter(range(1000))

    def dying(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            if next(count) == step:
                end()
            return call(*args, **kwargs)

        return wrapped

    for owner, name in STEPS:
        setattr(owner, name, dying(getattr(owner, name)))
    prepare(config)


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("end", [killed, interrupted])
def test_ended_before_any_step(tmp_path: Path, source: Path, old: bool, end: Callable[[], None]) -> None:
    """However it ends, each .beton is refused, or whole: the old pair or the new one, never one of each."""
    context = multiprocessing.get_context("fork")
    seeds = set()
    for step in range(100):
        out = tmp_path / f"{step}"
        if old:
            prepare(request(source, out))
        process = context.Process(
            target=end_at, args=(step, end, request(source, out, words={"seed": 7}, overwrite=old))
        )
        process.start()
        process.join()
        found = [seed_of(out / f"{split}.beton") for split in ("train", "val")]
        assert None in found or found[0] == found[1]
        seeds.update(found)
        if process.exitcode == 0:
            break
        assert process.exitcode == (9 if end is interrupted else -signal.SIGKILL)
        if found != [0, 0]:  # an intact old pair rightly asks for --output.overwrite
            prepare(request(source, out, words={"seed": 7}))
            assert left_in(out) == PAIR
            assert [seed_of(out / f"{split}.beton") for split in ("train", "val")] == [7, 7]
        shutil.rmtree(out, ignore_errors=True)
    else:
        pytest.fail("100 steps were not enough to write a pair")
    assert seeds == ({0, None, 7} if old else {None, 7})


def test_an_up_to_date_pair_is_swept_of_what_a_killed_write_left(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    prepare(request(source, out))
    partial_path(out / "train.beton").write_bytes(b"half")
    partial_path(card_path(out / "val.beton")).write_bytes(b"half")
    assert was_interrupted([out / "train.beton", out / "val.beton"])
    assert not prepare(request(source, out))[1]
    assert left_in(out) == PAIR


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_writer_and_workers(tmp_path: Path, source: Path, sent: signal.Signals) -> None:
    pytest.importorskip("fastargs")
    folder = source / "train" / "ant"
    Image.fromarray(random_images(1, 2000, 2000)[0]).save(folder / "large.png", compress_level=0)
    for i in range(150):  # keeps the workers busy for many seconds
        os.link(folder / "large.png", folder / f"large{i}.png")
    out = tmp_path / "out"
    process = run_script(*options_of(source, out, "--output.workers", "2", "--image.mode", "jpg"))
    while len(children_of(process.pid)) < 3:  # two workers and multiprocessing's resource tracker
        assert process.poll() is None
        time.sleep(0.02)
    children = children_of(process.pid)
    time.sleep(random.Random(0).uniform(0.3, 0.9))
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[sent]
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a worker outlived the writer"
        time.sleep(0.05)
    assert not set(left_in(out)) & set(PAIR)
    if sent != signal.SIGKILL:
        assert left_in(out) == []
