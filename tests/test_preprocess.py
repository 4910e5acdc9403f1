"""What heads are given of the features."""

import pytest
import torch

from rlp.errors import UserError
from rlp.measure.preprocess import FEATURES, Preprocess
from rlp.measure.spectrum import spectrum

RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(50, 7, generator=RANDOM) * torch.logspace(-3, 3, 7) + torch.linspace(-100, 100, 7)


def test_raw_is_as_it_is() -> None:
    assert torch.equal(Preprocess.fit(X, "raw")(X), X)


def test_standardised_has_mean_0_and_deviation_1() -> None:
    found = Preprocess.fit(X, "standardised")(X)
    assert found.dtype == torch.float32
    assert found.double().mean(0).abs().max() < 1e-6
    assert (found.double().std(0, correction=0) - 1).abs().max() < 1e-5


def test_constant_features_become_0_and_take_no_part() -> None:
    x = torch.cat([X, torch.full((50, 1), 1e4 / 3), torch.zeros(50, 1)], dim=1)
    found = Preprocess.fit(x, "standardised")(x)
    assert torch.equal(found[:, 7:], torch.zeros(50, 2))
    assert torch.equal(found[:, :7], Preprocess.fit(X, "standardised")(X))
    assert Preprocess.fit(x, "projected")(x).isfinite().all()
    flipped = torch.full((50, 1), 1.0)
    flipped[3] += torch.finfo(torch.float32).eps  # rounding is no signal
    assert not Preprocess.fit(flipped, "standardised")(flipped).any()


def test_normalised_has_one_length() -> None:
    x = torch.cat([X, X.mean(0, keepdim=True)])
    found = Preprocess.fit(X, "normalised")(x)
    assert found[:50].norm(dim=1).tolist() == pytest.approx([7**0.5] * 50)
    direction = (X - X.mean(0)) / (X - X.mean(0)).norm(dim=1, keepdim=True)
    assert torch.allclose(found[:50], direction * 7**0.5, atol=1e-3)
    assert not Preprocess.fit(x[:1], "normalised")(x[:1]).any()  # the only sample is the mean


@pytest.mark.parametrize("width", [1, 3, 7, 40])
def test_projected_is_linear_in_the_standardised(width: int) -> None:
    project = Preprocess.fit(X, "projected", width=width)
    assert project.dim == width
    found, standardised = project(X), Preprocess.fit(X, "standardised")(X)
    assert found.shape == (50, width)
    assert project.matrix is not None
    assert torch.allclose(found, standardised @ project.matrix, atol=1e-5)
    assert spectrum(found).numerical_rank == min(width, 7)


def test_projection_keeps_the_scale() -> None:
    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    assert Preprocess.fit(x, "projected")(x).std().item() == pytest.approx(1, abs=0.05)


def test_projection_is_a_function_of_width_and_seed() -> None:
    before = torch.get_rng_state()
    first, other = (Preprocess.fit(x, "projected", width=4).matrix for x in (X, X * 2 + 1))
    assert first is not None
    assert other is not None
    assert torch.equal(first, other)
    second = Preprocess.fit(X, "projected", width=4, seed=1).matrix
    assert second is not None
    assert not torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", FEATURES)
def test_statistics_come_from_what_was_fitted(kind: str) -> None:
    """Other samples, one at a time, are mapped as they are together."""
    fitted = Preprocess.fit(X, kind)
    others = X[:5] * 3 - 1
    together = fitted(others)
    assert together.shape == (5, fitted.dim)
    assert torch.allclose(torch.cat([fitted(row[None]) for row in others]), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FEATURES)
def test_huge_features_stay_finite(kind: str) -> None:
    assert Preprocess.fit(X * 1e30, kind)(X * 1e30).isfinite().all()


def test_mistakes_are_one_sentence() -> None:
    with pytest.raises(UserError, match="'white'; expected one of raw"):
        Preprocess.fit(X, "white")
    with pytest.raises(UserError, match="width is 0"):
        Preprocess.fit(X, "projected", width=0)
    with pytest.raises(UserError, match="sample 0 hold NaN"):
        Preprocess.fit(X * torch.nan, "raw")
    with pytest.raises(UserError, match=r"expected \[N, 7\]"):
        Preprocess.fit(X, "standardised")(X[:, :3])
