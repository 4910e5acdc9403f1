"""The kernels compile for GPUs that are not here: no spilled registers, shared memory that a GPU has."""

import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
SHARED_MEMORY = {"cuda": 227 * 1024, "hip": 64 * 1024}
REGISTERS = {"cuda": 255, "hip": 512}


@pytest.fixture(scope="module", params=[("cuda", "90"), ("hip", "gfx942")], ids=["sm_90", "gfx942"])
def report(request: pytest.FixtureRequest) -> tuple[str, list[dict[str, Any]]]:
    """What the compiler says of every launch of the benchmark's cases."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.compiled_kernels", *request.param],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    return request.param[0], json.loads(finished.stdout)


def test_every_kernel_is_there(report: tuple[str, list[dict[str, Any]]]) -> None:
    names = {launch["kernel"] for launch in report[1]}
    assert {"statistics_kernel", "gradients_kernel"} < names
    assert len(names) >= 6


def test_no_register_is_spilled(report: tuple[str, list[dict[str, Any]]]) -> None:
    backend, launches = report
    for launch in launches:
        assert launch["local"] == 0, launch
        assert launch["registers"] <= REGISTERS[backend], launch


def test_shared_memory_suffices(report: tuple[str, list[dict[str, Any]]]) -> None:
    backend, launches = report
    for launch in launches:
        assert launch["shared"] <= SHARED_MEMORY[backend], launch
