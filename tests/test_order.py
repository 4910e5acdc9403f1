"""Contracts 6 and 7: evaluation counts each sample once; order is a function of (seed, epoch, sample id) alone."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from small_sets import random_images, write_set
import torch

from rlp.data.batch import Batch, Schedule, epoch_order, eval_ids, train_batches
from rlp.data.loader import open_loader
from rlp.distributed import World

WORLDS = (1, 2, 3, 5)


def world(rank: int, size: int) -> World:
    return World(rank, size, rank, torch.device("cpu"))


def test_order_is_a_permutation_with_known_first_entries() -> None:
    order = epoch_order(0, 0, np.arange(1000))
    assert sorted(order) == list(range(1000))
    assert order[:6].tolist() == [995, 673, 430, 910, 329, 301]
    assert epoch_order(1, 2, np.arange(1000))[:6].tolist() == [291, 281, 287, 961, 597, 468]
    assert order.dtype == np.int64


def test_no_two_seeds_or_epochs_share_an_order() -> None:
    ids = np.arange(100)
    orders = {tuple(epoch_order(seed, epoch, ids)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert not np.array_equal(epoch_order(1, 0, ids), epoch_order(0, 1, ids))


def test_relative_order_depends_on_the_two_samples_only() -> None:
    ids = np.arange(200)
    some = np.random.default_rng(0).permutation(ids)[:60]
    whole = epoch_order(3, 4, ids)
    assert np.array_equal(epoch_order(3, 4, some), whole[np.isin(whole, some)])


def test_every_place_is_equally_likely() -> None:
    """Chi-square over 2000 epochs of 10 samples: 90 free cells, 99.99% below 150."""
    counts = np.zeros((10, 10))
    for epoch in range(2000):
        counts[epoch_order(7, epoch, np.arange(10)), np.arange(10)] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 150


@given(st.integers(1, 60), st.sampled_from([6, 12, 30]), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_global_batches_do_not_depend_on_the_number_of_ranks(count: int, batch_size: int, seed: int) -> None:
    order = epoch_order(seed, 2, np.arange(count))
    alone = train_batches(order, batch_size, 0, 1)
    for size in (2, 3):
        parts = [train_batches(order, batch_size, rank, size) for rank in range(size)]
        assert np.array_equal(np.concatenate(parts, axis=1), alone)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_evaluation_ids_are_shared_out_once(count: int, size: int, batch_size: int) -> None:
    schedules = [Schedule(np.arange(count), False, batch_size, 0, rank, size) for rank in range(size)]
    batches = [schedule.batches(0) for schedule in schedules]
    assert [len(part) for part in batches] == [schedule.steps for schedule in schedules]
    seen = [int(i) for part in batches for batch in part for i in batch]
    assert sorted(seen) == list(range(count))
    assert all(1 <= len(batch) <= max(1, batch_size // size) for part in batches for batch in part)
    assert np.array_equal(eval_ids(np.arange(count), 0, 1), np.arange(count))


def collect(path: Path, size: int, *, train: bool, kind: str, batch_size: int = 6, **more: object) -> list[list[Batch]]:
    """All batches of epoch 1, rank by rank."""
    loaders = [
        open_loader(path, train=train, batch_size=batch_size, seed=9, world=world(rank, size), kind=kind, **more)  # type: ignore[arg-type]
        for rank in range(size)
    ]
    batches = [list(loader.epoch(1)) for loader in loaders]
    for loader in loaders:
        loader.close()
    return batches


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("count", [1, 2, 4, 13, 25])
def test_resident_evaluation_counts_each_sample_once(tmp_path: Path, count: int, size: int) -> None:
    path = write_set(tmp_path / "a.beton", random_images(count, 4, 4))
    ranks = collect(path, size, train=False, kind="resident")
    seen = [i for batches in ranks for batch in batches for i in batch.index.tolist()]
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize(("count", "size"), [(1, 2), (13, 3), (7, 1)])
def test_ffcv_evaluation_counts_each_sample_once(tmp_path: Path, count: int, size: int) -> None:
    pytest.importorskip("ffcv")
    path = write_set(tmp_path / "a.beton", random_images(count, 4, 4))
    ranks = collect(path, size, train=False, kind="ffcv")
    seen = [i for batches in ranks for batch in batches for i in batch.index.tolist()]
    assert sorted(seen) == list(range(count))
    # A last batch of one sample keeps its batch dimension.
    for batch in (batch for batches in ranks for batch in batches):
        n = len(batch.image)
        assert batch.label.shape == batch.index.shape == (n,)
        assert batch.words.shape == (n, 3)


@pytest.mark.parametrize("kind", ["resident", "ffcv"])
def test_ranks_together_see_what_one_rank_sees(tmp_path: Path, kind: str) -> None:
    if kind == "ffcv":
        pytest.importorskip("ffcv")
    path = write_set(tmp_path / "a.beton", random_images(20, 4, 4))
    alone = collect(path, 1, train=True, kind=kind)[0]
    for size in (2, 3):
        ranks = collect(path, size, train=True, kind=kind)
        for step, whole in enumerate(alone):
            for place, column in enumerate(whole):
                assert torch.equal(torch.cat([batches[step][place] for batches in ranks]), column)


@pytest.mark.parametrize("kind", ["resident", "ffcv"])
@pytest.mark.parametrize("train", [True, False])
def test_a_start_within_the_epoch_gives_its_tail(tmp_path: Path, kind: str, train: bool) -> None:
    if kind == "ffcv":
        pytest.importorskip("ffcv")
    path = write_set(tmp_path / "a.beton", random_images(20, 4, 4))
    loader = open_loader(path, train=train, batch_size=6, seed=0, world=World(), kind=kind)  # type: ignore[arg-type]
    whole = list(loader.epoch(5))
    assert len(whole) == loader.steps == (3 if train else 4)
    for start in range(loader.steps + 1):
        tail = list(loader.epoch(5, start))
        assert len(tail) == loader.steps - start
        for got, expected in zip(tail, whole[start:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises(ValueError, match="start is"):
        next(loader.epoch(5, loader.steps + 1))
