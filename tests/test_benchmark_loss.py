"""The loss benchmark: floors by hand, rows for everyone, a wrong contender found out, tables and plot."""

from dataclasses import replace
import json
from pathlib import Path

import pytest
import torch

from benchmarks import harness, loss, stale
from benchmarks.loss_cases import SWEEPS, Case, all_cases, least_work, make_inputs
from benchmarks.loss_contenders import COMPOSITION, CONTENDERS, OURS, Contender, Inputs, Run
from benchmarks.loss_plot import write_plot
from benchmarks.loss_tables import best_other

CPU = torch.device("cpu")
TINY_PLAN = loss.Plan(CPU, 2, 2, 1e-4, 2**12, 32, compiles=False)
FAST = (
    OURS,
    COMPOSITION,
    "loop of linear layers",
    "F.grouped_mm composition",
    "F.linear_cross_entropy",
    "quack-kernels",
)
TAKERS = [one for one in CONTENDERS if one.name in FAST]


def tiny(key: str, n: int = 6, heads: int = 1, classes: int | None = None, is_sweep: bool = False) -> Case:
    return Case(key, f"case {key}", 8, 16, n, heads, classes, torch.float32, is_sweep=is_sweep)


@pytest.fixture(scope="module")
def rows() -> list[loss.Row]:
    cases = [tiny("A", classes=3), tiny("C"), tiny("E", heads=3)]
    cases += [tiny("n", n, is_sweep=True) for n in (2, 5, 9)] + [
        tiny("H10", 10, heads, is_sweep=True) for heads in (1, 3)
    ]
    return loss.measure(cases, TAKERS, TINY_PLAN)


def timed(rows: list[loss.Row], key: str) -> set[tuple[str, str]]:
    return {(row["contender"], row["mode"]) for row in rows if row["case"] == key and row["reason"] is None}


def test_floors_by_hand() -> None:
    case = Case("B", "by hand", batch=10, dim=4, num_labels=3, classes=5, dtype=torch.bfloat16)
    x, one_class, labels, outputs = 80, 24, 8 * 10 * 2, 4 * (4 * 10 + 1)
    product = 2 * 10 * 3 * 4
    read = x + 2 * one_class + labels + outputs  # two of the five classes occur
    assert least_work(case, "forward", touched=2) == (product, read)
    assert least_work(case, "fit", touched=2) == (2 * product, read + 5 * one_class)
    assert least_work(case, "both", touched=2) == (3 * product, read + 5 * one_class + x)
    assert least_work(case, "adamw", touched=2) == (3 * product, read + 5 * one_class + x + 7 * 5 * one_class)
    assert least_work(case, "forward", touched=2).seconds(24.0, 1e9) == 10.0
    assert least_work(case, "forward", touched=2).seconds(1e9, float(read)) == 1.0


def test_floors_of_the_huge_head_agree_with_the_design() -> None:
    huge = next(case for case in all_cases(torch.device("cuda"), False) if case.key == "C")
    assert least_work(huge, "both", 1).seconds(790e12, 4.3e12) == pytest.approx(2389e-6, rel=1e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_the_sizes_of_their_sweeps(device: str) -> None:
    cases = all_cases(torch.device(device), quick=False)
    assert set(SWEEPS) | set("ABCDE") == {case.key for case in cases}
    assert {case.num_labels for case in cases if case.key == "n"} >= {2, 1_000_000}
    assert {case.heads for case in cases if case.key == "H100"} >= {1, 1024}
    assert len(all_cases(torch.device(device), quick=True)) < len(cases)


def test_every_contender_has_a_row_and_a_time_or_a_reason(rows: list[loss.Row]) -> None:
    modes = {"forward", "fit", "both", "adamw"}
    shared = {(name, mode) for name in (OURS, COMPOSITION) for mode in modes}
    assert timed(rows, "C") == shared | ({("F.linear_cross_entropy", "fit")} if has_torch_peer() else set())
    assert timed(rows, "E") == shared | {("loop of linear layers", mode) for mode in modes}
    assert timed(rows, "A") >= {(COMPOSITION, mode) for mode in modes}
    assert timed(rows, "n") == {(OURS, "both"), (COMPOSITION, "both")}
    quack = [row for row in rows if row["contender"] == "quack-kernels"]
    assert [row["mode"] for row in quack] == ["all"]
    assert quack[0]["reason"] in ("not installed", "needs a GPU")


def has_torch_peer() -> bool:
    return hasattr(torch.nn.functional, "linear_cross_entropy")


def test_ratios_are_those_of_the_rounds(rows: list[loss.Row]) -> None:
    mine, theirs = (
        next(row for row in rows if (row["case"], row["mode"], row["contender"]) == ("C", "both", name))
        for name in (OURS, COMPOSITION)
    )
    ratios = [one / its for one, its in zip(theirs["rounds"], mine["rounds"], strict=True)]
    assert theirs["over_ours"]["low"] == pytest.approx(min(ratios), rel=2e-3)
    assert mine["over_floor"]["median"] > 0
    best = best_other(rows, mine)
    assert best is not None
    assert best["contender"] == COMPOSITION


def wrong_by(factor: float) -> Contender:
    """The composition with its penalty, and so the gradient of x, multiplied."""
    right = next(one for one in CONTENDERS if one.name == COMPOSITION)

    def build(inputs: Inputs) -> Run:
        run = right.build(inputs)

        def altered(x: torch.Tensor, penalised: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
            fit, penalty = run.loss(x, penalised)
            return fit, None if penalty is None else factor * penalty

        return run._replace(loss=altered)

    return replace(right, name="altered", build=build)


@pytest.mark.parametrize(("factor", "modes"), [(1.0, 4), (1.01, 0)])
def test_a_wrong_contender_is_reported_and_not_timed(factor: float, modes: int) -> None:
    rows = loss.measure([tiny("C")], [TAKERS[0], wrong_by(factor)], TINY_PLAN)
    altered = [row for row in rows if row["contender"] == "altered"]
    assert len([row for row in altered if row["reason"] is None]) == modes
    if not modes:
        assert altered[0]["reason"].startswith("wrong, not timed: relative error 1.0e-02")


def test_what_is_wrong_at_full_size_alone_is_found() -> None:
    whole = replace(tiny("C"), batch=100)  # above what the reduced case keeps

    def build(inputs: Inputs) -> Run:
        return wrong_by(1.0 if inputs.case.batch < 100 else 1.1).build(inputs)

    rows = loss.measure([whole], [TAKERS[0], replace(TAKERS[1], name="altered", build=build)], TINY_PLAN)
    assert "at full size" in next(row for row in rows if row["contender"] == "altered")["reason"]


def test_who_raises_has_a_row_with_the_reason() -> None:
    def build(inputs: Inputs) -> Run:
        raise RuntimeError("no such luck\nand a long story")

    rows = loss.measure([tiny("C")], [TAKERS[0], Contender("unlucky", build, lambda case: True, "")], TINY_PLAN)
    assert [row["reason"] for row in rows if row["contender"] == "unlucky"] == ["RuntimeError: no such luck"]
    assert timed(rows, "C") == {(OURS, mode) for mode in ("forward", "fit", "both", "adamw")}


def test_weights_stay_as_they_are(rows: list[loss.Row]) -> None:
    """A step of AdamW must not change the problem under the contenders that come later."""
    inputs = make_inputs(tiny("C"), CPU)
    before = inputs.weight.detach().clone()
    loss._call("adamw", TAKERS[0].build(inputs), inputs, loss._adamw([inputs.weight]))
    assert torch.equal(inputs.weight, before)
    assert inputs.weight.grad is None


@pytest.fixture
def result(rows: list[loss.Row], tmp_path: Path) -> Path:
    return loss.report(rows, TINY_PLAN, {}, tmp_path)


def test_the_result_holds_every_row_and_shows_the_plot(rows: list[loss.Row], result: Path) -> None:
    assert json.loads(result.read_text("utf-8"))["rows"] == rows
    assert stale.why_stale(harness.read_source("loss"), "cpu", result.parent) is None
    page = result.with_suffix(".md").read_text("utf-8")
    assert f"]({result.stem}.png)" in page
    assert result.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert row["contender"] in page
    assert "quack-kernels: " in page
    summary = page.split("## A")[0]
    assert all(f"| {key}, fit + penalty |" in summary for key in "CE")


def test_the_plot_of_a_sweep_that_failed_is_left_out(rows: list[loss.Row], tmp_path: Path) -> None:
    assert write_plot([row | {"reason": "out of memory"} for row in rows], tmp_path / "plot.png") is None


def test_a_quick_run_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loss, "PARTIAL", tmp_path / "partial")
    monkeypatch.setattr(loss, "all_cases", lambda device, quick: [tiny("C"), tiny("E", heads=2)])
    monkeypatch.setattr(loss, "CONTENDERS", TAKERS[:2])
    monkeypatch.setattr(loss.Plan, "of", lambda device, quick, rounds: TINY_PLAN)
    loss.main(["--device", "cpu", "--quick", "--cases", "E"])
    found = list((tmp_path / "partial").glob("*-loss-cpu.json"))
    assert len(found) == 1
    written = json.loads(found[0].read_text("utf-8"))
    assert {row["case"] for row in written["rows"]} == {"E"}
    assert written["settings"]["cases"] == "E"
    assert "## Summary" in capsys.readouterr().out
    with pytest.raises(loss.UserError, match=r"--cases names X; expected some of C, E"):
        loss.main(["--device", "cpu", "--cases", "X"])


@pytest.mark.gpu
def test_on_a_gpu_memory_is_told_and_graphs_are_replayed() -> None:
    case = replace(tiny("A", n=16, classes=3), dtype=torch.bfloat16, launch_bound=True)
    plan = replace(TINY_PLAN, device=torch.device("cuda"))
    rows = loss.measure([case], TAKERS, plan)
    plain = [row for row in rows if row["reason"] is None and not row["mode"].endswith(loss.GRAPH)]
    assert {row["contender"] for row in plain} >= {OURS, COMPOSITION}
    assert all(row["peak_bytes"] > row["extra_bytes"] >= 0 for row in plain)
    assert {row["mode"] for row in rows} >= {f"{mode}{loss.GRAPH}" for mode in ("forward", "fit", "both")}
