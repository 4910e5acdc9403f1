"""Heads over a run: warm-up, λ by tap, adaptive λ, more head steps, restarts; exact at λ = 0, on resume, over ranks."""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from small_sets import write_set
from test_runs import command, run, summary
from test_trainer import NoHostSync, Stopped, drop_seconds, make_trainer, stop_at
from tiny_run import CLASSES, assert_same_tensors, final_state, striped_images, tiny_config, write_tiny_sets
import torch
from torch import nn

from rlp.errors import UserError
from rlp.headplan import GAIN, RANGE, HeadPlan, KappaController, tap_factors
from rlp.losses import PENALTY_NAMES
from rlp.models import RandomLabelHeads, attach
from rlp.progress import Progress
from rlp.runlog import read_rows
from rlp.schema import HeadsConfig

RESTARTS: dict[str, Any] = {"heads__restart_every": 1, "heads__fresh_draws": True, "heads__steps": 3}
ADAPTIVE: dict[str, Any] = {"heads__lam": 1.0, "heads__target_kappa": 0.2}
ADAPTIVE |= {"heads__lam_taps": {"block2": 1, "block3": 2}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_sets(tmp_path)
    return tmp_path


def small_heads(**arguments: Any) -> RandomLabelHeads:
    return attach(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), ["0", "1"], example=torch.zeros(1, 6), **arguments)


# -- λ -------------------------------------------------------------------------------------------------------------


def test_factors_of_taps():
    taps = ["layer3.0", "layer3.1", "layer4:in"]
    assert tap_factors({}, taps) == [1, 1, 1]
    assert tap_factors({"layer3.1": 2}, taps) == [0, 2, 0]
    assert tap_factors({"*": 1, "layer3*": 0.5, "layer3.0": 0}, taps) == [0, 0.5, 1]
    with pytest.raises(UserError, match=r"names 'layer5', which fits no tap; the taps are layer3\.0, layer3\.1"):
        tap_factors({"layer5": 1}, taps)


def test_warm_up_is_linear_and_a_function_of_the_step():
    config = HeadsConfig(taps=("0",), lam_over_n=0.4, warmup_epochs=1.5, lam_taps={"*": 1, "1": 0.5})
    plan = HeadPlan(config, small_heads(), updates=4, accumulate=2)
    seen = [plan.lam(Progress(epoch=e, batch=b)) for e in range(2) for b in range(8)]  # 8 batches are 4 updates
    assert [lam["0"] for lam in seen] == pytest.approx([4 * min(1, (k // 2 + 1) / 6) for k in range(16)])
    assert [lam["1"] for lam in seen] == pytest.approx([lam["0"] / 2 for lam in seen])
    assert HeadPlan(HeadsConfig(), small_heads(), updates=4).lam(Progress()) == {"0": 0, "1": 0}


def feed(heads: RandomLabelHeads, kappas: list[float], count: int = 1000) -> None:
    """As if the heads had answered so many questions at each tap with those κ."""
    n = heads.num_labels
    for place, kappa in enumerate(kappas):
        heads.get_buffer("online_sums")[place, :, 1] += count * (1 + (n - 1) * kappa) / n
        heads.get_buffer("online_sums")[place, :, 2] += count


def test_the_controller_raises_lambda_where_kappa_is_too_high():
    """Per tap, by the stated law; in joint mode the other way round; a window without samples changes nothing."""
    for rises, sign in ((False, 1), (True, -1)):
        heads = small_heads(draws=2)
        control = KappaController(heads, 3.0, 0.2, rises)
        control.update()
        assert control.log_lam.tolist() == pytest.approx([math.log(3)] * 2)
        feed(heads, [0.25, 0.17])
        control.update()
        expected = [math.log(3) + sign * GAIN * move for move in (0.05, -0.03)]
        assert control.log_lam.tolist() == pytest.approx(expected)
        feed(heads, [0.25, 0.17])  # the next window counts by itself
        control.update()
        expected = [math.log(3) + 2 * sign * GAIN * move for move in (0.05, -0.03)]
        assert control.log_lam.tolist() == pytest.approx(expected)
        for _ in range(50):
            feed(heads, [1.0, 0.0])
            control.update()
        steps = (control.log_lam.exp() / 3).log().div(math.log(RANGE)).tolist()
        assert steps == pytest.approx([sign, -sign]), "λ stays within its range, and finite"


def test_the_controller_holds_a_simulated_kappa():
    """Heads whose κ falls as 0.8 / (1 + λ) come to 0.2, where λ is 3."""
    heads = small_heads(draws=2)
    control = KappaController(heads, 0.1, 0.2, rises=False)
    for _ in range(60):
        feed(heads, (0.8 / (1 + control.log_lam.exp())).tolist())
        control.update()
    assert control.log_lam.exp().tolist() == pytest.approx([3.0] * 2, rel=0.01)


def test_adaptive_lambda_lowers_kappa_and_is_logged(folder):
    """On a real run: taps without a factor have no λ, the others' moves as κ says, and ends where the row says."""
    trainer = make_trainer(folder, "run", **ADAPTIVE)
    row = trainer.fit()
    assert row["lam"].keys() == {"block2", "block3"}
    steps = [r for r in read_rows(folder / "run" / "metrics.jsonl") if r["kind"] == "step"]
    assert steps[0]["lam"] == {"block2": pytest.approx(1.0), "block3": pytest.approx(2.0)}
    assert row["lam"] != steps[0]["lam"]
    assert trainer.plan is not None
    assert trainer.plan.controller is not None
    now = trainer.plan.controller.log_lam.exp().tolist()
    assert [row["lam"]["block2"], row["lam"]["block3"] / 2] == pytest.approx(now[1:], rel=1e-6)


# -- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [RESTARTS, {"heads__penalty": "dof"}, {"heads__penalty": "entropy"}])
def test_lambda_zero_leaves_the_backbone_bit_equal(folder, changes):
    """Contract 1, with restarts, fresh draws and more head steps."""
    states = []
    for name, more in (("with", changes), ("without", {"heads__taps": []})):
        trainer = make_trainer(folder, name, **more)
        trainer.fit()
        states.append(trainer.model.state_dict())
    assert_same_tensors(*states)


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (7, {**RESTARTS, "heads__lam": 1.0, "train__epochs": 3}),  # in mid-epoch, after the first restart
        (10, {**RESTARTS, "heads__lam": 1.0, "train__epochs": 3}),  # at an epoch's end, just before the next
        (8, {**ADAPTIVE, "train__epochs": 3, "run__log_every": 3}),  # in the middle of a window
        (5, {**ADAPTIVE, "heads__penalty": "joint", "heads__warmup_epochs": 1.5}),
        (6, {"heads__penalty": "dof", "heads__lam": 1.0, "heads__warmup_epochs": 1.5, "train__accumulate": 2}),
    ],
)
def test_resume_is_exact(folder, step, changes):
    """Contract 5: weights, optimisers, λ and the last row."""
    changes = {"run__checkpoint_every": 1, **changes}
    whole = make_trainer(folder, "whole", **changes)
    expected = whole.fit()
    broken = make_trainer(folder, "broken", **changes)
    stop_at(broken, step)
    with pytest.raises(Stopped):
        broken.fit()
    resumed = make_trainer(folder, "resumed", **changes)
    resumed.load_state(final_state(folder / "broken"))
    row = resumed.fit()
    for key in ("model", "heads", "optimizers", "head_plan"):
        assert_same_tensors(whole.state()[key], resumed.state()[key], key)
    assert drop_seconds(row) == drop_seconds(expected)


@pytest.mark.parametrize("changes", [RESTARTS, ADAPTIVE, *({"heads__penalty": name} for name in PENALTY_NAMES)])
def test_a_step_never_waits_for_the_host(folder, changes):
    """Contract 10, for every penalty; adapting λ waits for nobody either."""
    trainer = make_trainer(folder, "run", **{"heads__lam": 1.0, "heads__optimizer": "sgd", **changes})
    assert trainer.heads is not None
    assert trainer.plan is not None
    batches = trainer.data.train.epoch(0)
    trainer.heads.first_draw = 3  # words beyond those of the file are computed
    trainer._train_batch(next(batches), True)
    with NoHostSync():
        trainer._train_batch(next(batches), True)
        trainer.plan.close_window()


def test_two_ranks_train_as_one(folder):
    """Restarts, inner steps and λ are equal on both ranks, or DDP's replicas would part; rows as with one, nearly."""
    changes = {**RESTARTS, **ADAPTIVE, "heads__penalty": "entropy", "model__args": {"norm": False}, "run__log_every": 1}
    make_trainer(folder, "one", **changes).fit()
    result = run(command(folder, 2, run__dir=str(folder / "two"), **changes), folder)
    assert result.returncode == 0, result.stderr
    assert summary(folder / "two")["ranks"] == 2
    files = [folder / name / "metrics.jsonl" for name in ("one", "two")]
    rows = [[row for row in read_rows(file) if row["kind"] == "step"] for file in files]
    for one, two in zip(*rows, strict=True):
        for key in ("class_loss", "fit_loss", "penalty"):
            assert one[key] == pytest.approx(two[key], rel=2e-3), (key, one["step"])
        assert one["lam"] == pytest.approx(two["lam"], rel=2e-2)


# -- restarts and steps --------------------------------------------------------------------------------------------


def test_restarts_clear_the_optimiser_and_say_which_draws_were_read(folder):
    trainer = make_trainer(folder, "run", heads__draws=2, train__epochs=3, run__eval_every=1, **RESTARTS)
    heads, started = trainer.heads, []
    assert heads is not None
    inner = heads.restart

    def restart(number, fresh_draws):
        inner(number, fresh_draws)
        started.append([p.detach().clone() for p in heads.parameters()])

    heads.restart = restart  # type: ignore[method-assign]
    trainer.fit()
    assert len(started) == 2
    assert not torch.equal(started[0][0], started[1][0])
    counts = {int(entry["step"]) for entry in trainer.optimizers[1].state.values()}
    assert counts == {5 * 3}, "steps of the last epoch alone, three for each of its 5 batches"
    rows = [r for r in read_rows(folder / "run" / "metrics.jsonl") if r["kind"] == "epoch"]
    seen = [{(head["restart"], head["draw"]) for head in row["heads"]} for row in rows]
    assert seen == [{(r, 2 * r), (r, 2 * r + 1)} for r in range(3)]
    assert {head["count"] for head in rows[0]["heads"] if head["mode"] == "online"} == {100}, "once a batch"
    floors = [[h["floor"] for h in row["heads"] if (h["split"], h["mode"]) == ("train", "eval")] for row in rows]
    assert floors[0] != floors[1]
    assert trainer.data.floors(2) == pytest.approx(floors[1][:2])


def test_words_beyond_the_file_are_those_of_a_file_with_more(folder, tmp_path_factory):
    """3 draws a restart: a file of 3 draws and one of 9 train to the same bits."""
    wide = tmp_path_factory.mktemp("wide")
    for split, count, seed in (("train", 100, 1), ("val", 37, 2)):
        write_set(wide / f"{split}.beton", striped_images(count, seed), CLASSES, split=split, draws=9)
    states, rows = [], []
    for place in (folder, wide):
        trainer = make_trainer(place, "run", heads__lam=1.0, train__epochs=3, **RESTARTS)
        rows.append(trainer.fit()["heads"])
        states.append(trainer.model.state_dict())
    assert_same_tensors(*states)
    assert rows[0] == rows[1]


def test_fresh_draws_change_the_labels_and_restarts_alone_do_not(folder):
    losses = {}
    for name, fresh in (("same", False), ("fresh", True)):
        trainer = make_trainer(folder, name, heads__restart_every=1, heads__fresh_draws=fresh, train__epochs=2)
        trainer.fit()
        assert trainer.heads is not None
        losses[name] = trainer.heads.first_draw
    assert losses == {"same": 0, "fresh": 3}


def test_more_steps_fit_the_heads_further(folder):
    """On a wide tap and images that stay as they are, so that there is something to fit."""
    changes = {"heads__taps": ["block1@flatten"], "data__flip": False, "data__crop_padding": 0, "train__epochs": 4}
    changes |= {"train__schedule": "constant", "heads__lr": 3e-3}
    kappas = []
    for steps in (1, 6):
        row = make_trainer(folder, f"steps{steps}", heads__steps=steps, **changes).fit()
        kappas.append(fmean(h["kappa"] for h in row["heads"] if (h["split"], h["mode"]) == ("train", "eval")))
    assert kappas[1] > kappas[0] + 0.05, kappas


def test_the_penalty_reaches_the_run_by_its_name(folder):
    """Every penalty trains to other weights, and λ of a single tap leaves what lies behind it alone at first."""
    seen = []
    for penalty in PENALTY_NAMES:
        trainer = make_trainer(folder, penalty, heads__lam=0.3, heads__penalty=penalty, train__epochs=1)
        trainer.fit()
        seen.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads__target_kappa": 0.1}, r"heads.target_kappa is 0.1, but λ is 0"),
        ({"heads__target_kappa": 1.5}, r"heads.target_kappa is 1.5; expected a number, from 0 to 1"),
        ({"heads__fresh_draws": True}, r"heads.fresh_draws is true, but heads.restart_every is 0"),
        ({"heads__lam_taps": {"block1": -1}}, r"heads.lam_taps has -1 at 'block1'"),
        ({"heads__lam_taps": {"block1": {"0": 1}}}, r"heads.lam_taps has \{'0': 1\} at 'block1'"),
        ({"heads__steps": 0}, r"heads.steps is 0; expected an integer, at least 1"),
        ({"heads__steps": 2, "train__accumulate": 2}, r"heads.steps is 2 and train.accumulate is 2"),
        ({"heads__warmup_epochs": 3}, r"heads.warmup_epochs is 3.0, longer than train.epochs"),
        ({"heads__penalty": "hinge"}, r"heads.penalty is 'hinge'; expected forget, uniform"),
        ({"heads__ridge": 0}, r"heads.ridge is 0; expected a number, at least 0.0001"),
    ],
)
def test_settings_that_cannot_be_are_refused(folder, changes, message):
    with pytest.raises(UserError, match=message):
        tiny_config(folder, **changes)


def test_a_tap_that_is_not_there_is_named_before_anything_is_written(folder):
    result = run(command(folder, heads__lam=1.0, heads__lam_taps={"block9": 1}), folder)
    assert result.returncode == 2
    assert "heads.lam_taps names 'block9', which fits no tap; the taps are block1, block2, block3" in result.stderr
    assert not (folder / "run").exists()
