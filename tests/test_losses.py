"""Losses from statistics: equal to the textbook formula where that is finite, right where it is not."""

from collections.abc import Callable
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import torch
from torch import Tensor
import torch.nn.functional as F

from rlp.errors import UserError
from rlp.kernels.reference import Statistics, statistics_from_logits
from rlp.losses import (
    PENALTIES,
    PENALTY_NAMES,
    correct,
    entropy_penalty,
    fit_loss,
    forget_penalty,
    kappa,
    penalty_named,
    reversal_penalty,
    uniform_penalty,
)
from rlp.schema import HeadsConfig


def random_logits(seed: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(6, 2, n, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(n, (6, 2), generator=generator)


def pick(values: Tensor, target: Tensor) -> Tensor:
    return values.gather(-1, target.unsqueeze(-1)).squeeze(-1)


TEXTBOOK: dict[Callable[[Statistics], Tensor], Callable[[Tensor, Tensor], Tensor]] = {
    fit_loss: lambda z, t: -pick(F.log_softmax(z, -1), t),
    forget_penalty: lambda z, t: -torch.log(1 - pick(z.softmax(-1), t)),
    uniform_penalty: lambda z, t: -F.log_softmax(z, -1).mean(-1),
    entropy_penalty: lambda z, t: (z.softmax(-1) * F.log_softmax(z, -1)).sum(-1),
    reversal_penalty: lambda z, t: pick(F.log_softmax(z, -1), t),
}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 50), st.sampled_from(list(TEXTBOOK)))
def test_values_and_gradients_are_those_of_the_textbook(seed, n, loss):
    logits, target = random_logits(seed, n)
    ours, theirs = loss(statistics_from_logits(logits, target, entropy=True)), TEXTBOOK[loss](logits, target)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(value.sum(), logits)[0] for value in (ours, theirs)]
    torch.testing.assert_close(gradients[0], gradients[1])


def binary_entropy(d: float) -> float:
    """Nats of an event of log-odds d, in float64, which the smaller probability decides."""
    q = 1 / (1 + math.exp(abs(d)))
    return -q * math.log(q) - (1 - q) * math.log1p(-q)


@pytest.mark.parametrize("d", [-100.0, -17.0, 0.0, 17.0, 100.0])
def test_margins_at_which_softmax_is_0_or_1(d):
    """In float32, where log(1 - softmax) is infinite from 17 on."""
    logits = torch.tensor([[[d, 0.0]]], requires_grad=True)
    stats = statistics_from_logits(logits, torch.tensor([[0]]), entropy=True)
    softplus = d + math.log1p(math.exp(-d)) if d > 0 else math.log1p(math.exp(d))
    assert forget_penalty(stats).item() == pytest.approx(softplus, rel=1e-6)
    assert fit_loss(stats).item() == pytest.approx(softplus - d, rel=1e-6)
    for loss in TEXTBOOK:
        (gradient,) = torch.autograd.grad(loss(stats).sum(), logits, retain_graph=True)
        assert gradient.isfinite().all()
    assert entropy_penalty(stats).item() == pytest.approx(-binary_entropy(d), rel=1e-5, abs=1e-37)
    (gradient,) = torch.autograd.grad(forget_penalty(stats).sum(), logits)
    assert gradient[0, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-d)), rel=1e-6)


def test_the_naive_penalty_is_infinite_there():
    """Why the statistics leave the label out."""
    p = torch.tensor([18.0, 0.0]).softmax(0)[0]
    assert torch.isinf(-torch.log(1 - p))


@pytest.mark.parametrize("name", PENALTIES)
def test_a_step_down_the_penalty_lowers_p(name):
    """The sign: log(1 - p), minimised as it is printed, would raise p. Uniform: only where p is above 1/n.

    Joint mode is no penalty: there the network helps.
    """
    logits = torch.tensor([[[1.0, 0.5, -1.0, 0.0]]], requires_grad=True)
    target = torch.tensor([[0]])
    stats = statistics_from_logits(logits, target, entropy=True)
    (gradient,) = torch.autograd.grad(penalty_named(name)(stats).sum(), logits)
    before, after = (pick(z.softmax(-1), target).item() for z in (logits, logits - 0.1 * gradient))
    assert (after > before) if name == "joint" else (after < before)


def test_where_the_penalties_pull():
    """In the margin: forget by p, reversal by 1 - p, which saturates on what the head is sure of."""
    for d in (-20.0, 0.0, 20.0):
        logits = torch.tensor([[[d, 0.0]]], dtype=torch.float64, requires_grad=True)
        stats, p = statistics_from_logits(logits, torch.tensor([[0]])), 1 / (1 + math.exp(-d))
        for loss, expected in ((forget_penalty, p), (reversal_penalty, 1 - p)):
            (gradient,) = torch.autograd.grad(loss(stats).sum(), logits, retain_graph=True)
            assert gradient[0, 0, 0].item() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 40), st.sampled_from([1.0, 30.0, 1000.0]))
def test_the_entropy_is_that_of_float64_at_any_scale(seed, n, scale):
    """In float32, to the rounding of its logits, and to their gradient; from -log n to 0, never NaN."""
    logits, target = random_logits(seed, n)
    low = (scale * logits.detach()).float().requires_grad_()
    high = low.detach().double().requires_grad_()
    ours = entropy_penalty(statistics_from_logits(low, target, entropy=True))
    theirs = TEXTBOOK[entropy_penalty](high, target)
    rounding = 4 * torch.finfo(torch.float32).eps * max(1.0, low.abs().max().item())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=rounding)
    gradients = [torch.autograd.grad(value.sum(), z)[0].double() for value, z in ((ours, low), (theirs, high))]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=10 * rounding)
    assert -math.log(n) - rounding <= ours.min().item()
    assert ours.max().item() <= rounding


def test_entropy_without_its_statistic_says_so():
    with pytest.raises(ValueError, match="entropy_rest"):
        entropy_penalty(statistics_from_logits(torch.zeros(1, 1, 3), torch.tensor([[0]])))


def test_the_gradient_of_the_penalty_has_l1_norm_2p():
    """So λ of the order of n is what acts near chance, where p = 1/n."""
    logits, target = random_logits(4, 10)
    (gradient,) = torch.autograd.grad(forget_penalty(statistics_from_logits(logits, target)).sum(), logits)
    torch.testing.assert_close(gradient.abs().sum(-1), 2 * pick(logits.softmax(-1), target))


def test_a_tie_is_wrong():
    target = torch.tensor([[0]])
    for logits, right in (([1.0, 1.0, 0.0], False), ([1.0, 0.9, 0.0], True), ([0.0, 0.0, 0.0], False)):
        assert correct(statistics_from_logits(torch.tensor([[logits]]), target)).item() is right


def test_kappa():
    assert kappa(0.1, 10) == pytest.approx(0)
    assert kappa(1.0, 10) == 1.0
    assert kappa(0.75, 2) == pytest.approx(2 * 0.75 - 1)


def test_an_unknown_penalty_is_named():
    with pytest.raises(
        UserError, match="penalty is 'hinge'; expected one of forget, uniform, entropy, reversal, joint"
    ):
        penalty_named("hinge")
    with pytest.raises(UserError, match="'dof' is a function of the features"):
        penalty_named("dof")


def test_the_configuration_knows_the_same_penalties():
    for name in PENALTY_NAMES:
        assert HeadsConfig(penalty=name).penalty == name  # type: ignore[arg-type]
