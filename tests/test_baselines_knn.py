"""k-NN in features and prediction depth: against loops, P_SAME = MA·acc + MD·(1 − acc), and the figures of the card."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from probed_run import tiny_finished_run
import pytest
import torch

from rlp.measure.baselines import depth, knn, neighbours
from rlp.measure.baselines.checks_features import check_knn
from rlp.measure.baselines.images import images_of
from rlp.measure.baselines.interface import Findings, Subject
from rlp.measure.baselines.neighbours import Reduction, nearest, vote
from rlp.measure.run import open_run

pytest.importorskip("fastargs")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.of(open_run(tiny_finished_run(tmp_path_factory.mktemp("knn")), device="cpu"))


@pytest.fixture(scope="module")
def findings(subject: Subject) -> Findings:
    return knn.measure(subject, k=5, width=6)


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("leave_out", [True, False])
def test_neighbours_are_those_of_a_loop(p: float, leave_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    anchors = random.normal(size=(37, 5)).astype(np.float32) + 100
    queries = anchors if leave_out else random.normal(size=(23, 5)).astype(np.float32) + 100
    monkeypatch.setattr(neighbours, "BLOCK", 37 * 4)  # four queries at a time
    found = nearest(torch.from_numpy(queries), torch.from_numpy(anchors), 4, p=p, leave_out=leave_out)
    for row, query in enumerate(queries.astype(np.float64)):
        distance = (np.abs(anchors.astype(np.float64) - query) ** p).sum(axis=1)
        if leave_out:
            distance[row] = np.inf
        assert found[row].tolist() == np.argsort(distance)[:4].tolist()


def test_too_many_neighbours_are_refused() -> None:
    x = torch.randn(5, 2)
    assert nearest(x, x, 4, leave_out=True).shape == (5, 4)
    with pytest.raises(ValueError, match="expected 1 to 4"):
        nearest(x, x, 5, leave_out=True)


def test_votes_are_those_of_a_count_and_ties_go_to_the_nearer() -> None:
    random = np.random.default_rng(1)
    labels = random.integers(0, 4, (200, 6))
    for row, found in zip(labels.tolist(), vote(torch.from_numpy(labels), 4).tolist(), strict=True):
        count = Counter(row)
        ranks = {c: sum(6 - place for place, label in enumerate(row) if label == c) for c in count}
        assert found == max(count, key=lambda c: (count[c], ranks[c], -c))
    assert vote(torch.tensor([[1, 0, 0, 1], [1, 0, 1, 0]]), 2).tolist() == [0, 1]
    assert vote(torch.tensor([[0, 2, 1, 1]]), 3).tolist() == [1]


def test_reduction_is_that_of_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    x = np.random.default_rng(2).normal(size=(50, 8)) * np.arange(1, 9)
    ours = Reduction(torch.from_numpy(x).float(), 3)(torch.from_numpy(x[:7]).float()).numpy()
    theirs = PCA(3).fit(x).transform(x[:7])
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-4)


def test_images_come_in_the_order_of_the_ids(subject: Subject) -> None:
    ids = subject.members.ids
    mixed = np.random.default_rng(3).permutation(len(ids))
    images = images_of(subject.run, ids, "members")
    assert torch.equal(images_of(subject.run, ids[mixed], "members"), images[torch.from_numpy(mixed)])
    with torch.no_grad():
        torch.testing.assert_close(subject.run.model(images), subject.members.logits, atol=1e-4, rtol=1e-4)


def test_probes_are_those_of_a_loop(subject: Subject) -> None:
    """Components of the members alone, L1, given labels; a member without itself, others and fresh weights apart."""
    from sklearn.decomposition import PCA

    def labels(anchors: np.ndarray, queries: np.ndarray | None) -> np.ndarray:
        reduction = PCA(6, svd_solver="full").fit(anchors)
        placed = reduction.transform(anchors)
        asked = placed if queries is None else reduction.transform(queries)
        distance = np.abs(asked[:, None] - placed[None]).sum(axis=2)
        if queries is None:
            np.fill_diagonal(distance, np.inf)
        return subject.members.given[np.argsort(distance, axis=1)[:, :5]]

    def same(found: torch.Tensor | None, expected: np.ndarray) -> bool:
        return found is not None and float((found.numpy() == expected).mean()) > 0.99  # float32 may swap two neighbours

    every = list(knn.probes(subject, k=5, width=6))
    assert [probe.tap for probe in every] == ["input", *subject.members.features]
    for probe in every:
        groups = (subject.members, subject.non_members, subject.untrained)
        if probe.tap == "input":
            mine, theirs = (images_of(subject.run, g.ids, g.group).flatten(1).double().numpy() for g in groups[:2])
            assert probe.untrained is None
        else:
            mine, theirs, fresh = (g.features[probe.tap].double().numpy() for g in groups)
            assert same(probe.untrained, labels(fresh, None))
        assert same(probe.members, labels(mine, None))
        assert same(probe.non_members, labels(mine, theirs))


def test_the_identity_of_the_paper_holds(subject: Subject, findings: Findings) -> None:
    """P_SAME = MA·acc + MD·(1 − acc), on members and on non-members, where the network is wrong on some of both."""
    for group, side in ((subject.members, "value"), (subject.non_members, "non_members")):
        accuracy = float((group.logits.argmax(1).numpy() == group.given).mean())
        assert 0 < accuracy < 1
        for tap in ("input", *group.features):
            found = {row.quantity: getattr(row, side).mean for row in findings.rows if row.tap == tap}
            assert found["P_SAME"] == pytest.approx(found["MA"] * accuracy + found["MD"] * (1 - accuracy))


def test_each_row_has_what_it_must_be_read_with(subject: Subject, findings: Findings) -> None:
    taps = ["input", *subject.members.features]
    assert [row.tap for row in findings.rows] == [tap for tap in taps for _ in range(4)]
    for row in findings.rows:
        assert row.value.low is not None
        assert row.value.low <= row.value.mean
        assert row.chance is not None
        assert 0 <= row.chance <= 1
        assert ("untrained" in row.controls) == (row.tap != "input")
        assert "k = 5" in row.settings


def test_disagreement_is_counted_by_hand(subject: Subject, findings: Findings) -> None:
    every = list(knn.probes(subject, k=5, width=6))
    right = [float((vote(p.non_members, 4).numpy() == subject.non_members.given).mean()) for p in every]
    chosen = every[int(np.argmax(right))]
    score = findings.scores[0]
    for row, value in enumerate(score.values):
        labels = chosen.members[row].tolist()
        assert value == pytest.approx(sum(label != subject.members.given[row] for label in labels) / 5)


def test_agreement_is_counted_among_the_asked_samples_alone() -> None:
    pair = knn._Pair(np.array([1, 1]), np.array([1, 0]), np.array([True, False]))
    assert pair.share == 1.0
    assert pair.chance == 1.0


def test_md_without_a_wrong_member_is_that_of_the_others(subject: Subject) -> None:
    logits = torch.nn.functional.one_hot(torch.from_numpy(subject.members.given), 4).float()
    right = replace(subject, members=replace(subject.members, logits=logits))
    rows = {row.quantity: row for row in knn.measure(right, k=5).rows if row.tap == "input"}
    assert "MD" not in rows
    alone = rows["MD of non-members"]
    wrong = subject.non_members.logits.argmax(1).numpy() != subject.non_members.given
    assert (alone.count, alone.non_members, alone.controls) == (wrong.sum(), None, {})
    assert rows["MA"].non_members is not None


def test_prediction_depth_is_that_of_a_loop() -> None:
    random = np.random.default_rng(4)
    votes, answers = random.integers(0, 2, (4, 300)), random.integers(0, 2, 300)
    for found, column, answer in zip(depth.prediction_depth(votes, answers), votes.T, answers, strict=True):
        first = 4
        while first > 0 and column[first - 1] == answer:
            first -= 1
        assert found == first


def test_prediction_depth_of_a_run(subject: Subject) -> None:
    found = depth.measure(subject, k=5)
    members, others = found.scores
    assert (members.group, others.group) == ("members", "non-members")
    assert np.array_equal(members.ids, subject.members.ids)
    assert 0 <= members.values.min() <= members.values.max() <= len(subject.members.features) + 1
    assert found.rows[0].value.mean == pytest.approx(members.values.mean())
    votes = [
        vote(probe.members if probe.untrained is None else probe.untrained, 4).numpy()
        for probe in knn.probes(subject, k=5)
    ]
    answers = subject.members.logits.argmax(1).numpy()
    untrained = depth.prediction_depth(np.stack(votes), answers).mean()
    assert found.rows[0].controls["untrained"] == pytest.approx(untrained)
    assert untrained != pytest.approx(members.values.mean())


@pytest.mark.slow
def test_random_labels_are_learnt_layer_by_layer() -> None:
    """Card B: .115, .19, .40, .93, .996. Seen (seed 0): .108, .169, .463, .964, 1."""
    assert [result for result in check_knn(small=True) if not result.passed] == []


def test_a_checkout_is_needed_for_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlp.errors import UserError
    from rlp.measure.baselines import check

    monkeypatch.setattr(check, "ROOT", tmp_path)
    with pytest.raises(UserError, match="expected a checkout"):
        check.write_digits(tmp_path)
