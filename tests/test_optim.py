"""Optimisers: who decays, and the learning rate at chosen steps."""

import pytest
import torch
from torch import nn

from rlp.errors import UserError
from rlp.optim import build_optimizer, lr_factor, parameter_groups, set_lr


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 2)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def names_in(model: nn.Module, group: dict) -> set[str]:
    ids = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def test_only_weights_of_linear_and_convolution_decay():
    model = Tokens()
    decayed, rest = parameter_groups(model, 0.1)
    assert names_in(model, decayed) == {"conv.weight", "head.weight"}
    assert decayed["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert names_in(model, rest) == {
        "cls_token", "conv.bias", "norm.weight", "norm.bias", "embed.weight", "head.bias",
    }  # fmt: skip


def test_a_models_own_exclusions_are_respected():
    model = Tokens()
    model.no_weight_decay = lambda: {"head.weight"}  # type: ignore[assignment]
    decayed, _ = parameter_groups(model, 0.1)
    assert names_in(model, decayed) == {"conv.weight"}


def test_shared_weights_appear_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    groups = parameter_groups(model, 0.1)
    assert sum(len(group["params"]) for group in groups) == 3
    build_optimizer("sgd", groups, lr=0.1)  # torch refuses a parameter in two groups


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 0, 0.1),  # warm-up of 10 steps: 1/10, 2/10, ...
        ("cosine", 9, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.5),
        ("linear", 55, 0.5),
        ("constant", 99, 1.0),
        ("step", 29, 1.0),
        ("step", 30, 0.1),
        ("step", 60, 0.01),
    ],
)
def test_learning_rate_factor(schedule, step, expected):
    factor = lr_factor(schedule, step, steps_per_epoch=10, epochs=10, warmup_epochs=1, step_epochs=[3, 6])
    assert factor == pytest.approx(expected)


def test_cosine_ends_near_zero_and_never_rises():
    factors = [lr_factor("cosine", step, 7, 3, 0.5) for step in range(21)]
    peak = factors.index(max(factors))
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert 0 < factors[-1] < 0.02


def test_set_lr_reaches_every_group():
    optimizer = build_optimizer("adamw", parameter_groups(Tokens(), 0.1), lr=1.0)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_unknown_names_are_named():
    with pytest.raises(UserError, match=r"'adam'.*sgd or adamw"):
        build_optimizer("adam", Tokens().parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"train\.schedule is 'cos'"):
        lr_factor("cos", 5, 10, 1)
