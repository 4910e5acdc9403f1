"""Parquet files as Hugging Face writes them: what is found, that images are read late and few at a time, bad files."""

from collections.abc import Sequence
import contextlib
from pathlib import Path
import re
import subprocess
import sys
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

pytest.importorskip("fastargs")

from data_prep import parquet
from data_prep.samples import OnDemand, hold_out, limited
from rlp.errors import UserError
from tests.image_folder import ROOT
from tests.source_files import contents, encoded, make_parquet, opened, refusal

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LABELS = [0, 1, 0, 1]


def images(first: int, count: int = 4) -> list[bytes]:
    return [encoded(seed) for seed in range(first, first + count)]


def two_splits(root: Path, names: Sequence[str] | None = ("cat", "dog"), **options: Any) -> Path:
    for part in (0, 1):
        make_parquet(root / f"train-{part:05d}-of-00002.parquet", images(10 * part), LABELS, names, **options)
    make_parquet(root / "validation-00000-of-00001.parquet", images(50), LABELS[::-1], names, **options)
    make_parquet(root / "test-00000-of-00001.parquet", images(60), [-1] * 4, names, **options)
    return root


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label"), ("pixels", "kind")])
@pytest.mark.parametrize("group", [1, 3, 100])
def test_files_of_splits(tmp_path: Path, plain: bool, columns: tuple[str, str], group: int) -> None:
    two_splits(tmp_path, columns=columns, plain=plain, row_group_size=group)
    named = {"image_column": "pixels", "label_column": "kind"} if columns[0] == "pixels" else {}
    source = opened("parquet", tmp_path, **named)
    assert source.classes == ("cat", "dog")
    assert source.train.names[3:5] == ["train-00000-of-00002.parquet[3]", "train-00001-of-00002.parquet[0]"]
    assert source.train.labels.tolist() == LABELS * 2
    assert contents(source.train) == images(0) + images(10)
    assert source.val.labels.tolist() == LABELS[::-1]
    assert contents(source.val) == images(50)


def test_the_first_usual_column_is_taken(tmp_path: Path) -> None:
    table = pa.table({"fine_label": [0, 1], "label": [1, 0], "img": [b"i", b"j"], "image": [b"x", b"y"]})
    for name in ("train", "test"):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    source = opened("parquet", tmp_path)
    assert (source.train.labels.tolist(), contents(source.train)) == ([1, 0], [b"x", b"y"])
    source = opened("parquet", tmp_path, label_column="fine_label", image_column="img")
    assert (source.train.labels.tolist(), contents(source.train)) == ([0, 1], [b"i", b"j"])


def test_numbers_where_no_names_are(tmp_path: Path) -> None:
    assert opened("parquet", two_splits(tmp_path / "a", names=None)).classes == ("0", "1")


@pytest.mark.parametrize("where", ["data", "train-and-val"])
def test_folders_of_hugging_face(tmp_path: Path, where: str) -> None:
    if where == "data":
        two_splits(tmp_path / "data")
        (tmp_path / "README.md").touch()
    else:
        make_parquet(tmp_path / "train" / "0000.parquet", images(0), LABELS)
        make_parquet(tmp_path / "train" / "0001.parquet", images(10), LABELS)
        make_parquet(tmp_path / "val" / "0000.parquet", images(50), LABELS)
    source = opened("parquet", tmp_path)
    assert contents(source.train) == images(0) + images(10)
    assert contents(source.val) == images(50)


def test_train_alone_is_split_without_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_splits(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "_batches", lambda *_: pytest.fail("an image was read"))
        source = opened("parquet", tmp_path / "train-*.parquet", val_fraction=0.25, limit=5)
        assert (len(source.train), len(source.val)) == (5, 2)
        train, val = hold_out(limited(source.train, 4, 1), 0.5, 1)
        assert isinstance(val.contents, OnDemand)
    by_name = {f"train-{part:05d}-of-00002.parquet[{i}]": encoded(10 * part + i) for part in (0, 1) for i in range(4)}
    for samples in (source.train, source.val, train, val):
        assert contents(samples) == [by_name[name] for name in samples.names]


def test_the_listing_tells_a_changed_file(tmp_path: Path) -> None:
    before = opened("parquet", two_splits(tmp_path)).listing
    assert opened("parquet", tmp_path).listing == before
    make_parquet(tmp_path / "train-00001-of-00002.parquet", images(11), LABELS, ["cat", "dog"])
    assert opened("parquet", tmp_path).listing != before


@given(
    sizes=st.lists(st.integers(0, 3000), min_size=3, max_size=200),
    group=st.integers(1, 150),
    rows=st.lists(st.integers(0, 10**6), min_size=1, max_size=40),
)
def test_rows_may_be_asked_for_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], group: int, rows: list[int]
) -> None:
    values = [bytes([i % 256]) * size for i, size in enumerate(sizes)]
    path = make_parquet(tmp_path_factory.mktemp("t") / "a.parquet", values, [0] * len(values), row_group_size=group)
    _, samples, _, _ = parquet.read_parquet(path, None, None)
    assert contents(samples) == values
    asked = np.array(rows) % len(values)
    assert contents(samples.take(asked)) == [values[row] for row in asked]


def test_memory_does_not_grow_with_the_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row group of 64 MB in pages of 1 MB, read in order: a few of them are in memory, and each is read once."""
    rng = np.random.default_rng(0)
    values = [rng.bytes(1 << 15) for _ in range(2048)]
    path = make_parquet(tmp_path / "a.parquet", values, [0, 1] * 1024, row_group_size=4096, write_batch_size=16)
    started = []
    original = parquet._batches
    monkeypatch.setattr(parquet, "_batches", lambda *args: started.append(args) or original(*args))
    source = opened("parquet", path)
    before, peak = pa.total_allocated_bytes(), 0
    for samples in (source.train, source.val):
        for start in range(0, len(samples), 64):
            for sample in samples.rows(start, start + 64):
                assert sample.content == values[int(sample.name[10:-1])]
                peak = max(peak, pa.total_allocated_bytes() - before)
    assert len(started) == 2  # once a split
    assert 1 << 20 < peak < 16 << 20


# Bad files


def replaced(root: Path, **options: Any) -> None:
    """Another last training file."""
    arguments = {"images": images(10), "labels": LABELS, "names": ["cat", "dog"], **options}
    make_parquet(root / "train-00001-of-00002.parquet", **arguments)


def written(root: Path, table: Any) -> None:
    pq.write_table(table, root / "train-00001-of-00002.parquet")


def with_metadata(root: Path, text: str) -> None:
    table = pa.table({"image": images(10), "label": LABELS}).replace_schema_metadata({"huggingface": text})
    written(root, table)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda root: replaced(root, images=[*images(1, 3), None]),
            r"00001-of-00002\.parquet\[3\] is without bytes in 'image\.bytes'; expected encoded images",
        ),
        (lambda root: replaced(root, images=[None] * 4, plain=True), r"parquet\[0\] is without bytes in 'image'"),
        (
            lambda root: written(root, pa.Table.from_arrays([pa.array([0]), pa.array([0])], names=["label", "label"])),
            "has the column 'label' twice",
        ),
        (lambda root: replaced(root, labels=[0, None, 1, 1]), "column 'label' has 1 rows without a label"),
        (
            lambda root: replaced(root, labels=[0, 2, 0, 1]),
            r"00002\.parquet\[1\] has the label 2; expected one from 0 to 1",
        ),
        (lambda root: replaced(root, labels=[0, -1, 0, 1]), r"\[1\] has the label -1"),
        (lambda root: replaced(root, names=["dog", "cat"]), "name the classes differently"),
        (lambda root: replaced(root, columns=("picture", "label")), r"no column image or img \(source\.image_column\)"),
        (
            lambda root: replaced(root, columns=("image", "kind")),
            r"no column label or labels .*its columns are image, kind",
        ),
        (
            lambda root: written(root, pa.table({"image": ["a.jpg"], "label": [0]})),
            "'image' is string; expected images",
        ),
        (
            lambda root: written(root, pa.table({"image": [{"path": "a"}], "label": [0]})),
            "'image' is struct<path: string>",
        ),
        (
            lambda root: written(root, pa.table({"image": [b"a"], "label": ["cat"]})),
            "'label' is string; expected integers",
        ),
        (lambda root: with_metadata(root, "{"), "its metadata 'huggingface' is not that of a data set"),
        (lambda root: with_metadata(root, "[" * 100_000), "its metadata 'huggingface' is not that of a data set"),
        (lambda root: with_metadata(root, '{"info": {"features": {"label": {"names": 3}}}}'), "not a list of texts"),
        (
            lambda root: replaced(root, images=[b"nothing", *images(1, 3)]),
            r"00002\.parquet\[0\] cannot be read as an image",
        ),
        (
            lambda root: (root / "train-00001-of-00002.parquet").unlink(),
            "one of 2 parts, of which 1 are there: part 1 is",
        ),
        (lambda root: (root / "train-00001-of-00002.parquet").write_bytes(b"PAR1"), "cannot be read as a parquet file"),
        (lambda root: replaced(root / "other"), None),
        (lambda root: make_parquet(root / "more.parquet", images(1), LABELS), r"more\.parquet says no split"),
        (
            lambda root: make_parquet(root / "train-0-of-3.parquet", images(1), LABELS),
            "some parts are there twice|part",
        ),
    ],
)
def test_a_bad_file_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, sentence: str | None
) -> None:
    root = two_splits(tmp_path / "set")
    change(root)
    if sentence is None:  # files of another set below are not looked at
        assert len(opened("parquet", root).train) == 8
        return
    found = refusal(capsys, "parquet", root, tmp_path / "out")
    assert re.search(sentence, found), found


def test_rows_that_are_counted_but_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened("parquet", make_parquet(tmp_path / "a.parquet", images(0), LABELS), val_fraction=0.5)
    original = parquet._batches
    monkeypatch.setattr(parquet, "_batches", lambda *args: (batch[:1] for batch in original(*args)))
    with pytest.raises(UserError, match=r"a\.parquet\[\d\] cannot be read: its file has fewer images than it counts"):
        [contents(samples) for samples in (source.train, source.val)]


def test_counts_of_rows_that_disagree(tmp_path: Path) -> None:
    """Each place of the metadata where one more or less changes a count of rows."""
    path = make_parquet(tmp_path / "a.parquet", images(0), LABELS, row_group_size=2)
    whole, found = path.read_bytes(), 0
    for place in range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole) - 8):
        if whole[place] not in (4, 8):  # 2 and 4 rows, as the format writes whole numbers
            continue
        path.write_bytes(whole[:place] + bytes([whole[place] - 2]) + whole[place + 1 :])
        with contextlib.suppress(OSError, ValueError), pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            if (file.metadata.num_rows, groups) in ((3, [2, 2]), (4, [1, 2]), (4, [2, 1])):
                found += 1
                with pytest.raises(UserError, match=r"a\.parquet (is damaged: it counts|cannot be read)"):
                    opened("parquet", path)
    assert found == 3


def test_damaged_metadata_never_ends_the_process(tmp_path: Path) -> None:
    """pyarrow aborts where Python asks it for a column's damaged metadata; in a process of its own, to survive that."""
    path = make_parquet(tmp_path / "a.parquet", [b"image"] * 4, LABELS, ["cat", "dog"])
    code = f"""
from pathlib import Path
import numpy as np
from rlp.errors import UserError
from tests.source_files import contents, opened
path, rng = Path({str(path)!r}), np.random.default_rng(1)
whole = path.read_bytes()
footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
refused = 0
for _ in range(600):
    damaged = bytearray(whole)
    for place in rng.integers(footer, len(whole), size=2):
        damaged[place] = rng.integers(256)
    path.write_bytes(damaged)
    try:
        source = opened("parquet", path, val_fraction=0.5)
        contents(source.train), contents(source.val)
    except UserError:
        refused += 1
print(refused)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (process.returncode, process.stderr) == (0, "")
    assert int(process.stdout) > 100


def test_a_damaged_page_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = encoded(3)
    path = make_parquet(
        tmp_path / "a.parquet", images(0), LABELS, compression="none", write_page_checksum=True, use_dictionary=False
    )
    whole = bytearray(path.read_bytes())
    whole[whole.index(value) + len(value) // 2] ^= 1
    path.write_bytes(whole)
    found = refusal(capsys, "parquet", path, tmp_path / "out")
    assert re.search(r"a\.parquet cannot be read as a parquet file: .*(CRC|checksum|crc)", found), found


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("none", r"has no \.parquet file; source\.path must name one, a folder or a pattern"),
        ("none-*.parquet", r"has no \.parquet file"),
        ("empty", r"has no \.parquet file"),
        ("a.csv", r"a\.csv is not a \.parquet file"),
    ],
)
def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").touch()
    assert re.search(sentence, refusal(capsys, "parquet", tmp_path / name, tmp_path / "out"))


def test_two_sets_in_one_folder(tmp_path: Path) -> None:
    for name in ("small", "large"):
        two_splits(tmp_path / name)
    with pytest.raises(UserError, match=r"has sets in .*large and .*small; source\.path must name one"):
        opened("parquet", tmp_path)


def test_validation_without_train(tmp_path: Path) -> None:
    for name in ("val", "test"):
        make_parquet(tmp_path / f"{name}.parquet", images(0), LABELS)
    with pytest.raises(UserError, match=r"has \.parquet files of test and val, but none of train"):
        opened("parquet", tmp_path)
    assert len(opened("parquet", tmp_path / "val.parquet").train) == 2


def test_without_pyarrow(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(capsys, "parquet", tmp_path, tmp_path / "out") == (
        "error: source.kind parquet needs pyarrow; pip install pyarrow"
    )
