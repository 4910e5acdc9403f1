"""Atomic writing: whole or not at all, and nothing left behind."""

import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from rlp.files import write_atomically


def test_writes_text_and_bytes_and_makes_the_folder(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "new" / "a.txt", "κ = 0.5\n")
    assert path.read_bytes() == "κ = 0.5\n".encode()
    write_atomically(path, b"\x00\r\n")
    assert path.read_bytes() == b"\x00\r\n"
    assert os.listdir(path.parent) == ["a.txt"]


def test_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    written = write_atomically(tmp_path / "atomic", "")
    assert written.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_failure_leaves_the_old_file_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomically(tmp_path / "a.txt", "old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_killed_while_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    """A process that rewrites a file without end is killed: what lies there is one of its two whole contents."""
    path = tmp_path / "a.bin"
    code = (
        "import sys; from rlp.files import write_atomically\n"
        "while True:\n"
        "    for byte in b'ab': write_atomically(sys.argv[1], bytes([byte]) * 3_000_000)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(20):  # a reader beside the writer never sees a part
            assert path.read_bytes() in (b"a" * 3_000_000, b"b" * 3_000_000)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert path.read_bytes() in (b"a" * 3_000_000, b"b" * 3_000_000)
