"""Probing finished runs: who is a member, features and their cache, protocols, controls, rows."""

import dataclasses
from dataclasses import replace
import json
from pathlib import Path
import shutil
import sys
from typing import Any

import numpy as np
from probed_run import tiny_finished_run
import pytest
from small_sets import write_set
from tiny_run import CLASSES, striped_images
import torch

from rlp.data.geometry import fill_of, move
from rlp.errors import UserError
from rlp.labels import class_floor, random_labels, random_words
from rlp.measure import features, load_readings, load_scores, open_run, probe
from rlp.measure.budget import BudgetCurve
from rlp.measure.controls import Material, Part, class_only, leak, noise
from rlp.measure.estimate import Estimate
from rlp.measure.features import FIRST_EPOCH, extract
from rlp.measure.fit import HeadSpec
from rlp.measure.probe import PROTOCOLS, ProbeOptions, run_probe
from rlp.measure.protocols import Setting, log_weights, read
from rlp.measure.rows import class_loss, difference, planted_masks
from rlp.measure.run import Run

SMALL = ProbeOptions(n=(2, 5), draws=3, taps=("block3",), tolerance=1e-2)
ROW_KEYS = {
    "run", "seed", "protocol", "tap", "depth", "D", "n", "N", "draws", "head", "features", "mode", "images", "steps",
    "converged", "chance", "accuracy", "members", "non_members", "delta", "untrained", "noise", "class_only", "leak",
    "effective_rank", "participation_ratio", "curve", "note",
}  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_finished_run(tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="module")
def run(run_dir: Path) -> Run:
    return open_run(run_dir, device="cpu")


@pytest.fixture(scope="module")
def probed(run_dir: Path):
    return run_probe(run_dir, SMALL)


# -- opening -----------------------------------------------------------------------------------------------------


def test_a_run_opens_frozen(run: Run, run_dir: Path) -> None:
    assert not run.model.training
    assert not any(p.requires_grad for p in run.model.parameters())
    state = torch.load(run.checkpoint, weights_only=True)
    assert run.step == state["progress"]["step"]
    assert run.epoch == 2
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, state["model"][name])


def test_members_are_what_was_trained_on_and_non_members_the_rest(run: Run) -> None:
    members, others = run.groups["members"], run.groups["non-members"]
    assert members.split == others.split == "train"
    assert sorted([*members.ids, *others.ids]) == list(range(120))
    assert (members.view.label == others.view.label).all()  # the same label noise
    assert run.summary["data"]["train"]["view"]["samples"] == len(members.ids)


def test_without_a_member_fraction_the_validation_images_are_non_members(tmp_path: Path) -> None:
    folder = tiny_finished_run(tmp_path, 60, data__member_fraction=1.0, data__label_noise=0.0, train__epochs=1)
    run = open_run(folder)
    assert [len(run.groups[name].ids) for name in ("members", "non-members")] == [60, 37]
    assert run.groups["non-members"].split == "val"
    (row, *_) = probe(folder, ProbeOptions(n=(3,), draws=2, taps=("block3",), protocols=("converged",)))
    assert row["N"] == 37  # as many of each, since κ depends on N
    write_set(tmp_path / "train.beton", striped_images(60, 9), CLASSES, split="train")
    with pytest.raises(UserError, match=r"data\.train .* is not the file that the run was trained with"):
        open_run(folder)


def test_what_is_no_finished_run_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        open_run(tmp_path)
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    with pytest.raises(UserError, match="there is no checkpoint at"):
        open_run(copy, checkpoint=str(tmp_path / "nothing.pt"))
    (copy / "summary.json").unlink()
    with pytest.raises(UserError, match="written when the run ends"):
        open_run(copy)


def test_the_checkpoint_of_another_run_is_refused(run_dir: Path, tmp_path: Path) -> None:
    """It fits the network and the data; what was read would be told as this run's seed."""
    state = torch.load(run_dir / "checkpoints" / "best.pt", weights_only=True)
    state["config"]["run"]["seed"] += 1
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt is no checkpoint of the run .*run\.seed"):
        open_run(run_dir, checkpoint=str(tmp_path / "other.pt"))


def test_the_best_checkpoint_can_be_opened(run_dir: Path) -> None:
    assert open_run(run_dir, checkpoint="best").checkpoint.name == "best.pt"


def test_the_untrained_network_is_seeded_and_another(run: Run) -> None:
    before = torch.get_rng_state()
    first, again, other = run.untrained(3), run.untrained(3), run.untrained(4)
    assert torch.equal(before, torch.get_rng_state())
    weights = [model.state_dict()["block1.0.weight"] for model in (first, again, other, run.model)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


# -- features ----------------------------------------------------------------------------------------------------


def normalised(run: Run, images: np.ndarray) -> torch.Tensor:
    """What a network sees of uint8 [N, H, W, 3], computed in float64 from the card."""
    pixels = torch.from_numpy(images).double() / 255
    scaled = (pixels - torch.tensor(run.card.mean)) / torch.tensor(run.card.std)
    return scaled.permute(0, 3, 1, 2).float()


def test_features_are_those_of_the_frozen_network(run: Run, tmp_path: Path) -> None:
    found = extract(run, "members", cache=tmp_path, draws=4, seed=1)
    group = run.groups["members"]
    x = normalised(run, group.beton.images(group.view.ids))
    for name in ("block1", "block2", "block3"):
        x = run.model.get_submodule(name)(x)
        assert torch.allclose(found.features[name], x.mean((2, 3)), atol=1e-5)
    assert list(found.features) == ["block1", "block2", "block3"]
    assert torch.allclose(found.logits, run.model.get_submodule("fc")(x.mean((2, 3))), atol=1e-5)
    assert (found.ids == group.ids).all()
    assert (found.given == group.view.label[group.view.ids]).all()
    assert (found.true == found.ids % CLASSES).all()


def test_words_are_fresh_and_nested_in_the_number_of_draws(run: Run, tmp_path: Path) -> None:
    words = extract(run, "members", cache=tmp_path, draws=4, seed=run.card.words_seed).words
    baked = random_words(run.card.words_seed, run.groups["members"].ids, 4)
    assert words.shape == baked.shape
    assert (words == baked).mean() < 0.01
    more = extract(run, "members", cache=tmp_path, draws=6, seed=run.card.words_seed).words
    assert (more[:, :4] == words).all()


def test_an_augmented_view_is_an_epoch_that_training_never_saw(run: Run, tmp_path: Path) -> None:
    group = run.groups["members"]
    images = torch.from_numpy(group.beton.images(group.view.ids))
    for view in (0, 3):
        moved = move(images, torch.from_numpy(group.ids), FIRST_EPOCH + view, 3, run.geometry, fill_of(run.card.mean))
        with torch.no_grad():
            expected = run.model.get_submodule("block1")(normalised(run, moved.numpy())).mean((2, 3))
        found = extract(run, "members", cache=tmp_path, view=view, taps=["block1"])
        assert torch.allclose(found.features["block1"], expected, atol=1e-5)
    first, other = (extract(run, "members", cache=tmp_path, view=view).features["block1"] for view in (0, 3))
    assert not torch.equal(first, other)


def test_train_mode_leaves_network_and_randomness_as_they_were(run: Run, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    state = torch.get_rng_state()
    first = extract(run, "members", mode="train", cache=tmp_path / "a")
    again = extract(run, "members", mode="train", cache=tmp_path / "b")
    clean = extract(run, "members", cache=tmp_path / "a")
    assert torch.equal(state, torch.get_rng_state())
    assert not run.model.training
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert torch.equal(first.logits, again.logits)  # dropout is seeded
    assert not torch.equal(first.logits, clean.logits)


def test_features_are_taken_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = extract(run, "members", cache=tmp_path)

    def fail(*_: object) -> None:
        raise AssertionError("taken again")

    monkeypatch.setattr(features, "_take", fail)
    again = extract(run, "members", cache=tmp_path, draws=5)  # words are no part of the cache
    assert torch.equal(first.features["block3"], again.features["block3"])
    changes: list[dict[str, Any]] = [
        {"taps": ["block1"]},
        {"mode": "train"},
        {"view": 1},
        {"untrained": True},
        {"limit": 20},
    ]
    for change in changes:
        with pytest.raises(AssertionError, match="taken again"):
            extract(run, "members", cache=tmp_path, **change)


def test_a_torn_or_damaged_cache_is_taken_again(run: Run, tmp_path: Path) -> None:
    first = extract(run, "members", cache=tmp_path)
    (place,) = tmp_path.iterdir()
    (tmp_path / ".0.999999999.tmp").mkdir()  # of a process that was killed
    for damage in (
        lambda: (place / "meta.json").unlink(),
        lambda: (place / "meta.json").write_text("[]"),
        lambda: (place / "0.npy").write_bytes(b"\x93NUMPY"),
        lambda: (place / "0.npy").write_bytes(b""),
    ):
        damage()
        assert torch.equal(extract(run, "members", cache=tmp_path).logits, first.logits)
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_a_failure_leaves_no_half_cache(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no module"):
        extract(run, "members", cache=tmp_path, taps=["blok"])
    model: Any = run.untrained(0)
    model.unused = torch.nn.Linear(2, 2)
    odd = dataclasses.replace(run, model=model)
    with pytest.raises(UserError, match="'unused' takes no part"):
        extract(odd, "members", cache=tmp_path, taps=["unused"])
    with torch.no_grad():
        model.fc.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="class logits are NaN"):
        extract(odd, "members", cache=tmp_path, taps=["block1"])
    assert list(tmp_path.iterdir()) == []


def test_limits_are_nested(run: Run) -> None:
    members = run.groups["members"]
    small, large = members.first(10, 0).ids, members.first(30, 0).ids
    assert len(small) == 10
    assert set(small) < set(large)
    assert set(small) != set(members.ids[:10])
    assert (np.diff(large) > 0).all()


# -- protocols and controls --------------------------------------------------------------------------------------


def part(x: torch.Tensor, words: np.ndarray, first: int = 0) -> Part:
    count = x.shape[1]
    classes = np.arange(count) % CLASSES
    predicted = torch.from_numpy(classes).expand(len(x), count)
    return Part(x=x, ids=first + np.arange(count), classes=classes, predicted=predicted, words=words)


def made_up(samples: int = 60, dim: int = 8, views: int = 1, draws: int = 3, seed: int = 0) -> Part:
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.normal(size=(views, samples, dim)).astype(np.float32))
    return part(x, random.integers(0, 2**32, (samples, draws)))


@pytest.mark.parametrize("protocol", ["converged", "budget"])
def test_heads_on_features_that_tell_the_random_label_are_right_and_do_not_leak(protocol: str) -> None:
    noisy = made_up(draws=1, samples=200)
    told = torch.nn.functional.one_hot(noisy.targets(4)[:, 0], 4).float()[None]
    telling = part(10 * told, noisy.words)
    setting = Setting(protocol=protocol, mode="eval", images="clean", features="raw", n=4)  # type: ignore[arg-type]
    found = read(Material(group="members", fit=telling, score=telling), setting)
    assert found.by_sample.mean() > (0.99 if protocol == "converged" else 0.6)
    # On features that tell nothing, heads know what they were fitted to, and nothing of other samples.
    whole = Material(group="members", fit=noisy, score=noisy)
    held_out = read(leak(whole, 0), setting)
    assert read(whole, setting).by_sample.mean() > 0.3
    assert abs(held_out.by_sample.mean() - 0.25) < 0.12
    assert held_out.by_sample.shape == (1, 100)


def test_residuals_are_those_of_the_given_or_of_the_predicted_class() -> None:
    noisy = made_up(draws=2, samples=60)
    predicted = torch.arange(60)[None] // 30  # two classes, in two halves: not the given ones
    apart = replace(noisy, x=100 * torch.nn.functional.one_hot(predicted, 8).float() + noisy.x, predicted=predicted)
    found = {
        kind: read(
            Material(group="members", fit=apart, score=apart),
            Setting(protocol="budget", mode="eval", images="clean", features=kind, n=2),
        )
        for kind in ("residual", "residual-predicted")
    }
    assert found["residual"].spectrum.effective_rank < 2  # what is predicted is still there, and all that there is
    assert found["residual-predicted"].spectrum.effective_rank > 4


def test_views_are_scored_unseen_and_averaged_by_sample() -> None:
    noisy = made_up(samples=40, draws=2, views=2)
    seen = part(noisy.x.repeat(3, 1, 1), noisy.words)
    unseen = made_up(samples=40, draws=2, views=2, seed=1)
    setting = Setting(protocol="views", mode="eval", images="augmented", features="raw", n=3)
    score = replace(noisy, x=unseen.x)
    found = read(Material(group="members", fit=seen, score=score), setting)
    assert found.correct.shape == (2, 2, 40)
    assert found.by_sample == pytest.approx(found.correct.mean(axis=1))
    assert abs(found.by_sample.mean() - 1 / 3) < 0.15
    reading = found.reading(setting, "tap", 0)
    assert reading.accuracy.mean() == pytest.approx(found.by_sample.mean())
    assert (reading.ids == np.tile(noisy.ids, 2)).all()


@pytest.mark.parametrize("protocol", ["converged", "budget", "retrieval"])
def test_a_dead_tap_reads_no_more_than_the_labels_shares(protocol: str) -> None:
    alive = made_up(samples=40)
    dead = part(torch.zeros_like(alive.x), alive.words)
    setting = Setting(protocol=protocol, mode="eval", images="clean", features="raw", n=4)  # type: ignore[arg-type]
    material = Material(group="members", fit=dead, score=dead)
    found = read(material, setting)
    assert found.by_sample.mean() < 0.45
    assert found.spectrum.effective_rank == 0.0
    control = noise(material, 0)
    assert torch.equal(control.fit.x, dead.x)


def test_retrieval_finds_copies_and_not_strangers() -> None:
    anchors, others = made_up(samples=50), made_up(samples=50, seed=1)
    setting = Setting(protocol="retrieval", mode="eval", images="augmented", features="raw")
    same = read(Material(group="members", fit=anchors, score=part(anchors.x + 1e-4, anchors.words)), setting)
    assert same.by_sample.mean() == 1.0
    assert same.n == 50
    strangers = read(Material(group="members", fit=anchors, score=others), setting)
    assert strangers.by_sample.mean() < 0.2
    assert np.isnan(strangers.log_p).all()


def test_per_class_heads_use_the_given_class() -> None:
    noisy = made_up(samples=40, dim=30)
    setting = Setting(
        protocol="converged", mode="eval", images="clean", features="raw", n=5, num_classes=CLASSES,
        head=HeadSpec(kind="per-class"),
    )  # fmt: skip
    found = read(Material(group="members", fit=noisy, score=noisy), setting)
    assert found.by_sample.mean() == 1.0  # ten samples a class in thirty dimensions: reached by counting alone
    shared = Setting(protocol="converged", mode="eval", images="clean", features="raw", n=5)
    small = made_up(samples=400, dim=3)
    assert read(Material(group="members", fit=small, score=small), shared).by_sample.mean() < 0.5


def test_noise_has_the_mean_and_covariance_of_the_features() -> None:
    x = torch.randn(1, 4000, 3, generator=torch.Generator().manual_seed(0)) @ torch.tensor(
        [[2.0, 1, 0], [0, 1, 0], [0, 0, 0.1]]
    ) + torch.tensor([5.0, 0, -1])
    members = part(x, made_up(4000).words)
    made = noise(Material(group="members", fit=members, score=members), 0)
    assert made.score is made.fit or torch.equal(made.score.x, made.fit.x)
    assert torch.allclose(made.fit.x[0].mean(0), x[0].mean(0), atol=0.15)
    assert torch.allclose(made.fit.x[0].T.cov(), x[0].T.cov(), atol=0.3)
    assert abs(np.corrcoef(made.fit.x[0, :, 0], x[0, :, 0])[0, 1]) < 0.1
    views = noise(Material(group="members", fit=members, score=made_up(4000, 3, 2)), 0)
    assert views.fit.x.shape == (1, 4000, 3)
    assert views.score.x.shape == (2, 4000, 3)


def test_the_leak_check_shares_no_sample() -> None:
    whole = made_up(samples=21)
    halves = leak(Material(group="members", fit=whole, score=whole), 0)
    assert not set(halves.fit.ids) & set(halves.score.ids)
    assert sorted([*halves.fit.ids, *halves.score.ids]) == list(range(21))
    assert torch.equal(halves.fit.x[0], whole.x[0, torch.from_numpy(halves.fit.ids)])


def test_class_only_is_the_floor_as_kappa() -> None:
    words = made_up(samples=40).words
    given = np.arange(40) % 4
    floor = class_floor(given, random_labels(words, 5), 4, 5).mean()
    assert class_only(given, words, 5) == pytest.approx((5 * floor - 1) / 4)


def test_the_area_of_a_budget_is_that_of_its_curve() -> None:
    steps = np.array([1, 2, 8, 64])
    correct = np.random.default_rng(0).random((4, 3, 50)) < 0.4
    area = BudgetCurve(steps=steps, correct=correct).area(6)
    weighted = np.einsum("s,skn->kn", log_weights(steps.tolist()), correct).mean(axis=1)
    assert (6 * weighted - 1) / 5 == pytest.approx(area)
    assert log_weights([7]) == pytest.approx([1.0])


def test_a_difference_adds_squares_of_half_widths() -> None:
    def estimate(mean: float, half: float | None) -> Estimate:
        low, high = (None, None) if half is None else (mean - half, mean + half)
        return Estimate(
            mean=mean, low=low, high=high, sd_seed=None, sd_draw=None, sd_sample=1.0, seeds=1, draws=1, samples=9
        )

    found = difference(estimate(0.5, 0.3), estimate(0.2, 0.4))
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, -0.2, 0.8))
    assert difference(estimate(0.5, None), estimate(0.2, 0.4)).low is None


# -- a whole probe -----------------------------------------------------------------------------------------------


def test_every_row_has_its_controls_and_intervals(probed) -> None:
    assert {row["protocol"] for row in probed.rows} == set(PROTOCOLS)
    for row in probed.rows:
        assert set(row) == ROW_KEYS
        assert row["chance"] == pytest.approx(1 / row["n"])
        assert row["class_only"] is not None
        missing = {name for name in ("non_members", "delta", "untrained", "noise", "leak") if row[name] is None}
        allowed = {"online": {"non_members", "delta", "untrained", "noise"}, "retrieval": {"leak"}}
        assert missing == allowed.get(row["protocol"], set())
        assert not missing or row["note"]
        for name in {"members", "non_members", "delta", "untrained", "noise", "leak"} - missing:
            assert row[name]["low"] <= row[name]["mean"] <= row[name]["high"]


def test_rows_agree_with_the_stored_readings(probed, run_dir: Path) -> None:
    readings = load_readings(run_dir / "measure" / "readings.npz")
    by_condition = {
        (c.protocol, c.tap, c.num_labels, c.group): reading for reading in readings for c in [reading.condition]
    }
    names = {"members": "members", "non-members": "non_members", "untrained": "untrained", "leak": "leak"}
    for row in probed.rows:
        if row["protocol"] not in ("converged", "views", "retrieval"):
            continue
        for group, name in names.items():
            if row[name] is not None:
                reading = by_condition[row["protocol"], row["tap"], row["n"], group]
                assert reading.kappa.mean() == pytest.approx(row[name]["mean"])
        assert row["delta"]["mean"] == pytest.approx(row["members"]["mean"] - row["non_members"]["mean"])
    with pytest.raises(KeyError):
        by_condition["online", "block3", 4, "members"]


def test_probe_json_holds_what_was_returned(probed, run_dir: Path) -> None:
    content = json.loads((run_dir / "measure" / "probe.json").read_text("utf-8"))
    assert content["schema"] == 1
    assert content["rows"] == json.loads(json.dumps(probed.rows))
    assert content["options"]["n"] == [2, 5]
    assert content["run"]["steps"] == open_run(run_dir).step
    assert {s["group"] for s in content["spectra"]} == {"members", "non-members", "untrained"}
    assert all(len(s["eigenvalues"]) == s["D"] for s in content["spectra"])
    assert {r["n"] for r in content["rademacher"]} == {2}
    curves = [row["curve"] for row in content["rows"] if row["protocol"] == "budget"]
    assert all(curve[0][0] == 1 and len(curve) > 5 for curve in curves)
    assert not any(row["curve"] for row in content["rows"] if row["protocol"] != "budget")


def test_online_rows_are_those_of_the_log(probed, run: Run) -> None:
    rows = [row for row in probed.rows if row["protocol"] == "online"]
    assert [(row["tap"], row["mode"]) for row in rows] == [("block3", mode) for mode in ("train", "eval")]
    heads = run.summary["final"]["heads"]
    for row in rows:
        mode = "online" if row["mode"] == "train" else "eval"
        mine = [h for h in heads if (h["split"], h["mode"], h["tap"]) == ("train", mode, row["tap"])]
        assert row["members"]["mean"] == pytest.approx(np.mean([h["kappa"] for h in mine]))


def test_wrong_labels_are_planted_truth(probed, run: Run, tmp_path: Path) -> None:
    members = extract(run, "members", cache=tmp_path)
    wrong = int((members.given != members.true).sum())
    assert wrong > 0
    (mask, scored) = planted_masks(members)["wrong label"]
    assert mask.sum() == wrong
    assert scored.all()
    assert {row["planted"] for row in probed.planted} == {"wrong label"}
    for row in probed.planted:
        assert row["chance"] == 0.5
        assert 0 <= row["members"]["mean"] <= 1
        assert row["untrained"] is not None
        assert row["non_members"] is not None
    loss = torch.nn.functional.cross_entropy(members.logits, torch.from_numpy(members.given), reduction="none")
    assert class_loss(members) == pytest.approx(loss.numpy(), abs=1e-5)


def test_scores_have_each_sample_once_a_condition(probed, run_dir: Path) -> None:
    frame: Any = load_scores(run_dir)
    condition = ["protocol", "tap", "n", "head", "features", "mode", "images", "group"]
    assert not frame.duplicated([*condition, "split", "index"]).any()
    for _, part in frame.groupby(condition):
        assert sorted(part["rank"]) == list(range(1, len(part) + 1))
        assert (part["N"] == len(part)).all()
    converged = frame[(frame.protocol == "converged") & (frame.tap == "block3") & (frame.n == 5)]
    (row,) = [r for r in probed.rows if (r["protocol"], r["tap"], r["n"]) == ("converged", "block3", 5)]
    members = converged[converged.group == "members"]
    assert members.correct.mean() == pytest.approx(row["accuracy"], abs=1e-6)
    assert (members.noisy == (members.given != members.true)).all()
    assert members.sort_values("rank").log_p.is_monotonic_decreasing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": (1,)}, "--n is '1'"),
        ({"draws": 0}, "--draws is 0"),
        ({"samples": 3}, "--samples is 3"),
        ({"protocols": ()}, "--protocols is ''"),
        ({"heads": ("cubic",)}, "--heads is 'cubic'"),
        ({"features": ("raw", "raw")}, "each once"),
        ({"seed": -1}, "--seed is -1"),
        ({"max_steps": 0}, "--max-steps is 0"),
        ({"tolerance": 1.0}, "--tolerance is 1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ProbeOptions(**changes)


QUICK = ProbeOptions(n=(2,), draws=2, taps=("block1",), protocols=("converged",), samples=20)


def test_a_probe_that_is_not_written_whole_leaves_no_older_one(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else ``probe.json`` of the first would be read with the readings of the second."""
    probe(run_dir, dataclasses.replace(QUICK, out=str(tmp_path)))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["rlp.measure.probe"], "save_scores", full)
    with pytest.raises(OSError, match="No space"):
        probe(run_dir, dataclasses.replace(QUICK, out=str(tmp_path), draws=3))
    assert not (tmp_path / "probe.json").exists()


def test_a_place_that_cannot_be_written_is_found_before_the_work(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("worked")

    monkeypatch.setattr(sys.modules["rlp.measure.probe"], "_probe_mode", work)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="File exists"):
        probe(run_dir, dataclasses.replace(QUICK, out=str(tmp_path / "file")))
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="cannot be written"):
        probe(run_dir, dataclasses.replace(QUICK, out=str(tmp_path / "folder")))


def test_one_draw_has_no_interval_and_other_settings_work(run_dir: Path, tmp_path: Path) -> None:
    options = ProbeOptions(
        n=(2,), draws=1, taps=("block1",), protocols=("converged",), heads=("linear", "per-class"),
        features=("standardised", "projected"), width=6, modes=("eval", "train"), images=("clean", "augmented"),
        samples=20, out=str(tmp_path),
    )  # fmt: skip
    rows = probe(run_dir, options)
    assert len(rows) == 16
    assert all(row["members"]["low"] is None and row["N"] == 20 for row in rows)
    assert {row["D"] for row in rows if row["features"] == "projected"} == {6}
    assert len({row["accuracy"] for row in rows}) > 2
