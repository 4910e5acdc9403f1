"""Table and figures say what the rows say, for every size of run."""

import io
from pathlib import Path
from typing import Any

from fake_run import Row, epoch_row, fake_summary, head_row, write_fake_run
import pytest

from rlp.errors import UserError
from rlp.intervals import Interval, draw_interval
from rlp.report.readings import readings
from rlp.report.table import COLUMNS, summary_table
from rlp.runlog import METRICS, write_summary

TAPS_13 = [f"features.{number}.block" for number in range(13)]


def tap_lines(table: str) -> list[list[str]]:
    """The cells of the table's tap lines (intervals as one cell)."""
    lines = table.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("---")) + 1
    end = lines.index("", start)
    return [line.replace(", ", ",").replace("one draw", "one-draw").split() for line in lines[start:end]]


def interval_of(row: Row, split: str, mode: str, tap: str) -> Interval:
    """The interval straight from the head rows."""
    wanted = (split, mode, tap)
    heads = [head for head in row["heads"] if (head["split"], head["mode"], head["tap"]) == wanted]
    return draw_interval([head["kappa"] for head in heads])


def points(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Places and heights of every curve, by the first part of its label."""
    return {
        line.get_label().split(",")[0]: (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()
    }


def test_readings_gather_draws_by_tap_in_depth_order() -> None:
    rows = [
        head_row("train", "eval", "fc", 1, 1, 0.4, 10),
        head_row("train", "eval", "fc", 1, 0, 0.3, 10),
        head_row("train", "online", "fc", 1, 0, 0.9, 10),
        head_row("train", "eval", "a_late_name", 0, 0, 0.1, 10),
        head_row("val", "eval", "fc", 1, 0, 0.0, 10),
    ]
    first, second = readings(rows, "train", "eval")
    assert (first.tap, first.kappas) == ("a_late_name", (0.1,))
    assert (second.tap, second.kappas, second.draws) == ("fc", (0.3, 0.4), 2)
    assert second.floors == pytest.approx((0.03, 0.03))
    assert readings(rows, "val", "eval")[0].floors == ()
    assert readings(rows, "val", "online") == []


@pytest.mark.parametrize("num_labels", [2, 10, 100])
def test_table_holds_every_number_of_its_tap(num_labels: int) -> None:
    row = epoch_row(5, 5, ["conv1", "conv2", "fc"], 8, num_labels)
    lines = tap_lines(summary_table(fake_summary(row, lam=2.5)))
    assert [line[0] for line in lines] == ["conv1", "conv2", "fc"]
    for line in lines:
        assert len(line) == len(COLUMNS) - COLUMNS.count("%")
        kinds = (("train", "eval"), ("train", "online"), ("val", "eval"))
        clean, online, leak = (interval_of(row, split, mode, line[0]) for split, mode in kinds)
        accuracy = (1 + clean.mean * (num_labels - 1)) / num_labels
        assert line[2:4] == [str(num_labels), "8"]
        assert float(line[4]) == pytest.approx(accuracy, abs=1e-4)
        assert float(line[5]) == pytest.approx(1 / num_labels)
        assert line[6:8] == [f"{clean.mean:.3f}", f"[{clean.low:.3f},{clean.high:.3f}]"]
        assert line[8:10] == ["0.030", f"{online.mean:.3f}"]
        assert line[10:] == [f"{leak.mean:.3f}", f"[{leak.low:.3f},{leak.high:.3f}]"]


def test_table_states_the_conditions_and_how_to_read_it() -> None:
    table = summary_table(fake_summary(epoch_row(5, 5, ["fc"], 2), lam=2.5))
    for part in ("small_cnn", "N = 1,437 train, 360 val", "λ = 2.5", "5 epochs", "100 steps", "seed 0", "val 90.00%"):
        assert part in table
    assert "train 99.00% (running, augmented)" in table
    assert "other seeds" in table
    assert "proves no memorisation" in table


def test_clean_training_accuracy_is_shown_where_the_row_has_it() -> None:
    row = epoch_row(5, 5, ["fc"], 2) | {"train_eval": {"loss": 0.1, "accuracy": 0.9876, "count": 1437}}
    assert "train 98.76%   val" in summary_table(fake_summary(row))


def test_one_draw_has_no_interval_in_the_table() -> None:
    (line,) = tap_lines(summary_table(fake_summary(epoch_row(1, 1, ["fc"], 1))))
    assert line[7] == "one-draw"
    assert "[" not in " ".join(line)


def test_taps_read_only_online_are_shown_with_gaps() -> None:
    row = epoch_row(3, 3, ["conv", "fc"], 4)
    row["heads"] = [head for head in row["heads"] if head["mode"] == "online"]
    for line in tap_lines(summary_table(fake_summary(row))):
        assert line[4] == line[6] == line[7] == line[10] == "-"
        assert line[8] == "0.030"
        float(line[9])


def test_a_table_without_heads_says_so() -> None:
    assert "No random-label heads" in summary_table(fake_summary(epoch_row(1, 1, [], 1)))


@pytest.mark.parametrize(
    ("taps", "draws", "epochs"), [(["conv1", "conv2", "fc"], 8, 6), (["fc"], 1, 1), (TAPS_13, 3, 2)]
)
def test_figures_are_drawn_for_every_size_of_run(tmp_path: Path, taps: list[str], draws: int, epochs: int) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    from rlp.report.figures import write_figures

    summary = write_fake_run(tmp_path, taps, draws, epochs)
    paths = write_figures(tmp_path, summary)
    folder = tmp_path / "figures"
    assert paths == [folder / f"{name}.{kind}" for name in ("training", "depth") for kind in ("png", "pdf")]
    assert sorted(folder.iterdir()) == sorted(paths)
    for path in paths:
        if path.suffix == ".png":
            width, height = image.open(io.BytesIO(path.read_bytes())).size
            assert width > 1000
            assert height > 500
        else:
            assert path.read_bytes().startswith(b"%PDF")


def test_no_heads_no_depth_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from rlp.report.figures import write_figures

    write_fake_run(tmp_path, [], epochs=2)
    assert [path.name for path in write_figures(tmp_path)] == ["training.png", "training.pdf"]


def test_figures_of_a_run_without_an_epoch_are_an_error(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from rlp.report.figures import write_figures

    (tmp_path / METRICS).write_text("")
    with pytest.raises(UserError, match="no finished epoch"):
        write_figures(tmp_path)


def test_the_depth_figure_shows_the_numbers_and_their_conditions() -> None:
    pytest.importorskip("matplotlib")
    from rlp.report.figures import depth_figure

    row = epoch_row(5, 5, ["conv", "fc"], 4)
    axes = depth_figure(row, fake_summary(row, lam=2.5)).axes[0]
    title = axes.get_title()
    for part in ("n = 10", "N = 1,437", "4 draws", "λ = 2.5", "5 epochs", "seed 0", "small_cnn"):
        assert part in title
    assert [label.get_text() for label in axes.get_xticklabels()] == ["conv", "fc"]
    drawn = points(axes)
    leak = [reading.interval.mean for reading in readings(row["heads"], "val", "eval")]
    assert drawn["leak check: validation images"][1] == leak
    assert drawn["chance"][1] == [0, 0]


def test_the_training_figure_follows_eval_readings_and_skips_gaps() -> None:
    """Evaluation every second epoch: κ has a point where it was read, and none made up between."""
    pytest.importorskip("matplotlib")
    from rlp.report.figures import training_figure

    rows = [epoch_row(epoch, 4, ["conv", "fc"], 2) for epoch in range(1, 5)]
    for row in rows[::2]:
        row["heads"] = [head for head in row["heads"] if head["mode"] == "online"]
        row["val"]["loss"] = None
    loss, accuracy, kappa = training_figure(rows).axes
    curves = points(kappa)
    assert curves["conv"][0] == curves["fc"][0] == [2, 4]
    assert points(loss)["training"][0] == points(accuracy)["validation"][0] == [1, 2, 3, 4]
    assert points(loss)["validation"][0] == [2, 4]


def test_figures_take_the_summary_that_lies_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from rlp.report import figures

    seen = []
    monkeypatch.setattr(figures, "rendered", lambda figure, _: seen.append(figure) or b"")
    summary = write_fake_run(tmp_path, ["fc"], 2, 2)
    figures.write_figures(tmp_path)
    assert "λ" not in seen[-1].axes[0].get_title()
    write_summary(tmp_path, summary)
    figures.write_figures(tmp_path)
    assert "λ = 0" in seen[-1].axes[0].get_title()


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from rlp.report.figures import write_figures

    summary = write_fake_run(tmp_path, ["conv", "fc"], 2, 2)
    first = [path.read_bytes() for path in write_figures(tmp_path, summary)]
    assert first == [path.read_bytes() for path in write_figures(tmp_path, summary)]
