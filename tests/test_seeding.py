"""Seeds by name, and random state that comes back exactly."""

from collections.abc import Iterator
import os
from pathlib import Path
import random

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from rlp.seeding import (
    capture_random_state,
    make_deterministic,
    named_seed,
    restore_random_state,
    seed_everything,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _same_state_after() -> Iterator[None]:
    """These tests move global generators; leave them as they were."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torch_state)


def draws() -> list[float]:
    """A few numbers of every global generator; odd counts of normals leave one cached inside."""
    numbers = [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]
    return [*numbers, *torch.randn(3).tolist(), float(torch.randint(1000, ()))]


@pytest.mark.parametrize("warm", [0, 1, 7, 700])
def test_restored_generators_go_on_as_they_did(tmp_path: Path, warm: int) -> None:
    """Through torch.save and the safe loader, from any point of the generators' cycles."""
    seed_everything(5)
    for _ in range(warm):
        draws()
    random.gauss(0, 1)  # one of a pair: the other is kept inside Python's generator
    np.random.randn()
    torch.save(capture_random_state(CPU), tmp_path / "state.pt")
    expected = [draws() for _ in range(4)]
    seed_everything(6)
    draws()
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True), CPU)
    assert [draws() for _ in range(4)] == expected


def test_capturing_changes_nothing() -> None:
    seed_everything(5)
    expected = draws()
    seed_everything(5)
    capture_random_state(CPU)
    assert draws() == expected


def test_a_captured_state_is_not_moved_by_later_draws() -> None:
    seed_everything(5)
    state = capture_random_state(CPU)
    expected = draws()
    for _ in range(1000):
        draws()
    restore_random_state(state, CPU)
    assert draws() == expected


@pytest.mark.gpu
def test_the_gpu_generator_comes_back_too(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    seed_everything(5)
    torch.save(capture_random_state(device), tmp_path / "state.pt")
    expected = torch.randn(5, device=device).tolist()
    for where in ("cpu", "cuda"):
        restore_random_state(torch.load(tmp_path / "state.pt", map_location=where, weights_only=True), device)
        assert torch.randn(5, device=device).tolist() == expected


def test_ranks_and_seeds_draw_different_numbers() -> None:
    seen = []
    for seed, rank in ((0, 0), (0, 1), (1, 0), (1, 1)):
        seed_everything(seed, rank)
        seen.append(tuple(draws()))
    for column in zip(*seen, strict=True):
        assert len(set(column)) > 1
    assert len({row[4] for row in seen}) == 4


@given(st.integers(0, 2**63 - 1), st.text(st.characters(codec="ascii"), max_size=20))
def test_named_seeds_fit_torch_and_depend_on_both(seed: int, name: str) -> None:
    value = named_seed(seed, name)
    assert 0 <= value < 2**63
    assert value == named_seed(seed, name)
    assert value != named_seed(seed, name + "x")
    torch.Generator().manual_seed(value)


def test_named_seeds_of_neighbours_do_not_meet() -> None:
    assert len({named_seed(seed, name) for seed in range(200) for name in ("heads", "rank0", "rank1")}) == 600


def test_deterministic_mode_is_set_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "to be put back")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
