"""Measures from retrained copies, Feldman-Zhang, training dynamics, LiRA: held to slow counting and planted truth."""

from dataclasses import replace
from itertools import pairwise
import math
from pathlib import Path
import statistics
from typing import Any

import numpy as np
from probed_run import tiny_finished_run
import pytest

from rlp.errors import UserError
from rlp.measure.baselines import dynamics, feldman_zhang, lira
from rlp.measure.baselines.interface import Findings, Subject
from rlp.measure.baselines.planted import planted_auroc, planted_findings
from rlp.measure.check_command import load_check
from rlp.measure.features import extract
from rlp.measure.rows import class_loss
from rlp.measure.run import open_run
import train_rlp


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """40 of 66 members and 40 non-members of a tiny run, a fifth with a wrong label."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rlp, "write_figures", lambda *_: [])
        run = tiny_finished_run(tmp_path_factory.mktemp("tiny"))
    return Subject.of(open_run(run, device="cpu"), taps=["block3"], samples=40, seed=5)


def rows_of(findings: Findings) -> dict[str, Any]:
    return {row.quantity: row for row in findings.rows}


def assert_scores(findings: Findings, subject: Subject, names: set[str], groups: tuple[str, ...]) -> None:
    assert {(score.name, score.group) for score in findings.scores} == {(n, g) for n in names for g in groups}
    for score in findings.scores:
        samples = subject.members if score.group == "members" else subject.non_members
        assert np.array_equal(score.ids, samples.ids)
        assert score.values.shape == (40,)
        assert score.values.dtype == np.float64


# Feldman and Zhang.


def test_gain_by_counting() -> None:
    random = np.random.default_rng(0)
    correct, subsets = random.random((9, 30)) < 0.6, random.random((9, 30)) < 0.5
    subsets[:, 0], subsets[:, 1] = True, False
    value, error = feldman_zhang.gain(correct, subsets)
    assert np.isnan(value[:2]).all()
    assert np.isnan(error[:2]).all()
    for i in range(2, 30):
        inside = [bool(c) for c, s in zip(correct[:, i], subsets[:, i], strict=True) if s]
        without = [bool(c) for c, s in zip(correct[:, i], subsets[:, i], strict=True) if not s]
        assert value[i] == pytest.approx(statistics.mean(inside) - statistics.mean(without))
        square = 0.0
        for side in (inside, without):
            p = (sum(side) + 1) / (len(side) + 2)
            square += p * (1 - p) / (len(side) + 2)
        assert error[i] == pytest.approx(math.sqrt(square))


def test_the_standard_error_covers_the_score() -> None:
    """Two standard errors hold the true difference of 2,000 samples about 95% of the time."""
    random = np.random.default_rng(1)
    p_in, p_out = random.uniform(0.5, 1, 2000), random.uniform(0, 0.9, 2000)
    subsets = random.random((60, 2000)) < 0.7
    correct = random.random((60, 2000)) < np.where(subsets, p_in, p_out)
    value, error = feldman_zhang.gain(correct, subsets)
    covered = float((np.abs(value - (p_in - p_out)) < 2 * error).mean())
    assert 0.93 < covered < 0.985


def test_subsets_are_of_one_size_and_depend_on_ids() -> None:
    ids = np.arange(100, 150)
    subsets = feldman_zhang.random_subsets(3, "train", ids, 40, 0.7)
    assert (subsets.sum(axis=1) == 35).all()
    assert 0.4 < subsets.mean(axis=0).min() < subsets.mean(axis=0).max() < 1
    assert np.array_equal(feldman_zhang.random_subsets(3, "train", ids, 50, 0.7)[:40], subsets)
    assert not np.array_equal(feldman_zhang.random_subsets(4, "train", ids, 40, 0.7), subsets)
    for share in (0.0, 0.001, 1.0):
        with pytest.raises(UserError, match="expected some in and some out"):
            feldman_zhang.random_subsets(3, "train", ids, 4, share)


def test_feldman_zhang_of_a_run(subject: Subject) -> None:
    findings = feldman_zhang.measure(subject, copies=12, epochs=2, at_once=6)
    assert_scores(findings, subject, {"feldman_zhang"}, ("members",))
    found = feldman_zhang.memorisation(subject, copies=12, epochs=2)
    assert len(found.ids) == len(subject.run.groups["members"].ids) > 40
    place = {int(i): n for n, i in enumerate(found.ids)}
    values = findings.scores[0].values
    assert values.tolist() == [found.value[place[int(i)]] for i in subject.members.ids]
    rows = rows_of(findings)
    assert set(rows) == {"mean", "standard error", "split-half Spearman", "feldman_zhang: AUROC(wrong label)"}
    assert rows["mean"].value.mean == pytest.approx(np.nanmean(values))
    assert 0 < rows["standard error"].value.mean < 0.6
    for row in rows.values():
        assert row.count <= 40
        assert "12 copies, subsets of 70%, 2 epochs" in row.settings
        assert row.value.low is not None
    with pytest.raises(UserError, match="expected at least 4"):
        feldman_zhang.measure(subject, copies=3)


def test_published_scores(tmp_path: Path) -> None:
    cifar, imagenet = tmp_path / "cifar100_infl_matrix.npz", tmp_path / "imagenet_index.npz"
    score = np.array([0.5, -0.1, 1.0], np.float32)
    np.savez(cifar, tr_mem=score, tr_labels=np.array([3, 1, 2]), infl=np.zeros((3, 2)))
    np.savez(imagenet, tr_mem=score, tr_filenames=np.array(["n02_7.JPEG", "n01_9.JPEG", "n01_10.JPEG"]))
    for path, expected in ((cifar, [0.5, -0.1, 1.0]), (imagenet, [1.0, -0.1, 0.5])):
        ids, values = feldman_zhang.load_published(path)
        assert ids.tolist() == [0, 1, 2]
        assert values == pytest.approx(expected)
        assert values.dtype == np.float64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tr_labels": np.zeros(3)}, "has no array 'tr_mem'"),
        ({"tr_mem": np.zeros((3, 2))}, r"'tr_mem' is float64 \[3, 2\]"),
        ({"tr_mem": np.array([0.1, np.nan])}, "expected finite numbers"),
        ({"tr_mem": np.array([1, 0])}, "'tr_mem' is int64"),
        ({"tr_mem": np.array([0.5, 3.0])}, "goes up to 3"),
        ({"tr_mem": np.zeros(3), "tr_labels": np.zeros(4)}, r"'tr_labels' is \[4\], and 'tr_mem' \[3\]"),
        ({"tr_mem": np.array([0.1, None], dtype=object)}, "cannot be read as .npz of plain arrays"),
        (None, "does not exist"),
        (b"no zip at all", "cannot be read"),
    ],
)
def test_what_is_not_published_is_refused(arrays: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(UserError, match=message):
        feldman_zhang.load_published(path)


# Training dynamics.


def test_forgetting_by_counting() -> None:
    correct = np.random.default_rng(2).random((2, 7, 50)) < 0.4
    correct[0, :, 0] = False
    correct[1, :, 1] = True
    found = dynamics.forgetting(correct)
    for copy in range(2):
        for i in range(50):
            history, events = correct[copy, :, i].tolist(), 0
            for before, after in pairwise(history):
                events += before and not after
            assert found[copy, i] == (events if any(history) else 7)
    assert found[0, 0] == 7
    assert found[1, 1] == 0


@pytest.mark.parametrize(("epochs", "expected"), [(1, 1), (10, 1), (100, 10), (200, 20), (1000, 20)])
def test_the_early_epoch(epochs: int, expected: int) -> None:
    assert dynamics.early_epoch(epochs) == expected


def test_dynamics_of_a_run(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    readings: dict[str, np.ndarray] = {}
    taken = dynamics.retrain

    def kept(*arguments: Any, **options: Any) -> dict[str, np.ndarray]:
        readings.update(taken(*arguments, **options))
        assert (arguments[2].sum(axis=1) == arguments[1].sizes[0]).all()  # trained on members, and on all of them
        assert arguments[2][:, : arguments[1].sizes[0]].all()
        return readings

    monkeypatch.setattr(dynamics, "retrain", kept)
    findings = dynamics.measure(subject, copies=2, epochs=3, early=2)
    names = {"el2n", "grand", "forgetting", "aum"}
    assert_scores(findings, subject, names, ("members", "non-members"))
    groups = list(subject.run.groups.values())
    ids = [("members", int(i)) for i in groups[0].ids] + [("non-members", int(i)) for i in groups[1].ids]
    expected = {
        "el2n": readings["error"][:, 0].mean(0),
        "grand": readings["gradient"][:, 0].mean(0),
        "forgetting": dynamics.forgetting(readings["margin"] > 0).mean(0),
        "aum": -readings["margin"].mean((0, 1)),
    }
    for score in findings.scores:
        by_id = dict(zip(ids, expected[score.name].tolist(), strict=True))
        assert score.values == pytest.approx([by_id[score.group, int(i)] for i in score.ids])
    rows = rows_of(findings)
    assert set(rows) == {f"{name}: {what}" for name in names for what in ("mean", "AUROC(wrong label)")}
    assert all(row.non_members is not None and row.value.low is not None for row in rows.values())
    assert "after epoch 2 of 3" in rows["el2n: mean"].settings
    with pytest.raises(UserError, match="expected some of 1 to 3"):
        dynamics.measure(subject, copies=2, epochs=3, early=4)
    with pytest.raises(UserError, match="0 copies"):
        dynamics.measure(subject, copies=0)


# Planted truth.


def test_planted_rows_by_counting_pairs(subject: Subject) -> None:
    score = np.random.default_rng(3).random(40)
    wrong = subject.members.given != subject.members.true
    score[np.flatnonzero(wrong)[0]] = np.nan
    pairs = [(a, b) for a in score[wrong] for b in score[~wrong] if not math.isnan(a + b)]
    (row,) = planted_findings(subject, "knn", "disagreement", score, settings="k 30")
    assert row.value.mean == pytest.approx(statistics.mean(0.5 if a == b else float(a > b) for a, b in pairs))
    assert (row.count, row.chance, row.non_members) == (39, 0.5, None)
    assert row.settings == f"k 30; {int((wrong & np.isfinite(score)).sum())} planted"
    loss = class_loss(subject.members)
    pairs = [(loss[a], loss[b]) for a in range(40) for b in range(40) if wrong[a] and not wrong[b] and score[a] > -1]
    assert row.controls["class loss"] == pytest.approx(statistics.mean(float(a > b) for a, b in pairs))
    assert planted_auroc(np.full(40, np.nan), subject.members) is None
    clean = replace(subject, members=replace(subject.members, given=subject.members.true))
    assert planted_findings(clean, "knn", "disagreement", score) == []


# LiRA.


def test_halves_hold_every_sample_equally_often() -> None:
    subsets = lira.halves(np.random.default_rng(0).integers(0, 2**32, (8, 101)))
    assert subsets.shape == (16, 101)
    assert (subsets.sum(axis=0) == 8).all()
    assert set(subsets.sum(axis=1).tolist()) == {50, 51}
    assert len({row.tobytes() for row in subsets}) == 16


@pytest.mark.parametrize("shadows", [8, 64])
def test_likelihood_ratio_by_hand(shadows: int) -> None:
    """With 64 shadows each sample has deviations of its own, below one is shared."""
    random = np.random.default_rng(4)
    phi, target = random.normal(size=(shadows, 6)) * random.uniform(1, 3, 6), random.normal(size=6)
    inside = lira.halves(random.integers(0, 2**32, (shadows // 2, 6)))
    found = {mode: lira.likelihood_ratio(target, phi, inside, mode) for mode in ("online", "offline")}
    sides = [
        [[phi[m, i] for m in range(shadows) if inside[m, i] == wanted] for i in range(6)] for wanted in (True, False)
    ]
    pooled = [math.sqrt(statistics.mean(statistics.variance(values) for values in side)) for side in sides]
    for i in range(6):
        z, log = [], []
        for side, shared in zip(sides, pooled, strict=True):
            sd = statistics.stdev(side[i]) if shadows == 64 else shared
            z.append((target[i] - statistics.mean(side[i])) / sd)
            log.append(-(z[-1] ** 2) / 2 - math.log(sd))
        assert found["online"][i] == pytest.approx(log[0] - log[1])
        assert found["offline"][i] == pytest.approx(z[1])


def test_true_positives_by_trying_every_threshold() -> None:
    random = np.random.default_rng(5)
    for count in (10, 100, 250):
        members, others = random.normal(1, 1, 80).round(1), random.normal(0, 1, count).round(1)
        thresholds = [t for t in [*others, -9.0] if (others > t).mean() <= 0.05]
        best = max(float((members > t).mean()) for t in thresholds)
        assert lira.true_positives(members, others, 0.05) == pytest.approx(best)


def test_lira_of_a_run(subject: Subject) -> None:
    for mode in ("online", "offline"):
        findings = lira.measure(subject, shadows=4, epochs=2, mode=mode)
        assert_scores(findings, subject, {"lira"}, ("members", "non-members"))
        rows = rows_of(findings)
        assert set(rows) == {"AUC", "TPR at 1% FPR"}
        values = {score.group: score.values for score in findings.scores}
        pairs = [float(a > b) + (a == b) / 2 for a in values["members"] for b in values["non-members"]]
        assert rows["AUC"].value.mean == pytest.approx(statistics.mean(pairs))
        assert rows["AUC"].count == 80
        assert set(rows["AUC"].controls) == {"confidence", "untrained"}
        assert [rows[name].chance for name in rows] == [0.5, 1 / 41]
        assert rows["AUC"].value.low <= rows["AUC"].value.mean <= rows["AUC"].value.high
        assert rows["TPR at 1% FPR"].value.low is None, "of 40 non-members none is 1%"
        assert rows["AUC"].settings.startswith(f"{mode}, 4 shadows, 2 epochs")
    mistakes: tuple[dict[str, Any], ...] = ({"shadows": 5}, {"shadows": 2}, {"mode": "sideways"})
    for mistake in mistakes:
        with pytest.raises(UserError, match="expected"):
            lira.measure(subject, **mistake)


@pytest.mark.parametrize("others", [40, 250])
def test_true_positives_of_guesses_are_as_said(others: int) -> None:
    random = np.random.default_rng(9)
    scores = [[random.normal(size=100), random.normal(size=others)] for _ in range(400)]
    row = lira._rows(scores[0], {}, "", 0)[1]
    assert np.mean([lira.true_positives(mine, theirs) for mine, theirs in scores]) == pytest.approx(
        row.chance, rel=0.15
    )
    assert (row.value.low is None) == (others < 100)


def test_copies_of_a_regularised_run_are_plain_and_said_to_be(subject: Subject) -> None:
    """Example-tied dropout hangs hooks into the network, which would ask copies for the ids of their batches."""
    run = subject.run
    tied = replace(run.config.train, tied_dropout=0.5, tied_taps=("block2",))
    other = replace(subject, run=replace(run, config=replace(run.config, train=tied)))
    plain, copies = (feldman_zhang.measure(each, copies=4, epochs=1) for each in (subject, other))
    assert np.array_equal(plain.scores[0].values, copies.scores[0].values, equal_nan=True)
    assert "without" not in plain.rows[0].settings
    mixed = replace(run.config.train, mixup=1.0, patience=3)
    other = replace(subject, run=replace(run, config=replace(run.config, train=mixed)))
    settings = [each.measure(other, epochs=1, **few).rows[0].settings for each, few in (
        (feldman_zhang, {"copies": 4}), (dynamics, {"copies": 1}), (lira, {"shadows": 4}),
    )]  # fmt: skip
    assert all(each.endswith("; copies without train.mixup, train.patience") for each in settings)
    assert copies.rows[0].settings.endswith("; copies without train.tied_dropout")


def test_lira_untrained_asks_fresh_weights_of_both_groups(subject: Subject) -> None:
    found = lira._untrained(subject)
    fresh = [extract(subject.run, group, limit=40, seed=5, untrained=True) for group in ("members", "non-members")]
    for values, samples, mine in zip(found, fresh, (subject.members, subject.non_members), strict=True):
        assert np.array_equal(samples.ids, mine.ids)
        assert values == pytest.approx(lira.confidence(samples), abs=1e-4)


def test_lira_finds_what_a_shadow_trained_on(subject: Subject) -> None:
    """Asked about a network that is one of the shadows' kind, the score tells its half from the other."""
    random = np.random.default_rng(6)
    inside = lira.halves(random.integers(0, 2**32, (8, 400)))
    hard = random.normal(size=400)
    phi = hard + 3 * inside + random.normal(size=(16, 400))
    trained = random.random(400) < 0.5
    score = lira.likelihood_ratio(hard + 3 * trained + random.normal(size=400), phi, inside, "online")
    assert (score[trained] > 0).mean() > 0.8
    assert (score[~trained] > 0).mean() < 0.2


# The cards' checks on digits, at a small size; the runs are shared.


@pytest.mark.parametrize("name", ["feldman_zhang", "el2n", "lira", "disagreement", "random_labels"])
def test_check_on_digits(name: str) -> None:
    results = load_check(name)((0,), True)
    assert results
    for result in results:
        assert result.passed, (result.quantity, str(result.found))
