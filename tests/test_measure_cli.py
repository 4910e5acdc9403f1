"""``python -m rlp.measure``: what it prints, its exit statuses, and the columns of every table."""

from pathlib import Path
import re
import subprocess
import sys

from probed_run import tiny_finished_run
import pytest
import torch

from rlp.measure import __main__ as cli
from rlp.measure import table
from rlp.measure.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = {"tap", "n", "N", "chance", "95%"}
CONTROLS = [{"κ non-member", "Δ", "untrained", "noise", "class-only", "leak"}, {"non-member", "untrained"}]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_finished_run(tmp_path_factory.mktemp("cli"), train__epochs=1)


def headers(text: str) -> list[set[str]]:
    """Columns of every table in a text: the line above each rule."""
    lines = text.splitlines()
    rules = [number for number, line in enumerate(lines) if re.fullmatch(r"-{20,}", line)]
    return [set(re.split(r"\s{2,}", lines[number - 1].strip())) for number in rules]


def test_every_printed_table_has_what_a_number_must_not_be_without(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--n", "2", "--draws", "2", "--taps", "block3", "--tolerance", "1e-2", "--samples", "30"]
    assert main(["probe", "--run", str(run_dir), *options]) == 0
    text = capsys.readouterr().out
    tables = headers(text)
    # converged, budget, views, retrieval, online twice; n = 2; planted truth of converged and views
    assert len(tables) == 9
    for columns in tables:
        assert columns >= ALWAYS
        assert any(columns >= controls for controls in CONTROLS)
    assert table.LEGEND in text
    assert "lower bound on the empirical Rademacher complexity" in text
    assert (run_dir / "measure" / "probe.json").is_file()


def test_a_table_without_an_interval_would_be_found() -> None:
    text = "tap  n  N  chance  κ non-member\n--------------------------------\nx    2  3  0.5     1"
    assert not headers(text)[0] >= ALWAYS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nowhere"], "error: nowhere holds no run"),
        (["--run", "RUN", "--taps", "layer9"], "error: tap 'layer9' names no module"),
        (["--run", "RUN", "--n", "1"], "error: --n is '1'"),
        (["--run", "RUN", "--samples", "2"], "error: --samples is 2"),
        (["--run", "RUN", "--checkpoint", "none.pt"], "error: there is no checkpoint at none.pt"),
        (["--run", "RUN", "--protocols", "magic"], "invalid choice: 'magic'"),
        ([], "the following arguments are required: --run"),
    ],
)
def test_mistakes_end_with_a_sentence_and_status_2(
    arguments: list[str], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["probe", *(str(run_dir) if argument == "RUN" else argument for argument in arguments)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_group_that_is_too_small_is_refused(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["rlp.measure.probe"], "FEWEST", 70)
    with pytest.raises(SystemExit):
        main(["probe", "--run", str(run_dir)])
    assert re.search(r"\d+ members and \d+ non-members; expected at least 70 of each", capsys.readouterr().err)


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_probe", stop)
    assert main(["probe", "--run", "x"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "run_probe", full)
    with pytest.raises(SystemExit):
        main(["probe", "--run", "x"])
    assert "error: probe failed: [Errno 28] No space left on device" in capsys.readouterr().err


def test_too_little_memory_is_a_sentence_and_other_faults_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def greedy(*_: object) -> None:
        torch.empty(2**55)

    monkeypatch.setattr(cli, "run_probe", greedy)
    with pytest.raises(SystemExit):
        main(["probe", "--run", "x"])
    assert "error: probe needs more memory: " in capsys.readouterr().err

    def wrong(*_: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(cli, "run_probe", wrong)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["probe", "--run", "x"])


def test_help_names_every_option() -> None:
    command = [sys.executable, "-m", "rlp.measure", "probe", "--help"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for option in ("--run", "--taps", "--draws", "--protocols", "--heads", "--features", "--width", "--modes"):
        assert option in finished.stdout
    assert "converged, views, budget, retrieval, online (default: all)" in " ".join(finished.stdout.split())
