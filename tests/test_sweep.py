"""Sweeps: files read strictly, equal budgets, a test split that no choice has seen, a kill that costs nothing."""

from collections.abc import Iterator, Sequence
import json
import os
from pathlib import Path
import shutil
import signal
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_sets import write_set
from tiny_run import CLASSES, striped_images, tiny_settings
import torch
import yaml

from rlp.config import parse, to_yaml
from rlp.data.beton import Beton
from rlp.distributed import World
from rlp.errors import UserError
from rlp.measure.run import open_run
from rlp.reproduce.study import CommandError
from rlp.runlog import METRICS, SUMMARY
from rlp.schema import TrainConfig
from rlp.sweep import trials
from rlp.sweep.__main__ import main
from rlp.sweep.plan import Sweep, proposals
from rlp.sweep.readings import calibration_error, probe_options
from rlp.sweep.space import Regulariser, read_space
from rlp.sweep.trials import Outcome, best_of, device_slots, run_all
from rlp.sweep.validation import non_members, reserved, selection_rows, write_validation

pytest.importorskip("fastargs")
pytest.importorskip("optuna")

ROOT = Path(__file__).resolve().parent.parent
SPACES = sorted((ROOT / "configs" / "sweep").glob("*.yaml"))
LR = {"distribution": "log_uniform", "low": 0.01, "high": 0.1, "default": 0.05}
LAM = {"distribution": "uniform", "low": 0, "high": 2, "default": 0.5}

TAPS = {"distribution": "choice", "choices": ["layer1", "layer2", "fc"], "default": "layer1"}


def a_space(**changes: Any) -> dict[str, Any]:
    """The content of a good file."""
    return {
        "about": "tiny.",
        "base": "base.yaml",
        "trials": 2,
        "fresh": {"tap": "layer2", "draws": 2, "n": 4, "features": "raw"},
        "search": {"train.lr": LR},
        "regularisers": {
            "plain": {},
            "rlp": {"settings": {"heads.taps": ["layer2"]}, "search": {"heads.lam": LAM}, "checkpoint": "best"},
        },
        **changes,
    }


def written(folder: Path, **changes: Any) -> Path:
    """``folder/tiny.yaml``, and beside it the base and the two sets."""
    for split, count, seed in (("train", 160, 1), ("val", 40, 2)):
        write_set(folder / f"{split}.beton", striped_images(count, seed), CLASSES, split=split)
    settings = tiny_settings(folder, data__member_fraction=0.5, data__label_noise=0.3, data__flip=False)
    settings["data"]["crop_padding"] = 0
    settings["model"] = {"name": "mlp", "args": {"width": 16, "depth": 2}}
    settings["heads"] = {"draws": 3, "num_labels": 4}
    (folder / "base.yaml").write_text(yaml.safe_dump(settings))
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(a_space(**changes)))
    return path


def a_sweep(folder: Path, **changes: Any) -> Sweep:
    space = read_space(written(folder, **changes))
    return Sweep(space, tuple(space.regularisers), space.trials, (0, 1), folder / "out")


# -- the files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trails": 3}, "unknown key 'trails'; did you mean trials?"),
        ({"about": None}, "about is None; expected text"),
        ({"regularisers": {}}, "regularisers is empty"),
        ({"regularisers": {"a/b": {}}}, "'a/b' cannot name a folder"),
        ({"regularisers": {"a": None}}, "regularisers.a is None; expected keys"),
        ({"regularisers": {"a": {"checkpoint": "bets"}}}, "checkpoint is 'bets'; did you mean best?"),
        ({"regularisers": {"a": {"search": {"train.lr": LR | {}}}}}, "gives train.lr twice"),
        ({"regularisers": {"a": {"settings": {"train.lr": 0.1}}}}, "gives train.lr twice"),
        ({"search": {"lr": LR}}, "expected 'section.key: value' lines"),
        ({"search": {"train.lr": 0.1}}, "train.lr is 0.1; expected keys distribution, low"),
        ({"search": {"train.lr": LR | {"distribution": "normal"}}}, "distribution is 'normal'; did you mean uniform?"),
        ({"search": {"train.lr": LR | {"low": 0}}}, "goes from 0.0 to 0.1; expected low above 0 below high"),
        ({"search": {"train.lr": LR | {"low": 0.2}}}, "goes from 0.2 to 0.1; expected low above 0 below high"),
        ({"search": {"train.lr": LR | {"default": 1}}}, "default is 1.0; expected 0.01 to 0.1"),
        ({"search": {"train.lr": {"distribution": "choice", "choices": [1]}}}, "expected two or more"),
        ({"search": {"train.lr": {"distribution": "choice", "choices": [1, 2], "default": 3}}}, "expected one of 1, 2"),
        ({"search": {"train.lr": LR | {"choices": [1]}}}, "unknown key 'choices'"),
        ({"search": {"run.seed": LR}}, "the sweep itself sets run.seed"),
        ({"settings": {"run.seed": 3}}, "settings: the sweep itself sets run.seed"),
        ({"regularisers": {"a": {"settings": {"run.dir": "x"}}}}, "regularisers.a: the sweep itself sets run.dir"),
        ({"regularisers": {"a": {"settings": {"data.member_fraction": 0.9}}}}, "same samples, and so data.member_frac"),
        ({"regularisers": {"a": {"search": {"data.label_noise": LR | {}}}}}, "same samples, and so data.label_noise"),
        ({"regularisers": {"a": {"settings": {"data.val": "x.beton"}}}}, "have the same samples, and so data.val"),
        ({"selection": 1.0}, "selection is 1.0; expected a share between 0 and 1"),
        ({"trials": 0}, "trials is 0; expected at least 1"),
        ({"fresh": {"tap": "a", "n": 1}}, "fresh.n is 1; expected at least 2"),
        ({"fresh": {"tap": "a", "protocol": "view"}}, "fresh.protocol is 'view'; expected one of converged, budget"),
    ],
)
def test_a_mistake_in_a_space_is_one_sentence(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(a_space(**change)))
    with pytest.raises(UserError) as raised:
        read_space(path)
    assert words in str(raised.value)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", SPACES, ids=[path.stem for path in SPACES])
def test_every_space_holds_whole_configurations(path: Path, tmp_path: Path) -> None:
    space = read_space(path)
    sweep = Sweep(space, tuple(space.regularisers), 3, (0, 1, 2), tmp_path)
    sweep.check()
    configs = [training.config for training in sweep.all_trials()]
    assert len({repr((c.data, c.model, c.heads, c.train)) for c in configs}) == 3 * len(space.regularisers)
    early, mixed = {"early_stopping", "early_stopping_nmf"}, {"mixup", "manifold_mixup", "bilevel", "bilevel_mixup"}
    assert {*space.regularisers} >= early | mixed | {"plain", "dropout", "weight_decay", "label_smoothing", "rlp"}


# -- the search ------------------------------------------------------------------------------------------------

WIDE = {
    "train.lr": LR,
    "train.bilevel": {"distribution": "choice", "choices": [2, 4], "default": 4},
    "train.patience": {"distribution": "log_integer", "low": 2, "high": 9, "default": 3},
}


def test_trials_begin_with_the_defaults_and_more_begin_with_fewer(tmp_path: Path) -> None:
    space = a_sweep(tmp_path, search=WIDE).space
    plain = space.regularisers["plain"]
    found = proposals(space, plain, 30)
    assert found[0] == {"train.lr": 0.05, "train.bilevel": 4, "train.patience": 3}
    assert found[:4] == proposals(space, plain, 4)
    assert len({each["train.lr"] for each in found}) == 30
    assert all(0.01 <= each["train.lr"] <= 0.1 and each["train.patience"] in range(2, 10) for each in found)
    assert {each["train.bilevel"] for each in found} == {2, 4}
    others = proposals(space, space.regularisers["rlp"], 30)
    assert [{key: each[key] for key in plain} for each, plain in zip(others, found, strict=True)] == found
    assert len({each["heads.lam"] for each in others}) == 30


def test_trials_differ_in_nothing_but_what_is_searched_and_set(tmp_path: Path) -> None:
    sweep = a_sweep(tmp_path)
    first, second, penalised, _ = (training.config for training in sweep.all_trials())
    assert (first.train.lr, first.heads.taps, first.heads.lam) == (0.05, (), 0.0)
    assert (penalised.train.lr, penalised.heads.taps, penalised.heads.lam) == (0.05, ("layer2",), 0.5)
    assert first.run.seed == second.run.seed == penalised.run.seed == 1000
    assert first.data == second.data == penalised.data
    assert sweep.final(sweep.regularisers()[0], 7, {"train.lr": 0.02}).config.run.seed == 7


# -- the split -------------------------------------------------------------------------------------------------


def test_selection_shares_no_sample_with_training_nor_with_the_fresh_heads(tmp_path: Path) -> None:
    sweep = a_sweep(tmp_path)
    group = non_members(sweep.base.data)
    rows = selection_rows(group, sweep.space.selection)
    options = probe_options(sweep, sweep.all_trials()[0])
    assert options.samples is not None
    assert options.samples == len(group.ids) - len(rows)
    probed = group.first(options.samples, options.seed).view.ids
    assert sorted([*rows, *probed]) == sorted(group.view.ids)  # each non-member on one side
    assert len(group.ids) < 160  # the rest are members
    with pytest.raises(UserError, match=r"selection is 0\.99, which splits"):
        reserved(group, 0.99)


# -- what is found before anything is trained -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fresh": {"tap": "layer9"}}, "tap 'layer9' names no module"),
        ({"fresh": {"tap": "layer*"}}, "fresh.tap 'layer*' names layer1, layer2; expected one of them"),
        ({"regularisers": {"plain": {}, "a": {"settings": {"heads.taps": ["x"]}}}}, "tap 'x' names no module"),
        (
            {"regularisers": {"a": {"settings": {"train.manifold_mixup": 1.0, "train.manifold_taps": ["lay"]}}}},
            "tap 'lay' names no module",
        ),
        (
            {"regularisers": {"a": {"search": {"train.nmf_tap": TAPS}}}},
            "train.nmf_tap: activations at tap 'fc' go down to",
        ),
    ],
)
def test_a_tap_that_does_not_exist_is_found_before_training(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    commands = Commands()
    monkeypatch.setattr("rlp.reproduce.study.run_command", commands)
    with pytest.raises(SystemExit) as ended:
        main([str(written(tmp_path, **changes)), "--out", str(tmp_path / "out"), "--seeds", "0"])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert commands.trained == []


def test_another_selection_in_the_same_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlp.reproduce.study.run_command", Commands())
    sweep = a_sweep(tmp_path)
    assert write_validation(sweep) == write_validation(sweep)
    with pytest.raises(UserError, match="holds other samples than the sweep would choose on now"):
        write_validation(a_sweep(tmp_path, selection=0.3))


# -- outcomes --------------------------------------------------------------------------------------------------


def a_finished(folder: Path, accuracies: Sequence[float], checkpoint: str) -> Any:
    """A training whose run has these validation accuracies."""
    folder.mkdir(parents=True)
    rows = [{"kind": "epoch", "epoch": i + 1, "step": i, "val": {"accuracy": a}} for i, a in enumerate(accuracies)]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / SUMMARY).write_text(json.dumps({"schema": 1, "seconds": 2.0}))
    regulariser = Regulariser(name="a", settings={}, search=(), checkpoint=checkpoint)  # type: ignore[arg-type]
    return SimpleNamespace(folder=folder, regulariser=regulariser, name=folder.name)


def test_the_checkpoint_that_counts_gives_the_accuracy(tmp_path: Path) -> None:
    last = trials._outcome(a_finished(tmp_path / "last", [0.2, 0.9, 0.9, 0.5], "last"))
    best = trials._outcome(a_finished(tmp_path / "best", [0.2, 0.9, 0.9, 0.5], "best"))
    assert (last.accuracy, last.epoch) == (0.5, 4)
    assert (best.accuracy, best.epoch) == (0.9, 2)


def test_of_equals_the_earlier_trial_is_chosen_and_failed_ones_never() -> None:
    training: Any = SimpleNamespace(regulariser=SimpleNamespace(name="a"))
    outcomes = [Outcome(training, accuracy, 1, 1.0) for accuracy in (None, 0.0, 0.7, 0.7)]
    assert best_of(outcomes) is outcomes[2]
    with pytest.raises(UserError, match="in all 1 trials of a a loss became NaN"):
        best_of(outcomes[:1])


def test_devices_are_taken_in_turn_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = device_slots(3, ["4", "7"])
    assert [slots.get()["CUDA_VISIBLE_DEVICES"] for _ in range(3)] == ["4", "7", "4"]
    assert device_slots(1, []).get() == {}
    used = []

    def train_run(*arguments: Any) -> None:
        used.append(arguments[4]["CUDA_VISIBLE_DEVICES"])
        raise CommandError("no", trials.NOT_FINITE)

    monkeypatch.setattr(trials, "train_run", train_run)
    monkeypatch.setattr(trials, "devices", lambda: ["4", "7"])
    sweep = a_sweep(tmp_path)
    outcomes = run_all(sweep, sweep.all_trials(), 1, "trials")
    assert used == ["4"] * 4  # one at a time: the one slot is given back each time
    assert [outcome.accuracy for outcome in outcomes] == [None] * 4


def test_a_loss_that_was_not_finite_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def train_run(config: TrainConfig, file: Path, what: str, *_: Any) -> None:
        started.append(what)
        folder = Path(config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(base, folder / "config.yaml")
        raise CommandError("training ended\nerror: NaN", status)

    sweep, status = a_sweep(tmp_path), trials.NOT_FINITE
    first = sweep.all_trials()[:1]
    base = tmp_path / "first.yaml"
    base.write_text(to_yaml(first[0].config))
    monkeypatch.setattr(trials, "train_run", train_run)
    for _ in range(2):
        assert run_all(sweep, first, 1, "trials")[0].accuracy is None
    assert len(started) == 1
    shutil.rmtree(first[0].folder)  # what is removed is tried again; another failure is a mistake
    status = 2
    for _ in range(2):  # and the note of the removed run is no note of this one
        with pytest.raises(CommandError):
            run_all(sweep, first, 1, "trials")


# -- calibration -----------------------------------------------------------------------------------------------


def test_calibration_error_is_the_sum_over_bins() -> None:
    random = np.random.default_rng(0)
    logits, label = 3 * random.normal(size=(200, 5)), random.integers(0, 5, 200)
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = []
        for row, truth in zip(logits, label, strict=True):
            p = np.exp(row) / np.exp(row).sum()
            if low < p.max() <= low + 1 / 15 + 1e-12:
                inside.append((p.argmax() == truth, p.max()))
        if inside:
            right, sure = np.mean(inside, axis=0)
            expected += len(inside) / 200 * abs(right - sure)
    assert calibration_error(logits, label) == pytest.approx(expected, abs=1e-9)


def test_calibration_error_of_known_cases() -> None:
    sure = np.array([[1000.0, 0.0], [1000.0, 0.0], [1000.0, 0.0], [1000.0, 0.0]], np.float32)
    assert calibration_error(sure, np.array([0, 0, 0, 0])) == 0
    assert calibration_error(sure, np.array([0, 1, 0, 1])) == 0.5
    assert calibration_error(np.zeros((4, 2)), np.array([0, 1, 0, 1])) == pytest.approx(0)  # unsure, right by half


# -- the command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "1", "1"], "--seeds is '1 1'; expected each once, and not 1000"),
        (["--seeds", "1000"], "--seeds is '1000'; expected each once, and not 1000"),
        (["--only", "rpl"], "--only is 'rpl'; did you mean rlp?"),
        (["--train.lr", "0.1"], "--train.lr is given, but it is searched"),
        (["--heads.taps=[layer1]"], "--heads.taps is given, but it is set by rlp"),
        (["--run.seed", "3"], "--run.seed is given, but it is set by the sweep itself"),
        (["--train.epoch", "3"], "unknown"),
        (["--data.member_fraction", "1.0"], "data.member_fraction is 1.0; expected below 1"),
        (["--data.train", "x.beton"], "data.train is given alone"),
    ],
)
def test_a_mistake_on_the_command_line_ends_with_status_2_and_writes_nothing(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(written(tmp_path)), "--out", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("device", "expected"), [("cpu", max(1, len(os.sched_getaffinity(0)) // 2)), ("auto", 5)])
def test_as_many_at_a_time_as_there_are_gpus_or_cores(
    device: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with five GPUs, of trainings of two threads each; those on the processor leave the GPUs alone."""
    seen = []
    monkeypatch.setattr("rlp.reproduce.study.run_command", Commands())
    monkeypatch.setattr(trials, "devices", lambda: list("01234"))
    monkeypatch.setattr("rlp.sweep.__main__._results", lambda plan, jobs: seen.append(jobs) or sys.exit(0))
    with pytest.raises(SystemExit):
        main([str(written(tmp_path, threads=2)), "--out", str(tmp_path / "out"), f"--run.device={device}"])
    assert seen == [expected]


class Commands:
    """Runs the project's scripts in this process, and can be stopped before a training."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.stop_at: int | None = None

    def __call__(self, command: Sequence[str], what: str, threads: int, variables: Any = None) -> None:
        from data_prep import write_datasets
        from train_rlp import train

        if not command[1].endswith("train_rlp.py"):
            assert write_datasets.main(command[2:]) == 0
            return
        if len(self.trained) == self.stop_at:
            raise KeyboardInterrupt
        config = parse(TrainConfig, list(command[2:]))
        assert config.run.resume == "auto"  # a run that was killed goes on
        assert not config.data.val.endswith("/val.beton")  # the test split's name here
        self.trained.append(what)
        train(config, World())


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One tiny sweep: stopped before its third training; then with a test split that cannot be read; then whole."""
    folder = tmp_path_factory.mktemp("sweep")
    arguments = [str(written(folder)), "--out", str(folder / "out"), "--seeds", "0", "1", "--jobs", "1"]
    good = (folder / "val.beton").read_bytes()
    (folder / "val.beton").write_bytes(b"not read")
    commands, found = Commands(), {"folder": folder, "arguments": arguments}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlp.reproduce.study.run_command", commands)
        patch.setattr("train_rlp.write_figures", lambda *_: [])  # of each run; a second for each
        commands.stop_at = 2
        found["stopped"], found["before"] = main(arguments), list(commands.trained)
        commands.stop_at = None
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        found["unread"], found["trained"] = ended.value.code, list(commands.trained)
        found["results"] = sorted((folder / "out").glob("sweep.*"))
        (folder / "val.beton").write_bytes(good)
        assert main(arguments) == 0
        found["again"] = commands.trained[len(found["trained"]) :]
        found["commands"] = commands
        found["json"] = json.loads((folder / "out" / "sweep.json").read_text())
        yield found


def test_a_stopped_sweep_goes_on_where_it_was(told: dict[str, Any]) -> None:
    assert told["stopped"] == 130
    assert told["before"] == ["training trials/plain-trial0", "training trials/plain-trial1"]
    assert told["trained"][:4] == [
        *told["before"], "training trials/rlp-trial0", "training trials/rlp-trial1"
    ]  # fmt: skip
    assert len(told["trained"]) == len(set(told["trained"])) == 8
    assert told["again"] == []


def test_the_test_split_is_read_for_nothing_but_the_last_table(told: dict[str, Any]) -> None:
    assert told["unread"] == 2  # it could not be opened, after all choices were made and all networks trained
    assert told["results"] == []
    assert {name for name in told["trained"] if "final" in name} == {
        f"training final/{name}-seed{seed}" for name in ("plain", "rlp") for seed in (0, 1)
    }
    written_configs = [path.read_text() for path in (told["folder"] / "out" / "configs").glob("*.yaml")]
    assert len(written_configs) == 8
    assert all(yaml.safe_load(text)["data"]["val"].endswith("out/data/validation.beton") for text in written_configs)


def test_the_validation_set_shows_the_selected_non_members_with_their_true_labels(told: dict[str, Any]) -> None:
    space = read_space(told["folder"] / "tiny.yaml")
    sweep = Sweep(space, tuple(space.regularisers), 2, (0, 1), told["folder"] / "out")
    train, validation = Beton.open(sweep.base.data.train), Beton.open(sweep.validation)
    rows = selection_rows(non_members(sweep.base.data), space.selection)
    assert np.array_equal(validation.images(), train.images(rows))
    assert np.array_equal(validation.label, train.label[rows])
    assert told["json"]["validation_samples"] == len(rows)


def test_every_regulariser_has_as_many_trials_and_all_are_shown(told: dict[str, Any]) -> None:
    found = told["json"]["regularisers"]
    assert [each["name"] for each in found] == ["plain", "rlp"]
    text = (told["folder"] / "out" / "sweep.md").read_text()
    for each in found:
        assert len(each["trials"]) == 2
        accuracies = [trial["validation_accuracy"] for trial in each["trials"]]
        assert each["chosen"] == int(np.argmax(accuracies))
        assert each["median_trial"] == statistics.median(accuracies)
        assert {network["seed"] for network in each["networks"]} == {0, 1}
        chosen = each["trials"][each["chosen"]]["params"]
        assert all(network["params"] == chosen for network in each["networks"])
        for number, trial in enumerate(each["trials"]):
            assert f"| {each['name']} | {number} |" in text
            assert trial["seed"] == 1000
    assert text.count("**chosen**") == 2
    assert (told["folder"] / "out" / "sweep.png").stat().st_size > 1000


def test_the_numbers_are_those_of_the_networks(told: dict[str, Any]) -> None:
    for each in told["json"]["regularisers"]:
        networks, estimates = each["networks"], each["estimates"]
        for name in ("test_accuracy", "noisy_given", "noisy_true", "ece"):
            values = [network[name] for network in networks]
            assert estimates[name]["mean"] == pytest.approx(np.mean(values))
            assert estimates[name]["seeds"] == 2
            assert estimates[name]["low"] is not None
        kappas = [network["fresh_heads"]["members"]["mean"] for network in networks]
        assert estimates["kappa"]["mean"] == pytest.approx(np.mean(kappas))
        deltas = [network["fresh_heads"]["delta"]["mean"] for network in networks]
        assert estimates["delta"]["mean"] == pytest.approx(np.mean(deltas))
        assert all(network["counts"]["test"] == 40 for network in networks)
    plain, penalised = told["json"]["regularisers"]
    difference = [
        b["test_accuracy"] - a["test_accuracy"] for a, b in zip(plain["networks"], penalised["networks"], strict=True)
    ]
    assert penalised["estimates"]["gain"]["mean"] == pytest.approx(np.mean(difference))
    assert plain["estimates"]["gain"] is None


def test_accuracies_agree_with_a_forward_pass(told: dict[str, Any]) -> None:
    network = told["json"]["regularisers"][0]["networks"][0]
    run = open_run(told["folder"] / "out" / network["run"], device="cpu")
    test = Beton.open(told["folder"] / "val.beton")
    images = torch.from_numpy(test.images()).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (run.card.mean, run.card.std))
    predicted = run.model((images - mean) / std).argmax(dim=1).numpy()
    assert network["test_accuracy"] == pytest.approx((predicted == test.label).mean())
    view = run.groups["members"].view
    images = torch.from_numpy(run.groups["members"].beton.images(view.ids)).permute(0, 3, 1, 2).float() / 255
    predicted = run.model((images - mean) / std).argmax(dim=1).numpy()
    given, true = view.label[view.ids], run.groups["members"].beton.label[view.ids]
    assert network["counts"]["noisy"] == (given != true).sum() > 0
    assert network["noisy_given"] == pytest.approx((predicted == given)[given != true].mean())
    assert network["noisy_true"] == pytest.approx((predicted == true)[given != true].mean())


def test_another_space_leaves_finished_runs_alone(
    told: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (told["folder"] / "tiny.yaml").read_text()
    other = told["folder"] / "other.yaml"
    other.write_text(text.replace("default: 0.05", "default: 0.06"))
    with pytest.raises(SystemExit):
        main([str(other), *told["arguments"][1:]])
    assert "holds a run with train.lr 0.05, and the sweep asks for 0.06" in capsys.readouterr().err


def test_trials_on_other_samples_are_not_taken_for_these(told: dict[str, Any]) -> None:
    """Whoever removes the validation samples gets others where the selection has changed; old trials are of the old."""
    space = read_space(told["folder"] / "tiny.yaml")
    sweep = Sweep(space, tuple(space.regularisers), 2, (0, 1), told["folder"] / "out")
    assert all(outcome.accuracy is not None for outcome in run_all(sweep, sweep.all_trials(), 1, "trials"))
    summary = told["folder"] / "out" / "trials" / "plain-trial0" / SUMMARY
    before = summary.read_text()
    summary.write_text(before.replace(json.loads(before)["data"]["val"]["sha256"], "0" * 64))
    try:
        with pytest.raises(UserError, match=r"plain-trial0 holds a run of another data\.val than"):
            run_all(sweep, sweep.all_trials(), 1, "trials")
    finally:
        summary.write_text(before)


@pytest.mark.slow
def test_a_killed_process_leaves_a_sweep_that_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [str(written(tmp_path)), "--out", str(out), "--seeds", "0", "--jobs", "1", "--only", "plain"]
    process = subprocess.Popen([sys.executable, "-m", "rlp.sweep", *arguments], cwd=ROOT, start_new_session=True)
    first = out / "trials" / "plain-trial0" / SUMMARY
    while not first.is_file() and process.poll() is None:
        time.sleep(0.1)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    stamp = first.stat().st_mtime_ns
    commands = Commands()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlp.reproduce.study.run_command", commands)
        assert main(arguments) == 0
    assert first.stat().st_mtime_ns == stamp
    assert commands.trained == ["training trials/plain-trial1", "training final/plain-seed0"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--jobs", "0"], "0 is not from 1 to"),
        (["--seeds", "1", "-1"], "-1 is not from 0 to"),
        (["--trials", "many"], "'many' is no integer"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["digits", *given])
    assert stop.value.code == 2
    assert f"argument {given[0]}: {message}" in capsys.readouterr().err
