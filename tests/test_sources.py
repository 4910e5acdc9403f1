"""Sources of images: what each reader finds, how it splits, and what it says of a bad source."""

from collections.abc import Callable
import hashlib
import io
from pathlib import Path
import pickle
import struct
import tarfile

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from data_prep import cifar
from data_prep.cifar import RELEASES, Release
from data_prep.folder import natural_key
from data_prep.samples import Samples, hold_out, limited
from data_prep.schema import SourceConfig
from data_prep.sources import Source, open_source
from rlp.errors import UserError


def numbered(labels: np.ndarray) -> Samples:
    return Samples([str(i) for i in range(len(labels))], labels, [Path(str(i)) for i in range(len(labels))])


labels_of_classes = st.lists(st.integers(0, 5), min_size=1, max_size=200).map(lambda x: np.array(x, np.int64))


@given(labels_of_classes, st.floats(0.01, 0.99), st.integers(0, 2**63))
def test_a_split_holds_out_a_share_of_every_class(labels: np.ndarray, fraction: float, seed: int) -> None:
    train, val = hold_out(numbered(labels), fraction, seed)
    assert sorted([*train.names, *val.names], key=int) == [str(i) for i in range(len(labels))]
    for c in np.unique(labels):
        held, total = (val.labels == c).sum(), (labels == c).sum()
        assert held == max(1, min(round(total * fraction), total - 1))
    assert [*map(int, val.names)] == sorted(map(int, val.names))
    np.testing.assert_array_equal(val.labels, labels[[int(name) for name in val.names]])


@given(labels_of_classes, st.integers(1, 200), st.integers(1, 200))
def test_a_limit_is_balanced_and_nested(labels: np.ndarray, few: int, many: int) -> None:
    few, many = sorted((few, many))
    small, large = limited(numbered(labels), few, 1), limited(numbered(labels), many, 1)
    assert len(small) == min(few, len(labels))
    assert set(small.names) <= set(large.names)
    counts, available = np.bincount(small.labels, minlength=6), np.bincount(labels, minlength=6)
    short = counts < available  # a class that could give more has at most one fewer than any other
    assert not short.any() or counts[short].min() >= counts.max() - 1


def test_another_seed_splits_otherwise() -> None:
    labels = np.repeat(np.arange(3), 30)
    assert hold_out(numbered(labels), 0.5, 0)[1].names != hold_out(numbered(labels), 0.5, 1)[1].names


def test_numbers_in_names_count() -> None:
    names = ["10.jpg", "9.jpg", "a10b2", "a10b10", "a9", "B", "", "a", "٣.jpg"]
    assert sorted(names, key=natural_key) == ["", "9.jpg", "10.jpg", "B", "a", "a9", "a10b2", "a10b10", "٣.jpg"]


def test_digits() -> None:
    source = open_source(SourceConfig(kind="digits"))
    assert (len(source.train), len(source.val)) == (1438, 359)
    assert source.classes == tuple("0123456789")
    pixels = np.asarray(source.train.contents)
    assert (pixels.shape, pixels.dtype, pixels.max()) == ((1438, 8, 8, 3), np.uint8, 255)
    assert np.bincount(source.val.labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]


# Image folders


def make_folder(root: Path, classes: dict[str, int], size: int = 4) -> None:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (size, size), (i, i, i)).save(root / name / f"{i}.png")


def folder(path: Path, **options: object) -> Source:
    return open_source(SourceConfig(kind="folder", path=str(path), **options))  # type: ignore[arg-type]


def test_a_folder_of_splits(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"cat": 12, "dog": 2, "10": 1, "9": 1})
    make_folder(tmp_path / "test", {"dog": 1, "cat": 1, "10": 1, "9": 2})
    (tmp_path / "train" / ".DS_Store").touch()
    (tmp_path / "train" / "cat" / ".hidden").touch()
    source = folder(tmp_path)
    assert source.classes == ("9", "10", "cat", "dog")
    assert source.train.names[:5] == ["train/9/0.png", "train/10/0.png", *(f"train/cat/{i}.png" for i in range(3))]
    assert source.train.names[-3] == "train/cat/11.png"
    assert source.val.labels.tolist() == [0, 0, 1, 2, 3]
    assert folder(tmp_path, limit=4).train.labels.tolist() == [0, 1, 2, 3]


def test_one_folder_is_split(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 10, "dog": 20})
    source = folder(tmp_path, val_fraction=0.3)
    assert np.bincount(source.train.labels).tolist() == [7, 14]
    assert np.bincount(source.val.labels).tolist() == [3, 6]
    assert not set(source.train.names) & set(source.val.names)


def test_the_listing_tells_a_changed_file(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 5, "dog": 5})
    before = folder(tmp_path).listing
    assert folder(tmp_path).listing == before
    Image.new("RGB", (40, 40)).save(tmp_path / "dog" / "3.png")
    assert folder(tmp_path).listing != before


def spoil(relative: str, content: bytes | None = b"") -> Callable[[Path], None]:
    """Put a file (or, without content, a folder) into the folder under test."""

    def change(root: Path) -> None:
        if content is None:
            (root / relative).mkdir(parents=True)
        else:
            (root / relative).write_bytes(content)

    return change


def remove(relative: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for file in (root / relative).iterdir():
            file.unlink()
        (root / relative).rmdir()

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (spoil("train/cat/notes.txt"), r"train/cat/notes\.txt is not an image file"),
        (spoil("train/cat/more.jpg", None), r"train/cat/more\.jpg is not an image file"),
        (spoil("train/readme.md"), r"train/readme\.md is a file where folders of classes"),
        (spoil("train/eel", None), "train/eel has no images"),
        (remove("val/dog"), "class 'dog' is in .*train but not in .*val"),
        (remove("train/dog"), "class 'dog' is in .*val but not in .*train"),
        (lambda root: (root / "val").rename(root / "valid"), "neither val/ nor test/"),
        (lambda root: (root / "train").rename(root / "training"), "not an image file|folders of classes"),
    ],
)
def test_a_bad_folder_is_one_sentence(tmp_path: Path, change: Callable[[Path], object], sentence: str) -> None:
    make_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    make_folder(tmp_path / "val", {"cat": 2, "dog": 2})
    change(tmp_path)
    with pytest.raises(UserError, match=sentence):
        folder(tmp_path)


def test_missing_empty_and_tiny_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        folder(tmp_path / "none")
    with pytest.raises(UserError, match="is empty"):
        folder(tmp_path)
    make_folder(tmp_path, {"cat": 1, "dog": 3})
    with pytest.raises(UserError, match=r"class 'cat' .* has no images in the train split"):
        folder(tmp_path)


def test_a_limit_below_the_number_of_classes(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 3, "dog": 3})
    with pytest.raises(UserError, match="limit is 1, fewer than the 2 classes"):
        folder(tmp_path, limit=1)


# NumPy arrays


def npz(path: Path, arrays: dict[str, np.ndarray], **options: object) -> Source:
    np.savez(path / "a.npz", **arrays)  # type: ignore[arg-type]
    return open_source(SourceConfig(kind="npz", path=str(path / "a.npz"), **options))  # type: ignore[arg-type]


X, Y = np.zeros((12, 5, 4, 3), np.uint8), np.arange(12) % 3


def test_arrays(tmp_path: Path) -> None:
    source = npz(tmp_path, {"x_train": X, "y_train": Y[:, None], "x_test": X[:6], "y_test": Y[:6]})
    assert source.classes == ("0", "1", "2")
    assert (len(source.train), len(source.val)) == (12, 6)
    named = npz(tmp_path, {"x": X, "y": Y, "classes": np.array(["ant", "bee", "cat"])}, val_fraction=0.25)
    assert named.classes == ("ant", "bee", "cat")
    assert np.bincount(named.val.labels).tolist() == [1, 1, 1]
    grey = npz(tmp_path, {"x": X[..., :1], "y": Y}, convert_rgb=True)
    assert np.asarray(grey.train.contents).shape[1:] == (5, 4)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"x_train": X, "y_train": Y}, "no array 'x_val'"),
        ({"images": X}, r"no array 'x_train'.*found images"),
        ({}, "found none"),
        ({"x": X.astype(np.float32), "y": Y}, "x is float32 .*expected uint8"),
        ({"x": X.transpose(0, 3, 1, 2), "y": Y}, r"shape \(12, 3, 5, 4\); expected uint8 \[N, height, width, 3\]"),
        ({"x": X[..., 0], "y": Y}, "grey images .*convert_rgb true"),
        ({"x": X, "y": Y[:5]}, "12 images but y has 5 labels"),
        ({"x": X, "y": Y.astype(float)}, "expected one integer per image"),
        ({"x": X, "y": Y - 1}, "the label -1"),
        ({"x": X, "y": Y * 2}, "class '1' .* has no images"),
        ({"x": X[:0], "y": Y[:0]}, "has no images"),
        ({"x": X, "y": Y, "classes": np.array(["a", "b"])}, "label outside 0 to 1"),
        ({"x": X, "y": np.array([None] * 12)}, "cannot be read as an .npz"),
    ],
)
def test_bad_arrays_are_one_sentence(tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        npz(tmp_path, arrays)


def test_a_file_that_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"no archive")
    for name, sentence in (("a.npz", "cannot be read"), ("b.npz", "does not exist")):
        with pytest.raises(UserError, match=sentence):
            open_source(SourceConfig(kind="npz", path=str(tmp_path / name)))


# CIFAR


class Python2Pickler(pickle._Pickler):
    """Pickles as Python 2 with an old NumPy did, which is how CIFAR was published: texts are byte strings."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012 (the pure-Python pickler's own table)

    def save_string(self, text: str | bytes) -> None:
        content = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)  # type: ignore[attr-defined]

    dispatch[bytes] = dispatch[str] = save_string  # type: ignore[assignment]


def python2_pickle(content: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar_files(release: Release, rng: np.random.Generator) -> dict[str, bytes]:
    """Files in the published layout, 20 images each, pixels by channel."""
    names = [f"class{i}".encode() for i in range(10)]
    files: dict[str, object] = {release.meta: {release.names_key.encode(): names}}
    for file in (*release.train, *release.test):
        files[file] = {
            b"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8),
            release.labels_key.encode(): [i % 10 for i in range(20)],
            b"filenames": [f"{file}_{i}.png".encode() for i in range(20)],
        }
    return {name: python2_pickle(content) for name, content in files.items()}


def publish(monkeypatch: pytest.MonkeyPatch, kind: str, folder: Path) -> Path:
    """A small release: its unpacked folder under ``folder`` and its archive beside it, which is returned."""
    release = RELEASES[kind]
    files = cifar_files(release, np.random.default_rng(0))
    (folder / release.folder).mkdir(parents=True)
    archive = folder / f"{kind}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            (folder / release.folder / name).write_bytes(content)
            entry = tarfile.TarInfo(f"{release.folder}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    archive_md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    changed = {**release.__dict__, "md5": md5, "archive_md5": archive_md5}
    monkeypatch.setitem(cifar.RELEASES, kind, Release(**changed))
    return archive


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_from_archive_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    archive = publish(monkeypatch, kind, tmp_path)
    inner = tmp_path / RELEASES[kind].folder
    sources = [open_source(SourceConfig(kind=kind, path=str(path))) for path in (archive, tmp_path, inner)]  # type: ignore[arg-type]
    assert len({source.listing for source in sources}) == 1
    source, count = sources[0], 20 * len(RELEASES[kind].train)
    assert (len(source.train), len(source.val)) == (count, 20)
    assert source.classes == tuple(f"class{i}" for i in range(10))
    assert source.train.labels.tolist() == [i % 10 for i in range(20)] * (count // 20)
    batch = pickle.loads((inner / RELEASES[kind].train[0]).read_bytes(), encoding="bytes")
    first = batch[b"data"][3]
    np.testing.assert_array_equal(source.train.contents[3], first.reshape(3, 32, 32).transpose(1, 2, 0))


def test_a_changed_cifar_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = publish(monkeypatch, "cifar10", tmp_path)
    batch = tmp_path / RELEASES["cifar10"].folder / "data_batch_2"
    for path in (archive, batch):
        path.write_bytes(path.read_bytes()[:-1])
        found, expected = hashlib.md5(path.read_bytes()).hexdigest(), "[0-9a-f]{32}"
        place = path if path == archive else tmp_path
        with pytest.raises(UserError, match=f"{path.name} is not .* its MD5 is {found}, expected {expected}"):
            open_source(SourceConfig(kind="cifar10", path=str(place)))
    batch.unlink()
    with pytest.raises(UserError, match="data_batch_2 is missing"):
        open_source(SourceConfig(kind="cifar10", path=str(tmp_path)))


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("this ran",)


def test_a_pickle_cannot_run_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"it names builtins\.print"):
        cifar._unpickle(pickle.dumps(Harmful()), "test_batch")
    assert capsys.readouterr().out == ""


def test_the_published_sums_are_there() -> None:
    assert RELEASES["cifar10"].archive_md5 == "c58f30108f718f92721af3b95e74349a"
    assert RELEASES["cifar100"].archive_md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    for release in RELEASES.values():
        assert set(release.md5) == {*release.train, *release.test, release.meta}
