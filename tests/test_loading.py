"""Both loaders give the same batches from one file; what does not fit is one sentence that names the key."""

from pathlib import Path
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from small_sets import SEED, random_images, write_card, write_set
import torch

from rlp.data.batch import Batch, Loader
from rlp.data.beton import Beton
from rlp.data.geometry import Geometry
from rlp.data.loader import open_loader
from rlp.data.resident import ResidentLoader
from rlp.data.view import ViewOptions
from rlp.distributed import World
from rlp.errors import UserError
from rlp.labels import member_mask, named_word, noisy_labels, random_words

LIMIT = 37 * (6 * 5 * 3 + 4 * 3)  # bytes of the images and words of `path`


def open_train(path: Path, **changes: Any) -> Loader:
    return open_loader(path, **{"train": True, "batch_size": 8, "seed": 3, "world": World()} | changes)


def assert_equal(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        for name in Batch._fields:
            x, y = getattr(a, name), getattr(b, name)
            assert torch.equal(x, y), name
            assert (x.dtype, x.stride(), x.device) == (y.dtype, y.stride(), y.device), name


@pytest.fixture
def images() -> list[np.ndarray]:
    return random_images(37, 6, 5)


@pytest.fixture
def path(tmp_path: Path, images: list[np.ndarray]) -> Path:
    return write_set(tmp_path / "a.beton", images)


@pytest.mark.parametrize("train", [True, False])
def test_both_loaders_give_the_same_batches(path: Path, train: bool) -> None:
    pytest.importorskip("ffcv")
    view, geometry = ViewOptions(label_noise=0.4, member_fraction=0.7), Geometry(flip=True, crop_padding=2)
    options: dict[str, Any] = {"train": train, "view": view, "geometry": geometry}
    resident, ffcv = open_train(path, kind="resident", **options), open_train(path, kind="ffcv", workers=2, **options)
    assert (resident.steps, resident.num_samples) == (ffcv.steps, ffcv.num_samples)
    for epoch in (0, 1):
        assert_equal(list(ffcv.epoch(epoch)), list(resident.epoch(epoch)))


def test_a_batch_holds_what_was_written(path: Path, images: list[np.ndarray]) -> None:
    loader = open_train(path)
    assert isinstance(loader, ResidentLoader)
    batches = list(loader.epoch(0))
    assert len(batches) == loader.steps == 4
    for batch in batches:
        rows = batch.index.numpy()
        assert batch.image.shape == (8, 3, 6, 5)
        assert batch.image.dtype == torch.uint8
        assert batch.image.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(batch.image.permute(0, 2, 3, 1).numpy(), np.stack([images[r] for r in rows]))
        assert np.array_equal(batch.label.numpy(), rows % 4)
        assert np.array_equal(batch.words.numpy(), random_words(SEED, rows, 3))


@pytest.mark.parametrize("train", [True, False])
def test_noise_and_members_make_the_view(path: Path, train: bool) -> None:
    """Members with the labels they are given, whether shuffled for training or in file order for evaluation."""
    ids = np.arange(37)
    members = ids[member_mask(named_word(SEED, ids, "member"), 0.5)]
    noisy = noisy_labels(ids % 4, named_word(SEED, ids, "noise"), named_word(SEED, ids, "noise_class"), 0.5, 4)
    view = ViewOptions(label_noise=0.5, member_fraction=0.5)
    loader = open_train(path, train=train, batch_size=1, view=view)
    seen = {int(batch.index): int(batch.label) for batch in loader.epoch(0)}
    assert seen == {int(i): int(noisy[i]) for i in members}
    assert loader.num_samples == len(members) < 37
    assert any(seen[i] != i % 4 for i in seen)


@pytest.mark.parametrize("kind", ["resident", "ffcv"])
def test_kept_batches_stay_as_they_were(path: Path, kind: str) -> None:
    if kind == "ffcv":
        pytest.importorskip("ffcv")
    loader = open_train(path, kind=kind, batch_size=2)
    kept = list(loader.epoch(0))
    copies = [Batch(*(column.clone() for column in batch)) for batch in loader.epoch(0)]
    assert_equal(kept, copies)
    for batch in kept:
        batch.image.zero_()
    assert_equal(list(loader.epoch(0)), copies)


def test_both_loaders_decode_jpegs_alike(tmp_path: Path) -> None:
    """To the bit, though one asks turbojpeg and the other Pillow."""
    pytest.importorskip("ffcv")
    path = write_set(tmp_path / "j.beton", random_images(40, 24, 32), jpeg=True)
    geometry = Geometry(flip=True, crop_padding=3)
    for kind in ("ffcv", "resident"):
        assert_equal(
            list(open_train(path, kind=kind, geometry=geometry).epoch(1)),
            list(open_train(path, kind="ffcv", geometry=geometry).epoch(1)),
        )


@pytest.mark.parametrize("geometry", [Geometry(), Geometry(flip=True), Geometry(crop_padding=2), Geometry(True, 9)])
def test_resident_images_are_the_same_without_numba(
    path: Path, monkeypatch: pytest.MonkeyPatch, geometry: Geometry
) -> None:
    pytest.importorskip("numba")
    compiled = list(open_train(path, kind="resident", geometry=geometry).epoch(2))
    monkeypatch.setattr("rlp.data.resident.find_spec", lambda name: None)
    assert_equal(list(open_train(path, kind="resident", geometry=geometry).epoch(2)), compiled)


def parts_of(path: Path, kind: str, size: int, epoch: int, start: int = 0, **options: Any) -> list[Batch]:
    """The batches of ``size`` ranks put together again."""
    ranks = [
        open_train(path, kind=kind, world=World(rank, size), **options).epoch(epoch, start) for rank in range(size)
    ]
    whole = []
    for parts in zip(*ranks, strict=True):
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        columns[0] = columns[0].contiguous(memory_format=torch.channels_last)
        whole.append(Batch(*columns))
    return whole


@pytest.mark.parametrize("kind", ["resident", "ffcv"])
@pytest.mark.parametrize("jpeg", [False, True])
def test_workers_ranks_and_a_resume_change_nothing(tmp_path: Path, kind: str, jpeg: bool) -> None:
    pytest.importorskip("ffcv")
    path = write_set(tmp_path / "a.beton", random_images(50, 16, 24), jpeg=jpeg)
    size = 0 if kind == "resident" else 12
    options = {"geometry": Geometry(True, 3, size), "batch_size": 12, "view": ViewOptions(label_noise=0.3)}
    expected = list(open_train(path, kind=kind, workers=1, **options).epoch(7))
    assert len(expected) == 4
    for workers in (2, 3):
        assert_equal(list(open_train(path, kind=kind, workers=workers, **options).epoch(7)), expected)
    for ranks in (2, 3):
        assert_equal(parts_of(path, kind, ranks, 7, **options), expected)
        assert_equal(parts_of(path, kind, ranks, 7, start=2, **options), expected[2:])
    for start in range(4):
        assert_equal(list(open_train(path, kind=kind, **options).epoch(7, start)), expected[start:])


@pytest.mark.parametrize("kind", ["resident", "ffcv"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_counts_every_sample_once(path: Path, kind: str, ranks: int) -> None:
    if kind == "ffcv":
        pytest.importorskip("ffcv")
    seen: list[int] = []
    for rank in range(ranks):
        loader = open_train(path, kind=kind, train=False, world=World(rank, ranks))
        batches = list(loader.epoch(0))
        assert len(batches) == loader.steps
        seen += [sample for batch in batches for sample in batch.index.tolist()]
    assert sorted(seen) == list(range(37))


def test_evaluation_moves_nothing(path: Path) -> None:
    moved = open_train(path, train=False, geometry=Geometry(flip=True, crop_padding=2))
    assert_equal(list(moved.epoch(0)), list(open_train(path, train=False).epoch(0)))


def test_auto_is_resident_as_long_as_it_fits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_train(path, resident_limit=LIMIT), ResidentLoader)
    monkeypatch.setattr("rlp.data.loader.ffcv_installed", lambda: False)
    too_large, resized = {"resident_limit": LIMIT - 1}, {"geometry": Geometry(image_size=4)}
    for changes, remedy in ((too_large, "resident_limit_gb"), (resized, "0")):
        with pytest.raises(UserError, match=f"FFCV is not installed; install it or .*{remedy}"):
            open_train(path, **changes)
    with pytest.raises(UserError, match=r"data\.loader is ffcv, but FFCV is not installed"):
        open_train(path, kind="ffcv")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"batch_size": 0}, "data.batch_size"),
        ({"batch_size": 38}, "data.batch_size is 38, more than the 37 samples"),
        ({"batch_size": 30, "view": ViewOptions(member_fraction=0.3)}, "more than the [0-9]+ samples of the view of"),
        ({"batch_size": 7, "world": World(0, 2)}, "data.batch_size is 7, which cannot be shared equally by 2 ranks"),
        ({"batch_size": 0, "train": False}, "data.eval_batch_size"),
        ({"view": ViewOptions(member_fraction=1e-6)}, "data.member_fraction 1e-06"),
        ({"kind": "dali"}, "data.loader is 'dali'"),
        ({"kind": "resident", "geometry": Geometry(image_size=4)}, "data.loader is resident"),
        ({"workers": -1}, "data.workers"),
    ],
)
def test_what_does_not_fit_names_its_key(path: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        open_train(path, **changes)


def test_images_of_several_sizes_need_image_size(tmp_path: Path) -> None:
    path = write_set(tmp_path / "v.beton", random_images(4, 6, 5) + random_images(4, 5, 6))
    for kind in ("auto", "ffcv"):
        with pytest.raises(UserError, match=r"differ in size \(6 x 6 at most\); set data.image_size"):
            open_train(path, kind=kind)
    with pytest.raises(UserError, match=r"data\.loader is resident.*differ in size"):
        open_train(path, kind="resident")


def test_damage_inside_an_image_is_found(path: Path, images: list[np.ndarray]) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(images[20].tobytes()) + 10] ^= 1
    path.write_bytes(content)
    Beton.open(path)  # its index is whole
    for options in ({"kind": "resident"}, {"kind": "ffcv", "verify": True}):
        with pytest.raises(UserError, match="is damaged"):
            open_train(path, **options)
    write_card(path, images, 4, 3, "train", False)
    open_train(path)


def test_neither_import_nor_resident_training_needs_ffcv(path: Path) -> None:
    program = f"""
import sys
for name in ("ffcv", "numba", "fastargs", "timm"):
    sys.modules[name] = None
import torch, rlp
from rlp.data.loader import open_loader
from rlp.distributed import World
loader = open_loader({str(path)!r}, train=True, batch_size=8, seed=3, world=World(), kind="resident")
print(len(list(loader.epoch(0))))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "4", result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_resident_step_never_waits_for_the_host(path: Path) -> None:
    loader = open_train(path, world=World(0, 1, 0, torch.device("cuda", 0)))
    batches = loader.epoch(0)
    first = next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rest = list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_host = [Batch(*(column.cpu() for column in batch)) for batch in (first, *rest)]
    assert_equal(on_host, list(open_train(path).epoch(0)))


def test_two_resident_loaders_of_one_file_share_its_memory(path: Path) -> None:
    train = open_train(path, kind="resident", view=ViewOptions(label_noise=0.5))
    evaluation = open_train(path, kind="resident", train=False)
    assert isinstance(train, ResidentLoader)
    assert isinstance(evaluation, ResidentLoader)
    assert train._set is evaluation._set
    train.close()
    assert sum(len(batch.label) for batch in evaluation.epoch(0)) == 37
    evaluation.close()
    assert open_train(path, kind="resident") is not None
