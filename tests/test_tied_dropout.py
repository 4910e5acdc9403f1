"""Example-tied dropout: a sample's channels are its own for good, and evaluation keeps the generalising ones alone."""

from pathlib import Path
from typing import Any

from probed_run import tiny_finished_run
import pytest
from test_trainer import Stopped, drop_seconds, make_trainer, stop_at
from tiny_run import assert_same_tensors, final_state, tiny_config, write_tiny_sets
import torch

from rlp.distributed import World
from rlp.errors import UserError
from rlp.measure.features import extract
from rlp.measure.run import open_run
from rlp.models import build_model
from rlp.regularisers.tied_dropout import TiedDropout, tied_dropout_of
from train_rlp import train

TIED: dict[str, Any] = {"train__tied_dropout": 0.5, "train__tied_per_sample": 0.25, "train__tied_taps": ["block2"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_sets(tmp_path)
    return tmp_path


def test_masks_belong_to_samples() -> None:
    """Whatever the batch; each memorising channel with the probability asked for."""
    dropout, ids = TiedDropout(0.75, 0.25, seed=1), torch.arange(4000)
    mask = dropout.mask("tap", 40, ids)
    assert mask[:, :10].all()
    assert mask[:, 10:].float().mean() == pytest.approx(0.25, abs=0.01)
    assert mask[:, 10:].float().mean(0).std() < 0.02
    some = torch.tensor([7, 3, 3999])
    assert torch.equal(dropout.mask("tap", 40, some), mask[some])
    assert not torch.equal(mask, TiedDropout(0.75, 0.25, seed=2).mask("tap", 40, ids))
    assert not torch.equal(mask, dropout.mask("other", 40, ids))
    assert TiedDropout(0.75, 1.0, seed=1).mask("tap", 40, ids).all()


@pytest.mark.parametrize(
    ("shape", "maps", "dim"), [((3, 8), 0, 1), ((3, 8, 2, 2), 0, 1), ((3, 5, 8), 0, 2), ((3, 2, 2, 8), 1, 3)]
)
def test_channels_are_masked_by_sample_in_training_and_all_alike_in_evaluation(
    shape: tuple[int, ...], maps: int, dim: int
) -> None:
    dropout = TiedDropout(0.5, 0.5, 0, channels_last_maps=bool(maps))
    dropout.index = torch.tensor([5, 6, 7])
    ones = torch.ones(shape)
    mask = dropout.mask("tap", 8, dropout.index)
    found = dropout.apply("tap", ones, training=True).movedim(dim, 1).flatten(2) if len(shape) > 2 else None
    found = dropout.apply("tap", ones, training=True)[..., None] if found is None else found
    assert torch.equal(found.bool(), mask[..., None].expand_as(found))
    clean = dropout.apply("tap", ones, training=False).movedim(dim, -1)
    assert clean[..., :4].all()
    assert not clean[..., 4:].any()


def test_training_without_ids_is_refused() -> None:
    with pytest.raises(UserError, match="'tap' has no sample ids"):
        TiedDropout(0.5, 0.5, 0).apply("tap", torch.ones(2, 4), training=True)


@pytest.mark.parametrize("taps", [["block*"], []])
def test_a_share_that_no_channel_comes_to_is_refused(folder: Path, taps: list[str]) -> None:
    """It would train without dropout, and nobody would know; with heads or without, before anything is written."""
    with pytest.raises(UserError, match=r"leaves none of the 32 channels at 'block2' to memorise"):
        train(tiny_config(folder, heads__taps=taps, **TIED | {"train__tied_dropout": 0.01}), World())
    assert not (folder / "run").exists()
    with pytest.raises(UserError, match=r"leaves none of the 4 channels"):
        TiedDropout(0.1, 0.5, 0).apply("tap", torch.ones(2, 4), training=False)


def test_an_output_without_a_row_for_each_sample_is_refused() -> None:
    dropout = TiedDropout(0.5, 0.5, 0)
    dropout.index = torch.arange(3)
    with pytest.raises(UserError, match=r"train\.tied_taps has 'tap', whose output has 12 rows for 3 samples"):
        dropout.apply("tap", torch.ones(12, 4), training=True)


def test_heads_read_what_the_network_goes_on_with(folder: Path) -> None:
    """Of a tap that dropout hangs at too: channels that are left out are zero in what heads are given."""
    trainer = make_trainer(folder, "run", **TIED)
    assert trainer.heads is not None
    trainer.model.eval()
    trainer.model(torch.randn(4, 3, 16, 16))
    features = trainer.heads._store.features["block2"]
    assert features[:, :16].any()
    assert not features[:, 16:].any()


def test_lambda_zero_changes_nothing_and_resume_is_exact(folder: Path) -> None:
    changes = {**TIED, "run__checkpoint_every": 1}
    whole = make_trainer(folder, "whole", **changes)
    expected = whole.fit()
    without = make_trainer(folder, "without", **changes, heads__taps=[])
    without.fit()
    assert_same_tensors(whole.model.state_dict(), without.model.state_dict())
    broken = make_trainer(folder, "broken", **changes)
    stop_at(broken, 7)
    with pytest.raises(Stopped):
        broken.fit()
    saved = final_state(folder / "broken")
    resumed = make_trainer(folder, "resumed", **changes)
    resumed.load_state(saved)
    assert drop_seconds(resumed.fit()) == drop_seconds(expected)
    assert_same_tensors(whole.state()["model"], resumed.state()["model"])


def test_a_run_that_is_opened_again_leaves_the_same_channels_out(folder: Path) -> None:
    run = open_run(tiny_finished_run(folder, **TIED), device="cpu")
    plain = build_model("small_cnn", 4, 16, dict(run.config.model.args)).eval()
    plain.load_state_dict(run.model.state_dict())
    image, seen = torch.randn(4, 3, 16, 16), []
    handle = run.model.get_submodule("block2").register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    answer = run.model(image)
    handle.remove()
    assert not seen[0][:, 16:].any()
    keep = torch.ones(1, 32, 1, 1)
    keep[:, 16:] = 0
    plain.get_submodule("block2").register_forward_hook(lambda *arguments: arguments[2] * keep)
    torch.testing.assert_close(plain(image), answer)


def test_features_in_train_mode_are_those_of_each_samples_own_channels(folder: Path) -> None:
    run = open_run(tiny_finished_run(folder, **TIED), device="cpu")
    [tap] = run.config.train.tied_taps
    found = extract(run, "members", taps=[tap], mode="train")
    index = torch.from_numpy(found.ids)
    dropout = tied_dropout_of(run.model)
    assert dropout is not None
    kept = dropout.mask(tap, found.features[tap].shape[1], index)
    assert not kept.all()
    assert not found.features[tap][~kept].any()
    assert found.features[tap][kept].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__tied_dropout": 0.5}, "train.tied_taps is empty"),
        ({**TIED, "heads__kind": "copied"}, "copies of the network's modules would lack train.tied_dropout"),
        ({**TIED, "model__compile": True}, "expected model.compile false"),
        ({**TIED, "train__mixup": 1.0}, "train.mixup and train.tied_dropout are set"),
    ],
)
def test_settings_that_make_no_sense_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(folder, **changes)
