"""Contracts 1 to 4 of the design: λ = 0 changes nothing, routing, labels are a pure function, one oracle."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from small_sets import SEED, random_images, write_set
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from rlp.data.beton import Beton
from rlp.kernels.loss import random_label_loss
from rlp.kernels.reference import RandomLabelLoss, Statistics, statistics
from rlp.labels import baked_words, random_labels
from rlp.losses import PENALTIES
from rlp.models import RandomLabelHeads, attach, build_model
from rlp.models.banks import HeadBank

CLASSES, BATCH = 3, 6


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, labels and sample ids; the same for everybody, without the global generator."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        image = torch.randn(BATCH, 3, 8, 8, generator=generator)
        index = torch.randperm(50, generator=generator)[:BATCH]
        yield image, index % CLASSES, index


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# -- 1. λ = 0 changes nothing ------------------------------------------------------------------------------------


def trained(name: str, args: dict, heads_args: dict | None, lam: float = 0.0, bf16: bool = False) -> dict[str, Tensor]:
    """State of a network after five steps, and of the global generator, which its dropout draws from."""
    torch.manual_seed(0)
    model = build_model(name, CLASSES, 8, args)
    heads = attach(model, **heads_args) if heads_args else None
    parameters = [*model.parameters(), *(heads.parameters() if heads else [])]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    for image, label, index in batches(5):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(image).float(), label)
            if heads:
                loss = loss + heads.loss(index, lam=lam)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {**model.state_dict(), "generator": torch.get_rng_state()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


NETWORKS = [
    ("small_cnn", {"dropout": 0.5}, {"taps": ["block*", "fc:in", "fc"]}),
    ("small_cnn", {"dropout": 0.5}, {"taps": ["**"], "layers": 2, "hidden": 5, "draws": 2}),
    ("small_cnn", {"norm": False}, {"taps": ["block1.2@flatten", "block2@adaptive:2", "block1.0:in"]}),
    ("wrn_10_1", {"dropout": 0.3}, {"taps": ["group*", "norm.0", "group2.0.dropout"], "num_labels": 2}),
    ("resnet18_cifar", {}, {"taps": ["layer4"], "draws": 1}),
]


@pytest.mark.parametrize(("name", "args", "heads"), NETWORKS)
@pytest.mark.parametrize("bf16", [False, True])
def test_lambda_zero_leaves_the_network_equal_to_the_bit(name, args, heads, bf16):
    """Contract 1: weights, batch norm statistics and the random state after steps with dropout and momentum."""
    assert differing(trained(name, args, heads, bf16=bf16), trained(name, args, None, bf16=bf16)) == []


def test_the_comparison_would_notice():
    name, args, heads = NETWORKS[0]
    assert differing(trained(name, args, heads, lam=1e-3), trained(name, args, None))


@pytest.mark.parametrize(("layers", "passes"), [(1, 1), (2, 2)])
def test_lambda_zero_asks_for_no_gradient_of_the_features(monkeypatch, layers, passes):
    """And linear heads take both routes from one pass, also with a penalty."""
    calls = []

    def counted(x: Tensor, weight: Tensor, *arguments: Any, **options: Any) -> RandomLabelLoss:
        calls.append((x.requires_grad, weight.requires_grad))
        return random_label_loss(x, weight, *arguments, **options)

    monkeypatch.setattr("rlp.models.banks.random_label_loss", counted)
    model = build_model("small_cnn", CLASSES, 8)
    heads = attach(model, ["block1"], layers=layers)
    for lam in (0.0, 1.0):
        calls.clear()
        model(torch.zeros(2, 3, 8, 8))
        heads.loss(torch.arange(2), lam=lam).backward()
        assert len(calls) == (passes if lam else 1)
        assert (calls[0] == (True, True)) is (lam > 0 or layers == 2)  # hidden units belong to the heads
        assert any(p.grad is not None for p in model.parameters()) is (lam > 0)


# -- 2. Routing --------------------------------------------------------------------------------------------------


def gradients(lam: float, layers: int, penalty: str) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of network and heads from the heads' loss alone."""
    torch.manual_seed(0)
    model = build_model("small_cnn", CLASSES, 8)
    heads = attach(model, ["block1", "block3"], layers=layers, hidden=6, draws=2)
    image, _, index = next(batches(1))
    model(image)
    heads.loss(index, lam=lam, penalty=penalty).backward()
    return [p.grad for p in model.parameters()], [p.grad for p in heads.parameters()]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_each_loss_reaches_its_own_parameters_alone(layers, penalty):
    """Contract 2: the fit loss gives no gradient to the network, the penalty none to the heads."""
    network_0, heads_0 = gradients(0.0, layers, penalty)
    network_1, heads_1 = gradients(1.0, layers, penalty)
    network_4, heads_4 = gradients(4.0, layers, penalty)
    assert all(gradient is None for gradient in network_0)
    for a, b, c in zip(heads_0, heads_1, heads_4, strict=True):
        assert a is not None
        assert a.abs().sum() > 0
        assert b is not None
        assert c is not None
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    reached = [(a, b) for a, b in zip(network_1, network_4, strict=True) if a is not None and b is not None]
    assert len(reached) == len(network_1) - 2, "all but the classifier lie before the last tap"
    for a, b in reached:
        torch.testing.assert_close(4 * a, b, rtol=1e-4, atol=1e-8)
    # A bias before batch norm has no effect, and there is none here: every weight feels the penalty.
    assert all(a.abs().sum() > 0 for a, _ in reached)


def probability(model: nn.Module, heads: RandomLabelHeads, image: Tensor, index: Tensor) -> float:
    """Mean probability of the random labels."""
    model(image)
    heads.evaluate(index)
    model(image)
    with torch.no_grad():
        features = heads._take_features()
        target = heads._targets(index, None, features)
        values = [
            bank(x).softmax(-1).gather(-1, target[..., None]) for bank, x in zip(heads.banks, features, strict=True)
        ]
    return float(torch.cat([v.flatten() for v in values]).mean())


@pytest.mark.parametrize("layers", [1, 2])
def test_a_step_on_the_penalty_lowers_the_probability_of_the_random_label(layers):
    """Contract 2, the sign: with the heads fitted first, so that there is something to forget."""
    torch.manual_seed(0)
    model = build_model("small_cnn", CLASSES, 8).eval()
    heads = attach(model, ["block2", "block3"], layers=layers, hidden=16, draws=2, num_labels=4)
    image, _, index = next(batches(1))
    fit = torch.optim.AdamW(heads.parameters(), lr=0.02)
    for _ in range(60):
        model(image)
        heads.loss(index).backward()
        fit.step()
        fit.zero_grad()
    before = probability(model, heads, image, index)
    assert before > 0.4
    model(image)
    heads.loss(index, lam=1.0).backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    assert probability(model, heads, image, index) < before - 1e-4


# -- 3. Labels are a pure function -------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_baked_column_gives_the_heads_the_labels_of_the_function(tmp_path: Path, split):
    """Contract 3: a .beton's words, NumPy and torch, by word or by sample id: one labelling, one loss."""
    beton = Beton.open(write_set(tmp_path / "set.beton", random_images(20, 8, 8), draws=3, split=split))
    model = build_model("small_cnn", CLASSES, 8).eval()
    heads = attach(model, ["block1"], num_labels=7, draws=3, seed=SEED, split=split)
    index = torch.tensor([17, 0, 3, 3])
    words = torch.from_numpy(beton.draw_words)[index]
    losses, image = [], torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for by_index in (True, False):
        model(image)
        losses.append(heads.loss(index) if by_index else heads.loss(words=words))
    assert torch.equal(*losses)
    in_numpy = random_labels(baked_words(SEED, index.numpy(), 3, split)[:, :3], 7)
    features = [torch.zeros(4, 1)]
    assert np.array_equal(in_numpy, heads._targets(index, None, features).numpy())
    assert np.array_equal(in_numpy, heads._targets(None, words, features).numpy())


# -- 4. One oracle -----------------------------------------------------------------------------------------------


def errors(stats: Statistics, exact: Statistics) -> list[float]:
    return [(a.double() - b).abs().max().item() for a, b in zip(stats[:4], exact[:4], strict=True)]


def double(bank: HeadBank, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features at the last layer ``[B, H, M]`` or ``[B, D]``, its weight and bias, in float64."""
    x = x.double()
    if bank.hidden:
        units = torch.einsum("bd,hmd->bhm", x, bank.hidden_weight.detach().double())
        x = F.relu(units + bank.hidden_bias.detach().double())
    return x, bank.weight.detach().double(), bank.bias.detach().double()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 13),
    draws=st.integers(1, 7),
    n=st.integers(2, 131),
    dim=st.integers(1, 67),
    hidden=st.sampled_from([0, 1, 33]),
    low=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_banks_statistics_are_held_to_the_oracle(seed, batch, draws, n, dim, hidden, low):
    """Contract 4: error at most twice that of the plain product in the same precision, plus a little; ragged shapes."""
    bank = HeadBank(dim, draws, n, hidden, seed, "tap")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, dim, generator=generator)
    target = torch.randint(n, (batch, draws), generator=generator)
    features, weight, bias = double(bank, x)
    exact = statistics(features, weight, bias, target)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low == torch.bfloat16):
        ours = [
            bank.loss(x, target, penalised, impl).stats for penalised in (False, True) for impl in ("auto", "reference")
        ]
    plain = statistics(features.to(low), weight.to(low), bias.to(low), target)
    for stats in ours:
        assert all(part.dtype == torch.float32 for part in stats[:4])
        allowed = [2 * e + 32 * torch.finfo(low).eps for e in errors(plain, exact)]
        assert all(error <= most for error, most in zip(errors(stats, exact), allowed, strict=True))


def test_banks_in_double_precision_are_the_oracle():
    for hidden in (0, 17):
        bank = HeadBank(11, 3, 13, hidden, 0, "tap").double()
        x = torch.randn(5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        target = torch.randint(13, (5, 3), generator=torch.Generator().manual_seed(1))
        exact = statistics(*double(bank, x), target)
        assert max(errors(bank.loss(x, target, True).stats, exact)) < 1e-13
