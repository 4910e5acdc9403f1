"""The training loop held to the contracts: λ = 0 changes nothing, resume is exact, no host sync, nothing silent."""

from pathlib import Path

import pytest
from tiny_run import assert_same_tensors, final_state, tiny_config, write_tiny_sets
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlp import seeding
from rlp.build import build_data, build_network
from rlp.distributed import World
from rlp.meters import NonFiniteError
from rlp.runlog import RunLog, read_rows, read_summary
from rlp.trainer import INTERRUPTED, Trainer
from train_rlp import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_sets(tmp_path)
    return tmp_path


def make_trainer(folder: Path, name: str, **changes) -> Trainer:
    """A trainer as the script makes it, with the global generators freshly seeded: make one, fit it, make the next."""
    config = tiny_config(folder, run__dir=str(folder / name), **changes)
    world = World()
    seeding.seed_everything(config.run.seed)
    data = build_data(config, world)
    model, heads = build_network(config, data.train.card, world.device)
    (folder / name / "checkpoints").mkdir(parents=True)
    return Trainer(config, world, model, heads, data, RunLog(folder / name))


class Stopped(Exception):
    """Stands for a crash: raised out of the step, nothing gets the chance to tidy up."""


def stop_at(trainer: Trainer, step: int) -> None:
    """Let the trainer die just before batch ``step``."""
    inner = trainer._train_batch

    def train_batch(batch, update):
        if trainer.progress.step == step:
            raise Stopped
        inner(batch, update)

    trainer._train_batch = train_batch  # type: ignore[method-assign]


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_lambda_zero_leaves_the_backbone_bit_equal(folder, clip):
    """Contract 1, through the whole loop: dropout, batch norm, momentum, weight decay, clipping, augmentation."""
    with_heads = make_trainer(folder, "with", train__clip_norm=clip)
    with_heads.fit()
    without = make_trainer(folder, "without", train__clip_norm=clip, heads__taps=[])
    without.fit()
    assert with_heads.heads is not None
    assert without.heads is None
    assert_same_tensors(with_heads.model.state_dict(), without.model.state_dict())


def test_the_penalty_does_change_the_backbone(folder):
    """The counterpart of the test above: it would notice."""
    plain = make_trainer(folder, "plain")
    plain.fit()
    penalised = make_trainer(folder, "penalised", heads__lam=1.0)
    penalised.fit()
    pairs = zip(plain.model.state_dict().values(), penalised.model.state_dict().values(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (5, {}),  # an epoch's end: 5 batches of 20
        (7, {"run__checkpoint_every": 1}),
        (8, {"run__checkpoint_every": 1, "train__accumulate": 2, "heads__lam": 2.0}),
        (9, {"run__checkpoint_every": 2, "train__optimizer": "adamw", "train__lr": 1e-3, "heads__layers": 2}),
    ],
)
def test_resume_is_exact(folder, step, changes):
    """Contract 5: die at ``step``, resume, and end with the same bits: weights, optimiser, log."""
    whole = make_trainer(folder, "whole", **changes)
    expected = whole.fit()
    broken = make_trainer(folder, "broken", **changes)
    stop_at(broken, step)
    with pytest.raises(Stopped):
        broken.fit()
    saved = final_state(folder / "broken")
    torch.manual_seed(12345)  # a new process knows nothing of the old one's generators
    resumed = make_trainer(folder, "resumed", **changes)
    resumed.load_state(saved)
    row = resumed.fit()
    state, other = whole.state(), resumed.state()
    for key in ("model", "heads", "optimizers", "random_states"):
        assert_same_tensors(state[key], other[key], key)
    assert drop_seconds(row) == drop_seconds(expected)


def drop_seconds(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "seconds"}


def test_a_resumed_script_leaves_the_same_log(folder):
    """Through the script: every row once, summary last, both as in the undisturbed run."""
    train(tiny_config(folder, run__dir=str(folder / "whole")), World())
    config = tiny_config(folder, run__dir=str(folder / "again"), run__checkpoint_every=3)
    original = Trainer._train_batch

    def dies_once(self, batch, update):
        if self.progress.step == 8:
            raise Stopped
        original(self, batch, update)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_batch", dies_once)
        with pytest.raises(Stopped):
            train(config, World())
    assert not (folder / "again" / "summary.json").exists()
    train(tiny_config(folder, run__dir=str(folder / "again"), run__resume="auto", run__checkpoint_every=3), World())
    rows = [[without_times(row) for row in read_rows(folder / d / "metrics.jsonl")] for d in ("whole", "again")]
    assert rows[0] == rows[1]
    summaries = [without_times(read_summary(folder / d)["final"]) for d in ("whole", "again")]
    assert summaries[0] == summaries[1]


def without_times(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("seconds", "images_per_s")}


class NoHostSync(TorchDispatchMode):
    """Raises where the host would wait for a device: .item(), a branch on a tensor, data-dependent shapes."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.FORBIDDEN:
            raise AssertionError(f"host sync in the step: {func}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"heads__lam": 1.0, "data__cutout": 4, "data__label_noise": 0.3}])
def test_a_step_never_waits_for_the_host(folder, changes):
    """Contract 10: neither the batch, nor augmentation, forward, losses, backward, optimisers or bookkeeping."""
    # AdamW counts its steps in CPU tensors and reads them: no device waits, but the mode cannot tell. So SGD.
    trainer = make_trainer(folder, "run", heads__optimizer="sgd", **changes)
    batches = trainer.data.train.epoch(0)
    trainer._train_batch(next(batches), True)  # the first step may set things up
    with NoHostSync():
        trainer._train_batch(next(batches), True)
        with pytest.raises(AssertionError, match="host sync"):
            trainer.window.values.sum().item()


def test_nan_stops_naming_step_rank_and_tap(folder):
    """Contract 9: and no checkpoint is written after it."""
    trainer = make_trainer(folder, "run", run__log_every=1000, run__checkpoint_every=1)
    inner = trainer._train_batch

    def poison(batch, update):
        if trainer.progress.step == 3:
            assert trainer.heads is not None
            next(iter(trainer.heads.parameters())).data.fill_(float("nan"))
        inner(batch, update)

    trainer._train_batch = poison  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"fit loss at tap block1.* at step 3 on rank 0"):
        trainer.fit()
    assert final_state(folder / "run")["progress"]["step"] == 3


def test_sigterm_saves_and_leaves_with_its_own_status(folder):
    trainer = make_trainer(folder, "run")
    inner = trainer._train_batch

    def terminate(batch, update):
        inner(batch, update)
        if trainer.progress.step == 6:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    trainer._train_batch = terminate  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as stop:
        trainer.fit()
    assert stop.value.code == INTERRUPTED
    assert final_state(folder / "run")["progress"]["step"] == 7


def test_accumulation_equals_the_large_batch(folder):
    """Two batches of 20 accumulated give the gradient of one batch of 40 (no batch norm or dropout in between)."""
    changes = {"data__flip": False, "data__crop_padding": 0, "train__epochs": 1, "heads__lam": 1.0}
    large = make_trainer(folder, "large", data__batch_size=40, **changes)
    small = make_trainer(folder, "small", data__batch_size=20, train__accumulate=2, **changes)
    for trainer in (large, small):
        trainer.model.eval()
    images = next(large.data.train.epoch(0))
    halves = list(small.data.train.epoch(0))[:2]
    large._loss(images).backward()
    for half in halves:
        (small._loss(half) / 2).backward()
    for a, b in zip(large.model.parameters(), small.model.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_the_epoch_row_counts_each_sample_once_and_val_heads_stay_at_chance(folder):
    """Contracts 6 and 8 on one rank: exact counts; on images never trained on, the heads know nothing."""
    trainer = make_trainer(folder, "run", data__eval_batch_size=16, train__epochs=6)
    row = trainer.fit()
    assert row["val"]["count"] == 37
    assert row["train_eval"]["count"] == 100
    heads = [head for head in row["heads"] if head["mode"] == "eval"]
    assert {(head["split"], head["count"]) for head in heads} == {("train", 100), ("val", 37)}
    assert all(head["chance"] == 0.25 and head["num_labels"] == 4 for head in heads)
    assert all((head["floor"] is None) == (head["split"] == "val") for head in heads)
