"""What heads are given of the features."""

import pytest
import torch

from rlp.errors import UserError
from rlp.measure.preprocess import FEATURES, Preprocess
from rlp.measure.spectrum import spectrum

RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(50, 7, generator=RANDOM) * torch.logspace(-3, 3, 7) + torch.linspace(-100, 100, 7)


CLASSES = torch.arange(50) % 3


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
    fitted = Preprocess.fit(X, kind, classes=CLASSES)
    others, own = X[:5] * 3 - 1, CLASSES[:5]
    together = fitted(others, own)
    assert together.shape == (5, fitted.dim)
    alone = [fitted(row[None], one[None]) for row, one in zip(others, own, strict=True)]
    assert torch.allclose(torch.cat(alone), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FEATURES)
def test_huge_features_stay_finite(kind: str) -> None:
    assert Preprocess.fit(X * 1e30, kind, classes=CLASSES)(X * 1e30, CLASSES).isfinite().all()


def test_mistakes_are_one_sentence() -> None:
    with pytest.raises(UserError, match="'white'; expected one of raw"):
        Preprocess.fit(X, "white")
    with pytest.raises(UserError, match="width is 0"):
        Preprocess.fit(X, "projected", width=0)
    with pytest.raises(UserError, match="sample 0 hold NaN"):
        Preprocess.fit(X * torch.nan, "raw")
    with pytest.raises(UserError, match=r"expected \[N, 7\]"):
        Preprocess.fit(X, "standardised")(X[:, :3])


def test_residuals_are_what_the_class_does_not_tell() -> None:
    classes = torch.tensor([0, 2, 3] * 16 + [2, 3])  # class 1 has no sample
    residual = Preprocess.fit(X, "residual", classes=classes)
    found = residual(X, classes).double()
    for number in (0, 2, 3):
        mine = classes == number
        torch.testing.assert_close(found[mine], X[mine].double() - X[mine].double().mean(0), rtol=1e-5, atol=1e-5)
    for absent in (1, 9):  # in held-out samples: the mean of all is taken off
        torch.testing.assert_close(
            residual(X[:1], torch.tensor([absent])), (X[:1].double() - X.double().mean(0)).float()
        )
    shifted = residual(X + 1e3 * torch.randn(4, 7, generator=RANDOM)[classes], classes)
    assert not torch.allclose(shifted, found.float())  # statistics are those that it was fitted to
    refitted = Preprocess.fit(X + classes[:, None], "residual", classes=classes)(X + classes[:, None], classes)
    torch.testing.assert_close(refitted, found.float(), rtol=1e-3, atol=1e-3)  # a shift by class is erased


def test_residuals_need_classes() -> None:
    with pytest.raises(UserError, match=r"the class of each sample; expected int64 \[50\]"):
        Preprocess.fit(X, "residual")
    with pytest.raises(UserError, match=r"the class of each sample"):
        Preprocess.fit(X, "residual", classes=torch.zeros(49, dtype=torch.int64))
    residual = Preprocess.fit(X, "residual", classes=torch.zeros(50, dtype=torch.int64))
    with pytest.raises(UserError, match=r"the class of each sample"):
        residual(X)
