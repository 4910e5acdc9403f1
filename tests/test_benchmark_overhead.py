"""The benchmark of heads' overhead: the trainer's step, memory by hand, columns, verdicts, the written result."""

from collections.abc import Callable
from dataclasses import replace
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
import torch.nn.functional as F

from benchmarks import harness, overhead, stale
from benchmarks.overhead_cases import LEARNING_RATE, NO_HEADS, Case, Group, Network, Step, all_groups
from benchmarks.overhead_memory import build_and_weigh
from benchmarks.overhead_plot import write_plot
from benchmarks.overhead_tables import TARGETS, page, verdict
from rlp.models import build_model
from rlp.schema import HeadsConfig, TrainingConfig
from rlp.trainer import Trainer

CPU = torch.device("cpu")
TINY = Network("wrn_10_1", 8, 4)
PLAN = overhead.Plan(CPU, TINY, rounds=3, calls=1, warmup=0)
GROUPS = [
    Group("last tap", (NO_HEADS, *(Case("last tap", draws, n, 1.0) for draws in (1, 3) for n in (2, 10)))),
    Group("all depths", (NO_HEADS, *(Case("all depths", 8, n, 1.0) for n in (2, 10)))),
    Group(
        "kinds of heads", (NO_HEADS, Case("group3.0", 2, 5, 1.0, "per_class"), Case("group3.0", 1, 5, 0.0, "copied"))
    ),
]
COLUMNS = {
    "group", "case", "where", "draws", "n", "lam", "kind", "reason", "taps", "head_parameters", "seconds", "rounds",
    "ratio", "images_per_s", "peak_bytes", "extra_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[overhead.Row]:
    return overhead.measure(GROUPS, PLAN)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [one.detach().clone() for one in model.state_dict().values()]


def test_the_step_without_heads_is_a_plain_step() -> None:
    step = Step(NO_HEADS, TINY, CPU)
    torch.manual_seed(0)
    model = build_model("wrn_10_1", 10, 8, {}).to(memory_format=torch.channels_last)  # pyright: ignore
    decayed = [one for one in model.parameters() if one.dim() > 1]
    others = [one for one in model.parameters() if one.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=0.9, nesterov=True)
    before = weights(step.model)
    for _ in range(2):
        step()
        F.cross_entropy(model.train()(step.image), step.label).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, weights(step.model), weights(model)))
    assert not any(map(torch.equal, weights(step.model), before))


@pytest.mark.parametrize("kind", ["shared", "per_class", "copied"])
def test_heads_move_the_network_only_with_a_penalty(kind: str) -> None:
    plain = Step(NO_HEADS, TINY, CPU)
    steps = {lam: Step(Case("group3.0", 2, 5, lam, kind), TINY, CPU) for lam in (0.0, 1.0)}
    for step in steps.values():
        assert step.heads is not None
        assert torch.equal(step.image, plain.image)
        assert torch.equal(step.label, plain.label)
        before = weights(step.heads)
        step()
        step()
        assert step.is_finite()
        moved = zip(before, weights(step.heads), strict=True)
        assert not all(torch.equal(one, other) for one, other in moved)
    plain()
    plain()
    assert all(map(torch.equal, weights(plain.model), weights(steps[0.0].model)))
    assert not all(map(torch.equal, weights(plain.model), weights(steps[1.0].model)))


def test_the_optimisers_are_the_trainers() -> None:
    step = Step(Case("all depths", 2, 5), TINY, CPU)
    config = SimpleNamespace(train=TrainingConfig(lr=LEARNING_RATE), heads=HeadsConfig(lr=LEARNING_RATE))
    trainer: Any = SimpleNamespace(config=config, model=step.model, heads=step.heads)
    wanted = Trainer._build_optimizers(trainer)
    assert [type(one) for one in step.optimizers] == [type(one) for one in wanted]
    assert [one.state_dict() for one in step.optimizers] == [one.state_dict() for one in wanted]


def test_heads_that_blow_up_are_found() -> None:
    step = Step(Case("last tap", 1, 2), TINY, CPU)
    with torch.no_grad():
        next(step.model.parameters()).fill_(float("nan"))
    assert not step.is_finite()


def test_memory_by_hand() -> None:
    """1,000 floats are 4,000 bytes: what is kept, and the most that a call holds besides."""

    def builder(count: int) -> Callable[[], Callable[[], None]]:
        def build() -> Callable[[], None]:
            kept = torch.zeros(count, 1000)

            def call() -> None:
                three = torch.ones(3 * count, 1000)
                del three
                torch.add(kept, kept)

            return call

        return build

    built, peaks, missing = build_and_weigh({"one": builder(1), "many": builder(50)}, CPU)
    assert list(built) == ["one", "many"]
    assert peaks == {"one": 4 * 4000, "many": 4 * 200_000}
    assert missing == {}


def test_the_columns(rows: list[overhead.Row]) -> None:
    assert all(row["reason"] is None for row in rows)
    assert {frozenset(row) for row in rows} == {frozenset(COLUMNS)}
    assert [row["case"] for row in rows] == [case.title for group in GROUPS for case in group.cases]
    json.dumps(rows)
    for row in rows:
        assert len(row["rounds"]) == PLAN.rounds
        assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["peak_bytes"] > 0
        if row["where"] == "none":
            assert row["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
            assert (row["taps"], row["head_parameters"], row["extra_bytes"]) == (0, 0, 0)


def test_ratios_and_memory_are_those_of_the_group(rows: list[overhead.Row]) -> None:
    for title in {row["group"] for row in rows}:
        mine = [row for row in rows if row["group"] == title]
        for row in mine:
            ratios = [one / its for one, its in zip(row["rounds"], mine[0]["rounds"], strict=True)]
            assert row["ratio"]["high"] == pytest.approx(max(ratios), rel=2e-3)
            assert row["extra_bytes"] == row["peak_bytes"] - mine[0]["peak_bytes"]
    by_title = {row["case"]: row for row in rows}
    heads = by_title["last tap x 3, n=10, λ=1"]
    assert (heads["taps"], heads["head_parameters"]) == (1, 3 * 10 * (64 + 1))
    assert by_title["all depths x 8, n=10, λ=1"]["taps"] == 5  # stem, a block in each group, norm
    # Weights, two averages of AdamW and their gradients are there at once.
    assert by_title["all depths x 8, n=10, λ=1"]["extra_bytes"] >= 4 * 4 * 8 * 10 * (16 + 16 + 32 + 64 + 64)


@pytest.mark.parametrize("is_cuda", [False, True])
def test_the_cases_cover_what_is_asked(is_cuda: bool) -> None:
    groups = all_groups(is_cuda)
    cases = [case for group in groups for case in group.cases]
    assert all(group.cases[0] == NO_HEADS for group in groups)
    assert all(len({case.title for case in group.cases}) == len(group.cases) for group in groups)
    for where in ("last tap", "all depths"):
        grid = {(case.draws, case.num_labels) for case in cases if case.where == where and case.lam}
        assert grid >= {(draws, n) for draws in (1, 8, 64) for n in (2, 10, 100, 1000)}
        assert {case.lam for case in cases if case.where == where} == {0.0, 1.0}
    assert {(case.draws, case.where) for case in cases if case.num_labels == 100_000} == {(1, "last tap")}
    assert {case.kind for case in cases} == {"shared", "per_class", "copied"}
    for target in TARGETS:
        judged = {
            case.lam for case in cases if (case.where, case.draws, case.num_labels) == (target.where, target.draws, 10)
        }
        assert judged == {0.0, 1.0}
    assert len([case for group in all_groups(is_cuda, quick=True) for case in group.cases]) < len(cases)


def target_row(lam: float, added: float, n: int = 10) -> overhead.Row:
    ratio = {"median": 1 + added, "low": 1 + added / 2, "high": 1 + 2 * added}
    return {"reason": None, "where": "last tap", "draws": 1, "kind": "shared", "n": n, "lam": lam, "ratio": ratio}


def test_a_target_is_judged_by_the_slower_case_and_on_a_gpu_alone() -> None:
    good, bad, other = target_row(0.0, 0.02), target_row(1.0, 0.04), target_row(1.0, 0.5, n=1000)
    assert "**reached**" in verdict(TARGETS[0], [good, other], is_cuda=True)
    assert "**missed**" in verdict(TARGETS[0], [good, bad], is_cuda=True)
    assert "λ=1 +4.0% [+2.0, +8.0]" in verdict(TARGETS[0], [good, bad], is_cuda=True)
    text = verdict(TARGETS[0], [good, other], is_cuda=False)
    assert "no target" in text
    assert "reached" not in text
    assert "n=1,000 λ=1 +50.0%" in text
    assert verdict(TARGETS[1], [good], is_cuda=True).endswith("not measured.")


def test_the_result_holds_every_row_and_shows_the_plot(rows: list[overhead.Row], tmp_path: Path) -> None:
    path = overhead.report(rows, PLAN, {}, tmp_path)
    assert json.loads(path.read_text("utf-8"))["rows"] == rows
    assert stale.why_stale(harness.read_source("overhead"), "cpu", tmp_path) is None
    text = path.with_suffix(".md").read_text("utf-8")
    assert f"]({path.stem}.png)" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert all(row["case"] in text for row in rows)
    assert "all depths (5 taps)" in text
    assert write_plot(rows, True, tmp_path / "with_targets.png") is not None


def test_what_cannot_be_measured_has_a_row_with_the_reason(rows: list[overhead.Row], tmp_path: Path) -> None:
    first, *others = rows
    known = ("group", "case", "where", "draws", "n", "lam", "kind")
    missing = [{key: row[key] for key in known} | {"reason": "out of memory"} for row in others]
    text = page([first, *missing], is_cuda=True)
    assert f"| {others[0]['case']}: out of memory | – |" in text
    assert "not measured" in text
    assert write_plot([first, *missing], True, tmp_path / "plot.png") is None


def test_it_is_registered_and_its_parts_are_not() -> None:
    names = stale.benchmark_names()
    assert "overhead" in names
    assert not [name for name in names if name.startswith("overhead_")]
    assert "rlp/models/*.py" in harness.read_source("overhead").measures


def test_a_quick_run_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "PARTIAL", tmp_path)
    monkeypatch.setattr(overhead, "all_groups", lambda is_cuda, quick: GROUPS[:1] if quick else [])
    monkeypatch.setattr(overhead.Plan, "of", lambda device, quick, rounds: replace(PLAN, rounds=rounds))
    overhead.main(["--device", "cpu", "--quick", "--rounds", "1"])
    found = json.loads(next(tmp_path.glob("*-overhead-cpu.json")).read_text("utf-8"))
    assert (found["settings"]["quick"], found["settings"]["rounds"]) == (True, 1)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    rows = overhead.measure(GROUPS, replace(PLAN, device=torch.device("cuda")))
    assert all(row["reason"] is None and row["peak_bytes"] > 0 for row in rows)
    assert all(row["extra_bytes"] > 0 for row in rows if row["where"] == "all depths")
