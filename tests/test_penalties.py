"""Penalties through heads on a network: routes, signs, λ by tap, degrees of freedom against random labels."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlp.errors import UserError
from rlp.losses import PENALTIES, PENALTY_NAMES, degrees_of_freedom
from rlp.models import RandomLabelHeads, attach

BATCH, LABELS = 24, 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))


def fitted(**arguments: Any) -> tuple[nn.Sequential, RandomLabelHeads, Tensor, Tensor]:
    """A network with heads that know something of a batch, the batch and its ids."""
    model = network()
    heads = attach(model, ["0", "2"], num_labels=LABELS, draws=3, example=torch.zeros(1, 12), **arguments)
    x = torch.randn(BATCH, 12, generator=torch.Generator().manual_seed(1))
    index = torch.arange(BATCH)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.03)
    for _ in range(40):
        model(x)
        heads.loss(index).backward()
        optimizer.step()
        optimizer.zero_grad()
    heads.metrics(reset=True)
    return model, heads, x, index


def reading(model: nn.Module, heads: RandomLabelHeads, x: Tensor, index: Tensor) -> float:
    """Mean fit loss of the heads."""
    with torch.no_grad():
        model(x)
        value = float(heads.loss(index))
    heads.metrics(reset=True)
    return value


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", PENALTY_NAMES)
def test_one_step_on_a_penalty_does_what_its_name_says(name, layers):
    """Contract 2: the network alone moves, and the heads find less afterwards (joint: more; dof: fewer degrees)."""
    model, heads, x, index = fitted(layers=layers, hidden=9)
    before = reading(model, heads, x, index)
    model(x)
    heads.loss(index, lam=1.0, penalty=name).backward()
    penalty = heads.last_penalty.item()
    alone = [p.grad.clone() for p in heads.parameters() if p.grad is not None]
    heads.zero_grad()
    torch.optim.SGD(model.parameters(), lr=1.0 if name == "dof" else 0.02).step()
    model.zero_grad()
    model(x)
    heads.loss(index, penalty=name).backward()
    assert heads.last_penalty.item() < penalty - 1e-5
    assert all(p.grad is None for p in model.parameters()), "λ = 0 reaches nothing"
    heads.metrics(reset=True)
    if name != "dof":
        after = reading(model, heads, x, index)
        assert (after < before) if name == "joint" else (after > before)
    plain, same, _, _ = fitted(layers=layers, hidden=9)
    plain(x)
    same.loss(index).backward()
    for mine, other in zip(alone, same.parameters(), strict=True):
        assert other.grad is not None
        assert torch.equal(mine, other.grad), "the heads' gradient knows nothing of the penalty"


def gradients(lam: float | Mapping[str, float | Tensor], penalty: str = "forget") -> list[Tensor]:
    """Of the first and the second tap's layer."""
    model, heads, x, index = fitted()
    model(x)
    heads.loss(index, lam=lam, penalty=penalty).backward()
    found = [model.get_parameter(f"{place}.weight").grad for place in (0, 2)]
    return [torch.zeros(()) if gradient is None else gradient for gradient in found]


@pytest.mark.parametrize("penalty", PENALTY_NAMES)
def test_lambda_by_tap(penalty):
    """A tap that is left out has none, numbers and tensors mean the same, and the taps' parts add up."""
    first, second = gradients({"0": 2.0}, penalty), gradients({"2": 0.5}, penalty)
    assert first[0].abs().sum() > 0
    assert first[1].abs().sum() == 0
    assert second[1].abs().sum() > 0
    both = gradients({"0": 2.0, "2": 0.5}, penalty)
    for a, b, c in zip(first, second, both, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-4, atol=1e-7)
    tensors = gradients({"0": torch.tensor(2.0), "2": torch.tensor(0.5)}, penalty)
    for a, b in zip(both, tensors, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(1.5, penalty), gradients({"0": 1.5, "2": 1.5}, penalty), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("lam", "message"),
    [
        ({"1": 1.0}, "lam names the tap '1'; expected one of 0, 2"),
        ({"0": -1.0}, "lam of tap '0' is -1.0"),
        ({"0": "1"}, "lam of tap '0' is '1'"),
        ({"0": float("nan")}, "lam of tap '0' is nan"),
        ({"0": torch.ones(2)}, "lam of tap '0' is tensor"),
        (True, "lam is True"),
        (torch.tensor(1.0), "lam is tensor"),
    ],
)
def test_a_wrong_lambda_is_named_and_uses_nothing_up(lam, message):
    model, heads, x, index = fitted()
    model(x)
    with pytest.raises(UserError, match=message):
        heads.loss(index, lam=lam)
    heads.loss(index)
    with pytest.raises(UserError, match="penalty is 'hinge'"):
        heads.loss(index, penalty="hinge")


def test_features_without_gradient_are_refused_by_every_penalty():
    model, heads, x, index = fitted()
    model.requires_grad_(False)
    for penalty in PENALTY_NAMES:
        model(x)
        with pytest.raises(UserError, match="no tap's features carry a gradient"):
            heads.loss(index, lam={"2": 1.0}, penalty=penalty)


def test_what_a_penalty_weighs_in_the_loss():
    """Penalties of heads are summed over taps and draws, degrees of freedom over taps alone."""
    for penalty in PENALTY_NAMES:
        values = []
        for lam in (0.0, 2.0):
            model, heads, x, index = fitted()
            model(x)
            values.append(heads.loss(index, lam=lam, penalty=penalty).item())
        parts = 2 * (heads.draws if penalty in PENALTIES else 1)
        assert values[1] - values[0] == pytest.approx(2 * parts * heads.last_penalty.item(), rel=1e-4)


# -- degrees of freedom --------------------------------------------------------------------------------------------


def features(batch: int, dim: int, seed: int = 0) -> Tensor:
    """With a falling spectrum, off centre."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, dim, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, dim)
    return 5 * x @ torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q + 3


@pytest.mark.parametrize(("batch", "dim"), [(40, 7), (30, 50), (25, 25)])
def test_degrees_of_freedom_are_what_ridge_heads_reach_on_random_labels(batch, dim):
    """E y'Hy / B over draws of ±1 labels, by fitting ridge heads; and the closed form in the eigenvalues."""
    x, rho, draws = features(batch, dim), 0.3, 4000
    centred = x - x.mean(0)
    scaled = centred / centred.square().mean().sqrt()
    y = torch.randint(2, (batch, draws), generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    heads = torch.linalg.solve(scaled.T @ scaled + rho * batch * torch.eye(dim), scaled.T @ y)  # ridge, [D, draws]
    agreement = (y * (scaled @ heads)).mean(0)  # (1/B) Σ σ_i h(x_i)
    value = degrees_of_freedom(x, rho).item()
    error = agreement.std().item() / draws**0.5
    assert abs(agreement.mean().item() - value) < 4 * error
    assert error < 0.05 * value
    eigenvalues = torch.linalg.eigvalsh(scaled.T @ scaled / batch)
    assert value == pytest.approx((eigenvalues / (eigenvalues + rho)).sum().item() / batch)


def test_degrees_of_freedom_have_the_bounds_and_invariances_of_a_fit():
    x = features(30, 8)
    value = degrees_of_freedom(x)
    for same in (1e3 * x, 1e-3 * x, x + 100, x[torch.randperm(30)], x.view(30, 2, 2, 2)):
        torch.testing.assert_close(degrees_of_freedom(same), value)
    turned = x @ torch.linalg.qr(features(8, 8, 1)).Q
    torch.testing.assert_close(degrees_of_freedom(turned), value)
    assert degrees_of_freedom(x, 1e-4) < 8 / 30
    assert degrees_of_freedom(x, 1e-4) > degrees_of_freedom(x, 1.0) > 0
    assert degrees_of_freedom(features(9, 50), 1e-4).item() < 8 / 9
    torch.testing.assert_close(degrees_of_freedom(x.float()).double(), value, rtol=1e-5, atol=0)
    line = torch.arange(30.0).double().unsqueeze(1) * torch.ones(8)  # one direction of eight: its eigenvalue is 8
    assert degrees_of_freedom(line, 0.1).item() == pytest.approx(8 / 8.1 / 30)


@pytest.mark.parametrize(("dim", "rho"), [(512, 0.1), (4096, 1e-4), (65536, 1e-3)])
def test_degrees_of_freedom_of_features_that_nearly_lie_on_a_line(dim, rho):
    """The Gram matrix's condition is D / ρ, up to 10^8 here: float32 features, but not a float32 factorisation."""
    random = torch.Generator().manual_seed(0)
    line = torch.randn(64, 1, generator=random) @ torch.randn(1, dim, generator=random)
    x = (line + 1e-3 * torch.randn(64, dim, generator=random)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    value, wanted = degrees_of_freedom(x, rho), degrees_of_freedom(exact, rho)
    assert value.dtype == torch.float32
    assert 0 < value.item() <= 63 / 64
    torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=0)
    (gradient,), (true,) = torch.autograd.grad(value, x), torch.autograd.grad(wanted, exact)
    assert (gradient.double() - true).norm() < 1e-4 * true.norm()


def test_shrinking_all_features_is_no_progress():
    """The gradient has no part along the features themselves."""
    x = features(30, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(degrees_of_freedom(x), x)
    centred = x - x.mean(0)
    assert gradient.norm() > 0
    assert (gradient * centred).sum().abs() < 1e-12
    assert torch.autograd.gradcheck(degrees_of_freedom, features(5, 3).requires_grad_())
    assert torch.autograd.gradcheck(degrees_of_freedom, features(3, 5).requires_grad_())


@pytest.mark.parametrize("x", [torch.full((4, 3), 7.0), torch.zeros(4, 3), torch.ones(1, 3)])
def test_features_without_any_variance_have_no_degrees_and_a_finite_gradient(x):
    x = x.clone().requires_grad_()
    value = degrees_of_freedom(x)
    (gradient,) = torch.autograd.grad(value, x)
    assert value.item() == 0
    assert gradient.isfinite().all()


def test_degrees_of_freedom_stay_float32_under_autocast():
    x = features(30, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(degrees_of_freedom(x), degrees_of_freedom(x.clone()))
        assert degrees_of_freedom(x.bfloat16()).dtype == torch.float32
    assert torch.equal(degrees_of_freedom(x), degrees_of_freedom(x.clone()))


def test_a_silenced_head_does_not_fool_the_degrees_of_freedom():
    """The head at zero sees chance, and forget has nothing left to do; the features are as they were."""
    model, heads, x, index = fitted()
    grown = []
    for penalty in ("forget", "dof"):
        for silent in (False, True):
            with torch.no_grad():
                for parameter in heads.parameters():
                    parameter.mul_(0.0 if silent else 1.0)
            model.zero_grad()
            model(x)
            heads.loss(index, lam=1.0, penalty=penalty).backward()
            gradient = model.get_parameter("2.weight").grad
            assert gradient is not None
            grown.append(gradient.norm().item())
        model, heads, x, index = fitted()
    assert grown[1] == 0.0
    assert grown[0] > 0
    assert grown[2] == grown[3] > 0


# -- more steps and restarts ---------------------------------------------------------------------------------------


def test_fit_keeps_the_features_and_counts_the_batch_once():
    model, heads, x, index = fitted()
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.5)
    expected = reading(model, heads, x, index)
    model(x)
    for _ in range(3):
        heads.fit(index).backward()
        optimizer.step()
        optimizer.zero_grad()
    last = heads.loss(index, lam=1.0)
    assert heads.last_fit.sum().item() * heads.draws == pytest.approx(expected, rel=1e-5), "before any step"
    rows = heads.metrics()
    assert {row.count for row in rows} == {BATCH}
    assert sum(row.loss for row in rows) == pytest.approx(expected, rel=1e-5)
    assert last.item() != pytest.approx(expected, rel=1e-3)
    with pytest.raises(UserError, match="no features at tap '0'"):
        heads.fit(index)
    model(x)
    heads.fit(index)
    model(x)
    heads.fit(index)  # features of another pass are another reading
    model(x)
    heads.loss(index)
    assert {row.count for row in heads.metrics()} == {3 * BATCH}


def test_a_restart_is_a_function_of_its_number_and_touches_no_generator():
    model, heads, _, _ = fitted()
    _, others, _, _ = fitted(seed=0)
    state = torch.get_rng_state()
    heads.restart(2)
    weights = [p.detach().clone() for p in heads.parameters()]
    assert torch.equal(state, torch.get_rng_state())
    others.restart(1)
    assert not any(torch.equal(a, b) for a, b in zip(weights, others.parameters(), strict=True))
    others.restart(2, fresh_draws=True)
    assert all(torch.equal(a, b) for a, b in zip(weights, others.parameters(), strict=True))
    assert (heads.first_draw, others.first_draw) == (0, 6)
    heads.restart(0)
    start = attach(model, ["0", "2"], num_labels=LABELS, draws=3, example=torch.zeros(1, 12))
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), start.parameters(), strict=True))
    with pytest.raises(UserError, match="number is -1"):
        heads.restart(-1)


def test_fresh_draws_are_the_next_columns_of_the_words():
    _, heads, _, index = fitted()
    wide = attach(network(), ["0"], num_labels=LABELS, draws=12, example=torch.zeros(1, 12))
    x = [torch.zeros(BATCH, 1)]
    columns = wide._targets(index, None, x)
    for number in range(4):
        heads.restart(number, fresh_draws=True)
        assert torch.equal(heads._targets(index, None, x), columns[:, 3 * number : 3 * number + 3])
