"""Heads of their own for each class, and runs with each kind of head."""

from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
from test_trainer import dies_at
from tiny_run import assert_same_tensors, final_state, tiny_config, write_tiny_sets
import torch
from torch import Tensor, nn
import torch.nn.functional as F

import rlp
from rlp.distributed import World
from rlp.kernels import reference
from rlp.models import build_model
from rlp.models.banks import HeadBank
from rlp.report.table import summary_table
from rlp.runlog import read_summary
from train_rlp import train


def batch(seed: int, count: int, dim: int, draws: int, n: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, random labels and classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dim, generator=generator)
    target = torch.randint(n, (count, draws), generator=generator)
    return x, target, torch.randint(classes, (count,), generator=generator)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 17),
    dim=st.integers(1, 9),
    draws=st.integers(1, 4),
    n=st.integers(2, 12),
    classes=st.integers(1, 6),
)
def test_a_sample_uses_its_class_head(seed, count, dim, draws, n, classes):
    """Fit losses, statistics and all gradients are those of plain autograd with each sample's own weight picked."""
    x, target, given_classes = batch(seed, count, dim, draws, n, classes)
    bank = HeadBank(dim, draws, n, 0, seed, "tap", num_classes=classes)
    assert bank.weight.shape == (draws, classes, n, dim)
    x.requires_grad_(True)
    fit, stats = bank.loss(x, target, True, classes=given_classes)
    parts = [*bank.parameters(), x]
    found = torch.autograd.grad(fit.sum() + F.softplus(stats.z_t - stats.lse_rest).sum(), parts)
    own_fit, own = reference.random_label_loss(x, bank.weight, bank.bias, target, given_classes)
    expected = torch.autograd.grad(own_fit.sum() + F.softplus(own.z_t - own.lse_rest).sum(), parts)
    torch.testing.assert_close(fit, own_fit, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    picked = torch.stack([bank.weight[:, c] @ row for c, row in zip(given_classes.tolist(), x.detach(), strict=True)])
    own_bias = bank.bias[:, given_classes].transpose(0, 1)
    torch.testing.assert_close(bank(x, given_classes), picked + own_bias, rtol=1e-4, atol=1e-5)


def test_the_heads_of_absent_classes_stay_as_they_are():
    x, target, _ = batch(0, 6, 4, 2, 3, 4)
    bank = HeadBank(4, 2, 3, 0, 0, "tap", num_classes=4)
    bank.loss(x, target, False, classes=torch.tensor([0, 2, 2, 0, 0, 2])).fit.sum().backward()
    assert bank.weight.grad is not None
    moved = bank.weight.grad.abs().sum((0, 2, 3)) > 0
    assert moved.tolist() == [True, False, True, False]


def test_per_class_weights_depend_on_seed_tap_and_draw_alone():
    def weights(draws: int, seed: int, tap: str) -> Tensor:
        return HeadBank(5, draws, 3, 0, seed, tap, num_classes=4).weight.detach()

    few, many = weights(2, 0, "a"), weights(5, 0, "a")
    assert torch.equal(few, many[:2])
    for other in (weights(2, 1, "a"), weights(2, 0, "b")):
        assert not torch.equal(few, other)
    flat = many.flatten(0, 1)
    assert all(not torch.equal(flat[a], flat[b]) for a in range(len(flat)) for b in range(a))
    assert flat.abs().max() <= 5**-0.5


def test_a_restart_gives_fresh_weights_and_the_start_comes_back():
    kinds: list[dict[str, Any]] = [{}, {"num_classes": 3}, {"features": "standardised"}]
    for options in kinds:
        bank = HeadBank(5, 2, 3, 0, 0, "tap", **options)
        start = bank.weight.detach().clone()
        bank(torch.randn(4, 5), torch.zeros(4, dtype=torch.int64))
        bank.initialise(1)
        assert not torch.equal(bank.weight, start)
        assert all(torch.equal(buffer, torch.zeros(5)) for name, buffer in bank.named_buffers() if "mean" in name)
        bank.initialise(0)
        assert torch.equal(bank.weight, start)


def attached(**options: Any) -> tuple[nn.Module, rlp.RandomLabelHeads]:
    torch.manual_seed(0)
    model = build_model("small_cnn", 3, 8)
    options = {"draws": 2, "num_labels": 4} | options
    return model, rlp.attach(model, ["block2", "pool"], **options)


def test_knowing_the_class_is_worth_nothing():
    """Features that tell the class alone: a shared head learns each class's commonest label, one for each class too.

    So with a single sample in a class its head is always right (100% by counting), whatever the network knows.
    """
    classes = torch.arange(6)
    target = torch.randint(4, (6, 1), generator=torch.Generator().manual_seed(0))
    bank = HeadBank(2, 1, 4, 0, 0, "tap", num_classes=6)
    optimizer = torch.optim.SGD(bank.parameters(), lr=1.0)
    for _ in range(60):
        optimizer.zero_grad()
        bank.loss(torch.zeros(6, 2), target, False, classes=classes).fit.sum().backward()
        optimizer.step()
    assert (bank(torch.zeros(6, 2), classes).argmax(-1) == target).all()
    swapped = bank(torch.zeros(6, 2), classes.roll(1)).argmax(-1)
    assert torch.equal(swapped, target.roll(1, 0))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_each_loss_reaches_its_own_parameters_alone(impl):
    """Contract 2."""
    found = []
    for lam in (0.0, 2.0):
        model, heads = attached(kind="per_class", impl=impl)
        model(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
        heads.loss(torch.arange(6), classes=torch.arange(6) % 3, lam=lam).backward()
        found.append([parameter.grad for parameter in heads.parameters()])
        assert any(parameter.grad is not None for parameter in model.parameters()) is (lam > 0)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]


def test_the_number_of_classes_comes_from_the_model():
    _, heads = attached(kind="per_class")
    assert heads.num_classes == 3
    assert heads.kind == "per_class"
    assert attached(kind="per_class", num_classes=7)[1].num_classes == 7
    assert attached()[1].num_classes == 0
    maps = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(rlp.UserError, match=r"output is not \[B, C\]; expected num_classes="):
        rlp.attach(maps, ["0"], kind="per_class")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (None, r"classes = None; expected each sample's class, int64 \[4\]"),
        (torch.zeros(3, dtype=torch.int64), r"int64 of shape \[3\]; expected"),
        (torch.zeros(4), r"float32 of shape \[4\]"),
        (torch.tensor([0, 1, 2, 3]), r"classes holds 3; expected class ids in \[0, 3\)"),
        (torch.tensor([0, 1, -1, 2]), "classes holds -1"),
    ],
)
def test_wrong_classes_are_named(classes, message):
    model, heads = attached(kind="per_class")
    for call in (heads.loss, heads.evaluate):
        model(torch.zeros(4, 3, 8, 8))
        with pytest.raises(rlp.UserError, match=message):
            call(torch.arange(4), classes=classes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "own"}, "kind is 'own'; expected one of shared, per_class, copied"),
        ({"kind": "per_class", "layers": 2}, "kind is per_class and layers is 2; expected 1"),
        ({"kind": "per_class", "num_classes": 0}, "num_classes is 0"),
        ({"features": "white"}, "features is 'white'; expected one of raw"),
        ({"features": "projected", "width": 0}, "width is 0"),
        ({"kind": "copied", "features": "standardised"}, "kind is copied and features is standardised; expected raw"),
        ({"kind": "copied", "pool": "flatten"}, "kind is copied and pool is flatten; expected auto"),
        ({"kind": "copied", "taps": ["block2@flatten"]}, "'block2@flatten' has a pooling.*expected 'block2'"),
    ],
)
def test_settings_that_do_not_go_together_leave_no_hook(options, message):
    model = build_model("small_cnn", 3, 8)
    with pytest.raises(rlp.UserError, match=message):
        rlp.attach(model, **({"taps": ["block2"]} | options))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# not importorskip: timm is imported by build_model, which knows how to
needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
NETWORKS = [
    ("small_cnn", 8),
    ("vgg16_cifar", 32),
    ("wrn_16_4", 8),
    pytest.param("resnet18", 32, marks=needs_timm),
]


@pytest.mark.parametrize(("name", "size"), NETWORKS)
@pytest.mark.parametrize(("kind", "tap"), [("per_class", "global_pool"), ("copied", "depth:2")])
def test_networks_take_each_kind(name, size, kind, tap):
    """Under bf16, channels_last; a step of network and heads, and a reading."""
    if tap == "global_pool" and name != "resnet18":
        tap = "pool"
    torch.manual_seed(0)
    model = build_model(name, 5, size).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    heads = rlp.attach(model, [tap], num_labels=2, draws=2, kind=kind, example=torch.zeros(1, 3, size, size))
    image = torch.randn(4, 3, size, size).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        model(image)
        loss = heads.loss(torch.arange(4), classes=torch.arange(4), lam=2.0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        model.eval()(image)
        heads.evaluate(torch.arange(4), classes=torch.arange(4))
    (row, _) = heads.metrics("eval")
    assert (row.kind, row.count, row.num_labels) == (kind, 4, 2)
    assert kind in heads.summary()


RUNS: list[dict[str, Any]] = [
    {"heads__kind": "per_class", "heads__taps": ["pool"], "heads__lam": 0.5},
    {"heads__kind": "copied", "heads__taps": ["depth:2"], "heads__lam": 0.5, "heads__draws": 2},
    {"heads__features": "projected", "heads__width": 9, "heads__lam": 0.5},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", RUNS)
def test_a_resumed_run_is_the_run(tmp_path: Path, changes):
    """Stopped in mid-epoch and gone on with: weights, running statistics, optimisers and readings equal to the bit."""
    write_tiny_sets(tmp_path)
    whole = tiny_config(tmp_path, run__dir=str(tmp_path / "whole"), **changes)
    train(whole, World())
    halves = {**changes, "run__dir": str(tmp_path / "halves"), "run__checkpoint_every": 3}
    dies_at(7, tiny_config(tmp_path, **halves))
    train(tiny_config(tmp_path, **halves, run__resume="auto"), World())
    states = [final_state(tmp_path / name) for name in ("whole", "halves")]
    for part in ("model", "heads", "optimizers", "running"):
        assert_same_tensors(states[0][part], states[1][part], part)
    summary = read_summary(tmp_path / "halves")
    kinds = Counter((row["kind"], row["features"]) for row in summary["final"]["heads"])
    kind, features = changes.get("heads__kind", "shared"), changes.get("heads__features", "raw")
    assert set(kinds) == {(kind, features)}
    assert f"{kind} heads on {features} features" in summary_table(summary)


@pytest.mark.slow
def test_a_runs_network_does_not_know_what_heads_it_has(tmp_path: Path):
    """Contract 1 through the script: dropout, augmentation, evaluation and all kinds of heads."""
    write_tiny_sets(tmp_path)
    states = []
    for number, changes in enumerate(({"heads__taps": []}, *RUNS)):
        config = tiny_config(tmp_path, run__dir=str(tmp_path / str(number)), **(changes | {"heads__lam": 0.0}))
        train(config, World())
        states.append(final_state(tmp_path / str(number))["model"])
    for state in states[1:]:
        assert_same_tensors(states[0], state)


def test_contradicting_settings_of_a_run_are_named(tmp_path: Path):
    write_tiny_sets(tmp_path)
    config = tiny_config(tmp_path, heads__kind="copied", heads__features="normalised")
    with pytest.raises(rlp.UserError, match=r"heads\.kind is copied and heads\.features is normalised; expected raw"):
        train(config, World())
