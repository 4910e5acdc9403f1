"""Sharded sets: equal to the unsharded one to the bit, written anywhere, merged exactly or not at all."""

import contextlib
import dataclasses
import errno
import functools
import json
import multiprocessing
import os
from pathlib import Path
import shutil
import signal

import numpy as np
import pytest
from small_sets import change_card, random_images, write_set, write_shards

from data_prep import pages, writer
from data_prep.schema import OutputConfig, PrepareConfig
from data_prep.write_datasets import prepare
from rlp.data.beton import Beton
from rlp.data.card import Card, card_path
from rlp.data.shards import find_shards, merge_cards, shard_bounds, shard_path
from rlp.errors import UserError
from tests.image_folder import PAIR, left_in, make_source, request

OF_THE_FILES = ("size", "sha256", "sha256_index", "created", "shards")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path)


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 4 KiB: many files, several pages each."""
    monkeypatch.setattr(writer, "PageWriter", functools.partial(pages.PageWriter, page_size=1 << 12))


def assert_equal_sets(one: Beton, other: Beton) -> None:
    for name in ("label", "index", "words"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(one.layout["crc32"], other.layout["crc32"])
    for row in range(one.num_samples):
        np.testing.assert_array_equal(one.image(row), other.image(row))
    if one.card.height:
        np.testing.assert_array_equal(one.images(), other.images())
    for field in dataclasses.fields(Card):
        if field.name not in OF_THE_FILES:
            assert getattr(one.card, field.name) == getattr(other.card, field.name), field.name
    assert (one.card.mean, one.card.std) == (other.card.mean, other.card.std)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize(
    "image", [{"mode": "raw"}, {"mode": "jpg"}, {"mode": "smart", "smart_threshold": 12, "size": 5}]
)
def test_shards_hold_what_one_file_holds(tmp_path: Path, source: Path, image: dict[str, object], count: int) -> None:
    prepare(request(source, tmp_path / "one", image))
    cards, written = prepare(request(source, tmp_path / "many", image, shards=count))
    assert written
    assert [len(card.shards) for card in cards] == [count, count]
    for split in ("train", "val"):
        one, many = (Beton.open(tmp_path / name / f"{split}.beton", full_hash=True) for name in ("one", "many"))
        assert_equal_sets(many, one)
        assert len(many.maps) == count
        assert np.array_equal(np.unique(many.layout["file"]), np.arange(count))
    names = [shard_path(f"{split}.beton", s, count).stem for split in ("train", "val") for s in range(count)]
    files = sorted([f"{name}{ending}" for name in names for ending in (".beton", ".json")] + ["train.json", "val.json"])
    assert left_in(tmp_path / "many") == files


def test_images_that_differ_in_size(tmp_path: Path) -> None:
    """Every shard alone has one size, the set has not."""
    images = [*random_images(4, 6, 8), *random_images(4, 9, 7)]
    one = Beton.open(write_set(tmp_path / "one.beton", images, page_size=4096))
    many = write_shards(tmp_path / "many.beton", images, 2)
    assert Beton.open(shard_path(many, 1, 2)).card.height == 9
    assert (Beton.open(many).card.height, Beton.open(many).card.max_height, Beton.open(many).card.max_width) == (
        0,
        9,
        8,
    )
    np.testing.assert_array_equal(Beton.open(many).image(5), one.image(5))


def test_seven_shards_of_many_rows_in_any_order(tmp_path: Path) -> None:
    images = random_images(100, 6, 8)
    one = Beton.open(write_set(tmp_path / "one.beton", images, page_size=4096))
    many = Beton.open(write_shards(tmp_path / "many.beton", images, 7))
    rows = np.random.default_rng(0).permutation(100)[:40]
    np.testing.assert_array_equal(many.images(rows), np.stack([images[row] for row in rows]))
    np.testing.assert_array_equal(many.stored_words(rows), one.words[rows])
    np.testing.assert_array_equal(many.images(rows[:0]), np.empty((0, 6, 8, 3)))
    with pytest.raises(IndexError, match="expected 0 to 99"):
        many.images(np.array([100]))
    for row in rows:
        place = many.layout[row]
        content = many.maps[place["file"]][place["image"] : place["image"] + place["image_size"]]
        assert content.tobytes() == images[row].tobytes()


def test_a_shard_alone_knows_its_place(tmp_path: Path) -> None:
    images = random_images(20, 6, 8)
    shard = Beton.open(shard_path(write_shards(tmp_path / "a.beton", images, 3), 1, 3), full_hash=True)
    assert shard.index.tolist() == list(range(6, 13))
    np.testing.assert_array_equal(shard.words, Beton.open(tmp_path / "a.beton").words[6:13])
    np.testing.assert_array_equal(shard.image(2), images[8])


@pytest.mark.parametrize("count", range(1, 12))
def test_bounds_share_all_samples(count: int) -> None:
    bounds = [shard_bounds(number, count, 11) for number in range(count)]
    assert [row for first, last in bounds for row in range(first, last)] == list(range(11))
    assert {last - first for first, last in bounds} <= {11 // count, 11 // count + 1}


# Writing


def test_more_shards_than_samples(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UserError, match=r"output\.shards is 7, more than the 6 samples of the val split"):
        prepare(request(source, tmp_path / "out", shards=7))
    assert left_in(tmp_path / "out") == []


@pytest.mark.parametrize(("shards", "shard"), [(0, 0), (3, 3)])
def test_a_shard_that_is_none(shards: int, shard: int) -> None:
    with pytest.raises(UserError, match=rf"output\.shard is {shard}; expected less than output\.shards"):
        PrepareConfig(output=OutputConfig(train="a.beton", val="b.beton", shards=shards, shard=shard)).output.check()


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_what_is_whole_is_not_written_again(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    cards, _ = prepare(request(source, out, shards=3))
    before = times(out)
    assert prepare(request(source, out, shards=3)) == (cards, False)
    assert times(out) == before
    shard_path(out / "train.beton", 1, 3).unlink()
    card_path(shard_path(out / "train.beton", 1, 3)).unlink()
    again, written = prepare(request(source, out, shards=3, overwrite=True))
    assert written
    changed = {name for name, time in times(out).items() if time != before[name]}
    pair = {f"{split}-00001-of-00003.{ending}" for split in ("train", "val") for ending in ("beton", "json")}
    assert changed <= {*pair, "train.json", "val.json"}
    assert [card.source["fingerprint"] for card in again] == [card.source["fingerprint"] for card in cards]


def full_at(step: int, write: object):
    calls = iter(range(1000))

    def full(self: pages.PageWriter, data: bytes) -> None:
        if next(calls) == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)  # type: ignore[operator]

    return full


def test_a_full_disk_leaves_whole_shards_alone(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write = pages.PageWriter._write
    monkeypatch.setattr(pages.PageWriter, "_write", full_at(20, write))
    with pytest.raises(UserError, match="the disk is full"):
        prepare(request(source, out, shards=3))
    left = left_in(out)
    assert left
    assert "train.json" not in left
    assert not [name for name in left if "partial" in name]
    before = times(out)
    monkeypatch.setattr(pages.PageWriter, "_write", write)
    prepare(request(source, out, shards=3))
    assert {name: time for name, time in times(out).items() if name in before} == before
    Beton.open(out / "train.beton", full_hash=True)


@pytest.mark.parametrize(("number", "sentence"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file")])
def test_merging_onto_a_disk_that_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    path = write_shards(tmp_path / "a.beton", random_images(9, 4, 4), 2, merge=False)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    before = left_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(UserError, match=rf"a\.json could not be written: {sentence}"):
            merge_cards(path)
    assert left_in(tmp_path) == before
    merge_cards(path)


def killed_at(step: int, config: PrepareConfig) -> None:
    calls = iter(range(1000))
    write = pages.PageWriter._write

    def dying(self: pages.PageWriter, data: bytes) -> None:
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, data)

    pages.PageWriter._write = dying  # type: ignore[method-assign]
    prepare(config)


def test_a_killed_write_goes_on_where_it_was(tmp_path: Path, source: Path) -> None:
    context = multiprocessing.get_context("fork")
    prepare(request(source, tmp_path / "one", shards=3))
    for step in (0, 9, 17, 26):
        out = tmp_path / f"{step}"
        process = context.Process(target=killed_at, args=(step, request(source, out, shards=3)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with pytest.raises(UserError, match="does not exist"):
            Beton.open(out / "train.beton")
        before = {name: time for name, time in times(out).items() if "partial" not in name}
        prepare(request(source, out, shards=3))
        assert {name: time for name, time in times(out).items() if name in before} == before
        assert left_in(out) == left_in(tmp_path / "one")
        for name in left_in(out):
            if name.endswith(".beton"):
                assert (out / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_two_machines_write_one_set(tmp_path: Path, source: Path) -> None:
    """Each process writes its shards while the other does; a merge afterwards makes the set."""
    context = multiprocessing.get_context("fork")
    prepare(request(source, tmp_path / "one"))
    out = tmp_path / "out"
    configs = [request(source, out, shards=4, shard=shard) for shard in range(4)]
    processes = [context.Process(target=prepare, args=(config,)) for config in configs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert "train.json" not in left_in(out)
    for split in ("train", "val"):
        merge_cards(out / f"{split}.beton")
        assert_equal_sets(*(Beton.open(tmp_path / name / f"{split}.beton", full_hash=True) for name in ("out", "one")))


def test_one_shard_s_cards_are_returned(tmp_path: Path, source: Path) -> None:
    cards, _ = prepare(request(source, tmp_path, shards=2, shard=1))
    assert [(card.first_sample, card.num_samples) for card in cards] == [(10, 10), (3, 3)]


def test_another_number_of_shards_needs_overwrite(tmp_path: Path, source: Path) -> None:
    """One file, two shards, three, one file: each refused while the other is there, and cleared away on demand."""
    out, seen = tmp_path / "out", []
    for count in (0, 2, 3, 0):
        if seen:
            before = times(out)
            with pytest.raises(UserError, match=rf"output\.shards is {count}; --output\.overwrite true"):
                prepare(request(source, out, shards=count))
            assert times(out) == before
        prepare(request(source, out, shards=count, overwrite=True))
        beton = Beton.open(out / "train.beton", full_hash=True)
        assert len(beton.card.shards) == count
        assert find_shards(out / "train.beton") == ({count: list(range(count))} if count else {})
        assert (out / "train.beton").exists() == (count == 0)
        seen.append(beton.card.source["fingerprint"])
    assert len(set(seen)) == 1
    assert left_in(out) == PAIR


def test_a_stray_card_is_noticed_before_the_work(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "val.json").write_text("{}")
    with pytest.raises(UserError, match=r"val\.json is there, .* --output\.overwrite true replaces it"):
        prepare(request(source, out, shards=2))
    assert left_in(out) == ["val.json"]
    prepare(request(source, out, shards=2, overwrite=True))
    Beton.open(out / "val.beton", full_hash=True)


# Merging and opening


def drop(path: Path) -> None:
    shard_path(path, 1, 3).unlink()
    card_path(shard_path(path, 1, 3)).unlink()


def swap(path: Path) -> None:
    for one, other in ((1, 2),):
        for of in (lambda p: p, card_path):
            first, second = of(shard_path(path, one, 3)), of(shard_path(path, other, 3))
            first.rename(path.with_name("x"))
            second.rename(first)
            path.with_name("x").rename(second)


def copy(path: Path, name: Path) -> None:
    shutil.copy(path, name)
    shutil.copy(card_path(path), card_path(name))


MERGES = {
    "missing": (drop, r"a-00001-of-00003\.beton is missing; .*a\.beton cannot be merged from 2 of 3 shards"),
    "without its card": (lambda p: card_path(shard_path(p, 1, 3)).unlink(), r"00001-of-00003\.json is missing"),
    "without its file": (lambda p: shard_path(p, 1, 3).unlink(), r"00001-of-00003\.beton does not exist"),
    "cut": (lambda p: os.truncate(shard_path(p, 1, 3), 9000), r"00001-of-00003\.beton has 9000 bytes"),
    "foreign seed": (lambda p: change_card(shard_path(p, 1, 3), words_seed=9), "cards differ in 'words_seed'"),
    "foreign request": (lambda p: change_card(shard_path(p, 1, 3), request={"a": 1}), "cards differ in 'request'"),
    "foreign classes": (
        lambda p: change_card(shard_path(p, 1, 3), classes=["a", "b", "c", "d"]),
        r"00001-of-00003\.beton is of another set than a-00000-of-00003\.beton: .* 'classes'",
    ),
    "foreign listing": (
        lambda p: change_card(
            shard_path(p, 1, 3), source={"kind": "test", "name": "test", "fingerprint": "0", "listing": "1"}
        ),
        r"cards differ in 'source\.listing'",
    ),
    "no fingerprint": (
        lambda p: [change_card(shard_path(p, s, 3), source={"kind": "test"}) for s in range(3)],
        "'source' has no fingerprint",
    ),
    "in another order": (swap, "holds the samples 6 to 8; expected 3 to 5 of 9"),
    "overlapping": (
        lambda p: write_set(shard_path(p, 1, 3), random_images(5, 4, 4), first_sample=2, page_size=4096),
        "the shards overlap or leave a gap",
    ),
    "with a gap": (
        lambda p: write_set(shard_path(p, 1, 3), random_images(1, 4, 4), first_sample=4, page_size=4096),
        "the shards overlap or leave a gap",
    ),
    "of two counts": (lambda p: copy(shard_path(p, 1, 3), shard_path(p, 1, 4)), "has shards of 3 and of 4"),
    "one too many": (lambda p: copy(shard_path(p, 1, 3), shard_path(p, 3, 3)), "is not one of 3 shards"),
    "a file of that name": (lambda p: p.touch(), "under a name that no file has"),
    "somebody's card": (lambda p: card_path(p).write_text("{}"), "has schema None"),
}


@pytest.mark.parametrize("case", MERGES)
def test_a_merge_is_exact_or_refused(tmp_path: Path, case: str) -> None:
    path = write_shards(tmp_path / "a.beton", random_images(9, 4, 4), 3, merge=False)
    spoil, sentence = MERGES[case]
    spoil(path)
    before = left_in(tmp_path)
    with pytest.raises(UserError, match=sentence):
        merge_cards(path)
    assert left_in(tmp_path) == before


def test_nothing_to_merge(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"has no shards to merge; expected files like a-00000-of-00004\.beton"):
            merge_cards(folder / "a.beton")


def test_merging_twice_keeps_what_was_found_since(tmp_path: Path) -> None:
    path = write_shards(tmp_path / "a.beton", random_images(9, 4, 4), 3)
    card = dataclasses.replace(Card.read(path), duplicates={"pairs": [[0, 1]]})
    card.write(path)
    assert merge_cards(path) == card == Beton.open(path).card


OPENS = {
    "a shard is missing": (drop, r"a-00001-of-00003\.beton does not exist"),
    "a shard was cut": (lambda p: os.truncate(shard_path(p, 1, 3), 9000), r"00001-of-00003\.beton has 9000 bytes"),
    "a shard was replaced": (
        lambda p: write_set(
            shard_path(p, 1, 3), random_images(3, 4, 4, seed=1), first_sample=3, page_size=4096, classes=2
        ),
        r"sha256_index differs",
    ),
    "shards in another order": (
        lambda p: change_card(p, shards=json.loads(card_path(p).read_text())["shards"][::-1]),
        "'sha256' is .* but its shards give",
    ),
    "a shard named twice": (
        lambda p: change_card(p, shards=[*(3 * [json.loads(card_path(p).read_text())["shards"][0]])]),
        "its shards give",
    ),
    "a file in the way": (lambda p: p.touch(), "is in the way of the shards"),
    "a shard elsewhere": (
        lambda p: change_card(
            p, shards=[{**s, "name": "/x/" + s["name"]} for s in json.loads(card_path(p).read_text())["shards"]]
        ),
        "expected a list of shards",
    ),
}


@pytest.mark.parametrize("case", OPENS)
def test_a_sharded_set_that_is_not_whole_is_refused(tmp_path: Path, case: str) -> None:
    path = write_shards(tmp_path / "a.beton", random_images(9, 4, 4), 3)
    spoil, sentence = OPENS[case]
    spoil(path)
    with pytest.raises(UserError, match=sentence):
        Beton.open(path)


def test_a_damaged_sample_is_named_by_its_id(tmp_path: Path) -> None:
    path = write_shards(tmp_path / "a.beton", random_images(9, 4, 4), 3)
    with open(shard_path(path, 2, 3), "r+b") as file:
        file.seek(int(Beton.open(path).layout["image"][7]))
        file.write(b"\1\2\3")
    with pytest.raises(UserError, match=r"00002-of-00003\.beton is damaged at sample 7: "):
        Beton.open(path, full_hash=True)


# A file that changes under us


def replaced(path: Path) -> None:
    shutil.copy(path, path.with_name("new"))
    path.with_name("new").replace(path)


def rewritten(path: Path) -> None:
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))  # clocks tick in ms; this test does not wait


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("change", [replaced, rewritten, lambda path: os.truncate(path, 9000), Path.unlink])
def test_a_file_that_changes_under_us(tmp_path: Path, change, sharded: bool) -> None:
    path, images = tmp_path / "a.beton", random_images(40, 8, 8)
    if sharded:
        write_shards(path, images, 3)
    else:
        write_set(path, images, page_size=4096)
    beton = Beton.open(path)
    beton.check_unchanged()
    change(shard_path(path, 1, 3) if sharded else path)
    for read in (beton.check_unchanged, beton.images, lambda: beton.words):
        with pytest.raises(UserError, match=r"(replaced, truncated or rewritten|removed) while it was in use"):
            read()
    with contextlib.suppress(UserError):  # a single image is a sentence or whole, never a signal
        beton.image(39)


def test_an_open_set_lets_go_of_its_files(tmp_path: Path) -> None:
    path = write_shards(tmp_path / "a.beton", random_images(9, 4, 4), 3)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        Beton.open(path).images()
    assert len(os.listdir("/proc/self/fd")) <= before + 3
