"""Going on with a run, going back in it, and dying in it at awkward moments: nothing is lost, mixed up or silent."""

import os
from pathlib import Path
import signal
import sys
import time

import numpy as np
import pytest
from small_sets import write_set
from test_trainer import Stopped, dies_at, make_trainer, stop_at, without_times
from tiny_run import CLASSES, final_state, striped_images, tiny_config, write_tiny_sets

from rlp import checkpoint
from rlp.distributed import World
from rlp.errors import UserError
from rlp.meters import NonFiniteError
from rlp.runlog import read_rows, read_summary
from rlp.trainer import Trainer
from train_rlp import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_sets(tmp_path)
    return tmp_path


def run(folder: Path, **changes) -> Path:
    """A run of tests/tiny_run.py's settings (5 batches an epoch); returns its folder."""
    config = tiny_config(folder, **changes)
    train(config, World())
    return Path(config.run.dir)


def dies(folder: Path, step: int, **changes) -> None:
    """A run that is cut off just before batch ``step``."""
    dies_at(step, tiny_config(folder, **changes))


def epochs(run_dir: Path) -> list[int]:
    return [row["epoch"] for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "epoch"]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*.pt"))


def test_going_back_leaves_no_hole_and_no_later_checkpoint(folder):
    run_dir = run(folder, train__epochs=3)
    older = run_dir / "checkpoints" / "step-000000010.pt"
    dies(folder, 13, train__epochs=3, run__resume=str(older), run__checkpoint_every=1)
    assert "step-000000013.pt" in checkpoints(run_dir)
    assert "step-000000015.pt" not in checkpoints(run_dir)
    assert not (run_dir / "summary.json").exists()
    run(folder, train__epochs=3, run__resume="auto")
    assert epochs(run_dir) == [1, 2, 3]


def test_a_checkpoint_of_another_run_does_not_enter_a_used_folder(folder):
    source = run(folder, run__dir=str(folder / "a"), train__epochs=1) / "checkpoints" / "step-000000005.pt"
    other = run(folder, run__dir=str(folder / "b"), train__epochs=1)
    before = (other / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds another run"):
        run(folder, run__dir=str(other), train__epochs=2, run__resume=str(source))
    assert (other / "metrics.jsonl").read_bytes() == before
    new = run(folder, run__dir=str(folder / "c"), train__epochs=2, run__resume=str(source))
    assert read_summary(new)["steps"] == 10


def test_auto_erases_no_run_that_lost_its_step_checkpoints(folder):
    run_dir = run(folder, train__epochs=1)
    (run_dir / "checkpoints" / "step-000000005.pt").unlink()
    with pytest.raises(UserError, match=r"best\.pt but no checkpoint to go on from"):
        run(folder, run__resume="auto")
    assert (run_dir / "summary.json").exists()


def test_a_damaged_newest_checkpoint_names_the_one_before(folder):
    run_dir = run(folder)
    newest = run_dir / "checkpoints" / "step-000000010.pt"
    newest.write_bytes(newest.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"step-000000010\.pt cannot be read.*before it is .*step-000000005\.pt"):
        run(folder, run__resume="auto")
    run(folder, run__resume=str(run_dir / "checkpoints" / "step-000000005.pt"))
    assert epochs(run_dir) == [1, 2]


def test_the_summary_is_gone_while_a_resumed_run_trains(folder):
    run_dir = run(folder, train__epochs=1)
    dies(folder, 7, train__epochs=3, run__resume="auto")
    assert not (run_dir / "summary.json").exists()


def test_the_best_survives_a_crash_before_its_write(folder):
    real = checkpoint.write_atomically

    def best_fails(path, content):
        if path.name == "best.pt":
            raise Stopped
        return real(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", best_fails)
        with pytest.raises(Stopped):
            run(folder, train__epochs=1)
    assert checkpoints(folder / "run") == ["step-000000005.pt"]
    run(folder, train__epochs=1, run__resume="auto")
    assert checkpoints(folder / "run") == ["best.pt", "step-000000005.pt"]


def test_config_yaml_of_an_overwriting_run_can_be_given_back(folder):
    run_dir = run(folder, train__epochs=1, run__overwrite=True)
    text = (run_dir / "config.yaml").read_text()
    assert "overwrite: false" in text
    assert "resume: null" in text


def test_overwriting_checks_before_it_removes(folder):
    run_dir = run(folder, train__epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(UserError, match=r"run\.tensorboard"):
            run(folder, run__overwrite=True, run__tensorboard=True)
    assert (run_dir / "summary.json").exists()


def test_a_run_that_ends_earlier_than_planned_is_read_as_a_whole(folder):
    settings = {"run__eval_every": 5, "train__schedule": "constant"}
    dies(folder, 12, train__epochs=6, **settings)
    run_dir = run(folder, train__epochs=2, run__resume="auto", **settings)
    final = read_summary(run_dir)["final"]
    assert final["train_eval"]["count"] == 100
    assert {(head["split"], head["mode"]) for head in final["heads"]} >= {("train", "eval"), ("val", "eval")}


def test_death_in_evaluation_neither_doubles_nor_loses_the_epoch(folder):
    """A checkpoint of the last batch of an epoch, whose evaluation had been written, is evaluated and written again."""
    changes = {"run__checkpoint_every": 5, "run__keep_last": 9}
    save = Trainer._save

    def dies_after_the_row(self, best, terminated):
        if self.progress.batch == 0:
            raise Stopped
        save(self, best, terminated)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save", dies_after_the_row)
        with pytest.raises(Stopped):
            run(folder, **changes)
    assert epochs(folder / "run") == [1]
    assert final_state(folder / "run")["progress"]["batch"] == 5
    run_dir = run(folder, run__resume="auto", **changes)
    whole = run(folder, run__dir=str(folder / "whole"), **changes)
    rows = [[without_times(row) for row in read_rows(d / "metrics.jsonl")] for d in (run_dir, whole)]
    assert rows[0] == rows[1]
    assert epochs(run_dir) == [1, 2]


@pytest.mark.parametrize("evaluations", [0, 1])
def test_sigterm_is_heard_before_and_between_evaluations(folder, evaluations):
    trainer = make_trainer(folder, "run")
    seen = []
    inner, step = trainer._evaluate, trainer._train_batch

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(split):
        seen.append(split)
        if evaluations:
            terminate()
        return inner(split)

    def train_batch(batch, update):
        step(batch, update)
        if not evaluations and trainer.progress.batch == 4:
            terminate()

    trainer._evaluate, trainer._train_batch = evaluate, train_batch  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        trainer.fit()
    assert len(seen) == evaluations
    assert final_state(folder / "run")["progress"]["step"] == 5


def test_the_last_step_of_all_is_checked_too(folder):
    """No later loss would show it."""
    changes = {"train__lr": 1e30, "train__schedule": "constant", "train__warmup_epochs": 0, "data__batch_size": 100}
    with pytest.raises(NonFiniteError, match="val loss is"):
        run(folder, train__epochs=1, **changes)
    assert checkpoints(folder / "run") == []
    assert not (folder / "run" / "summary.json").exists()


def test_weights_that_are_not_finite_are_never_saved(folder):
    trainer = make_trainer(folder, "run", run__checkpoint_every=1)
    inner = trainer._train_batch

    def poison(batch, update):
        inner(batch, update)
        if trainer.progress.step == 2:
            next(trainer.model.parameters()).data.fill_(float("nan"))

    trainer._train_batch = poison  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="weights became NaN or infinite by step 2"):
        trainer.fit()
    assert checkpoints(folder / "run") == ["step-000000001.pt", "step-000000002.pt"]


def test_a_penalty_that_is_not_finite_stops_the_run(folder):
    trainer = make_trainer(folder, "run", heads__lam=1.0)
    heads = trainer.heads
    assert heads is not None
    inner = heads.loss

    def loss(**arguments):
        value = inner(**arguments)
        heads.last_penalty = heads.last_penalty * float("inf")
        return value

    heads.loss = loss  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="the penalty became NaN or infinite at step 0"):
        trainer.fit()


def test_files_that_do_not_fit_each_other_are_refused_before_training(folder):
    write_set(folder / "val.beton", striped_images(37, 2), CLASSES, split="val", draws=2)
    with pytest.raises(UserError, match=r"val\.beton holds 2 draws"):
        run(folder)
    write_set(folder / "val.beton", [np.full((24, 24, 3), i, np.uint8) for i in range(37)], CLASSES, split="val")
    with pytest.raises(UserError, match=r"data\.val has images of 24x24 px"):
        run(folder)
    assert not (folder / "run").exists()


def test_images_need_not_be_square(folder):
    random = np.random.default_rng(0)
    for split, count in (("train", 100), ("val", 37)):
        images = list(random.integers(0, 256, (count, 16, 24, 3), dtype=np.uint8))
        write_set(folder / f"{split}.beton", images, CLASSES, split=split)
    run_dir = run(folder, train__epochs=1, heads__taps=["block1@flatten"])
    assert read_summary(run_dir)["final"]["heads"][0]["dim"] == 16 * 8 * 12


@pytest.mark.parametrize("where", ["/proc/none/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_made_is_named(folder, where):
    with pytest.raises(UserError, match=where):
        run(folder, run__dir=where)


def test_images_per_second_count_the_wait_for_the_device(folder):
    """Reading the sums is where the host waits: the row's rate includes it."""
    trainer = make_trainer(folder, "run", train__epochs=1, run__log_every=1)
    read = trainer.window.read

    def slow() -> dict[str, float]:
        time.sleep(0.3)
        return read()

    trainer.window.read = slow  # type: ignore[method-assign]
    trainer.fit()
    rates = [row["images_per_s"] for row in read_rows(folder / "run" / "metrics.jsonl") if row["kind"] == "step"]
    assert max(rates) <= 20 / 0.3


def test_time_before_a_resume_counts(folder):
    changes = {"train__epochs": 1, "run__log_every": 100, "run__checkpoint_every": 4}
    first = make_trainer(folder, "a", **changes)
    stop_at(first, 4)
    with pytest.raises(Stopped):
        first.fit()
    saved = final_state(folder / "a")
    saved["progress"] |= {"seconds": 500.0, "epoch_seconds": 300.0, "window_seconds": 100.0}
    second = make_trainer(folder, "b", **changes)
    second.load_state(saved)
    row = second.fit()
    rate = read_rows(folder / "b" / "metrics.jsonl")[0]["images_per_s"]
    assert rate <= 100 / 100.0
    assert row["seconds"] >= 300
    assert second.progress.seconds >= 500
    assert second.progress.epoch_seconds < 100  # of the next epoch


def test_the_best_of_before_a_resume_is_remembered(folder):
    dies(folder, 7)
    saved = final_state(folder / "run")
    saved["progress"] |= {"best": 2.0, "best_step": 1}
    trainer = make_trainer(folder, "again")
    trainer.load_state(saved)
    trainer.fit()
    assert (trainer.progress.best, trainer.progress.best_step) == (2.0, 1)
    assert "best.pt" not in checkpoints(folder / "again")
