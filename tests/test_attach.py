"""``rlp.attach`` in somebody else's training loop: the six lines, ranks, autocast, torch.compile, mistakes named."""

import os
from pathlib import Path
import socket
from typing import Any

import pytest
import torch
from torch import Tensor, nn
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import rlp
from rlp.distributed import connect, prompt_exit
from rlp.models import build_model

RANKS, BATCH, STEPS = 2, 8, 3


def data(steps: int = STEPS) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(BATCH, 3, 8, 8, generator=generator), torch.arange(BATCH) % 4, torch.arange(BATCH) + BATCH * step)
        for step in range(steps)
    ]


def network() -> nn.Module:
    """Without batch norm, whose statistics are those of a rank's own batch."""
    torch.manual_seed(0)
    return build_model("small_cnn", 4, 8, {"norm": False})


def test_the_six_lines():
    """As the docstring has them; the model knows its input size."""
    model = network()
    loader = data()

    heads = rlp.attach(model, taps=["block2", "block3"], num_labels=10, draws=8, seed=0)
    optimizer = torch.optim.SGD([*model.parameters(), *heads.parameters()], lr=0.1)
    for image, label, index in loader:
        loss = F.cross_entropy(model(image), label) + heads.loss(index, lam=0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    text = heads.summary()

    assert "N = 24 samples" in text
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["block2", "block3"]


def test_a_model_that_tells_no_input_size():
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))
    assert rlp.attach(model, ["0"]).dims == [5]
    picky = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(rlp.UserError, match=r"cannot guess the model's input .*; give example=, a batch of images"):
        rlp.attach(picky, ["1"])
    assert rlp.attach(picky, ["1"], example=torch.zeros(1, 3, 2, 2)).dims == [2]


def test_taps_by_default_and_the_model_in_wrappers():
    model = network()
    assert rlp.attach(model).tap_names == ["block1", "block2", "block3"]
    compiled: Any = torch.compile(model, backend="eager")
    assert rlp.attach(compiled, ["block1"]).tap_names == ["block1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"taps": []}, r"taps is \[\]; expected a list of at least one module path or glob"),
        ({"taps": "block1"}, "taps is 'block1'; expected a list"),
        ({"taps": ["blok1"]}, "tap 'blok1' names no module of the model; near names: block1"),
        ({"num_labels": 1}, "num_labels is 1; expected at least 2"),
        ({"draws": 0}, "draws is 0; expected at least 1"),
        ({"layers": 3}, "layers is 3; expected 1 or 2"),
        ({"layers": 2, "hidden": 0}, "hidden is 0; expected at least 1"),
        ({"seed": -1}, "seed is -1; expected 0 to"),
        ({"pool": "max"}, "attach has the pooling 'max'; expected one of auto"),
        ({"pool": "cls"}, "pooling 'cls' does not fit tap 'block1'"),
    ],
)
def test_wrong_arguments_are_named_and_leave_no_hook(arguments, message):
    model = network()
    with pytest.raises(rlp.UserError, match=message):
        rlp.attach(model, **({"taps": ["block1"]} | arguments))
    assert not any(module._forward_hooks for module in model.modules())


def gradients(model: nn.Module, forward: nn.Module, lam: float, bf16: bool = False, **heads_args) -> list[Tensor]:
    """Of network and heads, after one backward pass of the whole loss."""
    heads = rlp.attach(forward, ["block1", "block3"], draws=2, **heads_args)
    image, label, index = data()[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = F.cross_entropy(forward(image).float(), label) + heads.loss(index, lam=lam)
    loss.backward()
    assert heads.last_fit.dtype == torch.float32
    found = [p.grad for p in (*model.parameters(), *heads.parameters()) if p.grad is not None]
    assert len(found) == len([*model.parameters(), *heads.parameters()])
    return found


@pytest.mark.parametrize("lam", [0.0, 3.0])
@pytest.mark.parametrize("layers", [1, 2])
def test_autocast(lam, layers):
    """bf16 products, everything else float32; gradients near those of full precision."""
    model, other = network(), network()
    low = gradients(model, model, lam, bf16=True, layers=layers, hidden=16)
    full = gradients(other, other, lam, layers=layers, hidden=16)
    for a, b in zip(low, full, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.1 * b.norm() + 1e-3


def test_networks_and_heads_in_other_precisions():
    for dtype in (torch.float64, torch.bfloat16):
        model = network().to(dtype)
        heads = rlp.attach(model, ["block1"], draws=2)
        model(torch.zeros(2, 3, 8, 8, dtype=dtype))
        heads.loss(torch.arange(2), lam=1.0).backward()
        gradient = next(model.parameters()).grad
        assert gradient is not None
        assert gradient.dtype == dtype


@pytest.mark.parametrize("lam", [0.0, 3.0])
@pytest.mark.parametrize("compile_first", [False, True])
def test_torch_compile(lam, compile_first):
    """The captured features come out of the compiled graph with their gradients; one graph, no break at the hooks."""
    torch._dynamo.reset()
    model, plain = network(), network()
    plain_gradients = gradients(plain, plain, lam)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    heads = rlp.attach(compiled if compile_first else model, ["block1", "block3"], draws=2)
    image, label, index = data()[0]
    loss = F.cross_entropy(compiled(image), label) + heads.loss(index, lam=lam)
    loss.backward()
    found = [p.grad for p in (*model.parameters(), *heads.parameters())]
    for a, b in zip(found, plain_gradients, strict=True):
        assert torch.equal(a, b) if lam == 0 else torch.allclose(a, b, rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]
    with torch.no_grad():
        compiled.eval()
        compiled(image)
        heads.evaluate(index)
    assert {row.count for row in heads.metrics("eval")} == {BATCH}


@pytest.mark.parametrize("lam", [0.0, 3.0])
def test_a_compiled_step_of_network_and_heads_is_one_graph(lam):
    torch._dynamo.reset()
    plain, model = network(), network()
    expected = gradients(plain, plain, lam)
    heads = rlp.attach(model, ["block1", "block3"], draws=2)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss_of(image: Tensor, label: Tensor, index: Tensor) -> Tensor:
        return F.cross_entropy(model(image), label) + heads.loss(index, lam=lam)

    loss_of(*data()[0]).backward()
    for parameter, value in zip((*model.parameters(), *heads.parameters()), expected, strict=True):
        torch.testing.assert_close(parameter.grad, value)
    loss_of(*data()[1])
    assert {row.count for row in heads.metrics()} == {2 * BATCH}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mixed_precision_run_on_each_device(device, dtype):
    """channels_last, autocast, loss scaling, sample ids still on the host, heads moved after attach: they learn."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    model: Any = build_model("small_cnn", 4, 8, {"dropout": 0.1})
    heads = rlp.attach(model, ["block*", "fc:in"], draws=4, num_labels=3).to(device)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=0.03)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    image, label, index = data()[0]
    image, label = image.to(device, memory_format=torch.channels_last), label.to(device)
    for step in range(60):
        with torch.autocast(device, dtype):
            loss = F.cross_entropy(model(image).float(), label) + heads.loss(index, lam=1e-3)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 49:
            heads.metrics()  # count from here
    rows = heads.metrics()
    assert {row.count for row in rows} == {10 * BATCH}
    # of log 3 = 1.1 at chance; deeper, the two images of a class become alike
    assert all(row.loss < 0.8 for row in rows if row.tap == "block1")
    assert heads.last_fit.isfinite().all()


def test_activation_checkpointing():
    """The blocks run a second time in backward: their hooks fire again, and the gradients are the same."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner: Any = network()

        def forward(self, image: Tensor) -> Tensor:
            for block in (self.inner.block1, self.inner.block2, self.inner.block3):
                image = checkpoint(block, image, use_reentrant=False)  # type: ignore[assignment]
            return self.inner.fc(image.mean((2, 3)))

    plain, model = network(), Checkpointed()
    expected = gradients(plain, plain, 3.0)
    heads = rlp.attach(model, ["inner.block1", "inner.block3"], draws=2, example=torch.zeros(1, 3, 8, 8))
    heads.load_state_dict(rlp.attach(plain, ["block1", "block3"], draws=2).state_dict())
    image, label, index = data()[0]
    (F.cross_entropy(model(image), label) + heads.loss(index, lam=3.0)).backward()
    for parameter, value in zip((*model.parameters(), *heads.parameters()), expected, strict=True):
        torch.testing.assert_close(parameter.grad, value)


def test_evaluation_in_inference_mode():
    model = network()
    heads = rlp.attach(model, ["block1"])
    with torch.inference_mode():
        model(torch.zeros(2, 3, 8, 8))
        heads.evaluate(torch.arange(2))
    assert heads.metrics("eval")[0].count == 2


# -- ranks -------------------------------------------------------------------------------------------------------


def train(rank: int, size: int, wrap_first: bool) -> dict[str, Any]:
    """Three steps on this rank's share of each batch; state at the end, readings over all ranks."""
    model = network()
    forward: nn.Module = DistributedDataParallel(model) if size > 1 and wrap_first else model
    heads = rlp.attach(forward, ["block1", "block3"], num_labels=4, draws=2, layers=2, hidden=6)
    if size > 1 and not wrap_first:
        forward = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([*model.parameters(), *heads.parameters()], lr=0.1, momentum=0.9)
    for image, label, index in data():
        mine = slice(rank, None, size)
        logits = forward(image[mine])
        loss = F.cross_entropy(logits, label[mine]) + heads.loss(index[mine], lam=2.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            forward(image[mine])
            heads.evaluate(index[mine])
    running = heads.running_state()["online"]
    rows = [[row.loss, row.accuracy, row.count] for mode in ("online", "eval") for row in heads.metrics(mode)]
    return {"model": model.state_dict(), "heads": heads.state_dict(), "rows": rows, "running": running}


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with prompt_exit(), connect("cpu"):
        for wrap_first in (True, False):
            torch.save(train(rank, RANKS, wrap_first), Path(folder) / f"{rank}-{wrap_first}.pt")


def test_two_ranks_train_what_one_process_trains(tmp_path: Path):
    """DistributedDataParallel around the network alone, before or after attach; readings count every rank's samples."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=RANKS)  # type: ignore[attr-defined]
    alone = train(0, 1, False)
    for rank in range(RANKS):
        for wrap_first in (True, False):
            together = torch.load(tmp_path / f"{rank}-{wrap_first}.pt", weights_only=True)
            for part in ("model", "heads"):
                for key, value in alone[part].items():
                    torch.testing.assert_close(together[part][key], value, rtol=1e-4, atol=1e-6)
            for ours, expected in zip(together["rows"], alone["rows"], strict=True):
                assert ours == pytest.approx(expected, rel=1e-4)
                assert ours[2] == STEPS * BATCH
            torch.testing.assert_close(together["running"], alone["running"], rtol=1e-4, atol=1e-6)
