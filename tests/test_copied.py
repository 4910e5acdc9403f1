"""Heads that are copies of the rest of the network: where it can be cut, what the copies compute, who trains whom."""

import copy
from importlib.util import find_spec
import os
from pathlib import Path
import socket
import threading
from typing import cast

import pytest
import torch
from torch import Tensor, nn
import torch.multiprocessing as mp
import torch.nn.functional as F

import rlp
from rlp.distributed import connect, prompt_exit
from rlp.models import build_model
from rlp.models.copied import Branch, CopiedBank
from rlp.models.cut import depth_tap

CLASSES, BATCH = 3, 6


def images(count: int = BATCH, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def network(name: str = "small_cnn", size: int = 8, **args) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, CLASSES, size, args)


def bank_of(heads: rlp.RandomLabelHeads, place: int = 0) -> CopiedBank:
    bank = heads.banks[place]
    assert isinstance(bank, CopiedBank)
    return bank


def given_back(branch: nn.Module, model: nn.Module, path: str) -> None:
    """Give a copy the network's own last layer again."""
    layer = branch.tail.get_submodule(path)  # type: ignore[operator]
    layer.load_state_dict(model.get_submodule(path).state_dict())


# -- what a copy computes ----------------------------------------------------------------------------------------

needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
PLACES = [
    ("small_cnn", 8, ["block1", "block2.0", "pool:in", "depth:1"]),
    ("wrn_10_1", 8, ["stem", "group2", "norm", "depth:2"]),
    ("vgg16_cifar", 32, ["stage3", "depth:2"]),
    ("resnet18_cifar", 8, ["layer3", "depth:2"]),
    ("mlp", 8, ["depth:2"]),
    pytest.param("resnet18", 32, ["maxpool", "layer3", "depth:1"], marks=needs_timm),
    pytest.param("vit_tiny_patch16_224", 32, ["blocks.8", "depth:3"], marks=needs_timm),
]


@pytest.mark.parametrize(("name", "size", "taps"), PLACES)
@pytest.mark.parametrize("training", [True, False])
def test_a_copy_with_the_networks_last_layer_is_the_rest_of_the_network(name, size, taps, training):
    """In both modes, also where the network changes the tap's tensor in place."""
    model = network(name, size)
    heads = rlp.attach(model, taps, num_labels=CLASSES, draws=1, kind="copied", example=images(1, size))
    assert len(heads.tap_names) == len(taps)
    model.train(training)
    logits = model(images(4, size))
    for bank, name in zip(heads.banks.train(training), heads.tap_names, strict=True):
        assert isinstance(bank, CopiedBank)
        (branch,) = cast(list[Branch], bank.branches)
        given_back(branch, model, branch.classifier_path)
        found = branch(heads._store.features[name])
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)


def test_depth_one_is_a_linear_head_on_the_last_features():
    model = network()
    heads = rlp.attach(model, ["depth:1"], num_labels=5, draws=2, kind="copied")
    linear = rlp.attach(model, heads.tap_names, num_labels=5, draws=2)
    assert heads.dims == linear.dims == [64]
    model(images())
    x = linear._store.features[linear.tap_names[0]].detach()
    weight = torch.stack([branch.tail.fc.weight for branch in bank_of(heads).branches])  # type: ignore[union-attr]
    bias = torch.stack([branch.tail.fc.bias for branch in bank_of(heads).branches])  # type: ignore[union-attr]
    linear.banks[0].load_state_dict({"weight": weight, "bias": bias})
    torch.testing.assert_close(heads.loss(torch.arange(BATCH)), linear.loss(torch.arange(BATCH)))
    assert torch.equal(bank_of(heads)(x).argmax(-1), linear.banks[0](x).argmax(-1))


class OwnMode(nn.Module):
    """Asks for its mode outside of its modules, and changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        x = self.stem(x).relu_()
        if scale is not None:
            x = x * scale
        x = F.dropout(x.mean((2, 3)), 0.5, self.training)
        return self.fc(x)


def test_a_network_that_asks_for_its_mode():
    torch.manual_seed(0)
    model = OwnMode()
    heads = rlp.attach(model, ["stem"], num_labels=CLASSES, draws=1, kind="copied", example=images(1))
    (branch,) = bank_of(heads).branches
    given_back(branch, model, "fc")
    model.eval()
    logits = model(images())
    kept = heads._store.features["stem"]
    assert (kept < 0).any(), "as the convolution gave it, before relu_"
    torch.testing.assert_close(branch.eval()(kept), logits)
    branch.train()
    assert not torch.allclose(branch(kept), branch(kept)), "dropout"


def test_copies_are_of_now_share_nothing_and_start_with_fresh_last_layers():
    model = network()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    state = torch.get_rng_state()
    heads = rlp.attach(model, ["block1"], draws=3, kind="copied", num_labels=4)
    assert torch.equal(state, torch.get_rng_state())
    few = rlp.attach(model, ["block1", "block2"], draws=2, kind="copied", num_labels=4)
    for ours, fewer in zip(bank_of(heads).branches, bank_of(few).branches, strict=False):
        for a, b in zip(ours.parameters(), fewer.parameters(), strict=True):
            assert torch.equal(a, b)
    own = [dict(branch.tail.named_parameters()) for branch in bank_of(heads).branches]  # type: ignore[union-attr, operator]
    for name, parameter in own[0].items():
        same = [torch.equal(parameter, other[name]) for other in own[1:]]
        assert same == ([False] * 2 if name.startswith("fc") else [True] * 2)
        if not name.startswith("fc"):
            assert torch.equal(parameter, model.get_parameter(name))
        assert parameter.requires_grad
    addresses = [p.data_ptr() for p in (*model.parameters(), *heads.parameters())]
    assert len(set(addresses)) == len(addresses)
    assert not any(part._forward_hooks for part in heads.banks.modules()), "the taps' hooks stay with the network"
    assert "3 copies of the 3 weighted modules behind it, 23,492 parameters each" in heads.describe()[0]


def test_a_restart_changes_every_weight_in_place():
    heads = rlp.attach(network(), ["block1"], draws=2, kind="copied")
    addresses = [p.data_ptr() for p in heads.parameters()]
    before = [p.detach().clone() for p in heads.parameters()]
    state = torch.get_rng_state()
    bank_of(heads).initialise(1)
    first = [p.detach().clone() for p in heads.parameters()]
    bank_of(heads).initialise(2)
    bank_of(heads).initialise(1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, heads.parameters(), strict=True))
    matrices = [(a, b) for a, b in zip(before, first, strict=True) if a.dim() > 1]
    assert all(not torch.equal(a, b) for a, b in matrices)
    assert addresses == [p.data_ptr() for p in heads.parameters()]


class Attentive(nn.Module):
    """Attention, whose start has a name of its own, and a scale that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(192, 8), nn.Linear(8, CLASSES)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.full((8,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1)).unsqueeze(1)
        return self.fc((self.attention(x, x, x)[0] * self.scale).squeeze(1))


def test_a_restart_leaves_nothing_learnt():
    heads = rlp.attach(Attentive(), ["stem"], draws=1, kind="copied", example=images())
    branch = bank_of(heads).branches[0]
    learnt = {}
    with torch.no_grad():
        for name, parameter in branch.named_parameters():
            learnt[name] = parameter.add_(7).clone()
    heads.restart(1)
    fresh = dict(branch.named_parameters())
    assert not [name for name in learnt if torch.equal(learnt[name], fresh[name])]
    assert torch.equal(fresh["tail.scale"], torch.full((8,), 3.0)), "a scale starts as the network's did"
    assert not [name for name in heads.state_dict() if "kept" in name]


# -- who trains whom ---------------------------------------------------------------------------------------------


def gradients(lam: float | None, penalty: str = "forget") -> tuple[list, list, dict[str, Tensor]]:
    """Of network and heads, and the heads' state after one pass with dropout and batch norm."""
    model = network(dropout=0.5)
    heads = rlp.attach(model, ["block1", "depth:1"], draws=2, kind="copied", num_labels=4)
    loss = F.cross_entropy(model(images()), torch.arange(BATCH) % CLASSES)
    if lam is not None:
        loss = loss + heads.loss(torch.arange(BATCH), lam=lam, penalty=penalty)
    loss.backward()
    buffers = {name: buffer.clone() for name, buffer in heads.named_buffers()}
    buffers["generator"] = torch.get_rng_state()
    return [p.grad for p in model.parameters()], [p.grad for p in heads.parameters()], buffers


@pytest.mark.parametrize("penalty", ["forget", "uniform"])
def test_each_loss_reaches_its_own_parameters_alone(penalty):
    """Contracts 1 and 2, and the random state; a penalty's second pass leaves the copies' statistics alone."""
    network_no, _, no = gradients(None)
    network_0, heads_0, buffers_0 = gradients(0.0, penalty)
    network_1, heads_1, buffers_1 = gradients(1.0, penalty)
    network_4, _, _ = gradients(4.0, penalty)
    assert torch.equal(no["generator"], buffers_0["generator"])
    for a, b in zip(network_no, network_0, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(heads_0, heads_1, strict=True):
        assert a is not None
        assert torch.equal(a, b)
    assert buffers_0.keys() == buffers_1.keys()
    assert all(torch.equal(buffers_0[name], buffers_1[name]) for name in buffers_0 if "online" not in name)
    felt = [(a, b, c) for a, b, c in zip(network_0, network_1, network_4, strict=True) if not torch.equal(a, b)]
    assert len(felt) == len(network_0) - 2, "all but the classifier"
    for a, b, c in felt:
        torch.testing.assert_close(4 * (b - a), c - a, rtol=1e-3, atol=1e-5)


def test_the_penalty_is_that_of_ordinary_autograd_through_the_copies():
    """With dropout off and batch norms in train mode: the gradient goes through the batch's statistics too."""
    model = network()
    heads = rlp.attach(model, ["block1"], draws=2, kind="copied", num_labels=4)
    bank = bank_of(heads)
    model(images())
    x = heads._store.features["block1"]
    target = heads._targets(torch.arange(BATCH), None, [x])
    first = model.get_parameter("block1.0.weight")
    _, stats = bank.loss(x, target, True)
    (found,) = torch.autograd.grad(F.softplus(stats.z_t - stats.lse_rest).sum(), first, retain_graph=True)
    p = bank(x).softmax(-1).gather(-1, target[..., None])
    (expected,) = torch.autograd.grad(-torch.log1p(-p).sum(), first)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in heads.parameters())


def test_copies_learn_and_evaluation_leaves_their_statistics():
    model = network(dropout=0.2)
    heads = rlp.attach(model, ["block1"], draws=2, kind="copied", num_labels=4)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.01)
    for _ in range(80):
        model(images())
        heads.loss(torch.arange(BATCH)).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    model.train()  # the network's mode is its own, the copies' is eval meanwhile
    for part in (torch.arange(BATCH), torch.arange(2)):
        with torch.no_grad():
            model(images()[part])
        heads.evaluate(part)
    assert all(torch.equal(value, before[name]) for name, value in heads.state_dict().items())
    assert all(row.loss < 0.5 for row in heads.metrics("eval"))
    assert all(part.training for part in heads.banks.modules())
    other = rlp.attach(network(), ["block1"], draws=2, kind="copied", num_labels=4)
    other.load_state_dict(heads.state_dict())
    model.eval()
    for each in (heads, other):
        each._store.features["block1"] = torch.ones(2, 16, 4, 4)
        each.evaluate(torch.arange(2))
    assert [row.loss for row in heads.metrics("eval")] == [row.loss for row in other.metrics("eval")]


def test_an_empty_batch_leaves_no_trace():
    heads = rlp.attach(model := network(), ["block1"], draws=2, kind="copied")
    before = {name: value.clone() for name, value in heads.state_dict().items() if name != "steps"}
    model(images(0))
    heads.loss(torch.arange(0), lam=0.5).backward()
    assert heads.metrics() == []
    assert all(torch.equal(value, before[name]) for name, value in heads.state_dict().items() if name != "steps")
    assert all(p.grad is None or torch.equal(p.grad, torch.zeros_like(p)) for p in heads.parameters())


# -- where a network can be cut ----------------------------------------------------------------------------------


class Branching(nn.Module):
    """A root that asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x.flatten(1)[:, :4])
        return self.fc(x if x.sum() > 0 else -x)


class Inner(nn.Module):
    """The same within a module."""

    def __init__(self, tuples: bool = False) -> None:
        super().__init__()
        self.fc, self.tuples = nn.Linear(4, 4), tuples

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, int]:
        x = self.fc(x)
        x = x if x.sum() > 0 else -x
        return (x, 1) if self.tuples else x


class TwoWays(nn.Module):
    """The first tensor of a module that gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = Inner(tuples=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(x.flatten(1)[:, :4])[0])


class Locked(nn.Sequential):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, CLASSES))
        self.lock = threading.Lock()


def test_a_network_that_cannot_be_copied_is_said():
    with pytest.raises(rlp.UserError, match=r"Locked cannot be copied \(.*lock.*\); expected a network that"):
        rlp.attach(Locked(), ["0"], kind="copied", draws=1, example=images(1))


@pytest.mark.parametrize(
    ("model", "tap", "message"),
    [
        (
            lambda: network("wrn_10_1"),
            "group2.0.conv1",
            "cut at tap 'group2.0.conv1': 'add_1' behind it also reads 'group2_0_shortcut'; it can be at "
            "group2.0.norm1, group2.0.shortcut:in, group2, group3.0.norm1",
        ),
        (lambda: network("wrn_10_1"), "stem:in", "it is the image itself; it can be at stem"),
        (lambda: network(), "depth:5", "'depth:5' is no place.*expected a depth of 1 to 3"),
        (lambda: network(), "depth:0", "'depth:0' is no place"),
        (lambda: network(), "fc", "no linear layer lies behind the tap"),
        (Branching, "a", "forward pass of Branching cannot be cut, for torch.fx cannot trace it"),
        (TwoWays, "inner", "tap 'inner' gives tuple; heads of kind copied expect one tensor"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)), "0", "is '1', Conv2d; heads of kind copied"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4), nn.Unflatten(1, (2, 2))),
            "0",
            "last linear layer with 10 outputs, does not run .*expected that layer to be the model's output",
        ),
    ],
)
def test_where_it_cannot_be_cut_is_said(model, tap, message):
    built = model()
    with pytest.raises(rlp.UserError, match=message):
        rlp.attach(built, [tap], kind="copied", draws=1, example=images(1))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in built.modules())


def test_modules_that_cannot_be_traced_are_copied_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), Inner(), nn.Linear(4, CLASSES))
    heads = rlp.attach(model, ["1"], num_labels=CLASSES, draws=1, kind="copied", example=images(1))
    assert bank_of(heads).weighted == 2
    (branch,) = bank_of(heads).branches
    given_back(branch, model, "3")
    logits = model(images())
    torch.testing.assert_close(branch(heads._store.features["1"]), logits)


@pytest.mark.parametrize(
    ("name", "size", "places"),
    [
        ("small_cnn", 8, {1: "dropout", 2: "block2", 3: "block1"}),
        (
            "wrn_16_1",
            8,
            {
                1: "pool",
                2: "group3.0",
                3: "group3.0",
                4: "group3.0.shortcut:in",
                6: "group3.0.shortcut:in",
                7: "group2.0",
            },
        ),
        ("vgg16_cifar", 32, {1: "dropout", 2: "stage5.1", 5: "stage4.1"}),
    ],
)
def test_depths(name, size, places):
    model = network(name, size)
    assert {depth: depth_tap(model, depth).name for depth in places} == places
    assert rlp.attach(model, ["depth:1", "depth:2"], example=images(1, size)).tap_names[-1] == places[1]


# -- ranks -------------------------------------------------------------------------------------------------------

RANKS, STEPS = 2, 3


def train(rank: int, size: int, norm: bool) -> dict[str, Tensor]:
    """Three steps on this rank's share of each batch; the heads' state at the end."""
    torch.manual_seed(rank if norm else 0)  # with norm: other weights on each rank before they are shared
    model = build_model("small_cnn", CLASSES, 8, {"norm": norm})
    heads = rlp.attach(model, ["block1"], draws=2, kind="copied", num_labels=4)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        mine = slice(rank, None, size)
        model(images(seed=step)[mine])
        heads.loss(torch.arange(BATCH)[mine]).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    heads.synchronise()
    return {f"before.{name}": value for name, value in before.items()} | heads.state_dict()


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with prompt_exit(), connect("cpu"):
        for norm in (False, True):
            torch.save(train(rank, RANKS, norm), Path(folder) / f"{rank}-{norm}.pt")


@pytest.mark.slow
def test_ranks_train_the_same_copies(tmp_path: Path):
    """Without batch norm what one process trains; with it, equal weights, and equal statistics once synchronised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=RANKS)  # type: ignore[attr-defined]
    alone = train(0, 1, False)
    plain, other = (torch.load(tmp_path / f"{rank}-False.pt", weights_only=True) for rank in range(RANKS))
    for name, value in alone.items():
        torch.testing.assert_close(plain[name], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(plain[name], other[name])
    first, second = (torch.load(tmp_path / f"{rank}-True.pt", weights_only=True) for rank in range(RANKS))
    for name, value in first.items():
        differ = name.startswith("before.") and "running" in name
        assert torch.equal(value, second[name]) is not differ, name


def test_copies_are_left_out_of_a_copy_of_the_network():
    """An averaged network, say, does not write into the heads' store."""
    model = network()
    heads = rlp.attach(model, ["block1"], draws=1, kind="copied")
    average = copy.deepcopy(model)
    model(images())
    kept = heads._store.features["block1"]
    average(images(seed=1))
    assert heads._store.features["block1"] is kept
