"""One copy for all processes of a machine: filled once, by whoever comes first, and freed by the last."""

from functools import partial
import os
from pathlib import Path
import signal
import subprocess
import sys
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pytest
from small_sets import random_images, write_set
import torch

from rlp.data.loader import open_loader
from rlp.data.shared import share
from rlp.distributed import World

pytestmark = pytest.mark.timeout(90)  # three interpreters import torch, on a busy machine


def pattern(target: np.ndarray) -> None:
    target[:] = np.arange(len(target)) % 251


def never(target: np.ndarray) -> None:
    raise AssertionError("filled twice")


def test_the_second_gets_what_the_first_filled(tmp_path: Path) -> None:
    first = share("a", 1000, pattern, tmp_path)
    second = share("a", 1000, never, tmp_path)
    assert np.array_equal(second.array, np.arange(1000) % 251)
    second.array[3] = 77
    assert first.array[3] == 3  # what one process writes stays with it
    kept = second.array
    first.close()
    assert len(list(tmp_path.iterdir())) == 1
    second.close()
    assert list(tmp_path.iterdir()) == []
    assert kept[3] == 77  # still mapped
    second.close()


def test_a_failure_to_fill_leaves_nothing_and_the_next_may_try(tmp_path: Path) -> None:
    def fails(target: np.ndarray) -> None:
        target[0] = 1
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        share("a", 10, fails, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert share("a", 10, pattern, tmp_path).array[9] == 9


def test_what_a_killed_process_left_half_filled_is_filled_anew(tmp_path: Path) -> None:
    (tmp_path / f"rlp-{os.getuid()}-a-400").write_bytes(b"x" * 400)
    assert share("a", 400, pattern, tmp_path).array[399] == 399 % 251


def test_what_was_left_is_used_only_if_it_is_whole(tmp_path: Path) -> None:
    """And what was left under other names is removed, when nobody holds it."""
    first = share("a", 1000, pattern, tmp_path)
    held = share("b", 10, pattern, tmp_path)
    (path,) = tmp_path.glob("*-a-1000")
    whole = path.read_bytes()
    first.close()
    path.write_bytes(whole)
    again = share("a", 1000, never, tmp_path)
    again.close()
    path.write_bytes(whole[:500] + b"!" + whole[501:])
    assert share("a", 1000, pattern, tmp_path).array[500] == 500 % 251
    path.write_bytes(b"left")
    share("c", 10, pattern, tmp_path).close()
    assert [left.name for left in tmp_path.iterdir()] == [f"rlp-{os.getuid()}-b-10"]
    held.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gives_nothing_back(tmp_path: Path) -> None:
    held = share("a", 10, pattern, tmp_path)
    child = os.fork()
    if child == 0:
        held.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    held.close()


def test_too_little_room_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"."):
        share("a", 1 << 60, pattern, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=r"."):
        share("a", 10, pattern, tmp_path / "missing")


PROGRAM = """
import sys, time
from pathlib import Path
from rlp.data.shared import share
def fill(target):
    print("fills", flush=True)
    time.sleep(float(sys.argv[2]))
    target[:] = 5
held = share("a", 100000, fill, Path(sys.argv[1]))
print(int(held.array.sum()), flush=True)
sys.stdin.read()
"""


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(seconds)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_processes_share_and_one_that_is_killed_while_filling_is_replaced(tmp_path: Path) -> None:
    dies = start(tmp_path, 60)
    assert line(dies) == "fills"
    waiting = [start(tmp_path, 0.1) for _ in range(4)]
    dies.send_signal(signal.SIGKILL)
    said = [[line(process)] for process in waiting]
    for lines, process in zip(said, waiting, strict=True):
        if lines == ["fills"]:
            lines.append(line(process))
    # Those that waited go on while the one that filled still holds it.
    assert sorted(said, key=len) == [["500000"], ["500000"], ["500000"], ["fills", "500000"]]
    for process in waiting:
        process.communicate("")
    assert list(tmp_path.iterdir()) == []
    dies.communicate()


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two ranks on this machine, and a folder in place of its shared memory."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("rlp.data.resident.share", partial(share, folder=folder))
    return folder


OPTIONS: dict[str, Any] = {"train": True, "batch_size": 4, "seed": 1, "kind": "resident"}


def test_ranks_on_the_cpu_have_one_copy_of_the_images(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_set(tmp_path / "a.beton", random_images(20, 6, 6))
    with monkeypatch.context() as alone:
        alone.delenv("LOCAL_WORLD_SIZE")
        batches = list(open_loader(path, world=World(), **OPTIONS).epoch(0))
    assert list(memory.iterdir()) == []
    loaders = []
    for rank in range(2):
        monkeypatch.setattr("rlp.data.resident._sets", WeakValueDictionary())  # as in another process
        loaders.append(open_loader(path, world=World(rank, 2), **OPTIONS))
    assert len(list(memory.iterdir())) == 1
    for whole, *parts in zip(batches, *(loader.epoch(0) for loader in loaders), strict=True):
        assert torch.equal(torch.cat([part.image for part in parts]), whole.image)
    for loader in loaders:
        loader.close()
    assert list(memory.iterdir()) == []


def test_without_room_in_shared_memory_every_rank_has_its_own_copy(tmp_path: Path, memory: Path) -> None:
    path = write_set(tmp_path / "a.beton", random_images(20, 6, 6, seed=9))
    memory.rmdir()
    assert len(list(open_loader(path, world=World(1, 2), **OPTIONS).epoch(0))) == 5
