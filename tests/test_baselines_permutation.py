"""Shuffled labels and 1-NN: against a loop, at chance where nothing is known again, and the card's figures."""

from pathlib import Path

import numpy as np
from probed_run import tiny_finished_run
import pytest
import torch

from rlp.errors import UserError
from rlp.measure.baselines import permutation
from rlp.measure.baselines.checks_features import check_permutation
from rlp.measure.baselines.images import noisy_features
from rlp.measure.baselines.interface import Subject
from rlp.measure.baselines.permutation import shuffled
from rlp.measure.run import open_run

pytest.importorskip("fastargs")
pytest.importorskip("sklearn")

LABELS = np.arange(200) % 4


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.of(open_run(tiny_finished_run(tmp_path_factory.mktemp("permutation")), device="cpu"))


def test_who_knows_every_sample_again_learns_any_labels() -> None:
    found = shuffled(np.arange(200), LABELS, 99, 0)
    assert found.true == 1
    assert (found.null == 1).all()
    assert (found.by_sample == 1).all()
    assert found.p == 1


def test_a_neighbour_of_the_class_learns_the_given_labels_alone() -> None:
    """Views of a class are nearest to another sample of it: right with given labels, at chance with shuffled ones."""
    found = shuffled((np.arange(200) + 4) % 200, LABELS, 199, 0)
    assert found.true == 1
    assert found.p == pytest.approx(1 / 200)
    assert found.chance == 0.25
    assert found.memorised.mean == pytest.approx(0.25, abs=0.02)


def test_p_counts_shuffles_that_do_as_well() -> None:
    neighbour = np.random.default_rng(0).integers(0, 200, 200)
    found = shuffled(neighbour, LABELS, 99, 3)
    expected = (1 + sum(each >= found.true for each in found.null.tolist())) / 100
    assert found.p == expected
    assert found.p > 0.01
    assert found.null.mean() == pytest.approx(found.by_sample.mean())
    again = shuffled(neighbour, LABELS, 99, 3)
    assert np.array_equal(again.null, found.null)
    assert not np.array_equal(shuffled(neighbour, LABELS, 99, 4).null, found.null)


def test_noise_of_no_size_changes_no_features(subject: Subject) -> None:
    features = noisy_features(subject.run, subject.members, 0.0, 0)
    for tap, values in subject.members.features.items():
        torch.testing.assert_close(features[tap], values, atol=1e-5, rtol=1e-4)
    noisy = noisy_features(subject.run, subject.members, 0.5, 0)
    again = noisy_features(subject.run, subject.members, 0.5, 0)
    assert all(torch.equal(noisy[tap], again[tap]) for tap in noisy)
    assert not any(torch.allclose(noisy[tap], features[tap], atol=1e-3) for tap in noisy)
    fresh = noisy_features(subject.run, subject.untrained, 0.0, 0, untrained=0)
    for tap, values in subject.untrained.features.items():
        torch.testing.assert_close(fresh[tap], values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("noise", "view"), [(0.01, "Gaussian noise of 0.01"), (None, "the run's own augmentation")])
def test_a_run(subject: Subject, noise: float | None, view: str) -> None:
    found = permutation.measure(subject, shuffles=99, noise=noise)
    taps = list(subject.members.features)
    assert [(row.tap, row.quantity) for row in found.rows] == [
        (tap, quantity) for tap in taps for quantity in ("null accuracy", "p of learning")
    ]
    null = found.rows[0]
    assert view in null.settings
    assert null.non_members is not None
    assert null.controls["member − non-member"] == pytest.approx(null.value.mean - null.non_members.mean)
    members = found.scores[0]
    assert found.rows[-2].value.mean == pytest.approx(members.values.mean())
    if noise is not None:  # a view that hardly differs is known again
        assert null.value.mean > 0.9


@pytest.mark.slow
def test_an_untrained_network_memorises_more_than_a_trained_one() -> None:
    """Card D: members .636, non-members .645, untrained .997. Seen (seed 0): .79, .78, .99."""
    assert [result for result in check_permutation(small=True) if not result.passed] == []


def test_a_view_of_nobody_else(subject: Subject, tmp_path: Path) -> None:
    """The augmented view shows the same samples in the same order."""
    view = permutation._view(subject, subject.members, None, False)
    for tap, values in subject.members.features.items():
        away = torch.cdist(view[tap], values)
        assert (away.diagonal() < away.median(dim=1).values).float().mean() > 0.9  # another order would give a half


def test_no_shuffles_are_refused(subject: Subject) -> None:
    with pytest.raises(UserError, match="0 shuffles of the labels; expected at least 1"):
        permutation.measure(subject, shuffles=0)
