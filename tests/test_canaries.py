"""Planted truth: disjoint and nested kinds, equal to the bit in every loader, named in log, hash and summary."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_sets import SEED, change_card, random_images, write_set, write_shards
from tiny_run import assert_same_tensors, final_state, tiny_config, write_tiny_sets
import torch

from rlp.data.batch import Batch, Loader
from rlp.data.beton import Beton
from rlp.data.canaries import KINDS, noise_images
from rlp.data.geometry import Geometry
from rlp.data.loader import open_loader
from rlp.data.view import View, ViewOptions, make_view
from rlp.distributed import World
from rlp.errors import UserError
from rlp.labels import random_words
import train_rlp

COUNT, CLASSES = 2000, 5
SHARES = {"canary_noise": 0.1, "canary_mislabelled": 0.1, "canary_duplicates": 0.1}


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    path = tmp_path_factory.mktemp("canaries") / "a.beton"
    return Beton.open(write_set(path, random_images(COUNT, 1, 1), classes=CLASSES, page_size=1 << 16))


def view(beton: Beton, **options: Any) -> View:
    return make_view(beton, ViewOptions(**options))


def rows(seen: View, kind: str) -> set[int]:
    return set(np.flatnonzero(seen.planted == kind).tolist())


def test_nothing_is_planted_by_default(beton: Beton) -> None:
    seen = view(beton)
    assert seen.canaries is None
    assert set(seen.planted.tolist()) == {""}
    assert np.array_equal(seen.shown, np.arange(COUNT))
    assert seen.sha256 == view(beton, canary_noise=0.0).sha256


def test_kinds_are_disjoint_about_as_large_as_asked_and_nested(beton: Beton) -> None:
    some, more = view(beton, **SHARES), view(beton, **{**SHARES, "canary_noise": 0.3, "canary_mislabelled": 0.2})
    for kind in KINDS:
        assert rows(some, kind) <= rows(more, kind)
        assert abs(len(rows(some, kind)) - 0.1 * COUNT) < 5 * np.sqrt(0.1 * 0.9 * COUNT)
    assert len(rows(more, "noise")) > 2.5 * len(rows(some, "noise"))
    assert rows(some, "duplicate") == rows(more, "duplicate")
    everything = view(beton, canary_noise=0.3, canary_mislabelled=0.3, canary_duplicates=0.3)
    assert (everything.planted == "").mean() == pytest.approx(0.1, abs=0.05)


def test_a_sample_is_a_canary_in_any_view_that_has_it(beton: Beton) -> None:
    whole = view(beton, **SHARES)
    for side in ("members", "non-members"):
        part = view(beton, **SHARES, member_fraction=0.5, members=side, fraction=0.7)
        assert np.array_equal(part.planted[part.ids], whole.planted[part.ids])
        outside = np.setdiff1d(np.arange(COUNT), part.ids)
        assert set(part.planted[outside].tolist()) == {""}
        for kind in ("noise", "mislabelled"):
            chosen = np.flatnonzero(part.planted == kind)
            assert np.array_equal(part.label[chosen], whole.label[chosen])


def test_wrong_labels_are_wrong_whatever_the_noise(beton: Beton) -> None:
    seen = view(beton, **SHARES, label_noise=0.5)
    wrong = np.flatnonzero(seen.planted == "mislabelled")
    assert (seen.label[wrong] != beton.label[wrong]).all()
    assert set(((seen.label[wrong] - beton.label[wrong]) % CLASSES).tolist()) == {1, 2, 3, 4}
    clean = view(beton, canary_mislabelled=0.1)
    assert np.array_equal(clean.label[wrong], seen.label[wrong])
    assert np.array_equal(np.delete(clean.label, wrong), np.delete(beton.label, wrong))
    assert clean.wrong == len(wrong)
    noisy = view(beton, label_noise=0.5)
    free = np.flatnonzero((seen.planted == "") | (seen.planted == "noise"))
    assert np.array_equal(seen.label[free], noisy.label[free])


def test_duplicates_show_plain_samples_of_the_view_with_their_labels(beton: Beton) -> None:
    seen = view(beton, **SHARES, label_noise=0.4, member_fraction=0.5)
    copies = np.flatnonzero(seen.planted == "duplicate")
    originals = seen.shown[copies]
    assert set(originals.tolist()) <= set(seen.ids.tolist())
    assert set(seen.planted[originals].tolist()) == {""}
    assert np.array_equal(seen.label[copies], seen.label[originals])
    others = np.setdiff1d(np.arange(COUNT), copies)
    assert np.array_equal(seen.shown[others], others)
    assert len(set(originals.tolist())) > 0.8 * len(copies)
    assert seen.wrong == (seen.label != beton.label[seen.shown])[seen.ids].sum()


def test_originals_stay_when_shares_grow(beton: Beton) -> None:
    some, more = view(beton, canary_duplicates=0.05), view(beton, canary_duplicates=0.1, canary_noise=0.1)
    copies = np.flatnonzero(some.planted == "duplicate")
    kept = more.planted[some.shown[copies]] == ""
    assert np.array_equal(more.shown[copies][kept], some.shown[copies][kept])
    assert 0 < kept.sum() < len(copies)


def test_the_view_says_what_is_planted(beton: Beton) -> None:
    seen = view(beton, **SHARES, fraction=0.5)
    counts = {kind: len(rows(seen, kind)) for kind in KINDS}
    assert seen.summary()["canaries"] == counts
    assert seen.summary()["wrong_labels"] == counts["mislabelled"]
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    assert seen.describe()[-1] == f"canaries: {told} of 1,000 samples"


def test_the_hash_sees_canaries_that_change_no_label(beton: Beton) -> None:
    hashes = [view(beton, canary_noise=share).sha256 for share in (0.0, 0.05, 0.1)]
    hashes.append(view(beton, canary_duplicates=0.1).sha256)
    assert len(set(hashes)) == 4


def test_shards_have_the_canaries_of_the_whole(tmp_path: Path) -> None:
    images = random_images(60, 4, 4)
    whole = view(Beton.open(write_set(tmp_path / "a.beton", images)), canary_noise=0.3, canary_mislabelled=0.3)
    sharded = view(Beton.open(write_shards(tmp_path / "s.beton", images, 3)), canary_noise=0.3, canary_mislabelled=0.3)
    assert whole.sha256 == sharded.sha256
    alone = view(Beton.open(tmp_path / "s-00001-of-00003.beton"), canary_noise=0.3, canary_mislabelled=0.3)
    assert np.array_equal(alone.planted, whole.planted[20:40])
    assert np.array_equal(alone.label, whole.label[20:40])


def test_noise_is_uniform_and_a_function_of_the_sample(beton: Beton) -> None:
    ids = np.arange(100, 140)
    noise = noise_images(beton.card, ids, 9, 7)
    assert noise.shape == (40, 9, 7, 3)
    assert np.array_equal(noise_images(beton.card, ids[[30, 3]], 9, 7), noise[[30, 3]])
    assert len(np.unique(noise)) == 256
    assert noise.mean() == pytest.approx(127.5, abs=5 * 73.9 / np.sqrt(noise.size))
    assert not np.array_equal(noise[0], noise[1])


@pytest.mark.parametrize("key", ["canary_noise", "canary_mislabelled", "canary_duplicates"])
@pytest.mark.parametrize("share", [-0.1, 0.31, float("nan")])
def test_a_share_out_of_range_is_named(key: str, share: float) -> None:
    options: dict[str, Any] = {key: share}
    with pytest.raises(UserError, match=rf"data\.{key} is .*; expected a number from 0 to 0\.3"):
        ViewOptions(**options)


def test_what_cannot_be_planted_is_named(tmp_path: Path) -> None:
    one = Beton.open(write_set(tmp_path / "a.beton", random_images(60, 1, 1), classes=1))
    with pytest.raises(UserError, match=r"data\.canary_mislabelled is set, but .* has one class"):
        view(one, canary_mislabelled=0.3)
    few = Beton.open(write_set(tmp_path / "b.beton", random_images(60, 1, 1)))
    everything = view(few, canary_noise=0.3, canary_mislabelled=0.3, canary_duplicates=0.3)
    plain = np.flatnonzero(everything.planted == "")
    change_card(few.path, duplicates={"method": "by hand", "distance": 1, "dropped": plain.tolist()})
    with pytest.raises(UserError, match=r"every sample seen of .* is a canary"):
        view(
            Beton.open(few.path), canary_noise=0.3, canary_mislabelled=0.3, canary_duplicates=0.3,
            drop_duplicates=True,
        )  # fmt: skip


# Loaders.

PLANTED = ViewOptions(canary_noise=0.3, canary_mislabelled=0.2, canary_duplicates=0.3, member_fraction=0.8)


def opened(path: Path, kind: str, train: bool, geometry: Geometry, world: World | None = None, **more: Any) -> Loader:
    options: dict[str, Any] = {"batch_size": 8, "seed": 3, "view": PLANTED, "kind": kind, **more}
    return open_loader(path, train=train, geometry=geometry, world=world or World(), **options)


def by_sample(batches: list[Batch]) -> dict[int, tuple[bytes, int, list[int]]]:
    return {
        int(index): (image.contiguous().numpy().tobytes(), int(label), words.tolist())
        for batch in batches
        for image, label, index, words in zip(batch.image, batch.label, batch.index, batch.words, strict=True)
    }


@pytest.mark.parametrize("geometry", [Geometry(), Geometry(flip=True, crop_padding=2)])
@pytest.mark.parametrize("train", [True, False])
def test_all_loaders_plant_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: bool, geometry: Geometry
) -> None:
    path = write_set(tmp_path / "a.beton", random_images(61, 6, 5))
    pytest.importorskip("numba")
    found = {"compiled": by_sample(list(opened(path, "resident", train, geometry, workers=2).epoch(4)))}
    pytest.importorskip("ffcv")
    found["ffcv"] = by_sample(list(opened(path, "ffcv", train, geometry, workers=2).epoch(4)))
    if not train:
        ranks = [opened(path, "ffcv", train, geometry, World(rank, 3)) for rank in range(3)]
        found["ranks"] = {k: v for loader in ranks for k, v in by_sample(list(loader.epoch(4))).items()}
    monkeypatch.setattr("rlp.data.resident.find_spec", lambda name: None)
    found["torch"] = by_sample(list(opened(path, "resident", train, geometry).epoch(4)))
    assert all(batches == found["torch"] for batches in found.values())


@pytest.mark.parametrize("kind", ["resident", "ffcv"])
def test_images_labels_and_words_are_those_planted(tmp_path: Path, kind: str) -> None:
    if kind == "ffcv":
        pytest.importorskip("ffcv")
    images = random_images(61, 6, 5)
    beton = Beton.open(write_set(tmp_path / "a.beton", images))
    loader = opened(beton.path, kind, False, Geometry())
    seen, found = loader.view, by_sample(list(loader.epoch(0)))
    assert set(found) == set(seen.ids.tolist())
    assert {"", *KINDS} == set(seen.planted[seen.ids].tolist())
    noise = noise_images(beton.card, np.arange(61), 6, 5)
    for row, (image, label, words) in found.items():
        shown = noise[row] if seen.planted[row] == "noise" else images[seen.shown[row]]
        assert image == np.ascontiguousarray(shown.transpose(2, 0, 1)).tobytes()
        assert label == seen.label[row]
        assert words == random_words(SEED, np.array(row), 3).tolist()


def test_a_duplicate_moves_by_its_own_words(tmp_path: Path) -> None:
    path = write_set(tmp_path / "a.beton", random_images(61, 16, 16))
    loader = opened(path, "resident", True, Geometry(flip=True, crop_padding=4))
    seen, found = loader.view, by_sample(list(loader.epoch(0)))
    pairs = [(row, int(seen.shown[row])) for row in found if seen.planted[row] == "duplicate"]
    different = [found[copy][0] != found[original][0] for copy, original in pairs if original in found]
    assert sum(different) > 0.9 * len(different) > 0
    noisy = [row for row in found if seen.planted[row] == "noise"]
    again = by_sample(list(loader.epoch(1)))
    assert any(again[row][0] != found[row][0] for row in noisy if row in again)  # noise is augmented as images are


def test_noise_fills_crops_of_images_of_any_size(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    images = [random_images(1, 20 + i % 5, 24 - i % 3, seed=i)[0] for i in range(40)]
    path = write_set(tmp_path / "a.beton", images, jpeg=True)
    geometry = Geometry(image_size=12, flip=True)
    loader = opened(path, "ffcv", False, geometry)
    card, seen = loader.card, loader.view
    found = by_sample(list(loader.epoch(0)))
    noisy = np.flatnonzero(seen.planted == "noise")
    assert len(noisy)
    for row in noisy.tolist():
        expected = noise_images(card, np.array([row]), 12, 12)[0]
        assert found[row][0] == np.ascontiguousarray(expected.transpose(2, 0, 1)).tobytes()


def test_a_bad_jpeg_is_named_by_the_sample_whose_image_it_is(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    path = write_set(tmp_path / "a.beton", random_images(61, 16, 16), jpeg=True)
    beton = Beton.open(path)
    seen = make_view(beton, PLANTED)
    copy = int(np.flatnonzero(seen.planted == "duplicate")[0])
    original = int(seen.shown[copy])
    place = int(beton.layout["image"][original])
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\0" * 40)
    only = View(np.array([copy]), seen.label, canaries=seen.canaries)
    loader = open_loader(Beton.open(path), train=False, batch_size=1, seed=3, world=World(), view=only, kind="ffcv")
    with pytest.raises(UserError, match=rf"the JPEG of sample {original} cannot be decoded"):
        list(loader.epoch(0))


# Whole runs.


def test_runs_on_both_loaders_agree_and_say_what_is_planted(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    write_tiny_sets(tmp_path)
    planted = {f"data__{key}": 0.15 for key in SHARES}
    for kind in ("resident", "ffcv"):
        config = tiny_config(tmp_path, run__dir=str(tmp_path / kind), train__epochs=1, data__loader=kind, **planted)
        train_rlp.train(config, World())
    states = [final_state(tmp_path / kind) for kind in ("resident", "ffcv")]
    assert_same_tensors(states[0]["model"], states[1]["model"])
    summary = json.loads((tmp_path / "ffcv" / "summary.json").read_text("utf-8"))
    counts = summary["data"]["train"]["view"]["canaries"]
    assert all(counts[kind] > 0 for kind in KINDS)
    assert "canaries: " in (tmp_path / "ffcv" / "train.log").read_text("utf-8")
    assert "canaries" not in summary["data"]["val"]["view"]
    changed = {**planted, "data__canary_noise": 0.2}
    with pytest.raises(UserError, match=r"data\.canary_noise is 0\.2, but the run to resume has 0\.15"):
        train_rlp.train(
            tiny_config(tmp_path, run__dir=str(tmp_path / "ffcv"), run__resume="auto", train__epochs=2, **changed),
            World(),
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_shows_the_same(tmp_path: Path) -> None:
    path = write_set(tmp_path / "a.beton", random_images(61, 6, 5))
    geometry = Geometry(flip=True, crop_padding=2)
    device = World(device=torch.device("cuda", 0))
    moved = [
        Batch(*(column.cpu() for column in batch))
        for batch in opened(path, "resident", True, geometry, device).epoch(2)
    ]
    assert by_sample(moved) == by_sample(list(opened(path, "resident", True, geometry).epoch(2)))
