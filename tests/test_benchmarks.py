"""Benchmarks: ratios, what counts as stale, what a result holds; and every benchmark declares itself well."""

import json
from pathlib import Path
import subprocess
import sys

import pytest
import torch

from benchmarks import harness, stale, step
from rlp.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A tree with one benchmark that measures one file."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "rlp").mkdir()
    (tmp_path / "benchmarks" / "speed.py").write_text('MEASURES = ["rlp/*.py"]\nNEEDS = ["ffcv"]\nimport absent\n')
    (tmp_path / "rlp" / "fast.py").write_text("x = 1\n")
    return tmp_path


def write_old_result(folder: Path, day: str, sha256: str, device: str = "cpu") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{day}-speed-{device}.json").write_text(json.dumps({"sources": {"sha256": sha256}}))


def test_cases_take_turns_and_are_compared_within_a_round() -> None:
    calls: list[str] = []
    cases = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = harness.time_interleaved(cases, CPU, rounds=2, calls=2, warmup=1)
    assert calls == ["a", "b", *"aabb", *"bbaa"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    ratio = harness.ratios({"a": [1.0, 2.0, 4.0], "b": [3.0, 2.0, 8.0]}, "a")
    assert ratio["b"] == harness.Spread(median=2.0, low=1.0, high=3.0)
    assert ratio["a"] == harness.Spread(1.0, 1.0, 1.0)


def test_a_declaration_is_read_without_importing(repository: Path) -> None:
    source = harness.read_source("speed", repository)
    assert source.measures == ("rlp/*.py",)
    assert source.needs == ("ffcv",)


def test_a_result_is_stale_once_its_sources_change(repository: Path) -> None:
    results = repository / "results"
    results.mkdir()
    source = harness.read_source("speed", repository)
    assert stale.why_stale(source, "cpu", results) == "no result on cpu"
    write_old_result(results, "2026-01-02", source.sha256)
    assert stale.why_stale(source, "cpu", results) is None
    assert stale.why_stale(source, "nvidia-h200", results) == "no result on nvidia-h200"

    (repository / "rlp" / "fast.py").write_text("x = 2\n")
    changed = harness.read_source("speed", repository)
    assert "older than the code" in str(stale.why_stale(changed, "cpu", results))
    write_old_result(results, "2026-01-03", changed.sha256)
    assert stale.why_stale(changed, "cpu", results) is None
    write_old_result(results, "2026-01-04", source.sha256)
    assert "2026-01-04" in str(stale.why_stale(changed, "cpu", results))


def test_a_renamed_or_new_file_makes_it_stale(repository: Path) -> None:
    before = harness.read_source("speed", repository).sha256
    (repository / "rlp" / "fast.py").rename(repository / "rlp" / "faster.py")
    renamed = harness.read_source("speed", repository).sha256
    (repository / "rlp" / "slow.py").write_text("")
    assert len({before, renamed, harness.read_source("speed", repository).sha256}) == 3


def test_a_broken_result_is_stale(repository: Path) -> None:
    write_old_result(repository / "results", "2026-01-02", "")
    (repository / "results" / "2026-01-02-speed-cpu.json").write_text("{")
    source = harness.read_source("speed", repository)
    assert "is no result" in str(stale.why_stale(source, "cpu", repository / "results"))


def test_names_that_continue_each_other_are_told_apart(repository: Path) -> None:
    (repository / "results").mkdir()
    (repository / "results" / "2026-01-02-other-speed-cpu.json").write_text("{}")
    assert stale.newest_result("speed", "cpu", repository / "results") is None


@pytest.mark.parametrize(
    ("text", "message"), [("x = 1", "declares no MEASURES"), ('MEASURES = ["rlp/no*.py"]', "names no file")]
)
def test_a_wrong_declaration_is_an_error(repository: Path, text: str, message: str) -> None:
    (repository / "benchmarks" / "speed.py").write_text(text)
    with pytest.raises(UserError, match=message):
        harness.read_source("speed", repository)


@pytest.mark.parametrize("name", stale.benchmark_names())
def test_every_benchmark_declares_what_it_measures(name: str) -> None:
    assert harness.read_source(name).measures


def test_a_written_result_is_fresh_and_names_no_folder(tmp_path: Path) -> None:
    rows = [{"case": "no heads", "seconds": {"median": 1.0}}]
    path = harness.write_result("step", CPU, {"batch_size": 2}, rows, "| table |", tmp_path)
    result = json.loads(path.read_text("utf-8"))
    assert result["device"] == "cpu"
    assert result["rows"] == rows
    assert result["command"] == "python -m benchmarks.step --device cpu"
    assert str(harness.ROOT) not in path.read_text("utf-8")
    assert "| table |" in path.with_suffix(".md").read_text("utf-8")
    assert stale.why_stale(harness.read_source("step"), "cpu", tmp_path) is None


def test_what_is_missing_is_skipped_by_name(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = harness.Source("speed", ("rlp/*.py",), ("no_such_package",), "0")
    monkeypatch.setattr(stale, "benchmark_names", lambda: ["speed"])
    monkeypatch.setattr(stale, "read_source", lambda name: source)
    stale.main(["--run", "--all", "--device", "cpu", "--out", str(repository)])
    assert "speed: skipped, needs no_such_package" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a GPU")
def test_no_gpu_is_one_sentence() -> None:
    command = [sys.executable, "-m", "benchmarks.stale", "--device", "cuda"]
    finished = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: ")
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize("case", [step.CASES[0], step.CASES[2]], ids=lambda case: case.title)
def test_a_benchmarked_step_trains(case: step.Case) -> None:
    run = step.build_step(case, CPU, batch_size=2)
    run()
    run()


def test_the_table_shows_ranges() -> None:
    spread = {"median": 0.25, "low": 0.125, "high": 0.5}
    row = {"case": "no heads", "seconds": spread, "ratio": spread, "images_per_s": 4096.0, "peak_bytes": 2**21}
    assert (
        step.table([row]).splitlines()[-1] == "| no heads | 250.00 [125.00, 500.00] | 0.25 [0.12, 0.50] | 4,096 | 2 |"
    )
