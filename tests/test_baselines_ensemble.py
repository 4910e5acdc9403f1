"""Copies trained many at once are what plain loops train one by one; what is read from them is kept."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
import math
from pathlib import Path
from typing import Any

import numpy as np
from probed_run import tiny_finished_run
import pytest
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from rlp.data.batch import epoch_order
from rlp.data.loader import open_loader
from rlp.distributed import World
from rlp.errors import UserError
from rlp.measure.baselines import ensemble, retrain
from rlp.measure.baselines.ensemble import Moment, Stack, train_together
from rlp.measure.baselines.pool import Pool
from rlp.measure.features import extract
from rlp.measure.run import Run, open_run
from rlp.seeding import named_seed
import train_rlp

SEED, EPOCHS = 7, 3
RECIPES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {
        "optimizer": "adamw", "lr": 0.01, "schedule": "linear", "label_smoothing": 0.1, "clip_norm": 0.3,
        "warmup_epochs": 0.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Small CNN with batch norm; 72 members, mirrored and shifted, some of them replaced by noise."""
    folder = tmp_path_factory.mktemp("tiny")
    changes = {"model__args": {"dropout": 0.0}, "data__canary_noise": 0.1, "train__epochs": EPOCHS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rlp, "write_figures", lambda *_: [])
        return open_run(tiny_finished_run(folder, **changes), device="cpu")


@pytest.fixture(scope="module")
def pool(run: Run) -> Pool:
    return Pool.of(run, [run.groups["members"]])


@pytest.fixture(scope="module")
def subsets(pool: Pool) -> np.ndarray:
    """Three subsets of sizes that differ, all of two batches of 20."""
    rows = np.arange(len(pool))
    return np.stack([rows < 41, rows >= 4, rows % 7 != 0])


def with_recipe(run: Run, **changes: Any) -> Run:
    return replace(run, config=replace(run.config, train=replace(run.config.train, **changes)))


def with_model(run: Run, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the run are of this model, all with its weights."""
    import copy

    monkeypatch.setattr(Run, "untrained", lambda self, seed=0: copy.deepcopy(model).requires_grad_(False).eval())


def last(moments: Iterator[Moment]) -> Moment:
    *_, moment = moments
    return moment


def images_of_epoch(run: Run, epoch: int | None) -> Tensor:
    """Images as the run's own loader moves them in an epoch, or clean ones, in the order of the members."""
    group, train = run.groups["members"], epoch is not None
    options: dict[str, Any] = {"seed": run.config.run.seed, "world": World(), "view": group.view}
    loader = open_loader(group.beton, train=train, shuffle=False, batch_size=16, geometry=run.geometry, **options)
    with closing(loader), closing(loader.epoch(epoch or 0)) as batches:
        return torch.cat([run.augment(b.image, b.index, epoch or 0, train=train) for b in batches])


def plain_loop(run: Run, pool: Pool, subset: np.ndarray, copy: int) -> nn.Module:
    """One network trained as a tutorial would do it."""
    recipe, batch = run.config.train, 20
    model = run.untrained(named_seed(SEED, f"copy {copy}")).requires_grad_(True).train()
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    others = [p for p in model.parameters() if all(p is not d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=recipe.momentum, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=recipe.betas)
    rows, step, total = np.flatnonzero(subset), 0, 2 * EPOCHS
    for epoch in range(EPOCHS):
        images = images_of_epoch(run, epoch)
        order = epoch_order(named_seed(SEED, f"order {copy}"), epoch, rows)
        for chosen in torch.from_numpy(order[: 2 * batch]).split(batch):
            rate = 1 - step / total if recipe.schedule == "linear" else 1.0  # warm-up of one step: from 1/1
            if recipe.schedule == "cosine" and step > 0:
                rate = 0.5 * (1 + math.cos(math.pi * (step - 1) / (total - 1)))
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rate
            loss = F.cross_entropy(model(images[chosen]), pool.labels[chosen], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            step += 1
    return model.eval()


@pytest.mark.parametrize("name", RECIPES)
def test_copies_are_what_plain_loops_train(name: str, run: Run, pool: Pool, subsets: np.ndarray) -> None:
    """Logits and batch norm's running statistics of three copies, each on a subset of its own; and of one alone."""
    tuned = with_recipe(run, **RECIPES[name])
    together = last(train_together(tuned, pool, subsets, seed=SEED))
    assert together.stack.together
    assert together.logits.shape == (3, len(pool), 4)
    clean = images_of_epoch(run, None)
    for copy in range(3):
        model = plain_loop(tuned, pool, subsets[copy], copy)
        with torch.no_grad():
            torch.testing.assert_close(together.logits[copy], model(clean), rtol=1e-3, atol=1e-4)
        for key, value in model.named_buffers():
            torch.testing.assert_close(together.stack.buffers[key][copy], value, rtol=1e-3, atol=1e-4)
    alone = last(train_together(tuned, pool, subsets, [1], seed=SEED))
    torch.testing.assert_close(alone.logits[0], together.logits[1], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together.logits[0], together.logits[1], atol=1e-2)


class Branching(nn.Module):
    """A network whose forward pass asks for values, which no vectorised pass can."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(768), nn.Linear(768, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.flatten(1))
        return self.fc(x if x.mean().item() > -1e9 else -x)


class Straight(Branching):
    """The same function without the question."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x.flatten(1)))


def test_a_network_that_cannot_be_vectorised_runs_copy_by_copy(
    run: Run, pool: Pool, subsets: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for kind in (Branching, Straight):
        torch.manual_seed(0)
        with_model(run, kind(), monkeypatch)
        found.append(last(train_together(run, pool, subsets, seed=SEED)))
    assert [moment.stack.together for moment in found] == [False, True]
    torch.testing.assert_close(found[0].logits, found[1].logits, rtol=1e-3, atol=1e-4)
    for key in found[0].stack.buffers:
        torch.testing.assert_close(found[0].stack.buffers[key], found[1].stack.buffers[key], rtol=1e-3, atol=1e-4)
    for name in ("margin", "gradient"):
        first, second = (retrain.READINGS[name](moment) for moment in found)
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_dropout_differs_between_copies_and_leaves_the_global_state(
    run: Run, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    with_model(run, nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(768, 4)), monkeypatch)
    before = torch.get_rng_state()
    subsets = np.ones((2, len(pool)), bool)
    monkeypatch.setattr(ensemble, "epoch_order", lambda seed, epoch, rows: rows)  # masks alone may differ
    found = [last(train_together(run, pool, subsets, seed=SEED)).logits for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*found)
    assert not torch.allclose(found[0][0], found[0][1], atol=1e-3)


def test_epochs_are_those_asked_for(run: Run, pool: Pool, subsets: np.ndarray) -> None:
    every = {m.epoch: m.logits for m in train_together(run, pool, subsets, seed=SEED)}
    some = {m.epoch: m.logits for m in train_together(run, pool, subsets, seed=SEED, at=[2])}
    assert list(every) == [1, 2, 3]
    assert list(some) == [2]
    assert torch.equal(every[2], some[2])


def test_mistakes_are_named(run: Run, pool: Pool, subsets: np.ndarray) -> None:
    for at in ([], [0], [4]):
        with pytest.raises(UserError, match="expected some of 1 to 3"):
            next(train_together(run, pool, subsets, at=at))
    with pytest.raises(UserError, match="no samples to train on"):
        next(train_together(run, pool, np.zeros((1, len(pool)), bool)))
    with pytest.raises(UserError, match="copies of the run diverge: logits after epoch"):
        last(train_together(with_recipe(run, lr=1e30), pool, subsets))


def test_the_pool_shows_what_the_network_sees(run: Run) -> None:
    """The network's logits on the pool are those of the features, planted images and both groups included."""
    groups = list(run.groups.values())
    pool = Pool.of(run, groups)
    sets = [extract(run, group) for group in groups]
    assert (sets[0].planted == "noise").any()
    assert pool.sizes == tuple(len(s) for s in sets)
    assert pool.ids.tolist() == np.concatenate([s.ids for s in sets]).tolist()
    assert pool.labels.tolist() == np.concatenate([s.given for s in sets]).tolist()
    with torch.no_grad():
        logits = run.model(run.augment(pool.images.permute(0, 3, 1, 2), pool.ids, 0, train=False))
    torch.testing.assert_close(logits, torch.cat([s.logits for s in sets]), rtol=1e-4, atol=1e-5)


def test_readings_by_hand(run: Run, pool: Pool, subsets: np.ndarray) -> None:
    moment = last(train_together(run, pool, subsets, seed=SEED, at=[1]))
    found = {name: reading(moment) for name, reading in retrain.READINGS.items()}
    clean = images_of_epoch(run, None)
    for copy in range(len(subsets)):
        model = run.untrained()
        params, buffers = moment.stack.state(copy)
        model.load_state_dict({**params, **buffers})
        model.requires_grad_(True)
        for i in range(0, len(pool), 9):
            label, logits = int(pool.labels[i]), model(clean[i : i + 1])[0]
            p = logits.detach().double().softmax(0).numpy()
            others = [float(z) for c, z in enumerate(logits.detach()) if c != label]
            model.zero_grad()
            (-logits.log_softmax(0)[label]).backward()
            square = sum(float((v.grad.detach() ** 2).sum()) for v in model.parameters() if v.grad is not None)
            by_hand = {
                "margin": float(logits[label].detach()) - max(others),
                "confidence": math.log(p[label] / (p.sum() - p[label])),
                "error": math.dist(p, np.eye(4)[label]),
                "gradient": math.sqrt(square),
            }
            assert {name: float(found[name][copy, i]) for name in by_hand} == pytest.approx(by_hand, rel=1e-3, abs=1e-4)


def test_what_was_read_is_kept_copy_by_copy(
    run: Run, pool: Pool, subsets: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = replace(run, dir=tmp_path)
    trained: list[int] = []

    def counted(run: Run, pool: Pool, subsets: np.ndarray, copies: list[int], **options: Any) -> Iterator[Moment]:
        if len(trained) >= limit:
            raise KeyboardInterrupt
        trained.extend(copies)
        return train_together(run, pool, subsets, copies, **options)

    def taken(**changes: Any) -> dict[str, np.ndarray]:
        given = {"subsets": subsets, "asked": {"margin": [1, 3], "error": [2]}, "seed": SEED, "at_once": 1, **changes}
        return retrain.retrain(elsewhere, pool, given.pop("subsets"), given.pop("asked"), **given)

    monkeypatch.setattr(retrain, "train_together", counted)
    limit = 2
    with pytest.raises(KeyboardInterrupt):
        taken()
    limit = 99
    found = taken()
    assert trained == [0, 1, 2]  # a killed run goes on with the third
    assert {name: each.shape for name, each in found.items()} == {"margin": (3, 2, 72), "error": (3, 1, 72)}
    assert found["margin"].dtype == np.float32
    moments = {m.epoch: m for m in train_together(run, pool, subsets, seed=SEED)}
    np.testing.assert_allclose(found["margin"][:, 1], retrain.margin(moments[3]), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["error"][:, 0], retrain.error(moments[2]), rtol=1e-3, atol=1e-4)
    again = taken()
    assert trained == [0, 1, 2]
    assert all(np.array_equal(found[name], again[name]) for name in found)
    other = subsets.copy()
    other[1, 0] = not other[1, 0]
    for changes, expected in (({"subsets": other}, [1]), ({"seed": 8}, [0, 1, 2]), ({"epochs": 4}, [0, 1, 2])):
        trained.clear()
        taken(**changes)
        assert trained == expected
    trained.clear()
    for file in sorted((tmp_path / "measure" / "cache" / "copies").glob("*.npz")):
        file.write_bytes(file.read_bytes()[:100])
    assert all(np.array_equal(found[name], taken()[name]) for name in found)
    assert trained == [0, 1, 2]
    assert not list(tmp_path.rglob("*.tmp"))


def test_weights_are_of_each_copys_seed(run: Run, pool: Pool) -> None:
    models = [run.untrained(seed) for seed in (1, 1, 2)]
    stack = Stack(models, torch.zeros(2, 3, 16, 16))
    weights = stack.params["fc.weight"]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
