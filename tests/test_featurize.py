"""What heads are given of the features: definitions, running statistics, gradients."""

import pytest
import torch
from torch import Tensor, nn
import torch.nn.functional as F

import rlp
from rlp.measure.preprocess import FEATURES as FROZEN_FEATURES
from rlp.measure.preprocess import RESIDUALS, Preprocess
from rlp.models import build_model
from rlp.models.banks import HeadBank
from rlp.models.featurize import FEATURES, MOMENTUM, Featurizer

KINDS = [kind for kind in FEATURES if kind != "raw"]


def features(count: int = 40, dim: int = 6, seed: int = 0) -> Tensor:
    """Of unequal scales and means, one of them constant."""
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    x = x * torch.arange(1.0, dim + 1) + torch.arange(dim)
    x[:, 2] = 7.0
    return x


def settled(kind: str, x: Tensor, width: int = 4, seed: int = 3) -> Featurizer:
    """With the statistics of ``x``, in eval mode."""
    featurize = Featurizer(kind, x.shape[1], width, seed)
    for _ in range(300):
        featurize(x)
    return featurize.eval()


def test_the_names_are_those_of_frozen_features():
    assert tuple(kind for kind in FROZEN_FEATURES if kind not in RESIDUALS) == FEATURES  # which need all class means


@pytest.mark.parametrize("kind", KINDS)
def test_the_definitions_are_those_of_frozen_features(kind):
    x = features(4000)
    expected = Preprocess.fit(x, kind, width=4, seed=3)(x)
    torch.testing.assert_close(settled(kind, x)(x), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(Featurizer(kind, 6, 4, 3)(x), expected, rtol=2e-3, atol=2e-3)


def test_standardised_is_batch_norm_without_parameters():
    ours, theirs = Featurizer("standardised", 6, 1, 0), nn.BatchNorm1d(6, affine=False)
    for step in range(5):
        x = features(9, seed=step)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    x = features(9, seed=9)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)
    assert theirs.momentum == MOMENTUM
    assert theirs.running_var is not None
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_the_projection_depends_on_shape_and_seed_alone():
    def matrix(seed: int) -> Tensor:
        found = Featurizer("projected", 6, 4, seed).matrix
        assert found is not None
        return found

    torch.manual_seed(1)
    first = matrix(0)
    state = torch.get_rng_state()
    assert torch.equal(first, matrix(0))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, matrix(1))
    assert Featurizer("projected", 6, 50, 0)(features()).shape == (40, 50)


@pytest.mark.parametrize("kind", KINDS)
def test_eval_mode_and_small_batches_leave_the_statistics(kind):
    featurize = settled(kind, features())
    before = {name: buffer.clone() for name, buffer in featurize.named_buffers()}
    in_eval = featurize(features(1, seed=5))
    featurize.train()
    assert torch.equal(featurize(features(1, seed=5)), in_eval), "one sample has no variance: running statistics"
    assert featurize(features(0)).shape == (0, featurize.dim)
    assert all(torch.equal(buffer, before[name]) for name, buffer in featurize.named_buffers())
    featurize(features(2))
    assert not torch.equal(featurize.running_mean, before["running_mean"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_go_through(kind, training):
    featurize = Featurizer(kind, 5, 3, 0).double().train(training)
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(featurize, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_equal_samples_and_large_numbers_stay_finite(kind, value):
    x = torch.full((6, 5), value, requires_grad=True)
    found = Featurizer(kind, 5, 3, 0)(x)
    found.sum().backward()
    assert torch.equal(found, torch.zeros_like(found))
    assert x.grad is not None
    assert x.grad.abs().max() < 1e4


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize(("layers", "per_class"), [(1, False), (2, False), (1, True)])
def test_lambda_zero_changes_nothing_and_each_loss_has_its_route(kind, layers, per_class):
    """Contracts 1 and 2 for every kind of features."""

    def gradients(lam: float | None) -> tuple[list[Tensor | None], list[Tensor | None]]:
        torch.manual_seed(0)
        model = build_model("small_cnn", 3, 8, {"dropout": 0.5})
        heads = rlp.attach(
            model, ["block1", "block3"], draws=2, layers=layers, hidden=5, features=kind, width=7,
            kind="per_class" if per_class else "shared",
        )  # fmt: skip
        image, label = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
        loss = F.cross_entropy(model(image), label)
        if lam is not None:
            loss = loss + heads.loss(torch.arange(8), classes=label, lam=lam)
        loss.backward()
        return [p.grad for p in model.parameters()], [p.grad for p in heads.parameters()]

    network, none = gradients(None)
    network_0, heads_0 = gradients(0.0)
    network_1, heads_1 = gradients(1.0)
    assert all(gradient is None for gradient in none)
    for a, b, c in zip(network, network_0, network_1, strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]
        assert c is not None
    assert sum(not torch.equal(a, c) for a, c in zip(network, network_1, strict=True)) >= len(network) - 2  # type: ignore[arg-type]
    for a, b in zip(heads_0, heads_1, strict=True):
        assert a is not None
        assert torch.equal(a, b)  # type: ignore[arg-type]


def test_one_reading_moves_the_statistics_once():
    """Two-layer heads with a penalty go through their layers twice."""
    x, target = features(8), torch.zeros(8, 2, dtype=torch.int64)
    once = Featurizer("standardised", 6, 1, 0)
    once(x)
    for hidden, penalised in ((0, True), (3, False), (3, True)):
        bank = HeadBank(6, 2, 3, hidden, 0, "tap", features="standardised")
        bank.loss(x, target, penalised)
        assert bank.featurize is not None
        torch.testing.assert_close(bank.featurize.running_mean, once.running_mean)


def test_evaluation_reads_the_running_statistics_and_leaves_them():
    model = build_model("small_cnn", 3, 8)
    heads = rlp.attach(model, ["pool"], features="standardised", draws=1)
    image = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        model(image)
        heads.loss(torch.arange(8))
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    model.eval()
    rows = []
    for cuts in ([slice(0, 8)], [slice(0, 3), slice(3, 8)]):  # cut in any way, the samples read the same
        for part in cuts:
            model(image[part])
            heads.evaluate(torch.arange(8)[part])
        rows += heads.metrics("eval")
    whole, parts = rows
    assert parts.count == 8
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.features == "standardised"
    assert all(torch.equal(value, before[name]) for name, value in heads.state_dict().items())
    assert all(module.training for module in heads.banks.modules())


def test_the_width_is_the_heads_input():
    model = build_model("small_cnn", 3, 8)
    heads = rlp.attach(model, ["block1", "block3"], features="projected", width=9)
    assert heads.dims == [9, 9]
    model(torch.randn(4, 3, 8, 8))
    heads.loss(torch.arange(4))
    assert {row.dim for row in heads.metrics(reset=False)} == {9}
    assert "features projected" in heads.summary()
    assert "on projected features (16 at the tap, 9 into a head)" in heads.describe()[0]


@pytest.mark.slow
def test_a_compiled_step_is_one_graph():
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = build_model("small_cnn", 3, 8)
        heads = rlp.attach(model, ["block3"], features="standardised", kind="per_class", draws=2)

        def step(image: Tensor, label: Tensor, index: Tensor, model=model, heads=heads) -> Tensor:
            return F.cross_entropy(model(image), label) + heads.loss(index, classes=label, lam=0.5)

        run = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
        image = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        losses.append(run(image, torch.arange(6) % 3, torch.arange(6)))
    torch.testing.assert_close(*losses)
