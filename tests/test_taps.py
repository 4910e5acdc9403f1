"""Taps: which modules a pattern names, what is kept there, and how it becomes one vector a sample."""

import copy
from importlib.util import find_spec
import pickle

import pytest
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from rlp.errors import UserError
from rlp.models import attach, build_model
from rlp.models.taps import FeatureStore, Layout, check_pool, hook_taps, layout_of, pool_features, probe, resolve_taps

# not importorskip: timm is imported by build_model, which knows how to
needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")


class Branches(nn.Module):
    """Modules in another order than they run, one that gives a tuple, one that is never called, one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 4)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.pair = Pair()
        self.norm = nn.BatchNorm1d(6)
        self.relu = nn.ReLU(inplace=True)
        self.unused = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.5)
        self.noise = Noise()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        _, x, _ = self.pair(value=x)
        return self.last(self.noise(self.dropout(self.relu(self.norm(x)))))


class Noise(nn.Module):
    """Draws in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.0 * torch.randn_like(x)


class Pair(nn.Module):
    def forward(self, value: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, value + 1, value - 1


def names(model: nn.Module, *patterns: str) -> list[str]:
    return [tap.name for tap in resolve_taps(model, patterns)]


def test_paths_globs_sides_and_pooling():
    model = nn.Sequential()
    for name in ("layer1", "layer2", "layer10"):
        model.add_module(name, nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.Conv2d(3, 3, 1))))
    assert names(model, "layer2") == ["layer2"]
    assert names(model, "layer?") == ["layer1", "layer2"]
    assert names(model, "layer[2-9]", "layer1*") == ["layer1", "layer2", "layer10"]
    assert names(model, "layer2.*") == ["layer2.0", "layer2.1"]
    assert names(model, "layer2.**") == ["layer2", "layer2.0", "layer2.1", "layer2.1.0"]
    assert names(model, "**.0") == [f"layer{k}{inner}" for k in (1, 2, 10) for inner in (".0", ".1.0")]
    assert names(model, "layer2:in", "layer2:out", "layer2@flatten", "layer*") == [
        "layer1", "layer2:in", "layer2", "layer2@flatten", "layer10",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("block", "tap 'block' names no module of the model; near names: blocks"),
        ("blocks.*.*", "names no module"),
        ("last:side", "tap 'last:side' has the side 'side'; expected :in or :out"),
        ("last@sum", "tap 'last@sum' has the pooling 'sum'; expected one of auto, avg"),
        ("last@adaptive:0", "has the pooling 'adaptive:0'"),
        ("last@", "has the pooling ''"),
    ],
)
def test_a_wrong_pattern_is_named(pattern, message):
    with pytest.raises(UserError, match=message):
        resolve_taps(Branches(), [pattern])


def test_taps_come_in_the_order_of_the_forward_pass_without_uncalled_containers():
    heads = attach(Branches(), ["*"], draws=1, example=torch.zeros(2, 6))
    assert heads.tap_names == ["pair", "norm", "relu", "dropout", "noise", "last"]
    heads = attach(Branches(), ["last", "blocks.*", "pair:in"], draws=1, example=torch.zeros(2, 6))
    assert heads.tap_names == ["blocks.0", "blocks.1", "pair:in", "last"]


@pytest.mark.parametrize("taps", [["unused"], ["blocks"], ["unuse*"], ["norm", "unused"]])
def test_a_named_module_that_is_never_called_is_an_error(taps):
    model = Branches()
    with pytest.raises(UserError, match=r"tap '(unused|blocks)' takes no part in the forward pass"):
        attach(model, taps, example=torch.zeros(2, 6))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_kept_is_what_passed_there():
    model, store = Branches().eval(), FeatureStore()
    hook_taps(model, resolve_taps(model, ["norm", "norm:in", "pair", "relu", "pair:in"]), "auto", Layout(), store)
    x = torch.randn(3, 6)
    model(x)
    inner = model.blocks[1](model.blocks[0](x))
    torch.testing.assert_close(store.features["pair:in"], inner)  # a named argument
    torch.testing.assert_close(store.features["pair"], inner + 1)  # the first tensor of a tuple
    torch.testing.assert_close(store.features["norm:in"], inner + 1)
    # the ReLU works in place on the norm's output, and must not reach what was kept before it
    torch.testing.assert_close(store.features["norm"], model.norm(inner + 1))
    torch.testing.assert_close(store.features["relu"], model.norm(inner + 1).relu())


def test_a_module_that_runs_twice_leaves_its_last_output():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x))

    model, store = Twice(), FeatureStore()
    hook_taps(model, resolve_taps(model, ["inner"]), "auto", Layout(), store)
    assert torch.equal(model(torch.ones(1, 3)), store.features["inner"])


def test_the_probe_leaves_no_trace():
    torch.manual_seed(5)
    model = Branches()
    model.blocks[0].eval()
    model.norm(torch.randn(4, 6))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    probe(model, torch.ones(2, 6))
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_a_copy_of_the_network_keeps_to_itself():
    """An averaged copy of the weights carries the hooks along; its passes must not overwrite the network's features."""
    model = Branches()
    heads = attach(model, ["last"], draws=1, example=torch.zeros(2, 6))
    model(torch.randn(2, 6))
    kept = heads._store.features["last"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.randn(5, 6))
        assert heads._store.features["last"] is kept


IMAGE_MAPS = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
TOKENS = torch.arange(2 * 5 * 3, dtype=torch.float32).view(2, 5, 3)
VECTORS = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(
    ("value", "kind", "layout", "expected"),
    [
        (IMAGE_MAPS, "auto", Layout(), IMAGE_MAPS.mean((2, 3))),
        (IMAGE_MAPS, "mean", Layout(), IMAGE_MAPS.mean((2, 3))),
        (IMAGE_MAPS, "avg_last", Layout(), IMAGE_MAPS.mean((1, 2))),
        (IMAGE_MAPS, "auto", Layout(channels_last_maps=True), IMAGE_MAPS.mean((1, 2))),
        (IMAGE_MAPS, "flatten", Layout(), IMAGE_MAPS.flatten(1)),
        (IMAGE_MAPS, "adaptive:2", Layout(), F.avg_pool2d(IMAGE_MAPS, 2).flatten(1)),
        (
            IMAGE_MAPS.permute(0, 2, 3, 1), "adaptive:2", Layout(channels_last_maps=True),
            F.avg_pool2d(IMAGE_MAPS, 2).flatten(1),
        ),
        (TOKENS, "auto", Layout(), TOKENS.mean(1)),
        (TOKENS, "auto", Layout(1, True), TOKENS[:, 0]),
        (TOKENS, "auto", Layout(2, False), TOKENS[:, 2:].mean(1)),
        (TOKENS, "avg", Layout(1, True), TOKENS[:, 1:].mean(1)),
        (TOKENS, "cls", Layout(), TOKENS[:, 0]),
        (TOKENS, "avg_last", Layout(1, True), TOKENS.mean(1)),
        *((VECTORS, kind, Layout(), VECTORS) for kind in ("auto", "avg", "cls", "mean", "flatten", "adaptive:2")),
    ],
)  # fmt: skip
def test_pooling(value, kind, layout, expected):
    features = pool_features(value, kind, layout, "tap")
    torch.testing.assert_close(features, expected)
    memory = {tensor.untyped_storage().data_ptr() for tensor in (features, value)}
    assert len(memory) == 2, "the network could change the features in place"


@pytest.mark.parametrize(("value", "kind"), [(IMAGE_MAPS, "cls"), (TOKENS, "adaptive:2")])
def test_pooling_that_does_not_fit_is_named(value, kind):
    with pytest.raises(UserError, match=r"pooling '.*' does not fit tap 'blocks.3', which gives a tensor of shape \[2"):
        pool_features(value, kind, Layout(), "blocks.3")


def test_means_of_half_precision_are_single():
    value = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(pool_features(value, "avg", Layout(), "tap"), value.float().mean((2, 3)))


def test_unknown_pooling_is_named():
    with pytest.raises(UserError, match=r"heads\.pool has the pooling 'max'; expected one of auto"):
        check_pool("max", "heads.pool")
    for kind in ("auto", "avg", "cls", "adaptive:3"):
        check_pool(kind, "heads.pool")


@needs_timm
def test_layouts_of_timm_models():
    with torch.device("meta"):
        vit = build_model("vit_tiny_patch16_224", 5, 224)
        registers = build_model("vit_small_patch16_dinov3", 5, 224)
        swin = build_model("swin_tiny_patch4_window7_224", 5, 224)
        resnet = build_model("resnet18", 5, 224)
    assert layout_of(vit) == Layout(1, True)
    assert layout_of(registers) == Layout(5, True)
    assert layout_of(swin) == Layout(channels_last_maps=True)
    assert layout_of(resnet) == Layout()


class NoTensor(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x}


class Scalar(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.t()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (NoTensor(), "tap '0' gives dict; expected a tensor"),
        (Scalar(), r"tap '0' gives a tensor of shape \[\]; expected at least"),
        (Transposed(), "tap '0' gives 6 rows for 2 images; expected the batch as first dimension"),
    ],
)
def test_a_tap_without_one_row_an_image_is_named(module, message):
    with pytest.raises(UserError, match=message):
        attach(nn.Sequential(module), ["0"], example=torch.zeros(2, 6))
