"""Fresh random-label heads as a score: on features where what a head can know of each sample is known beforehand."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from rlp.labels import random_labels
from rlp.measure.baselines import random_labels as measured
from rlp.measure.baselines.interface import Findings, Subject
from rlp.measure.features import FeatureSet, probe_words

N, HALF, DRAWS, LABELS = 60, 30, 8, 4


def features(group: str, known: np.ndarray) -> FeatureSet:
    """Known samples have a direction of their own; the others are all alike, so that heads can only guess."""
    x = torch.zeros(N, N)
    x[known, known] = 1.0
    return FeatureSet(
        group=group, split="train", ids=np.arange(N) + (N if group == "non-members" else 0), given=np.arange(N) % 3,
        true=np.arange(N) % 3, planted=np.full(N, ""), words=np.zeros((N, 1), np.int64), logits=torch.zeros(N, 3),
        features={"tap": x},
    )  # fmt: skip


@pytest.fixture(scope="module")
def subject() -> Subject:
    """The first half of the members are known, the second half of the non-members, and no sample untrained."""
    return Subject(
        run=cast(Any, SimpleNamespace(device=torch.device("cpu"))),
        members=features("members", np.arange(HALF)),
        non_members=features("non-members", np.arange(HALF, N)),
        untrained=features("members", np.arange(0)),
        seed=3,
    )


@pytest.fixture(scope="module")
def findings(subject: Subject) -> Findings:
    return measured.measure(subject, n=LABELS, draws=DRAWS)


def guessed(samples: FeatureSet, alike: np.ndarray) -> tuple[np.ndarray, float]:
    """Of samples that are all alike: mean log share of each one's label among them, and the share guessed rightly."""
    labels = random_labels(probe_words(3, "train", samples.ids, DRAWS), LABELS)[alike]
    shares = np.stack([np.bincount(draw, minlength=LABELS) / len(alike) for draw in labels.T])
    return np.log(np.take_along_axis(shares.T, labels, axis=0)).mean(axis=1), float(shares.max(axis=1).mean())


def test_scores_say_what_heads_can_know(subject: Subject, findings: Findings) -> None:
    scores = {(score.name, score.group): score for score in findings.scores}
    assert {name for name, _ in scores} == {"rlp_tap", "rlp_budget_tap"}
    for samples in (subject.members, subject.non_members):
        known = samples.features["tap"].any(dim=1).numpy()
        alike = np.flatnonzero(~known)
        converged, budget = (scores[name, samples.group] for name in ("rlp_tap", "rlp_budget_tap"))
        assert np.array_equal(converged.ids, samples.ids)
        assert converged.values[alike] == pytest.approx(guessed(samples, alike)[0], abs=0.05)
        assert converged.values[known].min() > -0.1
        assert budget.values[known].mean() > 0.6 > budget.values[alike].mean()
        assert 0 <= budget.values.min() <= budget.values.max() <= 1


def test_kappa_stands_beside_its_controls(subject: Subject, findings: Findings) -> None:
    row = next(row for row in findings.rows if row.quantity == "κ converged")
    assert (row.count, row.chance, row.tap, row.depth) == (N, 0.0, "tap", 0)
    assert row.non_members is not None
    for found, samples, alike in (
        (row.value, subject.members, np.arange(HALF, N)),
        (row.non_members, subject.non_members, np.arange(HALF)),
    ):
        accuracy = (HALF + HALF * guessed(samples, alike)[1]) / N
        assert found.mean == pytest.approx((LABELS * accuracy - 1) / (LABELS - 1), abs=0.03)
    untrained = (LABELS * guessed(subject.untrained, np.arange(N))[1] - 1) / (LABELS - 1)
    assert row.controls["untrained"] == pytest.approx(untrained, abs=0.1)  # two equally frequent labels may be a tie
