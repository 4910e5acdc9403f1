"""Spectrum of features and Gaussian noise of equal covariance."""

import numpy as np
import pytest
import torch

from rlp.errors import UserError
from rlp.measure.spectrum import noise_like, spectrum


def random_features(samples: int, dim: int, rank: int, seed: int = 0) -> torch.Tensor:
    """Gaussian features in `rank` of `dim` directions, off the origin."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(samples, rank, generator=random) @ torch.randn(rank, dim, generator=random) + 3


@pytest.mark.parametrize(("samples", "dim"), [(500, 7), (8, 30), (30, 30), (2, 5)])
def test_eigenvalues_are_those_of_the_covariance(samples: int, dim: int) -> None:
    x = random_features(samples, dim, dim)
    found = spectrum(x)
    expected = np.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True))[::-1]
    assert found.eigenvalues.shape == (dim,)
    np.testing.assert_allclose(found.eigenvalues, expected, atol=1e-10 * expected[0])
    assert found.numerical_rank == min(samples - 1, dim)


def test_ranks_of_a_known_spectrum() -> None:
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])  # orthogonal, covariance 1
    even = spectrum(signs)
    assert (even.effective_rank, even.participation_ratio) == pytest.approx((3, 3))
    two = spectrum(signs * torch.tensor([3.0, 1.0, 0.0]))
    assert two.eigenvalues.tolist() == pytest.approx([9, 1, 0])
    assert two.effective_rank == pytest.approx(np.exp(-0.9 * np.log(0.9) - 0.1 * np.log(0.1)))
    assert two.participation_ratio == pytest.approx(100 / 82)
    assert two.numerical_rank == 2


@pytest.mark.parametrize("x", [torch.zeros(5, 3), torch.full((7, 4), 1e4 / 3), torch.randn(1, 6), torch.zeros(3, 9)])
def test_features_that_do_not_vary_have_rank_0(x: torch.Tensor) -> None:
    found = spectrum(x)
    assert (found.effective_rank, found.participation_ratio, found.numerical_rank) == (0, 0, 0)
    assert torch.equal(noise_like(x, 0), x)


def test_rank_does_not_count_repeated_and_constant_features() -> None:
    x = random_features(400, 6, 6)
    more = torch.cat([x, x[:, :2] * 3, torch.full((400, 1), 5e3)], dim=1)
    assert spectrum(more).numerical_rank == 6


def test_huge_and_double_features() -> None:
    x = random_features(50, 4, 4)
    assert spectrum(x * 1e30).effective_rank == pytest.approx(spectrum(x.double()).effective_rank, rel=1e-5)


@pytest.mark.parametrize(("samples", "dim", "rank"), [(20_000, 5, 5), (20_000, 12, 3)])
def test_noise_has_the_mean_and_covariance(samples: int, dim: int, rank: int) -> None:
    x = random_features(samples, dim, rank)
    noise = noise_like(x, 1)
    assert noise.shape == x.shape
    assert noise.dtype == torch.float32
    size = x.std()
    assert (noise.mean(0) - x.mean(0)).abs().max() < 0.05 * size
    assert (torch.cov(noise.T) - torch.cov(x.T)).abs().max() < 0.05 * size**2
    assert spectrum(noise).numerical_rank == rank


def test_noise_of_fewer_samples_than_features_stays_in_their_span() -> None:
    x = random_features(6, 40, 40)
    assert spectrum(torch.cat([x, noise_like(x, 0)])).numerical_rank == 5


def test_noise_is_a_function_of_the_seed() -> None:
    x = random_features(30, 4, 4)
    before = torch.get_rng_state()
    assert torch.equal(noise_like(x, 1), noise_like(x, 1))
    assert not torch.equal(noise_like(x, 1), noise_like(x, 2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("x", "message"),
    [(torch.zeros(0, 3), "shape"), (torch.zeros(3), "shape"), (torch.tensor([[1.0], [torch.inf]]), "sample 1 hold")],
)
def test_mistakes_are_one_sentence(x: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        spectrum(x)
    with pytest.raises(UserError, match=message):
        noise_like(x, 0)


def test_eigenvalues_too_small_for_a_share_count_as_none() -> None:
    x = torch.zeros(4, 2, dtype=torch.float64)
    x[:2, 0], x[2:, 0] = 1e3, -1e3
    x[::2, 1], x[1::2, 1] = 1e-161, -1e-161  # whose variance over the other's is below the smallest number
    found = spectrum(x)
    assert found.effective_rank == pytest.approx(1)
    assert found.participation_ratio == pytest.approx(1)
