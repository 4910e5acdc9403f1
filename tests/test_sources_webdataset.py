"""WebDataset's tars: what is found in whole ones, and that nothing of a damaged one is lost without a word."""

import io
import json
from pathlib import Path
import re
import tarfile

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

pytest.importorskip("fastargs")

from data_prep.encode import ByteRange
from rlp.errors import UserError
from tests.source_files import contents, encoded, make_tar, opened, refusal, samples_of


def two_splits(root: Path) -> Path:
    """Three training shards of two samples and a validation shard of four, two classes."""
    for shard in (10, 9, 0):
        make_tar(root / f"train-{shard}.tar", samples_of([2 * shard, 2 * shard + 1]))
    make_tar(root / "val-000000.tar", samples_of([100, 101, 102, 103], extension="json"))
    return root


def test_shards_are_read_in_natural_order(tmp_path: Path) -> None:
    source = opened("webdataset", two_splits(tmp_path))
    seeds = [0, 1, 18, 19, 20, 21]
    assert source.train.names == [f"train-{i // 2}.tar/{i:06d}" for i in seeds]
    assert source.train.labels.tolist() == [0, 1] * 3
    assert source.classes == ("0", "1")
    assert contents(source.train) == [encoded(seed) for seed in seeds]
    assert source.val.labels.tolist() == [0, 1, 0, 1]
    assert contents(source.val) == [encoded(seed) for seed in range(100, 104)]


@pytest.mark.parametrize("words", ["validation", "val", "test"])
def test_splits_by_word_or_by_folder(tmp_path: Path, words: str) -> None:
    make_tar(tmp_path / "a" / f"imagenet-{words}-0000.tar", samples_of([0, 1]))
    make_tar(tmp_path / "a" / "imagenet-train-0000.tar", samples_of([2, 3]))
    make_tar(tmp_path / "b" / words / "0000.tar", samples_of([0, 1]))
    make_tar(tmp_path / "b" / "train" / "0000.tar", samples_of([2, 3]))
    for folder in ("a", "b"):
        source = opened("webdataset", tmp_path / folder)
        assert contents(source.train) == [encoded(2), encoded(3)]
        assert contents(source.val) == [encoded(0), encoded(1)]


def test_a_set_without_validation_is_split(tmp_path: Path) -> None:
    two_splits(tmp_path)
    (tmp_path / "val-000000.tar").rename(tmp_path / "rest.tar")
    whole = opened("webdataset", tmp_path / "rest.tar", val_fraction=0.5)
    by_pattern = opened("webdataset", tmp_path / "train-*.tar", val_fraction=0.34)
    for source, count in ((whole, 4), (by_pattern, 6)):
        assert len(source.train) + len(source.val) == count
        assert not set(source.train.names) & set(source.val.names)
        assert np.bincount(source.val.labels).tolist() == [1, 1]
        for samples in (source.train, source.val):
            assert contents(samples) == [encoded(int(name[-6:])) for name in samples.names]


def test_class_names_beside_the_tars(tmp_path: Path) -> None:
    two_splits(tmp_path)
    (tmp_path / "classes.json").write_text('["cat", "dög"]')
    named = opened("webdataset", tmp_path)
    assert named.classes == ("cat", "dög")
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    assert opened("webdataset", tmp_path / "train-*.tar").classes == ("ant", "bee")
    assert opened("webdataset", tmp_path).listing != named.listing


def test_images_are_known_by_their_place_alone(tmp_path: Path) -> None:
    """Opening reads no image: what is there when a worker asks is what it gets."""
    path = make_tar(tmp_path / "a.tar", samples_of(range(8)))
    source = opened("webdataset", path, limit=2)
    places = [sample.content for sample in source.train.rows(0, 2)]
    whole = bytearray(path.read_bytes())
    for place in places:
        assert isinstance(place, ByteRange)
        whole[place.offset : place.offset + place.size] = bytes(place.size)
    path.write_bytes(whole)
    assert [len(set(content)) for content in contents(source.train)] == [1, 1]
    path.write_bytes(whole[:1024])
    with pytest.raises(UserError, match=r"cannot be read: .*a\.tar ends before byte"):
        contents(source.val)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.tar cannot be read: No such file"):
        contents(source.val)


sizes = st.lists(st.integers(0, 1200), min_size=1, max_size=12)


@given(
    sizes=sizes, long_names=st.booleans(), order=st.randoms(use_true_random=False), folder=st.sampled_from(["", "a.b/"])
)
def test_any_tar_gives_back_what_was_put_in(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], long_names: bool, order: object, folder: str
) -> None:
    """Any sizes (blocks, their borders, nothing), names beyond the 100 bytes of a plain header, any order."""
    stem = folder + ("n" * 150 if long_names else "n")
    images = {f"{stem}{i}": bytes([i]) * size for i, size in enumerate(sizes)}
    members = [(f"{key}.PNG", image) for key, image in images.items()]
    members += [(f"{key}.cls", b" 0\n") for key in images] + [(f"{key}.seg.png", b"mask") for key in images]
    order.shuffle(members)  # type: ignore[attr-defined]
    path = make_tar(tmp_path_factory.mktemp("tar") / "a.tar", [*members, ("zz.jpg", b""), ("zz.cls", b"0")])
    source = opened("webdataset", path, val_fraction=0.4)
    found = {}
    for samples in (source.train, source.val):
        found |= dict(zip(samples.names, contents(samples), strict=True))
    assert found == {f"a.tar/{key}": image for key, image in (images | {"zz": b""}).items()}


def test_a_tar_cut_anywhere_is_refused_or_whole(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "a.tar", {f"{i}.{x}": y for i in range(3) for x, y in (("jpg", b"x" * 700), ("cls", b"0"))}
    )
    whole = path.read_bytes()
    last = 3 * (512 + 1024 + 512 + 512)
    assert whole[last:].strip(b"\0") == b""
    for size in range(0, len(whole), 128):
        path.write_bytes(whole[:size])
        if size >= last + 512:
            assert len(opened("webdataset", path).train) == 2
        else:
            with pytest.raises(UserError, match=r"a\.tar (is cut off|cannot be read as an uncompressed tar)"):
                opened("webdataset", path)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", samples_of(range(4)))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar.getmembers()]
    for start in headers:
        for place in (start, start + 150):
            path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
            with pytest.raises(UserError, match=r"is damaged|cannot be read"):
                opened("webdataset", path)


def test_tars_put_one_after_the_other(tmp_path: Path) -> None:
    one, two = (make_tar(tmp_path / f"{i}.tar", samples_of([2 * i, 2 * i + 1])) for i in (0, 1))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(UserError, match="is damaged: what follows"):
        opened("webdataset", one)


JPG, CLS = ("a.jpg", encoded(0)), ("a.cls", b"0")


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([JPG], r"a\.tar/a has no label; expected a member that ends in cls, json, txt"),
        ([CLS], r"a\.tar/a has no images; expected one member that ends in jpg, jpeg, png"),
        ([JPG, ("a.png", b""), CLS], r"a\.tar/a has 2 images"),
        ([JPG, CLS, JPG, CLS], r"a\.tar has 'a\.jpg' twice; expected every key once"),
        ([JPG, ("a.JPG", b""), CLS], r"has 'a\.JPG' twice"),
        ([JPG, CLS, ("readme", b"")], r"'readme' has no extension"),
        ([JPG, ("a.cls", b"cat")], r"a\.cls holds 'cat'; expected the number of a class"),
        ([JPG, ("a.cls", b"-1")], r"a\.cls holds '-1'"),
        ([JPG, ("a.cls", b"1_0")], r"a\.cls holds '1_0'"),
        ([JPG, ("a.json", b"[" * 100_000)], r"a\.json is not a JSON object"),
        ([JPG, ("a.cls", b"1" * 30)], "expected the number of a class"),
        ([JPG, ("a.cls", b"\xff")], "expected the number of a class"),
        ([JPG, ("a.txt", b"a photo of a cat")], r"a\.txt holds 'a photo of a cat'"),
        ([JPG, ("a.json", b"{")], r"a\.json is not a JSON object with the key label or labels"),
        ([JPG, ("a.json", b'{"class": 1}')], r"is not a JSON object with the key label"),
        ([JPG, ("a.json", b'{"label": true}')], r"a\.json holds '{\"label\": true}'"),
        ([JPG, ("a.json", b'{"label": "cat"}')], "expected the number of a class"),
        ([JPG, ("a.cls", b"7")], r"a has the label 7; expected one from 0, below the number of images, 1"),
        ([JPG, CLS], "has no images in the train split"),
        ([], "has no images in the train split"),
    ],
)
def test_a_bad_sample_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], members: list[tuple[str, bytes]], sentence: str
) -> None:
    found = refusal(capsys, "webdataset", make_tar(tmp_path / "a.tar", members), tmp_path / "out")
    assert re.search(sentence, found), found


def test_a_link_is_refused_and_a_hidden_file_is_not_seen(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", {**samples_of(range(4)), "./._a.jpg": b"", "d/.DS_Store": b""})
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert len(opened("webdataset", path).train) == 2
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "000000.jpg"
        tar.addfile(link)
    with pytest.raises(UserError, match=r"'b\.jpg' is not a plain file but a link"):
        opened("webdataset", path)


def test_labels_in_json(tmp_path: Path) -> None:
    both = {"fine_label": 1, "super": 0}
    members = {f"{i}.{x}": y for i in range(4) for x, y in (("jpg", b""), ("json", json.dumps(both).encode()))}
    path = make_tar(tmp_path / "a.tar", members)
    (tmp_path / "classes.txt").write_text("only")
    assert set(opened("webdataset", path, label_column="super").train.labels) == {0}
    with pytest.raises(UserError, match=r"a\.tar/0 has the label 1; expected one from 0 to 0"):
        opened("webdataset", path)
    with pytest.raises(UserError, match=r"the key other \(source\.label_column\)"):
        opened("webdataset", path, label_column="other")


@pytest.mark.parametrize(
    ("names", "content", "sentence"),
    [
        ("classes.json", "{", "is not a JSON list of texts"),
        ("classes.json", "[" * 100_000, "is not a JSON list of texts"),
        ("classes.json", '{"0": "cat"}', "is not a JSON list of texts"),
        ("classes.json", "[1, 2]", "is not a JSON list of texts"),
        ("classes.txt", "cat\n", "has the label 1; expected one from 0 to 0"),
        ("classes.txt", "cat\ndog\neel\n", "class 'eel' of .* has no images"),
    ],
)
def test_bad_class_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: str, content: str, sentence: str
) -> None:
    two_splits(tmp_path / "tars")
    (tmp_path / "tars" / names).write_text(content)
    assert re.search(sentence, refusal(capsys, "webdataset", tmp_path / "tars", tmp_path / "out"))


def test_a_compressed_tar_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    assert "cannot be read as an uncompressed tar" in refusal(
        capsys, "webdataset", tmp_path / "a.tar", tmp_path / "out"
    )
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    assert "is not a .tar file" in refusal(capsys, "webdataset", tmp_path / "a.tar.gz", tmp_path / "out")


def test_an_image_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_tar(tmp_path / "a.tar", {**samples_of(range(6)), "9.jpg": b"nothing", "9.cls": b"0"})
    sentence = refusal(capsys, "webdataset", path, tmp_path / "out")
    assert sentence == "error: a.tar/9 cannot be read as an image: it is not an image"
    assert Image.open(io.BytesIO(encoded(0))).size == (12, 10)
