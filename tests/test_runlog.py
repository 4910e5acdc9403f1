"""The log of a run: whole rows, exact cutting on resume, silence off the main rank, readable lines."""

import importlib.util
import io
import json
import math
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

from fake_run import epoch_row, fake_summary, step_row
import pytest

from rlp import runlog
from rlp.errors import UserError
from rlp.runlog import RunLog, environment, read_rows, read_summary, weight_text, write_summary


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def steps(directory: Path) -> list[int]:
    return [row["step"] for row in read_rows(directory / "metrics.jsonl")]


def write_steps(directory: Path, numbers: range, after: int | None = None) -> None:
    log = RunLog(directory, truncate_after_step=after, stream=io.StringIO())
    for step in numbers:
        log.write(step_row(step))
    log.close()


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    rows = [step_row(20), epoch_row(1, 2, ["conv", "fc"], 3)]
    log = RunLog(tmp_path / "run", stream=io.StringIO())
    for row in rows:
        log.write(row)
        assert read_rows(tmp_path / "run" / "metrics.jsonl")[-1] == row  # on the disk before the run goes on
    log.close()
    log.close()


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with_nan = step_row(1, math.nan) | {"nested": [{"x": math.inf}]}
    log = RunLog(tmp_path, stream=io.StringIO())
    log.write(with_nan)
    log.close()
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["loss"] is None
    assert row["nested"] == [{"x": None}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_resumed_log_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 7))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 7, "lo')
    write_steps(tmp_path, range(5, 9), after=4)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (tmp_path / "train.log").read_text().count("step 5 ") == 2  # the text log keeps what happened


def test_a_torn_line_that_ends_in_half_a_character_is_dropped(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"kind": "step", "step": 3, "tap": "κ'.encode()[:-1])
    assert steps(tmp_path) == [1, 2]


def test_a_whole_last_row_without_its_newline_is_kept(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    write_steps(tmp_path, range(4, 5), after=3)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_fresh_log_begins_anew(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 7))
    write_steps(tmp_path, range(1, 3))
    assert steps(tmp_path) == [1, 2]


def test_damage_before_the_last_line_is_an_error_that_names_it(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2, is damaged"):
        RunLog(tmp_path, truncate_after_step=4)
    with pytest.raises(UserError, match="missing"):
        read_rows(tmp_path / "other.jsonl")


def test_killed_in_the_middle_leaves_whole_rows(tmp_path: Path) -> None:
    """kill -9 while rows are written as fast as they go: every line is whole but perhaps the last."""
    code = (
        "import io, sys; sys.path.insert(0, sys.argv[2])\n"
        "from rlp.runlog import RunLog; from fake_run import epoch_row\n"
        "log = RunLog(sys.argv[1], stream=io.StringIO())\n"
        "for epoch in range(1, 10**6): log.write(epoch_row(epoch, 10**6, ['a', 'b'], 8))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)])
    path = tmp_path / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 30
        while (not path.exists() or path.stat().st_size < 200_000) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    found = steps(tmp_path)
    assert len(found) > 10
    assert found == [20 * epoch for epoch in range(1, len(found) + 1)]


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path / "run", main=False, tensorboard=True)
    with log.progress(10, desc="epoch 1/1") as bar:
        bar.advance()
        log.write(step_row(1))
        log.info("hello")
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_line_per_step_row_where_there_is_no_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, stream=stream)
    with log.progress(100, 0, "epoch 3/12") as bar:
        for _ in range(50):
            bar.advance()
        log.write(step_row(50))
    log.info("resumed")
    log.close()
    line, message = stream.getvalue().splitlines()
    for part in ("epoch 3/12", "step 50", "loss 1.5", "accuracy 0.5", "lr 0.05", "fit 2.3", "1,234 images/s", "left"):
        assert part in line
    assert message == "resumed"
    logged = (tmp_path / "train.log").read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", entry) for entry in logged] == [line, message]


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    stream = Terminal()
    log = RunLog(tmp_path, stream=stream)
    with log.progress(8, 2, "epoch 1/1") as bar:
        bar.advance(3)
        log.write(step_row(5))
        log.info("saved")
        assert (bar.done, bar.total) == (5, 8)
    log.close()
    shown = stream.getvalue()
    assert "epoch 1/1" in shown
    assert "2/8" in shown
    assert "saved\n" in shown
    assert "images/s" not in shown  # the row is in the bar, not on a line of its own
    assert "images/s" in (tmp_path / "train.log").read_text()


def test_the_epoch_line_names_the_weakest_and_the_strongest_tap(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, stream=stream)
    log.write(epoch_row(4, 4, ["conv", "mid", "fc"], 8))
    log.write(epoch_row(4, 4, [], 8))
    log.write(epoch_row(4, 4, ["fc"], 1) | {"val": None})
    log.close()
    full, bare, single = stream.getvalue().splitlines()
    assert re.search(r"train loss 0\.23, accuracy 0\.99 \| val loss .*κ eval 0\.2\d+ \(conv\) to 0\.\d+ \(fc\)", full)
    assert "κ" not in bare
    assert "val loss" not in single
    assert re.search(r"κ eval 0\.\d+ \(fc\) \|", single)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (3725, "1h02m"), (math.nan, "?")])
def test_durations(seconds: float, text: str) -> None:
    assert runlog._duration(seconds) == text


def test_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    progress = runlog.Progress(20, 10, "epoch", None)
    assert math.isnan(progress.seconds_left())
    progress.advance(4)
    now[0] += 8.0
    assert progress.seconds_left() == 12.0


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, tensorboard=True, stream=io.StringIO())
    log.write(step_row(20))
    row = epoch_row(1, 1, ["conv", "fc"], 2)
    log.write(row)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("val/accuracy")[0].value == pytest.approx(row["val"]["accuracy"])
    assert events.Scalars("step/loss")[0].step == 20
    kappas = [h["kappa"] for h in row["heads"] if (h["split"], h["mode"], h["tap"]) == ("train", "eval", "fc")]
    assert events.Scalars("kappa_train_eval/fc")[0].value == pytest.approx(sum(kappas) / 2)


def test_tensorboard_that_is_not_installed_names_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"run\.tensorboard"):
        RunLog(tmp_path, tensorboard=True)


def test_summary_comes_back_and_refuses_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="written when the run ends"):
        read_summary(tmp_path)
    summary = fake_summary(epoch_row(2, 2, ["fc"], 1))
    write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary
    write_summary(tmp_path, summary | {"schema": 9})
    with pytest.raises(UserError, match="schema 1"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text('{"schema": 1,')
    with pytest.raises(UserError, match="damaged"):
        read_summary(tmp_path)


def test_environment_says_what_is_installed_and_no_more() -> None:
    import platform

    import torch

    found = environment(torch.device("cpu"))
    assert found["packages"]["torch"] == torch.__version__ or found["packages"]["torch"] in torch.__version__
    for name in ("ffcv", "triton"):
        if importlib.util.find_spec(name) is None:
            assert found["packages"][name] is None
    assert found["device"] == "cpu"
    assert found["cores"] >= 1
    assert "host" not in " ".join(found).lower()
    assert platform.node() not in json.dumps({k: v for k, v in found.items() if k != "argv"}) or not platform.node()


def test_git_state_of_a_checkout_and_of_an_installed_copy(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    for name in ("tracked.py", "installed.py"):
        (tmp_path / name).write_text("")
    git("add", "tracked.py")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    assert runlog._git_state(tmp_path / "tracked.py") == {"commit": head, "dirty": False}
    (tmp_path / "tracked.py").write_text("changed")
    assert runlog._git_state(tmp_path / "tracked.py") == {"commit": head, "dirty": True}
    assert runlog._git_state(tmp_path / "installed.py") is None


def test_a_weight_says_what_it_weighs():
    assert weight_text(0.0, {"penalty": "uniform"}) == "λ = 0"
    assert weight_text(1.0, {}) == weight_text(1.0, {"penalty": "forget", "steps": 1, "target_kappa": None}) == "λ = 1"
    told = weight_text(0.5, {"penalty": "uniform", "steps": 5, "lam_taps": {"a": 2}, "target_kappa": 0.1})
    assert told == "λ = 0.5 (uniform, 5 head steps, times {'a': 2}, adapted to κ = 0.1)"
