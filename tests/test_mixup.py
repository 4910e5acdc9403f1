"""mixup and manifold mixup: held to timm's, drawn from nothing global, and clean images for the heads."""

from collections.abc import Callable
import copy
import os
from pathlib import Path
import random
import socket
from typing import Any, cast

import numpy as np
import pytest
from test_trainer import Stopped, drop_seconds, make_trainer, stop_at
from tiny_run import assert_same_tensors, final_state, tiny_config, write_tiny_sets
import torch
from torch import Tensor, nn
import torch.multiprocessing as mp
import torch.nn.functional as F

from rlp.data.batch import Batch
from rlp.distributed import World, connect
from rlp.errors import UserError
from rlp.measure.baselines.check import CheckResult
from rlp.measure.baselines.checks_training import check_mixup
from rlp.measure.estimate import Estimate
from rlp.models.backbone import build_model, import_timm
from rlp.progress import Progress
from rlp.regularisers.class_loss import count_correct, pass_for_heads
from rlp.regularisers.mixing import Mixing, Mixture
from train_rlp import train

BATCH, CLASSES, LAM = 6, 4, 0.3
MODES = {
    "mixup": {"train__mixup": 1.0},
    "manifold": {"train__manifold_mixup": 2.0, "train__manifold_taps": ["block*"]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_sets(tmp_path)
    return tmp_path


def a_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(BATCH, 3, 4, 4, generator=generator)
    ids = torch.arange(BATCH)
    return Batch(image, torch.tensor([0, 1, 2, 3, 0, 1]), ids, ids[:, None])


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def fixed(mixing: Mixing, mixture: Mixture, patch: pytest.MonkeyPatch) -> Mixing:
    patch.setattr(mixing, "draw", lambda epoch, batch, count: mixture)
    return mixing


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_timms_mixup(monkeypatch: pytest.MonkeyPatch, smoothing: float) -> None:
    """With timm's λ and its pairs, i and B - 1 - i."""
    try:
        import_timm()
    except UserError as error:
        pytest.skip(str(error))
    from timm.data.mixup import Mixup

    batch, model = a_batch(), network()
    theirs = Mixup(mixup_alpha=1.0, label_smoothing=smoothing, num_classes=CLASSES)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (LAM, False))
    image, target = theirs(batch.image.clone(), batch.label)
    expected = F.cross_entropy(model(image), target)
    mixture = Mixture(LAM, np.arange(BATCH)[::-1].copy(), 0)
    found = fixed(Mixing(1.0, 0, smoothing), mixture, monkeypatch).step(model, batch.image, batch, Progress())
    torch.testing.assert_close(found.loss, expected)
    answer = model(image)
    right = LAM * count_correct(answer, batch.label) + (1 - LAM) * count_correct(answer, batch.label.flip(0))
    torch.testing.assert_close(found.correct, right)


def test_manifold_mixup_mixes_the_output_of_the_module_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the network cut in two by hand; its hook is gone afterwards, and the module may run again in a pass."""
    batch, model = a_batch(), network()
    partner = np.array([3, 0, 1, 2, 5, 4])
    mixing = fixed(Mixing(1.0, 0, modules={"1": cast(nn.Module, model[1])}), Mixture(LAM, partner, 1), monkeypatch)
    found = mixing.step(model, batch.image, batch, Progress())
    hidden = model[:2](batch.image)
    logits = model[2:](LAM * hidden + (1 - LAM) * hidden[partner])
    one, two = F.cross_entropy(logits, batch.label), F.cross_entropy(logits, batch.label[partner])
    torch.testing.assert_close(found.loss, LAM * one + (1 - LAM) * two)
    again = mixing.step(lambda x: model(x) + 0 * model(2 * x), batch.image, batch, Progress())
    torch.testing.assert_close(again.loss, found.loss)
    assert not model[1]._forward_hooks


def test_what_is_drawn_depends_on_seed_epoch_and_batch_alone() -> None:
    mixing = Mixing(1.0, 5)
    first = mixing.draw(2, 3, 8)
    before = repr((np.random.get_state(), random.getstate(), torch.get_rng_state().tolist()))
    again = Mixing(1.0, 5).draw(2, 3, 8)
    assert repr((np.random.get_state(), random.getstate(), torch.get_rng_state().tolist())) == before
    assert (first.lam, first.partner.tolist()) == (again.lam, again.partner.tolist())
    assert sorted(first.partner) == list(range(8))
    others = [Mixing(1.0, 6).draw(2, 3, 8), mixing.draw(3, 3, 8), mixing.draw(2, 4, 8)]
    assert len({first.lam, *(other.lam for other in others)}) == 4
    assert mixing.draw(2, 3, 4).lam == first.lam  # whatever a rank's share of the batch


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_lambda_is_beta_and_places_are_equally_likely(alpha: float) -> None:
    mixing = Mixing(alpha, 0, modules={"a": nn.Identity(), "b": nn.Identity()})
    drawn = [mixing.draw(0, batch, 2) for batch in range(1500)]
    lams = np.array([mixture.lam for mixture in drawn])
    assert abs(lams.mean() - 0.5) < 4 * lams.std() / 1500**0.5
    assert lams.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)
    assert np.bincount([mixture.place for mixture in drawn]) == pytest.approx([500] * 3, abs=80)


def test_a_module_that_is_not_called_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mixing = fixed(Mixing(1.0, 0, modules={"x": nn.Identity()}), Mixture(LAM, np.arange(BATCH), 1), monkeypatch)
    with pytest.raises(UserError, match=r"train\.manifold_taps has 'x', which takes no part"):
        mixing.step(network(), a_batch().image, a_batch(), Progress())


def test_a_module_without_a_row_for_each_sample_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = network(), a_batch()
    mixture = Mixture(LAM, np.arange(BATCH), 1)
    mixing = fixed(Mixing(1.0, 0, modules={"1": cast(nn.Module, model[1])}), mixture, monkeypatch)
    with pytest.raises(UserError, match=r"train\.manifold_taps has '1', whose output has 12 rows for 6 samples"):
        mixing.step(lambda x: model(torch.cat([x, x])), batch.image, batch, Progress())


def test_a_pass_for_heads_leaves_nothing_but_features() -> None:
    """What it leaves is what a pass in train mode leaves: batch statistics, and dropout."""
    model = build_model("small_cnn", CLASSES, 16, {"dropout": 0.5}).train()
    image, seen = torch.randn(BATCH, 3, 16, 16), []
    handle = model.get_submodule("block3").register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    pass_for_heads(model, image, gradient=True)
    assert_same_tensors(model.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), generator)
    model(image)
    handle.remove()
    assert torch.equal(seen[0], seen[1])
    assert seen[0].requires_grad
    assert model.training
    with pytest.raises(AssertionError):  # a plain pass does change them
        assert_same_tensors(model.state_dict(), state)


@pytest.mark.parametrize("mode", MODES)
def test_lambda_zero_changes_nothing(folder: Path, mode: str) -> None:
    """Contract 1, with dropout, batch norm and clipping."""
    changes = {**MODES[mode], "train__clip_norm": 0.5}
    with_heads = make_trainer(folder, "with", **changes)
    with_heads.fit()
    without = make_trainer(folder, "without", **changes, heads__taps=[])
    without.fit()
    assert_same_tensors(with_heads.model.state_dict(), without.model.state_dict())
    assert with_heads.heads is not None


def first_step(folder: Path, name: str, **changes: Any) -> tuple[Tensor, Tensor | None]:
    """Fit losses of fresh heads on the first batch, and the first gradient at the network's first layer."""
    trainer = make_trainer(folder, name, **changes, model__args={})
    seen: dict[str, Tensor] = {}

    def step(batch: Batch, update: bool) -> None:
        trainer._loss(batch).backward()
        seen["gradient"] = next(trainer.model.parameters()).grad  # type: ignore[assignment]
        raise Stopped

    trainer._train_batch = step  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        trainer.fit()
    assert trainer.heads is not None
    return trainer.heads.last_fit, seen["gradient"]


def test_heads_see_clean_images_and_the_penalty_reaches_the_network(folder: Path) -> None:
    plain, _ = first_step(folder, "plain")
    mixed, free = first_step(folder, "mixed", train__mixup=1.0)
    penalised, held = first_step(folder, "held", train__mixup=1.0, heads__lam=1.0)
    assert torch.equal(plain, mixed)
    assert torch.equal(plain, penalised)
    assert free is not None
    assert held is not None
    assert not torch.equal(free, held)


@pytest.mark.parametrize("mode", MODES)
def test_resume_is_exact_within_an_epoch(folder: Path, mode: str) -> None:
    changes = {**MODES[mode], "run__checkpoint_every": 1, "heads__lam": 0.5}
    whole = make_trainer(folder, "whole", **changes)
    expected = whole.fit()
    broken = make_trainer(folder, "broken", **changes)
    stop_at(broken, 7)
    with pytest.raises(Stopped):
        broken.fit()
    saved = final_state(folder / "broken")
    np.random.seed(1)
    resumed = make_trainer(folder, "resumed", **changes)
    resumed.load_state(saved)
    assert drop_seconds(resumed.fit()) == drop_seconds(expected)
    for key in ("model", "heads", "optimizers", "random_states"):
        assert_same_tensors(whole.state()[key], resumed.state()[key], key)


def settings(folder: Path, name: str) -> Any:
    """A network without batch norm or dropout, so that ranks differ in nothing; with a penalty through clean passes."""
    changes = {"model__name": "mlp", "model__args": {"width": 16, "depth": 2}, "model__channels_last": False}
    heads = {"heads__taps": ["layer1"], "heads__lam": 1.0, "train__epochs": 1}
    mixing = {"train__manifold_mixup": 1.0, "train__manifold_taps": ["layer*"]}
    return tiny_config(folder, run__dir=str(folder / name), **changes, **heads, **mixing)


def work(rank: int, port: int, folder: str) -> None:
    """One of two ranks."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with connect("cpu") as world:
        train(settings(Path(folder), "two"), world)


def test_two_ranks_train_as_one_that_pairs_within_halves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=2)  # type: ignore[attr-defined]
    draw: Callable[[Mixing, int, int, int], Mixture] = Mixing.draw

    def by_halves(self: Mixing, epoch: int, batch: int, count: int) -> Mixture:
        half = draw(self, epoch, batch, count // 2)
        return half._replace(partner=np.concatenate([half.partner, count // 2 + half.partner]))

    monkeypatch.setattr(Mixing, "draw", by_halves)
    train(settings(folder, "one"), World())
    one, two = (final_state(folder / name) for name in ("one", "two"))
    for part in ("model", "heads"):
        torch.testing.assert_close(one[part], two[part], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train__mixup": 1.0, "train__manifold_mixup": 1.0, "train__bilevel": 4},
            "train.mixup and train.manifold_mixup and train.bilevel are set; expected one of them",
        ),
        ({"train__manifold_mixup": 1.0}, "train.manifold_taps is empty; expected modules"),
        ({"train__mixup": -1.0}, "train.mixup is -1.0; expected a number, at least 0"),
        ({**MODES["manifold"], "model__compile": True}, "expected model.compile false"),
    ],
)
def test_settings_that_make_no_sense_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(folder, **changes)


@pytest.mark.parametrize(
    ("taps", "message"), [(["blok"], "names no module"), (["block1:in"], "'block1:in'; expected a module alone")]
)
def test_taps_that_do_not_exist_are_refused(folder: Path, taps: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(folder, "run", train__manifold_mixup=1.0, train__manifold_taps=taps)


@pytest.fixture(scope="module")
def checked() -> dict[str, CheckResult]:
    return {result.quantity: result for result in check_mixup(seeds=(0,), small=True)}


def test_the_cards_check_passes(checked: dict[str, CheckResult]) -> None:
    for result in checked.values():
        found = result.found.mean if isinstance(result.found, Estimate) else result.found
        assert result.expected[0] <= found <= result.expected[1], result
