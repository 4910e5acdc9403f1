"""Backbones by name: published sizes, arguments, and mistakes named."""

from importlib.util import find_spec
from pathlib import Path
import subprocess
import sys

import pytest
import torch
from torch import nn

from rlp.errors import UserError
from rlp.models import backbone, build_model, default_taps
from rlp.models.backbone import import_timm
from rlp.models.taps import resolve_taps

# not importorskip: timm is imported by build_model, which knows how to
needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
OWN = ["wrn_10_2", "vgg16_cifar", "resnet18_cifar", "small_cnn", "mlp"]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [
        ("wrn_16_4", 10, 2.75),  # Zagoruyko and Komodakis, table 1 and 4
        ("wrn_28_10", 100, 36.54),
        ("wrn_40_4", 10, 8.95),
        ("vgg16_cifar", 10, 14.72),
        ("resnet18_cifar", 10, 11.17),
    ],
)
def test_published_sizes(name, classes, millions):
    with torch.device("meta"):
        model = build_model(name, classes, 32)
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("name", OWN)
def test_shapes_gradients_and_taps(name):
    torch.manual_seed(0)
    model = build_model(name, 7, 32, {"dropout": 0.1})
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    taps = default_taps(model)
    assert [tap.name for tap in resolve_taps(model, taps)] == taps


@pytest.mark.parametrize("name", OWN)
def test_an_image_gets_the_same_logits_alone_in_evaluation(name):
    torch.manual_seed(0)
    model = build_model(name, 3, 32, {"dropout": 0.5}).eval()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)
    last = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(last(images), last(images.contiguous(memory_format=torch.channels_last)))


def test_the_dropout_of_a_wide_net_acts_in_training_alone():
    torch.manual_seed(0)
    model, images = build_model("wrn_10_1", 3, 32, {"dropout": 0.5}), torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@needs_timm
def test_timm_models_are_built_for_the_image_size():
    vit = build_model("vit_tiny_patch16_224", 5, 32, {"depth": 1, "drop_path_rate": 0.1})
    assert vit(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    assert default_taps(vit) == ["blocks.0"]
    resnet = build_model("resnet10t", 5, 64, {"drop_rate": 0.2})
    assert resnet(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    assert default_taps(resnet)[-2:] == ["layer3", "layer4"]


@pytest.mark.parametrize(
    ("name", "size", "args", "message"),
    [
        ("wrn_17_4", 32, {}, r"'wrn_17_4'; expected wrn_d_k with d = 10, 16, 22"),
        ("wrn_16_0", 32, {}, "k at least 1"),
        ("small_cnn", 32, {"dropuot": 0.1}, "model.args has 'dropuot', which small_cnn does not take; .* dropout"),
        ("small_cnn", 32, {"dropout": 1.5}, "model.args {'dropout': 1.5} do not fit small_cnn: dropout probability"),
        ("small_cnn", 32, {"width": "wide"}, "model.args {'width': 'wide'} do not fit small_cnn"),
        ("vgg16_cifar", 16, {}, "vgg16_cifar needs images of at least 32 pixels a side; these have 16"),
    ],
)
def test_mistakes_with_our_models_are_named(name, size, args, message):
    with pytest.raises(UserError, match=message):
        build_model(name, 10, size, args)


@needs_timm
@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("smal_cnn", {}, "'smal_cnn' is neither one of ours nor a timm model; near names: small_cnn"),
        ("resnet5O", {}, "near names: resnet50"),
        ("zzzzqqq", {}, "see timm.list_models"),
        ("resnet10t", {"no_such": 1}, "model.args {'no_such': 1} do not fit resnet10t .*no_such"),
        ("vit_tiny_patch16_224", {"no_such": 1}, "do not fit vit_tiny_patch16_224 .*no_such"),
    ],
)
def test_mistakes_with_timm_are_named(name, args, message):
    with pytest.raises(UserError, match=message):
        build_model(name, 10, 32, args)


@needs_timm
def test_weights_that_cannot_be_fetched_are_named(monkeypatch):
    def offline(*_args, **_kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(import_timm(), "create_model", offline)
    with pytest.raises(UserError, match=r"model.args.pretrained: the weights of resnet10t cannot be had: no route"):
        build_model("resnet10t", 10, 32, {"pretrained": True})


def test_a_model_without_taps_of_its_own_is_named():
    with pytest.raises(UserError, match="Sequential names no taps of its own"):
        default_taps(nn.Sequential(nn.Linear(2, 2)))


def test_rlp_imports_neither_timm_nor_ffcv_nor_triton():
    code = (
        "import sys, rlp, rlp.models; rlp.attach; "
        "assert not {'timm', 'torchvision', 'ffcv', 'fastargs', 'matplotlib'} & set(sys.modules)"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("torch_cuda", "version", "needed"),
    [
        (None, "0.28.0+cu130", True),
        (None, "0.28.0+cpu", False),
        (None, "0.28.0", False),
        ("13.0", "0.28.0+cu130", False),
    ],
)
def test_operators_are_declared_for_a_cuda_torchvision_beside_a_cpu_torch_alone(
    tmp_path, monkeypatch, torch_cuda, version, needed
):
    """Another build brings its operators; declared twice, its library would not load."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    assert backbone._torchvision_is_for_cuda_alone() is needed


def test_a_torchvision_that_is_imported_needs_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", sys)
    assert backbone._torchvision_is_for_cuda_alone() is False
