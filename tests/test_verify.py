"""Verifying a set: every kind of damage is named, by sample where there is one, and a whole set passes."""

from collections.abc import Callable
import dataclasses
import errno
import os
from pathlib import Path
import zlib

import numpy as np
import pytest
from small_sets import change_card, random_images, write_card, write_set, write_shards

from rlp.data import verify as verify_module
from rlp.data.beton import Beton
from rlp.data.card import Card, card_path
from rlp.data.format import DESCRIPTORS_END, METADATA, WORD_BYTES
from rlp.data.shards import shard_path
from rlp.data.verify import verify
from rlp.errors import UserError

PAGE = 4096


def change(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def flip(path: Path, offset: int) -> None:
    change(path, offset, bytes([path.read_bytes()[offset] ^ 1]))


def place(path: Path, row: int, column: str) -> int:
    return int(Beton.open(path).layout[column][row])


@pytest.fixture(params=["raw", "jpg"])
def small_set(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_set(tmp_path / "a.beton", random_images(60, 8, 9), jpeg=request.param == "jpg", page_size=PAGE)


@pytest.mark.parametrize("window", [16 << 20, PAGE, 1000])  # the last cuts samples in two
def test_a_whole_set_is_ok(small_set: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(verify_module, "_WINDOW", window)
    report = verify(small_set)
    assert report.ok, report.text
    assert (report.num_samples, report.size) == (60, small_set.stat().st_size)
    assert report.text == f"{small_set}: 60 samples, {report.size} bytes: all as they were written"


def test_sizes_that_differ_and_many_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_COUNTED", 100)
    images = [*random_images(9, 20, 20), *random_images(2, 70, 100), *random_images(9, 30, 20)]
    assert verify(write_set(tmp_path / "a.beton", images, page_size=PAGE)).ok
    many = write_shards(tmp_path / "many.beton", images, 4)
    assert verify(many).ok
    assert all(verify(shard_path(many, number, 4)).ok for number in range(4))


@pytest.mark.parametrize("window", [16 << 20, 1000])
def test_damaged_samples_are_named(small_set: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(verify_module, "_WINDOW", window)
    flip(small_set, place(small_set, 41, "image") + 150)
    flip(small_set, place(small_set, 7, "words") + 2)
    report = verify(small_set)
    assert not report.ok
    assert report.damaged == [
        (7, "its random words are not those of seed 5"),
        (41, "its image is damaged: the crc32 differs"),
    ]
    assert report.findings == [
        f"{small_set} is damaged in its samples: its contents differ from the card's sha256",
    ]
    assert "sample 7: its random words" in report.text
    with pytest.raises(UserError, match="is damaged at sample 7 and 1 more: "):
        Beton.open(small_set, full_hash=True)


def test_many_damaged_samples_are_counted(small_set: Path) -> None:
    first = place(small_set, 0, "image")
    table = int(Beton.open(small_set).files[0].size - 2 * 60 * 24)
    change(small_set, first, bytes(table - first))
    report = verify(small_set)
    assert [sample for sample, _ in report.damaged] == list(range(60))
    assert "40 more damaged samples" in report.text
    assert len(report.text.splitlines()) == 22


def test_damage_between_samples(small_set: Path) -> None:
    flip(small_set, place(small_set, 0, "image") - 1)
    report = verify(small_set)
    assert report.damaged == []
    assert "is damaged in what lies between its samples" in report.text
    with pytest.raises(UserError, match="is damaged outside of the samples: "):
        Beton.open(small_set, full_hash=True)


def test_words_of_another_seed(small_set: Path) -> None:
    change_card(small_set, words_seed=6)
    assert [what for _, what in verify(small_set).damaged] == ["its random words are not those of seed 6"] * 60


def test_a_card_with_the_moments_of_other_pixels(small_set: Path) -> None:
    card = Card.read(small_set)
    other = {**card.pixels, "sum": [card.pixels["sum"][0] + 1, *card.pixels["sum"][1:]]}
    dataclasses.replace(card, pixels=other).write(small_set)
    Beton.open(small_set, full_hash=True)
    assert verify(small_set).findings == [f"{small_set}: mean and std of its card are not those of the pixels"]


def test_a_jpeg_that_does_not_decode(tmp_path: Path) -> None:
    """Stored like that: checksum and hash agree with it."""
    images = random_images(20, 8, 9)
    path = write_set(tmp_path / "a.beton", images, jpeg=True, page_size=PAGE)
    beton = Beton.open(path)
    for row, content in ((3, b"\xff\xd8\xff\xd9" + bytes(int(beton.layout["image_size"][3]) - 4)), (5, None)):
        image = int(beton.layout["image"][row])
        if content is None:  # the size in the JPEG's frame header: FF C0, length, precision, height
            stored = bytes(beton.maps[0][image : image + int(beton.layout["image_size"][row])])
            content = bytearray(stored)
            content[stored.index(b"\xff\xc0") + 6] += 1
        words = bytes(beton.maps[0][beton.layout["words"][row] :][: 6 * WORD_BYTES])
        change(path, image, bytes(content))
        record = np.array([zlib.crc32(words, zlib.crc32(content))], "<i8").tobytes()
        change(path, DESCRIPTORS_END + row * METADATA.itemsize + METADATA.fields["crc32"][1], record)  # type: ignore[index]
    write_card(path, images, 4, 3, "train", jpeg=True)
    Beton.open(path, full_hash=True)
    report = verify(path)
    assert [sample for sample, _ in report.damaged] == [3, 5]
    assert report.damaged[0][1].startswith("its JPEG cannot be decoded")
    assert report.damaged[1][1] == "its JPEG is (9, 9, 3), expected (8, 9, 3)"


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        lambda path: card_path(path).unlink(),
        lambda path: card_path(path).write_bytes(b"\xff\xfe{"),
        lambda path: os.truncate(path, 100),
        lambda path: flip(path, DESCRIPTORS_END),
        lambda path: flip(card_path(path), 300),
    ],
)
def test_what_cannot_be_opened_is_a_finding(small_set: Path, spoil: Callable[[Path], object]) -> None:
    spoil(small_set)
    with pytest.raises(UserError) as refusal:
        Beton.open(small_set)
    report = verify(small_set)
    assert (report.ok, report.damaged, report.findings) == (False, [], [str(refusal.value)])
    assert report.text == str(refusal.value)


def test_the_shards_own_cards_are_read(tmp_path: Path) -> None:
    path = write_shards(tmp_path / "a.beton", random_images(20, 8, 9), 3)
    card = card_path(shard_path(path, 1, 3))
    whole = card.read_bytes()
    for content in (whole.replace(b"class1", b"class9"), card_path(shard_path(path, 0, 3)).read_bytes()):
        card.write_bytes(content)
        Beton.open(path)
        assert "a-00001-of-00003.json" in verify(path).text
        with pytest.raises(UserError, match=r"a-00001-of-00003\.json"):
            Beton.open(path, full_hash=True)
    card.unlink()  # not needed to read the set
    assert verify(path).ok
    Beton.open(path, full_hash=True)


def test_a_bad_sector_costs_its_samples_only(small_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = place(small_set, 30, "image") + 5
    read = os.pread

    def failing(handle: int, size: int, offset: int) -> bytes:
        if offset <= bad < offset + size:
            raise OSError(errno.EIO, "Input/output error")
        return read(handle, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    report = verify(small_set)
    assert [sample for sample, _ in report.damaged] == [30]
    assert "Input/output error" in report.damaged[0][1]
    assert "cannot be read at byte 0: Input/output error" in report.text


def test_a_file_replaced_meanwhile(small_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = verify_module._verify_samples

    def replaced(*arguments: object) -> None:
        check(*arguments)  # type: ignore[arg-type]
        copy = small_set.with_name("copy")
        copy.write_bytes(small_set.read_bytes())
        copy.replace(small_set)

    monkeypatch.setattr(verify_module, "_verify_samples", replaced)
    assert verify(small_set).findings == [f"{small_set} was replaced, truncated or rewritten while it was in use"]


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a window is ever asked of the file, and samples come out of it."""
    path = write_set(tmp_path / "a.beton", random_images(200, 16, 16), page_size=PAGE)
    monkeypatch.setattr(verify_module, "_WINDOW", 4 * PAGE)
    read, sizes = os.pread, []

    def watched(handle: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return read(handle, size, offset)

    monkeypatch.setattr(os, "pread", watched)
    assert verify(path).ok
    assert max(sizes) == 4 * PAGE
    assert sum(sizes) == path.stat().st_size  # each byte once
