"""Deep Bilevel Learning: weights held to loops, batches of splits with equal class lists, heads left out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_trainer import Stopped, drop_seconds, make_trainer, stop_at
from tiny_run import assert_same_tensors, final_state, tiny_config, write_tiny_sets
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from rlp.build import build_data
from rlp.data.batch import Batch, Schedule, balanced_batches, epoch_order
from rlp.distributed import World
from rlp.errors import UserError
from rlp.measure.baselines.checks_training import check_bilevel
from rlp.measure.estimate import Estimate
from rlp.progress import Progress
from rlp.regularisers.bilevel import Bilevel, flat, weighted_direction
from rlp.regularisers.class_loss import Plain
from rlp.regularisers.mixing import Mixing

SPLITS, EACH, CLASSES = 4, 3, 5
BILEVEL: dict[str, Any] = {"train__bilevel": 5}  # of 20 images, 4 a split


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_sets(tmp_path)
    return tmp_path


def gradients(
    forward: Callable[[Tensor], Tensor], parameters: Sequence[nn.Parameter], batch: Batch, smoothing: float
) -> list[list[Tensor]]:
    """Of every split, parameter by parameter, each from a backward pass of its own."""
    found = []
    for start in range(0, SPLITS * EACH, EACH):
        rows = slice(start, start + EACH)
        loss = F.cross_entropy(forward(batch.image[rows]), batch.label[rows], label_smoothing=smoothing)
        found.append([gradient.double() for gradient in torch.autograd.grad(loss, list(parameters))])
    return found


@pytest.mark.parametrize(("mu", "smoothing"), [(0.01, 0.0), (1.0, 0.1)])
def test_the_gradient_is_the_weighted_one(mu: float, smoothing: float) -> None:
    """ω_i = <g_0, g_i> / (|g_i|² + μ), divided by Σ|ω_i|; spelt out in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, CLASSES))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    label = torch.arange(SPLITS * EACH) % CLASSES
    batch = Batch(torch.randn(SPLITS * EACH, 3, 4, 4), label, label, label[:, None])
    validation, *rest = gradients(model, list(model.parameters()), batch, smoothing)
    omegas = []
    for gradient in rest:
        dot = sum((a * b).sum() for a, b in zip(validation, gradient, strict=True))
        omegas.append(float(dot / (sum((a * a).sum() for a in gradient) + mu)))
    size = sum(abs(omega) for omega in omegas)
    assert min(omegas) < 0 < max(omegas)  # a split is taken back too

    losses = Bilevel(list(model.parameters()), SPLITS, mu, Plain(smoothing))
    found = losses.step(model, batch.image, batch, Progress())
    (2 * found.loss).backward()  # as a scaler or an accumulated step would
    for place, parameter in enumerate(model.parameters()):
        expected = 2 * sum(omega / size * gradient[place] for omega, gradient in zip(omegas, rest, strict=True))
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-4, atol=1e-6)
    logits = model(batch.image)
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, label, label_smoothing=smoothing))
    assert found.correct == (logits.argmax(1) == label).sum()


def test_with_mixup_all_splits_but_the_first_are_mixed_each_within_itself() -> None:
    """From mixtures and label vectors that are made by hand, with a draw for every split of every batch."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    label = torch.arange(SPLITS * EACH) % CLASSES
    batch = Batch(torch.randn(SPLITS * EACH, 3, 4, 4), label, label, label[:, None])
    mixing = Mixing(0.8, seed=4)
    draws = [mixing.draw(2, 7 * SPLITS + number, EACH) for number in range(SPLITS)]
    assert len({draw.lam for draw in draws}) == SPLITS
    gradients, values = [], []
    for number, (lam, partner, _) in enumerate(draws):
        rows = slice(number * EACH, (number + 1) * EACH)
        x, y = batch.image[rows], F.one_hot(label[rows], CLASSES).float()
        if number:
            x, y = lam * x + (1 - lam) * x[partner], lam * y + (1 - lam) * y[partner]
        values.append(-(y * model(x).log_softmax(1)).sum(1).mean())
        gradients.append(flat(torch.autograd.grad(values[-1], list(model.parameters()))))
    found = Bilevel(list(model.parameters()), SPLITS, training=mixing).step(
        model, batch.image, batch, Progress(epoch=2, batch=7)
    )
    torch.testing.assert_close(found.loss, torch.stack(values).mean())
    found.loss.backward()
    direction = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(direction, weighted_direction(torch.stack(gradients), 0.01), rtol=1e-4, atol=1e-6)


def test_frozen_parameters_and_those_that_take_no_part_are_let_alone() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, CLASSES), "idle": nn.Linear(2, 2)})
    model["used"].bias.requires_grad_(False)  # type: ignore[union-attr]
    label = torch.arange(8) % 2
    batch = Batch(torch.randn(8, 4), label, label, label[:, None])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    Bilevel(trained, 2).step(model["used"], batch.image, batch, Progress()).loss.backward()
    assert model["used"].weight.grad.abs().sum() > 0  # type: ignore[union-attr]
    assert model["used"].bias.grad is None
    assert not model["idle"].weight.grad.any()  # type: ignore[union-attr]


def test_batches_have_splits_with_equal_class_lists() -> None:
    random = np.random.default_rng(0)
    ids = np.sort(random.choice(5000, 1003, replace=False))
    label = random.choice(CLASSES, 1003, p=[0.4, 0.3, 0.2, 0.08, 0.02])
    of = dict(zip(ids.tolist(), label.tolist(), strict=True))
    schedule = Schedule(ids, True, 64, 3, 0, 1, splits=8, label=label)
    first, second = schedule.batches(0), schedule.batches(1)
    assert len(first) == len(second) == schedule.steps
    lists = set()
    for batch in first:
        classes = [sorted(of[row] for row in split) for split in batch.reshape(8, 8).tolist()]
        assert all(one == classes[0] for one in classes)
        lists.add(tuple(classes[0]))
    assert len(lists) > len(first) / 2  # the lists are drawn, not the same over again
    seen = np.concatenate(first)
    assert len(set(seen.tolist())) == len(seen) >= 1003 - CLASSES * 7 - 63
    assert not np.array_equal(seen, np.concatenate(second))
    again = Schedule(ids, True, 64, 3, 0, 1, splits=8, label=label).batches(1, 2)
    assert all(np.array_equal(a, b) for a, b in zip(again, second[2:], strict=True))
    other = balanced_batches(epoch_order(4, 0, ids), label, 64, 8, 4, 0)
    assert not np.array_equal(other.ravel(), seen)


def test_the_loader_gives_such_batches_by_given_labels(folder: Path) -> None:
    data = build_data(tiny_config(folder, **BILEVEL, data__label_noise=0.3), World())
    batches = list(data.train.epoch(0))
    assert len(batches) == data.train.steps
    for batch in batches:
        splits = batch.label.view(5, 4).sort(1).values
        assert (splits == splits[0]).all()
    data.close()


def test_lambda_zero_changes_nothing(folder: Path) -> None:
    """Contract 1: heads have no part in the weights, and their pass leaves nothing behind."""
    changes = {**BILEVEL, "train__clip_norm": 0.5}
    with_heads = make_trainer(folder, "with", **changes)
    with_heads.fit()
    without = make_trainer(folder, "without", **changes, heads__taps=[])
    without.fit()
    assert_same_tensors(with_heads.model.state_dict(), without.model.state_dict())
    assert with_heads.heads is not None
    assert int(with_heads.heads.steps) == with_heads.progress.step


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_resume_is_exact_within_an_epoch(folder: Path, alpha: float) -> None:
    changes = {**BILEVEL, "train__mixup": alpha, "run__checkpoint_every": 1, "heads__lam": 0.5}
    whole = make_trainer(folder, "whole", **changes)
    expected = whole.fit()
    broken = make_trainer(folder, "broken", **changes)
    stop_at(broken, whole.data.train.steps + 2)
    with pytest.raises(Stopped):
        broken.fit()
    saved = final_state(folder / "broken")
    resumed = make_trainer(folder, "resumed", **changes)
    resumed.load_state(saved)
    assert drop_seconds(resumed.fit()) == drop_seconds(expected)
    for key in ("model", "heads", "optimizers", "random_states"):
        assert_same_tensors(whole.state()[key], resumed.state()[key], key)


def test_autocast_rounds_the_passes_and_not_the_weights() -> None:
    """In float64 from the very gradients that passes in bfloat16 give."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    label = torch.arange(SPLITS * EACH) % CLASSES
    batch = Batch(torch.randn(SPLITS * EACH, 3, 4, 4), label, label, label[:, None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Bilevel(list(model.parameters()), SPLITS).step(model, batch.image, batch, Progress())
    found.loss.backward()
    direction = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    def half(image: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(image).float()

    parts = gradients(half, list(model.parameters()), batch, 0.0)
    table = torch.stack([torch.cat([each.flatten() for each in part]) for part in parts])
    omega = table[1:] @ table[0] / (table[1:].square().sum(1) + 0.01)
    torch.testing.assert_close(direction.double(), omega / omega.abs().sum() @ table[1:], rtol=1e-4, atol=1e-7)


def test_accumulated_batches_give_the_mean_of_their_directions(folder: Path) -> None:
    """Two batches for one step, in bfloat16: each weighs its own splits; the optimiser sees the mean."""
    changes = {**BILEVEL, "train__accumulate": 2, "train__amp": "bf16", "heads__taps": [], "model__args": {}}
    trainer = make_trainer(folder, "run", **changes)
    batches = list(trainer.data.train.epoch(0))[:2]
    images = [trainer.data.augment(batch.image, batch.index, 0, train=True) for batch in batches]
    parameters = list(trainer.model.parameters())
    steps = []
    for image, batch in zip(images, batches, strict=True):
        with trainer._autocast():
            loss = Bilevel(parameters, 5).step(trainer.model, image, batch, Progress()).loss
        steps.append(torch.autograd.grad(loss, parameters))
    seen: list[Tensor] = []
    trainer.optimizers[0].register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in parameters if p.grad is not None)
    )
    for update, batch in enumerate(batches):
        trainer._train_batch(batch, bool(update))
        trainer.progress.batch += 1
    for one, two, mean in zip(*steps, seen, strict=True):
        torch.testing.assert_close((one + two) / 2, mean)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__bilevel": 1}, "train.bilevel is 1; expected an integer, 0 or at least 2"),
        ({"train__bilevel": 3}, "data.batch_size is 20, which 3 splits"),
        ({**BILEVEL, "train__amp": "fp16"}, "expected train.amp none or bf16"),
    ],
)
def test_settings_that_make_no_sense_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(folder, **changes)


def test_ranks_and_too_few_samples_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="on 2 ranks; expected one process"):
        build_data(tiny_config(folder, **BILEVEL), World(rank=0, size=2))
    with pytest.raises(UserError, match="give no batch of 100 in which 50 splits have equal class lists"):
        build_data(tiny_config(folder, train__bilevel=50, data__batch_size=100), World())


def test_the_cards_check_passes() -> None:
    for result in check_bilevel(seeds=(0,), small=True):
        found = result.found.mean if isinstance(result.found, Estimate) else result.found
        assert result.expected[0] <= found <= result.expected[1], result
