"""Every kind of source through the script, to .betons that read back; and JPEGs that stay as they were to the bit."""

from collections.abc import Callable
import hashlib
import io
from pathlib import Path
import zipfile

import numpy as np
from PIL import Image
import pytest

pytest.importorskip("fastargs")

from data_prep import workers
from data_prep.encode import ByteRange, ImageOptions, Sample, encode_chunk
from data_prep.samples import OnDemand, Samples
from data_prep.sources import Source
from rlp.data.beton import Beton
from rlp.data.format import JPG, RAW
from rlp.errors import UserError
from tests.image_folder import ROOT, run_script
from tests.source_files import (
    encoded,
    make_folder,
    make_parquet,
    make_tar,
    opened,
    run_here,
    tiny_imagenet_files,
    write_pair,
)

TRAIN, VAL = range(6), range(50, 54)
"""Seeds of the images of each split; image ``i`` is of class ``i % 2``."""


def make_folders(root: Path) -> Path:
    files = {f"{split}/{'ab'[i % 2]}/{i}.JPEG": encoded(i) for split, seeds in SPLITS for i in seeds}
    return make_folder(root, files)


def make_npz(root: Path) -> Path:
    arrays = {}
    for split, seeds in SPLITS:
        arrays[f"x_{split}"] = np.stack([pixels_of(encoded(i)) for i in seeds])
        arrays[f"y_{split}"] = np.array([i % 2 for i in seeds])
    np.savez(root / "a.npz", **arrays)
    return root / "a.npz"


def make_parquets(root: Path) -> Path:
    pytest.importorskip("pyarrow")
    for split, seeds in SPLITS:
        make_parquet(root / f"{split}.parquet", [encoded(i) for i in seeds], [i % 2 for i in seeds], ["a", "b"])
    return root


def make_tars(root: Path) -> Path:
    for split, seeds in SPLITS:
        members = {f"{i}.{x}": y for i in seeds for x, y in (("jpg", encoded(i)), ("cls", b"%d" % (i % 2)))}
        make_tar(root / f"{split}-000000.tar", members)
    return root


def make_zip(root: Path) -> Path:
    with zipfile.ZipFile(root / "tiny.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in tiny_imagenet_files().items():
            zipped.writestr(name, content)
    return root / "tiny.zip"


SPLITS = (("train", TRAIN), ("val", VAL))
SOURCES: dict[str, Callable[[Path], Path]] = {
    "folder": make_folders,
    "npz": make_npz,
    "parquet": make_parquets,
    "webdataset": make_tars,
    "tiny-imagenet": make_zip,
}


def pixels_of(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)))


def expected(kind: str, split: str) -> list[bytes]:
    """The image files in the order in which they are written."""
    if kind == "tiny-imagenet":
        seeds = {"train": [1, 5, 2, 9, 10], "val": [102, 101, 100]}[split]
    else:
        seeds = list(dict(SPLITS)[split])
        seeds = sorted(seeds, key=lambda i: i % 2) if kind == "folder" else seeds
    return [encoded(seed) for seed in seeds]


@pytest.mark.parametrize("kind", SOURCES)
def test_the_script_writes_what_beton_reads(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source").mkdir()
    path, out = SOURCES[kind](tmp_path / "source"), tmp_path / "out"
    paths = ["--output.train", str(out / "train.beton"), "--output.val", str(out / "val.beton")]
    config = ROOT / "configs" / "data" / f"{kind.replace('-', '_')}.yaml"
    options = ["--config", str(config), "--source.path", str(path), *paths, "--image.mode", "raw", "--words.draws", "2"]
    process = run_script(*options, "--output.workers", "1", cwd=tmp_path)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert "images of 2 classes, 12x10 px raw, 2 draws" in output
    for split in ("train", "val"):
        beton = Beton.open(out / f"{split}.beton", full_hash=True)
        files = expected(kind, split)
        np.testing.assert_array_equal(beton.images(), np.stack([pixels_of(file) for file in files]))
        assert beton.card.source["kind"] == kind
        assert str(tmp_path) not in beton.card.to_json()
    assert run_here(*options) == 0
    assert capsys.readouterr().out.count("(up to date)") == 2


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind != "npz"])
@pytest.mark.parametrize("more", [[], ["--output.shards", "2"]], ids=["whole", "shards"])
def test_jpegs_are_stored_as_they_are(tmp_path: Path, kind: str, more: list[str]) -> None:
    (tmp_path / "source").mkdir()
    assert write_pair(kind, SOURCES[kind](tmp_path / "source"), tmp_path / "out", "--image.mode", "jpg", *more) == 0
    for split in ("train", "val"):
        beton = Beton.open(tmp_path / "out" / f"{split}.beton", full_hash=True)
        assert [stored(beton, row) for row in range(beton.num_samples)] == expected(kind, split)


def stored(beton: Beton, row: int) -> bytes:
    place = beton.layout[row]
    assert place["mode"] == JPG
    return bytes(beton.maps[place["file"]][place["image"] : place["image"] + place["image_size"]])


def test_every_kind_of_content_is_encoded_alike(tmp_path: Path) -> None:
    """A path, a place in a file and the bytes themselves: one result, one digest, for JPEG, PNG, grey and smart."""
    for seed, (kind, mode) in enumerate([("JPEG", "RGB"), ("PNG", "RGB"), ("JPEG", "L"), ("WEBP", "RGB")]):
        file = encoded(seed, kind, mode)
        (tmp_path / "alone").write_bytes(file)
        (tmp_path / "among").write_bytes(b"before" + file + b"after")
        contents = (tmp_path / "alone", ByteRange(tmp_path / "among", 6, len(file)), file)
        for options in (
            {"mode": "jpg"},
            {"mode": "raw"},
            {"mode": "smart", "smart_threshold": 1},
            {"mode": "jpg", "size": 8},
        ):
            chunks = [
                encode_chunk([Sample("x", 0, content)], ImageOptions(**options, convert_rgb=True))  # type: ignore[arg-type]
                for content in contents
            ]
            assert chunks[0].images == chunks[1].images == chunks[2].images
            assert chunks[0].digests == chunks[1].digests == chunks[2].digests
            untouched = (kind, mode) == ("JPEG", "RGB") and options["mode"] != "raw" and "size" not in options
            assert (chunks[0].images[0].content == file) == untouched


def test_workers_get_what_this_process_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents on demand are read here, a few chunks ahead of what was written, and go to the workers as bytes."""
    monkeypatch.setattr(workers, "CHUNK", 2)
    read: list[int] = []
    samples = Samples(
        [str(i) for i in range(30)],
        np.zeros(30, np.int64),
        OnDemand(lambda row: read.append(row) or encoded(row, "PNG"), np.arange(100, 130)),
    )
    written = []
    with workers.Encoder(1) as encoder:
        for _, chunk in encoder.chunks(samples, ImageOptions()):
            written += chunk.images
            assert len(read) <= len(written) + 2 * 4
    assert read == list(range(100, 130))
    assert [image.content for image in written] == [pixels_of(encoded(i, "PNG")).tobytes() for i in range(100, 130)]
    assert {image.mode for image in written} == {RAW}


def test_a_read_that_fails_midway_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_zip(tmp_path)
    whole = path.read_bytes()
    place = whole.index(b"val_10.JPEG", whole.index(b"val_annotations.txt") + 200) + 40
    path.write_bytes(whole[:place] + bytes(8) + whole[place + 8 :])
    assert write_pair("tiny-imagenet", path, tmp_path / "out") == 2
    assert "val/images/val_10.JPEG of" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


# Folders with ImageNet's names


@pytest.mark.parametrize("name", ["LOC_synset_mapping.txt", "synset_words.txt", "classes.txt"])
@pytest.mark.parametrize("split", [True, False])
def test_imagenet_folders_and_their_names(tmp_path: Path, name: str, split: bool) -> None:
    parts = ("train/", "val/") if split else ("",)
    files = {f"{part}{wnid}/{wnid}_{i}.JPEG": encoded(i) for part in parts for wnid in ("n02", "n01") for i in (10, 9)}
    root = make_folder(tmp_path / "imagenet", files)
    plain = opened_folder(root)
    assert plain.classes == ("n01", "n02")
    (root / name).write_text("n03 drake\nn02  crane\nn01 crane, bird\n")
    named = opened_folder(root)
    assert named.classes == ("n01 crane, bird", "n02 crane")
    assert named.listing != plain.listing
    assert (named.train.names, named.val.names) == (plain.train.names, plain.val.names)
    if split:
        assert named.train.names == [f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in ("n01", "n02") for i in (9, 10)]
    (root / name).write_text("n02 crane\n")
    with pytest.raises(UserError, match=rf"{name} has no line for the class 'n01'; expected lines like 'n01 its name'"):
        opened_folder(root)


def opened_folder(root: Path) -> Source:
    return opened("folder", root, val_fraction=0.5)


def test_a_file_of_names_that_would_not_be_used_is_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {f"{part}/a/{i}.jpg": encoded(0) for part in ("train", "val") for i in (0, 1)})
    (root / "train" / "classes.txt").write_text("a\n")
    assert opened_folder(root / "train").classes == ("a",)
    with pytest.raises(UserError, match=r"train/classes\.txt is a file where folders of classes were expected"):
        opened_folder(root)


def test_a_list_of_folder_names_may_have_blanks(tmp_path: Path) -> None:
    names = ["golden", "golden retriever", "tench"]
    root = make_folder(tmp_path, {f"{part}/{name}/0.jpg": encoded(0) for part in ("train", "val") for name in names})
    (root / "classes.txt").write_text("golden\ngolden retriever\n\ntench Tinca tinca\n")
    assert opened_folder(root).classes == ("golden", "golden retriever", "tench Tinca tinca")


def test_a_listing_without_a_names_file_is_as_before(tmp_path: Path) -> None:
    """Sets that were written before stay up to date: one line a file, with label, size and time."""
    root = make_folder(tmp_path, {f"{part}/{name}/0.jpg": encoded(0) for part in ("train", "val") for name in "ab"})
    digest = hashlib.sha256()
    for part in ("train", "val"):
        for label, name in enumerate("ab"):
            status = (root / part / name / "0.jpg").stat()
            digest.update(f"'{part}/{name}/0.jpg' {label} {status.st_size} {status.st_mtime_ns}\n".encode())
    assert opened_folder(root).listing == digest.hexdigest()
