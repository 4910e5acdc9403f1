"""Early stopping: after train.patience epochs without a better validation accuracy, also across a resume."""

from pathlib import Path

import pytest
from test_trainer import make_trainer
from tiny_run import final_state, tiny_config, write_tiny_sets

from rlp.distributed import World
from rlp.runlog import read_rows, read_summary
from rlp.trainer import Trainer
from train_rlp import train

ACCURACIES = (0.3, 0.5, 0.5, 0.4, 0.9, 0.2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sets, and a trainer whose validation accuracy is that of the table above."""
    write_tiny_sets(tmp_path, train=40)
    evaluate = Trainer._evaluate

    def told(self: Trainer, split: str) -> tuple[dict, list[dict]]:
        metrics, rows = evaluate(self, split)
        return (metrics | {"accuracy": ACCURACIES[self.progress.epoch]} if split == "val" else metrics), rows

    monkeypatch.setattr(Trainer, "_evaluate", told)
    return tmp_path


@pytest.mark.parametrize(("patience", "epochs"), [(0, 6), (1, 3), (2, 4), (3, 6)])
def test_it_stops_after_as_many_epochs_without_a_better_one(folder: Path, patience: int, epochs: int) -> None:
    """The last row is read as a whole, however early it comes."""
    trainer = make_trainer(folder, "run", train__epochs=6, train__patience=patience, run__eval_every=6)
    row = trainer.fit()
    assert row["epoch"] == trainer.progress.epoch == epochs
    assert "train_eval" in row
    rows = [row for row in read_rows(folder / "run" / "metrics.jsonl") if row["kind"] == "epoch"]
    assert ["train_eval" in row for row in rows] == [False] * (epochs - 1) + [True]


def test_a_stopped_run_goes_on_with_more_patience(folder: Path) -> None:
    """A run that stopped is complete, and resumed as it was it does nothing; the checkpoints' best stays the best."""
    for resume, patience, epochs in ((None, 1, 3), ("auto", 1, 3), ("auto", 3, 6)):
        train(tiny_config(folder, train__epochs=6, train__patience=patience, run__resume=resume), World())
        assert read_summary(folder / "run")["epochs"] == epochs
    progress = final_state(folder / "run")["progress"]
    assert (progress["best"], progress["best_step"]) == (0.9, 10)
