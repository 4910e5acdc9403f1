"""Ranks: what one process computes on the whole batch, two compute on its halves."""

import os
from pathlib import Path
import socket
from typing import Any

import pytest
import torch
from torch import Tensor, nn
import torch.distributed as dist
import torch.multiprocessing as mp

from rlp.distributed import any_rank, average_gradients, choose_device, connect, from_main, group_size, reduce_sum
from rlp.errors import UserError

RANKS, MICRO_BATCHES, BATCH, FEATURES, LABELS = 2, 2, 8, 6, 5


def network() -> nn.Sequential:
    """The same small head everywhere, with one frozen parameter."""
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(FEATURES, 7), nn.ReLU(), nn.Linear(7, LABELS))
    module[0].bias.requires_grad_(False)
    return module


def micro_batches() -> list[tuple[Tensor, Tensor]]:
    """Two whole micro-batches, features [B, D] and labels [B]."""
    generator = torch.Generator().manual_seed(4)
    return [
        (torch.randn(BATCH, FEATURES, generator=generator), torch.randint(LABELS, (BATCH,), generator=generator))
        for _ in range(MICRO_BATCHES)
    ]


def gradients_after_each_backward(module: nn.Module, rank: int, size: int) -> list[list[Tensor]]:
    """Gradients accumulated so far, after the backward of each micro-batch, on this rank's share of it."""
    seen = []
    for features, labels in micro_batches():
        logits = module(features[rank::size])
        nn.functional.cross_entropy(logits, labels[rank::size]).backward()
        seen.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    return seen


def work(rank: int, port: int, folder: str) -> None:
    """One rank: use every collective once and save what came out."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with connect("cpu") as world:
        mine = torch.tensor([rank + 1, 10 * (rank + 1)])
        module, alone = network(), network()
        average_gradients(module)
        result: dict[str, Any] = {
            "world": [world.rank, world.size, world.local_rank, int(world.is_main), str(world.device)],
            "sum": reduce_sum(mine),
            "sum64": reduce_sum(torch.tensor(0.1 * (rank + 1), dtype=torch.float64)),
            "mine": mine,
            "main": from_main(0.1 * (rank + 1), world.device),
            "any": [any_rank(flag, world.device) for flag in (False, rank == 1, True)],
            "averaged": gradients_after_each_backward(module, rank, RANKS),
            "local": gradients_after_each_backward(alone, rank, RANKS),
        }
        module.zero_grad()
        result["again"] = gradients_after_each_backward(module, rank, RANKS)
    result["left"] = not dist.is_initialized()
    torch.save(result, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=RANKS)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_each_rank_knows_its_place_and_leaves_the_group(results: list[dict[str, Any]]) -> None:
    assert [result["world"] for result in results] == [[0, 2, 0, 1, "cpu"], [1, 2, 1, 0, "cpu"]]
    assert all(result["left"] for result in results)


def test_sums_reach_every_rank_and_leave_the_input(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        assert result["sum"].tolist() == [3, 30]
        assert result["sum64"].item() == 0.1 + 0.2
        assert result["sum64"].dtype == torch.float64
        assert result["mine"].tolist() == [rank + 1, 10 * (rank + 1)]


def test_the_main_ranks_number_reaches_all(results: list[dict[str, Any]]) -> None:
    assert [result["main"] for result in results] == [0.1] * 2


def test_a_flag_on_one_rank_is_seen_by_all(results: list[dict[str, Any]]) -> None:
    assert [result["any"] for result in results] == [[False, True, True]] * 2


@pytest.mark.parametrize("key", ["averaged", "again"])
def test_averaged_gradients_are_those_of_the_whole_batch(results: list[dict[str, Any]], key: str) -> None:
    """After one backward and after two accumulated ones, again after zero_grad; bit-equal on the ranks."""
    expected = gradients_after_each_backward(network(), 0, 1)
    for step in range(MICRO_BATCHES):
        assert len(expected[step]) == 3  # the frozen bias has none
        for whole, first, second in zip(expected[step], *(r[key][step] for r in results), strict=True):
            torch.testing.assert_close(first, whole, rtol=1e-5, atol=1e-7)
            assert torch.equal(first, second)


def test_without_averaging_the_ranks_would_part(results: list[dict[str, Any]]) -> None:
    first, second = (result["local"][-1][0] for result in results)
    assert (first - second).abs().max() > 1e-2


@pytest.fixture
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_torchrun")
def test_alone_there_is_no_group() -> None:
    value = torch.tensor([1.5])
    module = network()
    with connect("cpu") as world:
        assert (world.rank, world.size, world.is_main, str(world.device)) == (0, 1, True, "cpu")
        assert group_size() == 1
        assert reduce_sum(value) is value
        assert any_rank(True, world.device)
        assert not any_rank(False, world.device)
        average_gradients(module)
    assert gradients_after_each_backward(module, 0, 1)


def test_devices_that_do_not_exist_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu", 3) == torch.device("cpu")
    with pytest.raises(UserError, match=r"run\.device is 'tpu'"):
        choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="no CUDA device"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"local rank 2 .* has 2"):
        choose_device("cuda", 2)
