"""Tiny ImageNet in its own layout, from the folder and from the archive."""

from pathlib import Path
import re
import zipfile

import pytest

pytest.importorskip("fastargs")

from data_prep.samples import limited
from rlp.data.beton import Beton
from tests.source_files import contents, encoded, make_folder, opened, refusal, tiny_imagenet_files, write_pair

FOLDER = "tiny-imagenet-200"


def archive(path: Path, files: dict[str, bytes], root: str = f"{FOLDER}/") -> Path:
    with zipfile.ZipFile(path / f"{FOLDER}.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr(f"{root}train/", b"")
        for name, content in files.items():
            zipped.writestr(root + name, content)
    return path / f"{FOLDER}.zip"


def places(tmp_path: Path) -> list[Path]:
    files = tiny_imagenet_files()
    inner = make_folder(tmp_path / FOLDER, files)
    (inner / "val" / "images" / ".DS_Store").touch()
    (tmp_path / "flat").mkdir()
    return [inner, tmp_path, archive(tmp_path, files), archive(tmp_path / "flat", files, root="")]


def test_folder_and_archive_give_the_same(tmp_path: Path) -> None:
    files = tiny_imagenet_files()
    for path in places(tmp_path):
        source = opened("tiny-imagenet", path)
        assert source.classes == ("n01 goldfish, Carassius auratus", "n02 European fire salamander")
        names = [f"train/n01/images/n01_{i}.JPEG" for i in (1, 5)] + [
            f"train/n02/images/n02_{i}.JPEG" for i in (2, 9, 10)
        ]
        assert list(source.train.names) == names
        assert source.train.labels.tolist() == [0, 0, 1, 1, 1]
        assert source.val.names == ["val/images/val_0.JPEG", "val/images/val_9.JPEG", "val/images/val_10.JPEG"]
        assert source.val.labels.tolist() == [1, 1, 0]
        for samples in (source.train, source.val):
            assert contents(samples) == [files[name] for name in samples.names]


def test_the_archive_is_unpacked_image_by_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = zipfile.ZipFile.read
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda self, name: read.append(name) or original(self, name))
    source = opened("tiny-imagenet", archive(tmp_path, tiny_imagenet_files()), limit=3)
    few = limited(source.train, 2, 0)
    assert all(name.endswith(".txt") for name in read)
    del read[:]
    few.rows(1, 2)
    assert read == [f"{FOLDER}/{few.names[1]}"]


def test_the_listing_tells_a_change(tmp_path: Path) -> None:
    folder, _, zipped, _ = places(tmp_path)
    for place, changed in (
        (folder, folder / "words.txt"),
        (folder, folder / "val/images/val_0.JPEG"),
        (zipped, zipped),
    ):
        before = opened("tiny-imagenet", place).listing
        assert opened("tiny-imagenet", place).listing == before
        stat = changed.stat()
        changed.touch()
        assert changed.stat().st_mtime_ns != stat.st_mtime_ns
        assert opened("tiny-imagenet", place).listing != before


def test_grey_images_are_converted_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tiny_imagenet_files() | {"train/n01/images/n01_5.JPEG": encoded(5, mode="L")}
    path = archive(tmp_path, files)
    assert "n01_5.JPEG is not RGB but grey" in refusal(capsys, "tiny-imagenet", path, tmp_path / "out")
    assert write_pair("tiny-imagenet", path, tmp_path / "out", "--source.convert_rgb", "true") == 0
    assert Beton.open(tmp_path / "out" / "train.beton", full_hash=True).num_samples == 5


def without(name: str) -> dict[str, bytes | None]:
    return {name: None}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("wnids.txt"), "wnids.txt"),
        (without("words.txt"), "words.txt"),
        (without("val/val_annotations.txt"), "val/val_annotations.txt"),
        ({"words.txt": b"n01\tgoldfish\n"}, "has no words for n02, which wnids.txt lists"),
        ({"words.txt": b"\xff\xfe"}, "is not text in UTF-8"),
        ({"wnids.txt": b"n01\n"}, "is of the class n02, which wnids.txt does not list"),
        ({"wnids.txt": b"n00\nn01\nn02\n"}, "class 'n00 entity' of .* has no images in the train split"),
        (without("val/images/val_9.JPEG"), "val/images/val_9.JPEG is missing, though val/val_annotations.txt names it"),
        ({"val/images/val_3.JPEG": b""}, "does not give the class of val/images/val_3.JPEG"),
        ({"val/val_annotations.txt": b"val_0.JPEG n01"}, "line 1 of val/val_annotations.txt is 'val_0.JPEG n01'"),
        (
            {"val/val_annotations.txt": b"val_0.JPEG\tn02\nval_0.JPEG\tn01\n"},
            "gives val/images/val_0.JPEG two classes, n02 and n01",
        ),
        ({"train/n01/images/note.txt": b""}, "train/n01/images/note.txt is not an image"),
        ({"train/n01/images/n01_1.JPEG": b"broken"}, "n01_1.JPEG cannot be read as an image: it is not an image"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_bad_layout_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, bytes | None], sentence: str, zipped: bool
) -> None:
    changed = {name: x for name, x in (tiny_imagenet_files() | change).items() if x is not None}
    path = archive(tmp_path, changed) if zipped else make_folder(tmp_path / FOLDER, changed)
    found = refusal(capsys, "tiny-imagenet", path, tmp_path / "out")
    assert re.search(sentence, found), found


def test_a_damaged_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = archive(tmp_path, tiny_imagenet_files())
    whole = path.read_bytes()
    place = whole.index(b"n01_5.JPEG") + 40  # in the compressed image after its local header
    path.write_bytes(whole[:place] + bytes(8) + whole[place + 8 :])
    found = refusal(capsys, "tiny-imagenet", path, tmp_path / "out")
    assert "train/n01/images/n01_5.JPEG of" in found
    assert "cannot be unpacked" in found
    place = whole.index(b"PK\1\2") + 6  # the version that is needed to unpack the first file
    path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
    assert "cannot be read as a .zip: zip file version 25.5" in refusal(capsys, "tiny-imagenet", path, tmp_path / "out")
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as a .zip" in refusal(capsys, "tiny-imagenet", path, tmp_path / "out")
    assert "does not exist" in refusal(capsys, "tiny-imagenet", tmp_path / "none.zip", tmp_path / "out")
