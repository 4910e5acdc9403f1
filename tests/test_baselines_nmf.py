"""Activations of low rank: factors against scikit-learn, one batch by itself, and the areas of the card."""

from pathlib import Path

import numpy as np
from probed_run import tiny_finished_run
import pytest
import torch
from torch import nn

from rlp.errors import UserError
from rlp.low_rank.curve import RANKS, accuracy_by_rank, area, batches_of, nmf_area
from rlp.low_rank.factors import few_units, non_negative, principal
from rlp.measure.baselines import nmf
from rlp.measure.baselines.checks_features import check_nmf
from rlp.measure.baselines.interface import Subject
from rlp.measure.run import open_run

pytest.importorskip("fastargs")
pytest.importorskip("sklearn")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def relative_error(a: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return (a - found).norm(dim=(1, 2)) / a.norm(dim=(1, 2))


def test_factors_are_as_good_as_scikit_learns() -> None:
    from sklearn.decomposition import NMF

    a = torch.from_numpy(np.random.default_rng(0).gamma(1.0, size=(3, 30, 12))).float()
    ours = relative_error(a, non_negative(a, 4, generator()))
    for matrix, error in zip(a.double().numpy(), ours.tolist(), strict=True):
        theirs = NMF(4, solver="mu", init="random", random_state=0, max_iter=400)  # pyright: ignore[reportArgumentType]
        found = theirs.fit_transform(matrix) @ theirs.components_
        assert error < 1.03 * np.linalg.norm(matrix - found) / np.linalg.norm(matrix)


def test_a_matrix_of_non_negative_rank_k_comes_back() -> None:
    random = np.random.default_rng(1)
    a = torch.from_numpy(random.random((2, 40, 3)) @ random.random((2, 3, 20))).float()
    assert bool((relative_error(a, non_negative(a, 3, generator(), iterations=2000, tolerance=0)) < 0.02).all())
    assert bool((relative_error(a, non_negative(a, 1, generator())) > 0.1).all())
    assert non_negative(a, 2, generator()).min() >= 0


def test_zero_activations_stay_zero_and_finite() -> None:
    a = torch.zeros(2, 5, 4)
    a[1] = 1
    found = non_negative(a, 2, generator())
    assert torch.equal(found[0], a[0])
    torch.testing.assert_close(found[1], a[1], atol=1e-2, rtol=0)


@pytest.mark.parametrize("shape", [(30, 7), (7, 30)])
def test_principal_components_are_the_best_of_their_rank(shape: tuple[int, int]) -> None:
    a = torch.from_numpy(np.random.default_rng(2).random((2, *shape)))
    for k, found in zip((1, 3), principal(a, [1, 3]), strict=True):
        mean = a.mean(1, keepdim=True)
        u, s, v = torch.linalg.svd(a - mean, full_matrices=False)
        torch.testing.assert_close(found, mean + (u[..., :k] * s[:, None, :k]) @ v[:, :k])


def test_ablation_leaves_k_units() -> None:
    a = torch.rand(3, 5, 8) + 1
    kept = few_units(a, 3, generator())
    assert ((kept != 0).all(1).sum(1) == 3).all()
    assert torch.equal(kept[kept != 0], a[kept != 0])


def test_batches_hold_one_label_and_every_sample_of_it() -> None:
    labels = np.array([0] * 23 + [1] * 40 + [2] * 9)
    batches = batches_of(labels, 15)
    assert batches.shape[1] == 15
    assert all(len({*labels[rows]}) == 1 for rows in batches)
    assert {*batches.ravel()} == {*range(63)}  # the rare label is left out
    with pytest.raises(UserError, match="no given label has 10 samples"):
        batches_of(np.arange(30), 5)


def test_area_is_one_where_rank_one_is_enough() -> None:
    assert area(np.ones((5, 4)), RANKS) == pytest.approx(np.ones(5))
    assert area(np.array([0.0, 0.0, 0.0, 1.0]), (1, 2, 4, 8)) == pytest.approx(1 / 6)


class Parts(nn.Module):
    """A ReLU (``a``), a copy of it (``b``), GELU (``c``); class = whether unit 0 exceeds unit 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.maps = nn.ReLU(), nn.Identity(), nn.GELU(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.c(x)
        y = self.b(self.a(self.maps(x).flatten(1)))
        return torch.stack([y[:, 0], y[:, 1]], 1)


def case(count: int = 24) -> tuple[Parts, torch.Tensor, torch.Tensor]:
    images = torch.randn(count, 3, 2, 2, generator=generator())
    model = Parts().train()
    return model, images, model(images).argmax(1)


@pytest.mark.parametrize("tap", ["a", "b", "a:in", "maps"])
def test_full_rank_changes_no_answer(tap: str) -> None:
    model, images, labels = case(60)
    found = accuracy_by_rank(model, images, labels, tap, ("pca", "ablation"), ranks=(1, 12), size=20)
    for kind in found:
        assert (found[kind][:, -1] == 1).all() or tap == "maps"  # maps have 3 channels, 12 is more than all
    assert (found["pca"][:, 1] == 1).all()
    assert (found["ablation"][:, 0] < 1).any()
    assert model.training


def test_negative_activations_are_refused() -> None:
    model, images, labels = case(60)
    with pytest.raises(UserError, match=r"tap 'c' go down to -.*behind a ReLU"):
        nmf_area(model, images, labels, "c")
    with pytest.raises(UserError, match="expected two or more from 1 on"):
        nmf_area(model, images, labels, "a", ranks=(2, 1))


def test_the_area_repeats_and_leaves_the_random_state_alone() -> None:
    model, images, labels = case(60)
    before = torch.get_rng_state()
    first = nmf_area(model, images, labels, "a", seed=1)
    assert 0 < first <= 1
    assert nmf_area(model, images, labels, "a", seed=1) == first
    assert torch.equal(before, torch.get_rng_state())


def test_a_run(tmp_path: Path) -> None:
    """Maps of the small CNN: each tap has a row, each sample of a frequent label a score."""
    subject = Subject.of(open_run(tiny_finished_run(tmp_path, samples=160), device="cpu"))
    found = nmf.measure(subject, ranks=(1, 4), restarts=1, size=20)
    assert [row.tap for row in found.rows] == list(subject.members.features)
    assert {*found.rows[0].controls} == {"whole", "pca", "ablation"}
    members = found.scores[0]
    assert len(members.values) == len(subject.members)
    counted = members.values[np.isfinite(members.values)]
    assert found.rows[0].value.mean == pytest.approx(1 - counted.mean())
    assert found.rows[0].count == len(counted)


@pytest.mark.slow
def test_random_labels_need_a_higher_rank() -> None:
    """Card A: 1.00 against .64–.79, PCA .78–.86. Seen (seed 0): 1.00, .70 and .83."""
    assert [result for result in check_nmf(small=True) if not result.passed] == []
