"""The best epoch by the area of non-negative ranks: read of training images alone, and without a trace in training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_trainer import dies_at, make_trainer
from tiny_run import assert_same_tensors, final_state, tiny_config, write_tiny_sets
import torch

from rlp.data.view import View
from rlp.distributed import World
from rlp.errors import UserError
from rlp.low_rank.curve import FEWEST, nmf_area
from rlp.measure.run import open_run
from rlp.runlog import read_rows
from rlp.stopping import LABELS, PER_LABEL, NmfArea, few_of_each_label, score_of
from train_rlp import train

AREAS = (0.3, 0.5, 0.5, 0.4, 0.9, 0.2)
TAP = "block2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_sets(tmp_path)
    return tmp_path


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Areas as in the table, one an epoch."""
    areas = iter(AREAS)
    monkeypatch.setattr(NmfArea, "__call__", lambda self, model: next(areas))


def epochs(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "epoch"]


def test_a_row_is_scored_by_accuracy_or_else_by_the_area() -> None:
    assert score_of({"val": {"accuracy": 0.25}}) == 0.25
    assert score_of({"val": {"accuracy": 0.25}, "nmf_area": 0.75}) == 0.75


@pytest.mark.parametrize(("classes", "each"), [(3, 12), (LABELS, PER_LABEL), (23, PER_LABEL + 30)])
def test_it_reads_few_samples_of_each_given_label(classes: int, each: int) -> None:
    ids = np.arange(5, 5 + classes * each)
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), each))
    label = np.concatenate([np.zeros(5, np.int64), label])  # rows that are not in the view
    few = few_of_each_label(View(ids, label))
    assert np.isin(few.ids, ids).all()
    assert (np.diff(few.ids) > 0).all()
    counts = np.bincount(label[few.ids], minlength=classes)
    assert (counts > 0).sum() == min(LABELS, classes)
    assert {*counts[counts > 0]} == {min(PER_LABEL, each)}


def test_labels_too_rare_for_an_area_take_no_place_of_others() -> None:
    """Of 40 labels every fourth has ten samples: ten labels, whichever places the others would have had."""
    each = np.where(np.arange(4 * LABELS) % 4 == 3, FEWEST, FEWEST - 1)
    label = np.repeat(np.arange(4 * LABELS), each)
    few = few_of_each_label(View(np.arange(len(label)), label))
    assert np.unique(label[few.ids]).tolist() == list(range(3, 4 * LABELS, 4))
    assert len(few.ids) == LABELS * FEWEST


def test_too_few_samples_of_each_label_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_tiny_sets(tmp_path, train=4 * (FEWEST - 1))
    with pytest.raises(UserError, match=r"train.nmf_tap: no given label has 10 samples; expected more"):
        train(tiny_config(tmp_path, train__nmf_tap=TAP), World())
    assert not (tmp_path / "run").exists()


def test_the_row_has_the_area_of_the_trained_network(folder: Path) -> None:
    """By hand: the network of the last checkpoint on all of the training images, as evaluation shows them."""
    train(tiny_config(folder, train__nmf_tap=TAP), World())
    run = open_run(folder / "run", device="cpu", checkpoint="last")
    members = run.groups["members"]
    beton = members.beton
    images = torch.from_numpy(beton.images(members.view.ids)).permute(0, 3, 1, 2)
    shown = run.augment(images.contiguous(), torch.from_numpy(members.ids), 0, train=False)
    label = torch.from_numpy(members.view.label[members.view.ids])
    seed = run.config.run.seed
    assert epochs(folder / "run")[-1]["nmf_area"] == nmf_area(run.model, shown, label, TAP, restarts=1, seed=seed)


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize(("patience", "count", "best"), [(0, 6, 5), (1, 3, 2), (3, 6, 5)])
def test_the_area_decides_what_is_best_and_when_to_stop(folder: Path, patience: int, count: int, best: int) -> None:
    trainer = make_trainer(folder, "run", train__epochs=6, train__patience=patience, train__nmf_tap=TAP)
    assert trainer.fit()["epoch"] == count
    assert trainer.progress.best == AREAS[best - 1]
    state = torch.load(folder / "run" / "checkpoints" / "best.pt", weights_only=True)
    assert state["progress"]["step"] == best * 5


def test_training_is_the_same_with_and_without(folder: Path) -> None:
    """Nothing is left behind in the network, in its batch norms, or in what dropout draws next."""
    for name, tap in (("with", TAP), ("without", "")):
        train(tiny_config(folder, run__dir=str(folder / name), train__nmf_tap=tap), World())
    with_, without = (final_state(folder / name) for name in ("with", "without"))
    for part in ("model", "heads", "optimizers", "random_states"):
        assert_same_tensors(with_[part], without[part], part)


def test_a_killed_run_goes_on_as_if_it_had_not_been(folder: Path) -> None:
    changes = {"train__nmf_tap": TAP, "train__epochs": 3, "run__checkpoint_every": 2}
    train(tiny_config(folder, run__dir=str(folder / "whole"), **changes), World())
    dies_at(12, tiny_config(folder, **changes))
    train(tiny_config(folder, run__resume="auto", **changes), World())
    areas = [[row["nmf_area"] for row in epochs(folder / name)] for name in ("whole", "run")]
    assert areas[0] == areas[1]
    assert len(areas[0]) == 3
    whole, killed = (final_state(folder / name) for name in ("whole", "run"))
    assert_same_tensors(whole["model"], killed["model"])
    assert [whole["progress"][key] for key in ("best", "best_step")] == [
        killed["progress"][key] for key in ("best", "best_step")
    ]


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("fc", r"train.nmf_tap: activations at tap 'fc' go down to -.*behind a ReLU"),
        ("nothing", r"train.nmf_tap: .*nothing"),
        ("block*", r"train.nmf_tap: 'block\*' names 3 taps.*expected one"),
    ],
)
def test_a_tap_that_does_not_fit_is_refused_before_anything_is_written(folder: Path, tap: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny_config(folder, train__nmf_tap=tap), World())
    assert not (folder / "run").exists()
