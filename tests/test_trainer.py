"""The training loop held to the contracts: λ = 0 changes nothing, resume is exact, no host sync, nothing silent."""

from collections import Counter
import dataclasses
import itertools
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
from rlp.schema import TrainConfig
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


def dies_at(step: int, config: TrainConfig) -> None:
    """A run of the script that is cut off just before batch ``step``."""
    original = Trainer._train_batch

    def train_batch(self, batch, update):
        if self.progress.step == step:
            raise Stopped
        original(self, batch, update)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_batch", train_batch)
        with pytest.raises(Stopped):
            train(config, World())


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
    assert drop_seconds(state["progress"]) == drop_seconds(other["progress"])
    assert drop_seconds(row) == drop_seconds(expected)


def drop_seconds(row: dict) -> dict:
    return {key: value for key, value in row.items() if "seconds" not in key}


def test_a_resumed_script_leaves_the_same_log(folder):
    """Through the script: every row once, summary last, both as in the undisturbed run."""
    train(tiny_config(folder, run__dir=str(folder / "whole")), World())
    again = {"run__dir": str(folder / "again"), "run__checkpoint_every": 7}  # in the middle of a logging window
    config = tiny_config(folder, **again)
    dies_at(8, config)
    assert not (folder / "again" / "summary.json").exists()
    train(tiny_config(folder, run__resume="auto", **again), World())
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


def test_an_epoch_reads_tensors_only_where_it_logs(folder):
    """Contract 10 again, for what the mode above cannot see on the CPU: .tolist(), .cpu(), .numpy() and the like."""
    trainer = make_trainer(folder, "run", heads__optimizer="sgd", run__log_every=1000)
    logged = []
    trainer._log_window = lambda: logged.append(trainer.progress.step)  # type: ignore[method-assign]

    def refuse(name):
        def method(*_, **__):
            raise AssertionError(f"host sync in the step: Tensor.{name}")

        return method

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, refuse(name))
        trainer._train_epoch()
    assert logged == [5]


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
    """Two batches of 20 make the step of one batch of 40, also as an epoch's smaller last group (no batch norm)."""
    changes = {"data__flip": False, "data__crop_padding": 0, "train__epochs": 1, "heads__lam": 1.0}
    changes |= {"model__args": {"norm": False}, "train__schedule": "constant", "train__warmup_epochs": 0}
    large = make_trainer(folder, "large", data__batch_size=40, **changes)
    large._train_batch(next(large.data.train.epoch(0)), True)
    small = make_trainer(folder, "small", data__batch_size=20, train__accumulate=2, **changes)
    for batch, update in zip(small.data.train.epoch(0), (False, True), strict=False):
        small._train_batch(batch, update)
        small.progress.batch += 1
    # Five batches: the group of four, and the fifth alone, whose gradient counts in full.
    rest = make_trainer(folder, "rest", data__batch_size=20, train__accumulate=4, **changes)
    rest.progress.batch = 4
    rest._train_batch(next(rest.data.train.epoch(0)), True)
    alone = make_trainer(folder, "alone", data__batch_size=20, **changes)
    alone._train_batch(next(alone.data.train.epoch(0)), True)
    for one, other in ((large, small), (rest, alone)):
        for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_order_and_augmentation_follow_the_epoch(folder):
    """Contract 7 in the loop: each epoch has its own order and its own augmentation, in training alone."""
    trainer = make_trainer(folder, "run")
    seen = []
    load, augment = trainer.data.train.epoch, trainer.data.augment

    def epoch(number, start=0):
        seen.append(("order", number))
        return load(number, start)

    def spy(image, index, number, train):
        seen.append(("augment", number) if train else ("clean", number))
        return augment(image, index, number, train)

    trainer.data.train.epoch = epoch  # type: ignore[method-assign]
    trainer.data = dataclasses.replace(trainer.data, augment=spy)  # type: ignore[arg-type]
    trainer.fit()
    expected = [("order", 0), ("augment", 0), ("clean", 0), ("order", 1), ("augment", 1), ("clean", 0)]
    assert [key for key, _ in itertools.groupby(seen)] == expected


def test_lambda_over_n_is_lambda(folder):
    """λ/n = 0.25 with n = 4 trains to the bit like λ = 1."""
    states = []
    for name, changes in (("a", {"heads__lam": 1.0}), ("b", {"heads__lam_over_n": 0.25})):
        trainer = make_trainer(folder, name, **changes)
        trainer.fit()
        states.append(trainer.model.state_dict())
    assert_same_tensors(*states)


def test_the_floor_is_that_of_members_with_their_given_labels(folder):
    trainer = make_trainer(folder, "run", data__label_noise=0.4, data__member_fraction=0.7)
    batches = list(trainer.data.evaluation["train"].epoch(0))
    label, words = (torch.cat([getattr(b, name) for b in batches]) for name in ("label", "words"))
    assert len(label) < 100
    for draw, floor in enumerate(trainer.data.floors(0)):
        pairs = Counter(zip(label.tolist(), (words[:, draw] * 4 >> 32).tolist(), strict=True))
        best = [max((n for (c, _), n in pairs.items() if c == given), default=0) for given in range(4)]
        assert floor == pytest.approx(sum(best) / len(label))


def test_heads_learn_the_labels_they_are_read_on(folder):
    """Fitting and reading use the same words: with one wide tap and time, κ on the training images is far from 0."""
    changes = {"heads__taps": ["block1@flatten"], "heads__lr": 1e-2, "train__epochs": 12, "data__flip": False}
    row = make_trainer(folder, "run", data__crop_padding=0, train__schedule="constant", **changes).fit()
    kappas = [head["kappa"] for head in row["heads"] if (head["split"], head["mode"]) == ("train", "eval")]
    assert min(kappas) > 0.3


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
