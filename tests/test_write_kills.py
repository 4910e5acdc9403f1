"""kill -9 at random moments of the real writing script: no half file is taken for a whole one, the next write recovers.

``RLP_KILLS=20`` repeats the killing that often (4 by default, to keep the suite short).
"""

import os
from pathlib import Path
import random
import signal
import subprocess
import sys
import time

import pytest

from rlp.data.beton import Beton
from rlp.errors import UserError

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("RLP_KILLS", "4"))
NAMES = ("train.beton", "train.json", "val.beton", "val.json")


def test_kill_nine_at_random_moments_of_writing(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    outputs = [argument for split in ("train", "val") for argument in (f"--output.{split}", f"{split}.beton")]
    script = [sys.executable, str(ROOT / "data_prep" / "write_datasets.py")]
    command = [*script, "--source.kind", "digits", "--image.size", "32", "--output.workers", "1", *outputs]
    started = time.monotonic()
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    duration = time.monotonic() - started
    whole = {name: (tmp_path / name).read_bytes() for name in ("train.beton", "val.beton")}
    moments, kills = random.Random(os.environ.get("RLP_KILL_SEED", "0")), 0
    while kills < KILLS:
        for name in NAMES:
            (tmp_path / name).unlink(missing_ok=True)
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(0.1, duration))
            continue  # it was faster this time
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        for name, content in whole.items():
            assert is_refused(tmp_path / name) or (tmp_path / name).read_bytes() == content
        again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert {name: (tmp_path / name).read_bytes() for name in whole} == whole
        assert sorted(path.name for path in tmp_path.iterdir()) == list(NAMES)


def is_refused(path: Path) -> bool:
    """A file that is missing, half-written, or without its card."""
    try:
        Beton.open(path, full_hash=True)
    except UserError:
        return True
    return False
