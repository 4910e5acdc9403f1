"""Crossover: complementary halves, pairs of one sample, what is finished is used again, and the command line."""

from dataclasses import replace
import json
from pathlib import Path
import sys
from typing import Any

import numpy as np
import pytest
from small_sets import write_set
from tiny_run import striped_images, tiny_config, write_tiny_sets

from rlp.config import to_yaml
from rlp.errors import UserError
from rlp.measure import crossover as module
from rlp.measure.crossover import crossover, half_config
from rlp.measure.estimate import Estimate
from rlp.measure.pooled_table import COLUMNS, pooled_table
from rlp.measure.pooling import by_sample
from rlp.measure.probe import ProbeOptions
from rlp.measure.reading import Condition, Reading, load_readings
from rlp.schema import TrainConfig
import train_rlp

OPTIONS = ProbeOptions(n=(2, 5), draws=3, protocols=("converged", "retrieval"), taps=("block1", "block3"))


def reading(ids: list[int], correct: np.ndarray, group: str = "members", protocol: str = "views") -> Reading:
    condition = Condition(
        protocol=protocol, tap="t", depth=0, dim=3, num_labels=2, head="linear", features="raw", mode="eval",
        images="clean", group=group,
    )  # fmt: skip
    none = np.zeros(correct.shape, np.float32)
    return Reading(condition=condition, ids=np.array(ids), correct=correct, log_p=none, margin=none)


def test_views_of_a_sample_are_averaged() -> None:
    """Ids as the probe stores them: all samples in one view, then in the next."""
    correct = np.array([[1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 1, 1]], bool)
    ids, values = by_sample(reading([7, 3, 9, 7, 3, 9], correct))
    assert ids.tolist() == [3, 7, 9]
    assert values.tolist() == [[0.5, 1.0, 0.0], [0.5, 0.0, 1.0]]
    ids, values = by_sample(reading([7, 3, 9], correct[:, :3]))
    assert values.dtype == bool
    assert values.tolist() == [[False, True, False], [False, False, True]]
    with pytest.raises(ValueError, match="differing numbers of views"):
        by_sample(reading([7, 3, 7], correct[:, :3]))


def test_the_halves_are_complementary_and_have_folders_of_their_own(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, run__resume="auto", data__label_noise=0.1)
    members, others = (half_config(config, 4, group) for group in ("members", "non-members"))
    assert members.run.dir == str(tmp_path / "run" / "seed4-members")
    assert others.run.dir == str(tmp_path / "run" / "seed4-non-members")
    assert (members.run.seed, members.run.resume, members.data.member_fraction) == (4, None, 0.5)
    assert replace(members, run=others.run, data=replace(members.data, members="non-members")) == others
    assert members.data.label_noise == 0.1


@pytest.mark.parametrize(
    ("change", "seeds", "options", "message"),
    [
        ({"data__member_fraction": 0.3}, [0], OPTIONS, r"data\.member_fraction is 0\.3; expected 0\.5, or 1"),
        ({}, [], OPTIONS, "--seeds is ''; expected seeds of networks, each once"),
        ({}, [1, 1], OPTIONS, "--seeds is '1 1'"),
        ({}, [0], replace(OPTIONS, protocols=("online",)), "--protocols is 'online'; expected some of converged"),
    ],
)
def test_what_cannot_be_is_named(
    tmp_path: Path, change: dict[str, Any], seeds: list[int], options: ProbeOptions, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        crossover(tiny_config(tmp_path, **change), seeds, options)


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "environment.json").write_text("{}")
    with pytest.raises(UserError, match=r"run\.dir .* holds a run; expected a new folder"):
        crossover(tiny_config(tmp_path), [0], OPTIONS)


def test_a_training_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_run", lambda command: 2)
    with pytest.raises(UserError, match="seed0-members ended with status 2; once mended, the same command goes on"):
        crossover(tiny_config(tmp_path), [0], OPTIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("crossover")
    write_tiny_sets(path)
    return path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Train in this process, which is faster; the names of the folders that were trained in."""
    trained: list[str] = []

    def run(command: list[str]) -> int:
        assert command[:2] == [sys.executable, str(Path(train_rlp.__file__))]
        trained.append(Path(command[3]).stem)
        train_rlp.main(command[2:])
        return 0

    monkeypatch.setattr(module, "_run", run)
    return trained


@pytest.fixture(scope="module")
def config(folder: Path) -> TrainConfig:
    return tiny_config(folder, train__epochs=1, data__batch_size=10, heads__taps=[], data__canary_mislabelled=0.1)


def test_every_sample_is_member_once_and_non_member_once(folder: Path, config: TrainConfig, here: list[str]) -> None:
    rows = crossover(config, [0, 1], OPTIONS)
    assert here == ["seed0-members", "seed0-non-members", "seed1-members", "seed1-non-members"]
    told = json.loads((folder / "run" / "crossover.json").read_text("utf-8"))
    assert (told["rows"], told["run"]["seeds"]) == (rows, [0, 1])
    assert {(row["protocol"], row["tap"]) for row in rows} == {
        (protocol, tap) for protocol in OPTIONS.protocols for tap in OPTIONS.taps
    }
    assert {row["n"] for row in rows if row["protocol"] == "converged"} == {2, 5}
    for row in rows:
        check_row(row, folder / "run")
    table = pooled_table(rows)
    for column in COLUMNS:
        assert column in table
    assert "95% interval" not in table.splitlines()[0]

    # Again: nothing is trained or probed, and the numbers are the same.
    before = (folder / "run" / "seed0-members" / "measure" / "crossover" / "probe.json").stat().st_mtime_ns
    here.clear()
    assert crossover(config, [0, 1], OPTIONS) == rows
    assert here == []
    assert (folder / "run" / "seed0-members" / "measure" / "crossover" / "probe.json").stat().st_mtime_ns == before

    # A network of other settings is not taken for the one asked for.
    for change, message in (
        ({"heads": replace(config.heads, num_labels=7)}, "heads.num_labels is 7"),
        ({"train": replace(config.train, epochs=2)}, "train.epochs was 1 and is 2"),
    ):
        with pytest.raises(UserError, match=rf"seed0-members is finished, with other settings: .*{message}"):
            crossover(replace(config, **change), [0, 1], OPTIONS)


def check_row(row: dict[str, Any], run_dir: Path) -> None:
    """Against the readings in the four networks' folders, sample by sample."""
    found = {}
    for seed in (0, 1):
        for side in ("members", "non-members"):
            path = run_dir / f"seed{seed}-{side}" / "measure" / "crossover" / "readings.npz"
            for each in load_readings(path):
                c = each.condition
                if (c.protocol, c.tap, c.num_labels) == (row["protocol"], row["tap"], row["n"]):
                    found[seed, side, c.group] = dict(zip(each.ids.tolist(), each.correct.T.mean(axis=1), strict=True))
    gains = []
    for seed in (0, 1):
        first, second = found[seed, "members", "members"], found[seed, "non-members", "members"]
        assert not set(first) & set(second)
        assert set(first) == set(found[seed, "non-members", "non-members"])
        assert set(second) == set(found[seed, "members", "non-members"])
        pairs = [(first[i], found[seed, "non-members", "non-members"][i]) for i in first]
        pairs += [(second[i], found[seed, "members", "non-members"][i]) for i in second]
        gains.append(np.mean([a - b for a, b in pairs]))
    n = row["n"]
    delta = Estimate.from_dict(row["delta"])
    assert delta.mean == pytest.approx(np.mean(gains) * n / (n - 1))
    assert (delta.seeds, delta.samples) == (2, 2 * row["N"])
    assert delta.low is not None
    assert delta.mean == pytest.approx(row["members"]["mean"] - row["non_members"]["mean"])
    assert row["chance"] == 1 / n
    assert row["class_only"] is not None
    for control in ("untrained", "noise", "leak"):
        assert (row[control] is None) == (row["protocol"] == "retrieval" and control == "leak")


def test_the_command_line(
    folder: Path, config: TrainConfig, capsys: pytest.CaptureFixture[str], here: list[str]
) -> None:
    from rlp.measure.__main__ import main

    path = folder / "c.yaml"
    path.write_text(to_yaml(config), "utf-8")
    out = folder / "other"
    options = ["--seeds", "5", "--draws", "2", "--n", "2", "--taps", "block3", "--protocols", "converged"]
    argv = ["crossover", "--config", str(path), *options, "--run.dir", str(out), "--train.lr=0.02"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "Δ" in printed
    assert f"written to {out / 'crossover.json'}" in printed
    assert "seed 5 (1 of 1), non-members" in printed
    told = json.loads((out / "crossover.json").read_text("utf-8"))
    assert told["run"]["config"]["train"]["lr"] == 0.02
    assert told["rows"][0]["delta"]["sd_seed"] is None
    assert (out / "seed5-members" / "summary.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--run.seed", "3"], "--run.seed is 3; expected --seeds"),
        (["--train.lr", "fast"], "train.lr is 'fast'"),
        (["--draws", "0"], "--draws is 0"),
    ],
)
def test_mistakes_on_the_command_line_end_with_status_2(
    folder: Path, config: TrainConfig, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    from rlp.measure.__main__ import main

    path = folder / "c.yaml"
    path.write_text(to_yaml(config), "utf-8")
    with pytest.raises(SystemExit) as caught:
        main(["crossover", "--config", str(path), *argv])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_network_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: list[str]) -> None:
    """A training that ended half-way leaves a checkpoint, from which the same command goes on to the same weights."""
    write_tiny_sets(tmp_path)
    config = half_config(tiny_config(tmp_path, train__epochs=2, data__batch_size=10), 0, "members")
    module._train(config)
    summary = Path(config.run.dir) / "summary.json"
    final = json.loads(summary.read_text("utf-8"))["final"]
    summary.unlink()
    sorted((Path(config.run.dir) / "checkpoints").glob("step-*.pt"))[-1].unlink()
    module._train(config)
    again = json.loads(summary.read_text("utf-8"))["final"]
    assert again["train"] == final["train"]
    assert here == ["seed0-members"] * 2


def test_a_real_process_trains(tmp_path: Path) -> None:
    write_tiny_sets(tmp_path)
    config = half_config(tiny_config(tmp_path, train__epochs=1, data__batch_size=10), 0, "non-members")
    module._train(config)
    assert (Path(config.run.dir) / "summary.json").exists()
    write_set(Path(config.data.val), striped_images(20, 3), split="val")
    with pytest.raises(UserError, match=r"is finished, with other settings: data\.val is not the file"):
        module._train(config)
