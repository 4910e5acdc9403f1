"""Heads whose labels are spread over ranks: what one process computes, two and four compute from their slices."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
import os
from pathlib import Path
import socket
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import pytest
import torch
from torch import Tensor
import torch.distributed as dist
import torch.multiprocessing as mp

from rlp.distributed import prompt_exit
from rlp.errors import UserError
from rlp.kernels.loss import MEMORY_BUDGET
from rlp.kernels.reference import RandomLabelLoss, Statistics, random_label_loss
from rlp.kernels.sharded import Shard, sharded_random_label_loss
from tests.loss_cases import Case, Outcome, assert_same, by_reference, random_case

RANKS = 4


@dataclass(frozen=True)
class Split:
    """A case, the samples that each rank has of it, and the call's options."""

    case: Case
    batches: tuple[int, ...]
    budget: int = MEMORY_BUDGET
    dtype: torch.dtype = torch.float64
    x_dtype: torch.dtype = torch.float64
    routes: str = "wx"

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.batches)


SPLITS = {
    "even": Split(random_case(1, 8, 3, 37, 5), (2, 2, 2, 2)),
    "uneven, a column at a time": Split(random_case(2, 10, 2, 37, 5, entropy=True), (3, 0, 5, 2), budget=1),
    "features for each head": Split(random_case(3, 9, 3, 21, 4, own_features=True, has_bias=False), (0, 4, 4, 1)),
    "slices of few labels": Split(random_case(4, 7, 3, 5, 6, entropy=True, own_features=True), (1, 2, 3, 1)),
    "a label for each rank": Split(random_case(5, 6, 1, 4, 3, entropy=True), (3, 1, 1, 1), budget=300),
    "two ranks": Split(random_case(6, 11, 2, 50, 8, entropy=True), (7, 4), budget=2000),
    "two ranks, one without samples": Split(random_case(7, 5, 2, 2, 8, own_features=True), (0, 5)),
    "one rank": Split(random_case(8, 5, 2, 9, 8, entropy=True), (5,)),
    "large logits": Split(random_case(9, 8, 2, 30, 8, entropy=True, scale=40.0), (4, 4), budget=2000),
    "float32": Split(random_case(10, 8, 2, 30, 8, entropy=True), (5, 3), 2000, torch.float32, torch.float32),
    "bfloat16 features": Split(random_case(11, 8, 2, 30, 8), (5, 3), 2000, torch.float32, torch.bfloat16),
    "weights alone": Split(random_case(12, 8, 2, 30, 8, entropy=True), (5, 3), routes="w"),
    "features alone": Split(random_case(13, 8, 2, 30, 8, entropy=True), (2, 3, 3, 0), routes="x"),
    "no gradient": Split(random_case(14, 8, 2, 30, 8, entropy=True), (5, 3), routes=""),
}


def rows_of(split: Split, rank: int) -> slice:
    """The samples of one rank."""
    first = sum(split.batches[:rank])
    return slice(first, first + split.batches[rank])


def call(split: Split, rank: int, group: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> RandomLabelLoss:
    """The loss on a rank, of its samples' features."""
    case = split.case
    return sharded_random_label_loss(
        x, weight, bias, case.target[rows_of(split, rank)],
        num_labels=case.weight.shape[1], first_label=Shard.of(case.weight.shape[1], rank, split.size).first_label,
        group=group, entropy=case.entropy, memory_budget=split.budget,
    )  # fmt: skip


def leaves(split: Split, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """A rank's features, and its slice of weight and bias."""
    case, shard = split.case, Shard.of(split.case.weight.shape[1], rank, split.size)
    labels = slice(shard.first_label, shard.first_label + shard.labels)

    def leaf(tensor: Tensor, dtype: torch.dtype, route: str) -> Tensor:
        return tensor.to(dtype, copy=True).requires_grad_(route in split.routes)

    bias = None if case.bias is None else leaf(case.bias[:, labels], split.dtype, "w")
    return leaf(case.x[rows_of(split, rank)], split.x_dtype, "x"), leaf(case.weight[:, labels], split.dtype, "w"), bias


def outcome_on_rank(split: Split, rank: int, group: Any) -> dict[str, Tensor | None]:
    """Fit loss, statistics and gradients of one rank."""
    x, weight, bias = leaves(split, rank)
    fit, stats = call(split, rank, group, weight, bias, x)
    if split.routes:
        pull = split.case.pull.to(split.dtype)
        terms = [(fit * pull[0].mean(0)).sum()] if "w" in split.routes else []
        pairs = zip(stats, pull[1:, rows_of(split, rank)], strict=True)
        terms += [(part * coefficient).sum() for part, coefficient in pairs if part is not None and part.requires_grad]
        torch.stack(terms).sum().backward()
    named = {"fit": fit, **stats._asdict(), "dx": x.grad, "dweight": weight.grad}
    named["dbias"] = None if bias is None else bias.grad
    return {name: None if part is None else part.detach() for name, part in named.items()}


def weights_after_two_steps(loss: Callable[..., RandomLabelLoss], parameters: list[Tensor]) -> list[Tensor]:
    """What SGD with momentum makes of the parameters."""
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        loss(*parameters).fit.sum().backward()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def mistakes(rank: int) -> dict[str, Callable[[], Any]]:
    """Calls that fail, by name; on some ranks they are right."""
    split = SPLITS["even"]
    x, weight, bias = leaves(split, rank)
    good: dict[str, Any] = {"x": x, "weight": weight, "bias": bias, "target": split.case.target[rows_of(split, rank)]}
    good |= {"num_labels": 37, "first_label": Shard.of(37, rank, RANKS).first_label}
    last = rank == RANKS - 1
    changes = {
        "gap": {"first_label": good["first_label"] + (rank == 2)},
        "too few": {"num_labels": 40},
        "entropy": {"entropy": rank == 1},
        "gradient": {"x": x.detach() if last else x},
        "features": {"x": x[:, :4] if last else x},
        "label": {"target": good["target"] + 37 * last},
        "budget": {"memory_budget": int(not last)},
        "reference": {"impl": "reference"},
        "no samples": {"x": x[:0], "target": good["target"][:0]},
    }
    return {
        name: lambda change=change: sharded_random_label_loss(**(good | change)) for name, change in changes.items()
    }


def message(function: Callable[[], Any]) -> str:
    """What a UserError said."""
    try:
        function()
    except UserError as error:
        return str(error)
    return "no error"


def work(rank: int, port: int, folder: str) -> None:
    """One rank: everything that the tests look at."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with prompt_exit():
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        groups = {size: dist.new_group(list(range(size))) for size in (1, 2)} | {RANKS: None}
        result: dict[str, Any] = {
            name: outcome_on_rank(split, rank, groups[split.size])
            for name, split in SPLITS.items()
            if rank < split.size
        }
        split = SPLITS["even"]
        x, weight, bias = leaves(replace(split, routes="w"), rank)
        assert bias is not None
        result["trained"] = weights_after_two_steps(
            lambda weight, bias: call(split, rank, None, weight, bias, x), [weight, bias]
        )
        result["mistakes"] = {name: message(function) for name, function in mistakes(rank).items()}
        result["mistakes"]["stranger"] = (
            message(lambda: call(split, rank, groups[2], weight, bias, x)) if rank > 1 else ""
        )
        torch.save(result, Path(folder) / f"{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four gloo ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=RANKS)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def joined(parts: list[dict[str, Tensor | None]]) -> Outcome:
    """The outcome of the joint batch and all labels, from those of the ranks."""

    def cat(name: str, dim: int) -> Any:
        found = [tensor for part in parts if (tensor := part[name]) is not None]
        return torch.cat(found, dim) if found else None

    assert parts[0]["fit"] is not None
    stats = Statistics(*(cat(name, 0) for name in Statistics._fields))
    return Outcome(parts[0]["fit"], stats, cat("dx", 0), cat("dweight", 1), cat("dbias", 1))


@pytest.mark.parametrize("name", SPLITS)
def test_ranks_find_what_one_process_finds(results: list[dict[str, Any]], name: str) -> None:
    split = SPLITS[name]
    found = joined([result[name] for result in results[: split.size]])
    case = replace(split.case, x=split.case.x.to(split.x_dtype).double())
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[split.x_dtype]
    assert_same(found, by_reference(case, split.routes), tolerance, tolerance)


@pytest.mark.parametrize("name", SPLITS)
def test_the_fit_loss_is_the_same_to_the_bit_on_all_ranks(results: list[dict[str, Any]], name: str) -> None:
    fits = [result[name]["fit"] for result in results[: SPLITS[name].size]]
    assert all(torch.equal(fit, fits[0]) for fit in fits)


def test_ranks_train_the_weights_that_one_process_trains(results: list[dict[str, Any]]) -> None:
    case = SPLITS["even"].case
    assert case.bias is not None
    parameters = [case.weight.clone().requires_grad_(), case.bias.clone().requires_grad_()]
    expected = weights_after_two_steps(
        lambda weight, bias: random_label_loss(case.x, weight, bias, case.target), parameters
    )
    for place in range(2):
        found = torch.cat([result["trained"][place] for result in results], 1)
        torch.testing.assert_close(found, expected[place], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gap", ["the slice of rank 2 begins with label 19; expected 18, where the last ends"] * 4),
        ("too few", ["the slices of the ranks hold 37 labels together; expected 40"] * 4),
        ("entropy", ["the ranks differ in entropy: [0, 1, 0, 0]; expected the same on all"] * 4),
        ("gradient", ["the ranks differ in x.requires_grad: [1, 1, 1, 0]; expected the same on all"] * 4),
        ("features", [None] * 3 + ["x has the shape [2, 4]; expected [B, 5] or [B, 3, 5], as the weight has"]),
        ("label", [None] * 3 + ["target holds "]),
        ("budget", [None] * 3 + ["memory_budget is 0; expected a number of bytes above 0"]),
        ("reference", ["impl is 'reference', which knows no slices of labels"] * 4),
        ("no samples", ["no rank has a sample"] * 4),
        ("stranger", ["", "", *["this process is not in the group"] * 2]),
    ],
)
def test_mistakes_end_the_call_on_all_ranks(
    results: list[dict[str, Any]], name: str, expected: list[str | None]
) -> None:
    elsewhere = "rank 3 of the group was given wrong arguments; its own error names them"
    for result, text in zip(results, expected, strict=True):
        assert result["mistakes"][name].startswith(elsewhere if text is None else text)


@given(st.integers(1, 60), st.integers(1, 9))
def test_slices_tile_the_labels(num_labels: int, size: int) -> None:
    if num_labels < size:
        with pytest.raises(UserError, match="fewer than"):
            Shard.of(num_labels, 0, size)
        return
    shards = [Shard.of(num_labels, rank, size) for rank in range(size)]
    labels = [label for first, count in shards for label in range(first, first + count)]
    assert labels == list(range(num_labels))
    counts = [shard.labels for shard in shards]
    assert max(counts) - min(counts) <= 1


def test_a_rank_that_is_none_is_named() -> None:
    with pytest.raises(UserError, match="rank is 2; expected one of 0 to 1"):
        Shard.of(10, 2, 2)


def alone(case: Case, **options: Any) -> Outcome:
    """Of a process without a group."""
    x, weight = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
    n = weight.shape[1]
    fit, stats = sharded_random_label_loss(
        x, weight, None, case.target, num_labels=n, first_label=0, entropy=case.entropy, **options
    )
    terms = [
        (part * pull).sum()
        for part, pull in zip(stats, case.pull[1:], strict=True)
        if part is not None and part.requires_grad
    ]
    torch.stack([(fit * case.pull[0].mean(0)).sum(), *terms]).sum().backward()
    stats = Statistics(*(None if part is None else part.detach() for part in stats))  # pyright: ignore[reportArgumentType]
    return Outcome(fit.detach(), stats, x.grad, weight.grad, None)


def test_a_process_alone_is_a_world_of_one() -> None:
    case = random_case(20, 7, 3, 29, 5, entropy=True, has_bias=False)
    assert_same(alone(case, memory_budget=500), by_reference(case), 1e-10, 1e-10)


def test_a_process_alone_with_triton() -> None:
    pytest.importorskip("triton")
    case = random_case(22, 5, 2, 23, 5, entropy=True, has_bias=False)
    assert_same(alone(case, memory_budget=1500, impl="triton"), by_reference(case), 1e-10, 1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_a_process_alone_on_a_gpu(impl: str) -> None:
    case = random_case(21, 300, 2, 5000, 64, has_bias=False)
    found = alone(case.to(torch.float32, "cuda"), memory_budget=2**20, impl=impl)
    assert_same(found, by_reference(case), 1e-3, 1e-3)
