"""The oracle of the statistics, held to definitions written out another way."""

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import torch
from torch import Tensor
import torch.nn.functional as F

from rlp.kernels.reference import statistics, statistics_from_logits


def random_case(seed: int, batch: int, heads: int, n: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias in float64 and targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    target = torch.randint(n, (batch, heads), generator=generator)
    return normal(batch, dim), normal(heads, n, dim), normal(heads, n), target


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 5), st.integers(2, 37), st.integers(1, 19))
def test_statistics_are_what_their_names_say(seed, batch, heads, n, dim):
    """Against Python's loops and log_softmax, on ragged shapes."""
    x, weight, bias, target = random_case(seed, batch, heads, n, dim)
    stats = statistics(x, weight, bias, target)
    assert stats.entropy_rest is None
    assert all(part.shape == (batch, heads) for part in stats[:4])
    for b in range(batch):
        for h in range(heads):
            logits = torch.stack([(x[b] * weight[h, j]).sum() + bias[h, j] for j in range(n)])
            t = int(target[b, h])
            rest = torch.cat([logits[:t], logits[t + 1 :]])
            expected = [logits[t], rest.exp().sum().log(), logits.mean(), max(rest.tolist())]
            torch.testing.assert_close(
                [part[b, h] for part in stats[:4]], [torch.as_tensor(e).double() for e in expected]
            )
            log_p = F.log_softmax(logits, dim=0)[t]
            total = torch.logaddexp(stats.z_t[b, h], stats.lse_rest[b, h])
            torch.testing.assert_close(stats.z_t[b, h] - total, log_p)


def test_features_of_their_own_for_each_head():
    x, weight, bias, target = random_case(1, 7, 3, 5, 4)
    shared = statistics(x, weight, bias, target)
    separate = statistics(x.unsqueeze(1).expand(-1, 3, -1), weight, bias, target)
    torch.testing.assert_close(shared, separate)
    without_bias = statistics(x, weight, None, target)
    torch.testing.assert_close(statistics(x, weight, torch.zeros_like(bias), target), without_bias)


def test_two_labels_leave_one_in_the_rest():
    logits = torch.tensor([[[3.0, -2.0]]])
    stats = statistics_from_logits(logits, torch.tensor([[1]]))
    assert [part.item() for part in stats[:4]] == [-2.0, 3.0, 0.5, 3.0]


def test_one_label_is_refused():
    with pytest.raises(ValueError, match="1 random label; expected at least 2"):
        statistics_from_logits(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_before_any_sum(dtype):
    logits = torch.randn(4, 3, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    target = torch.randint(1000, (4, 3), generator=torch.Generator().manual_seed(1))
    low, exact = statistics_from_logits(logits, target), statistics_from_logits(logits.double(), target)
    for part, reference in zip(low[:4], exact[:4], strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.double(), reference, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
    x, weight, bias, target = random_case(2, 3, 2, 4, 3)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()

    def differentiable(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return statistics(x, weight, bias, target)[:3]  # max_rest only counts right answers

    assert torch.autograd.gradcheck(differentiable, (x, weight, bias))


def test_a_row_does_not_depend_on_its_neighbours():
    x, weight, bias, target = random_case(3, 11, 3, 6, 5)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    whole, permuted = statistics(x, weight, bias, target), statistics(x[order], weight, bias, target[order])
    for a, b in zip(whole[:4], permuted[:4], strict=True):
        torch.testing.assert_close(a[order], b, rtol=0, atol=1e-14)
