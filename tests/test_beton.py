"""The .beton format: held to FFCV's own reader and writer, and to damage of every kind."""

from collections.abc import Callable
from pathlib import Path
import threading

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from numpy.lib import recfunctions
import pytest
from small_sets import SEED, change_card, random_images, write_card, write_set

from rlp.data import beton as beton_module
from rlp.data import format as beton_format
from rlp.data.beton import Beton, Card, card_path
from rlp.data.format import ALLOC, DESCRIPTORS_END, HEADER, IMAGE, METADATA, read_index, sample_crc32
from rlp.errors import UserError
from rlp.labels import baked_words


def write_small_pages(path: Path, images: list[np.ndarray]) -> Path:
    """Three draws, four classes, pages of 4 KiB: many pages in a small file."""
    return write_set(path, images, page_size=1 << 12)


def assert_holds(beton: Beton, images: list[np.ndarray], draws: int = 3) -> None:
    rows = np.arange(len(images))
    np.testing.assert_array_equal(beton.label, rows % 4)
    np.testing.assert_array_equal(beton.index, rows)
    np.testing.assert_array_equal(beton.words, baked_words(SEED, rows, draws, "train"))
    for row, image in enumerate(images):
        np.testing.assert_array_equal(beton.image(row), image)


@pytest.mark.parametrize("write", [write_set, write_small_pages])
def test_what_was_written_is_read(tmp_path: Path, write: Callable[..., Path]) -> None:
    images = random_images(300, 8, 9)
    beton = Beton.open(write(tmp_path / "a.beton", images), full_hash=True)
    assert_holds(beton, images)
    np.testing.assert_array_equal(beton.images(), np.stack(images))
    np.testing.assert_array_equal(beton.images(np.array([7, 3])), np.stack([images[7], images[3]]))
    np.testing.assert_array_equal(beton.draw_words, beton.words[:, :3])
    np.testing.assert_array_equal(beton.named("member"), beton.words[:, 5])
    with pytest.raises(UserError, match="no words 'nose'"):
        beton.named("nose")
    with pytest.raises(IndexError):
        beton.image(300)


def test_jpegs_are_decoded_by_threads_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton_module, "_DECODE_ROWS", 7)
    path = write_set(tmp_path / "a.beton", random_images(50, 8, 9), jpeg=True)
    beton, rows = Beton.open(path), np.array([3, 40, 3, 0])
    images = np.stack([beton.image(row) for row in range(50)])
    np.testing.assert_array_equal(beton.images(progress=True), images)
    np.testing.assert_array_equal(beton.images(rows), images[rows])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]
    with open(path, "r+b") as file:
        file.seek(int(beton.layout["image"][40]))
        file.write(bytes(60))
    with pytest.raises(UserError, match="the JPEG of sample 40 cannot be decoded"):
        Beton.open(path).images()


def test_pages_grow_for_a_large_sample(tmp_path: Path) -> None:
    images = [*random_images(9, 20, 20), *random_images(2, 70, 100), *random_images(9, 30, 20)]
    path = write_small_pages(tmp_path / "a.beton", images)
    beton = Beton.open(path)
    assert_holds(beton, images)
    assert read_index(path).page_size == 1 << 15  # the first power of two above 3 * 70 * 100
    with pytest.raises(UserError, match="different sizes"):
        beton.images()


def offsets(dtype: np.dtype) -> list[int]:
    assert dtype.fields is not None
    return [field[1] for field in dtype.fields.values()]


def test_dtypes_are_ffcv_s() -> None:
    types = pytest.importorskip("ffcv.types")
    fields = pytest.importorskip("ffcv.fields")
    integer = fields.IntField()
    ours = [fields.RGBImageField(), integer, integer, fields.NDArrayField(np.dtype("<i4"), (7,)), integer]
    theirs = types.get_metadata_type(ours)
    assert offsets(METADATA) == offsets(theirs)
    assert METADATA.itemsize == theirs.itemsize
    assert HEADER.itemsize == types.HeaderType.itemsize
    assert types.FieldDescType == beton_format.FIELD_DESC
    assert ALLOC == types.ALLOC_TABLE_TYPE
    np.testing.assert_array_equal(beton_format.field_descriptors(7)[3]["arguments"], ours[3].to_binary()[0])


def ffcv_loader(path: Path, **options):
    pytest.importorskip("ffcv")
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.ndarray import NDArrayDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor

    decoders = dict.fromkeys(("image", "label", "index", "words", "crc32"), IntDecoder)
    decoders |= {"image": SimpleRGBImageDecoder, "words": NDArrayDecoder}
    pipelines = {name: [decoder(), ToTensor()] for name, decoder in decoders.items()}
    return Loader(str(path), batch_size=16, num_workers=1, drop_last=False, pipelines=pipelines, **options)


def read_with_ffcv(loader) -> list[np.ndarray]:
    """image, label, index, words, crc32 of every sample, sorted by index."""
    batches = [[column.numpy().copy() for column in batch] for batch in loader]
    columns = [np.concatenate(column) for column in zip(*batches, strict=True)]
    return [column[np.argsort(columns[2][:, 0])] for column in columns]


@pytest.mark.slow
def test_ffcv_reads_our_file_page_by_page(tmp_path: Path) -> None:
    """FFCV's page cache and page-wise order need each sample on one page, and pages that may grow."""
    pytest.importorskip("ffcv")
    from ffcv.loader import OrderOption

    images = random_images(100, 40, 40)  # 4,800 bytes: larger than the page at first
    path = write_small_pages(tmp_path / "a.beton", images)
    loader = ffcv_loader(path, order=OrderOption.QUASI_RANDOM, os_cache=False)
    image, label, index, words, crc32 = read_with_ffcv(loader)
    np.testing.assert_array_equal(image, np.stack(images))
    np.testing.assert_array_equal(index[:, 0], np.arange(100))
    np.testing.assert_array_equal(label[:, 0], np.arange(100) % 4)
    np.testing.assert_array_equal(words.view(np.uint32), baked_words(SEED, np.arange(100), 3, "train"))
    np.testing.assert_array_equal(crc32[:, 0], Beton.open(path).layout["crc32"])


@pytest.mark.slow
def test_ffcv_and_we_decode_the_same_jpegs(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    across, down = np.meshgrid(ramp, ramp)
    smooth = [np.stack([across, down, np.full_like(down, 6 * k)], axis=2) for k in range(40)]
    path = write_set(tmp_path / "a.beton", smooth, jpeg=True)
    beton = Beton.open(path)
    image, label, _, words, _ = read_with_ffcv(ffcv_loader(path))
    np.testing.assert_array_equal(label[:, 0], beton.label)
    np.testing.assert_array_equal(words.view(np.uint32), beton.words)
    # FFCV asks libjpeg-turbo for its fast, less exact transform; two different images differ by far more.
    difference = np.abs(image.astype(int) - beton.images())
    assert difference.max() <= 8
    assert difference.mean() <= 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_we_read_ffcv_s_own_file(tmp_path: Path, mode: str) -> None:
    pytest.importorskip("ffcv")
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    images, path = random_images(50, 16, 12), tmp_path / "a.beton"
    words = baked_words(SEED, np.arange(50), 3, "train").astype(np.uint32).view(np.int32)
    crcs = [sample_crc32(image.tobytes(), words[row].tobytes()) for row, image in enumerate(images)]
    samples = [(image, row % 4, row, words[row], crcs[row]) for row, image in enumerate(images)]
    fields = {
        "image": RGBImageField(write_mode=mode),
        "label": IntField(),
        "index": IntField(),
        "words": NDArrayField(np.dtype("<i4"), (6,)),
        "crc32": IntField(),
    }
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(samples)
    write_card(path, images, 4, 3, "train", jpeg=mode == "jpg")
    beton = Beton.open(path)
    np.testing.assert_array_equal(beton.label, np.arange(50) % 4)
    np.testing.assert_array_equal(beton.words, baked_words(SEED, np.arange(50), 3, "train"))
    if mode == "raw":
        np.testing.assert_array_equal(beton.images(), np.stack(images))
        assert [beton.crc32(row) for row in range(50)] == crcs
    else:
        assert beton.images().shape == (50, 16, 12, 3)


def test_named_damage_is_named(tmp_path: Path) -> None:
    path = write_small_pages(tmp_path / "a.beton", random_images(30, 8, 8))
    whole = path.read_bytes()
    padding = DESCRIPTORS_END + IMAGE.itemsize  # three bytes that nothing reads
    spoiled = {
        "fewer than the header": whole[:20],
        "damaged or another file": whole[:-1],
        "card .* describes": whole[:padding] + b"\1" + whole[padding + 1 :],
        "version 3": b"\3" + whole[1:],
        "other fields": whole[: HEADER.itemsize + 1] + b"I" + whole[HEADER.itemsize + 2 :],
    }
    for sentence, content in spoiled.items():
        path.write_bytes(content)
        if sentence.startswith("fewer"):
            change_card(path, size=20)
        with pytest.raises(UserError, match=sentence):
            Beton.open(path)
        change_card(path, size=len(whole))


@pytest.mark.parametrize(
    ("region", "field", "value", "sentence"),
    [
        ("metadata", "mode", 2, "sample 4 has a size that does not fit its bytes"),
        ("metadata", "height", 0, "sample 4 has a size that does not fit its bytes"),
        ("metadata", "ptr", 1, "sample 4 points to bytes that are not its own"),
        ("metadata", "words", 1, "sample 4 points to bytes that are not its own"),
        ("alloc", "size", 2**64 - 4, "sample 4 lies outside the data"),  # pointer + size wraps around to a place inside
        ("alloc", "size", 0, "sample 4 lies outside the data"),
        ("alloc", "size", 5000, "allocations overlap"),
        ("alloc", "ptr", 2**64 - 1, "sample 4 lies outside the data"),
        ("alloc", "ptr", 0, "sample 4 lies outside the data"),
        ("alloc", "sample_id", 5, "sample 4 points to bytes that are not its own"),
    ],
)
def test_a_wrong_place_is_named(tmp_path: Path, region: str, field: str, value: int, sentence: str) -> None:
    path = write_set(tmp_path / "a.beton", random_images(9, 16, 16), jpeg=True)  # JPEGs may have any size
    whole = bytearray(path.read_bytes())
    if region == "metadata":
        records = np.frombuffer(whole, METADATA, 9, DESCRIPTORS_END)
        (records["image"] if field in (IMAGE.names or ()) else records)[field][4] = value
    else:
        table = int(np.frombuffer(whole, HEADER, 1)[0]["alloc_table"])
        np.frombuffer(whole, ALLOC, 18, table)[field][8] = value
    path.write_bytes(whole)
    with pytest.raises(UserError, match=sentence):
        read_index(path)


def test_full_hash_finds_a_changed_pixel(tmp_path: Path) -> None:
    path = write_set(tmp_path / "a.beton", random_images(30, 8, 8))
    place = int(read_index(path).metadata["image"]["ptr"][3])
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    Beton.open(path)
    with pytest.raises(UserError, match=r"damaged at sample 3: .* sha256"):
        Beton.open(path, full_hash=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schema": 3}, "schema 3"),
        ({"schema": 1}, "schema 1, of an older version; write the set again"),
        ({"num_samples": 31}, "'num_samples' is 31"),
        ({"num_samples": "30"}, "'num_samples' is '30'; expected a whole number"),
        ({"classes": ["a", "b"]}, "label 3"),
        ({"classes": [1, 2, 3, 4]}, "'classes'.*a list of names"),
        ({"draws": 2}, "'draws' is 2"),
        ({"draws": 10**15}, "'draws' is 1000000000000000"),
        ({"word_names": ["a"]}, "word_names"),
        ({"height": 9}, "'height' is 9"),
        ({"max_width": 9}, "'max_width' is 9"),
        ({"mean": [0.5]}, "three numbers"),
        ({"mean": [0.5, 0.5, 0.5]}, "'mean' is .* but 'pixels' give"),
        ({"std": [0.5, 0.5, 0.5]}, "'std' is .* but 'pixels' give"),
        ({"pixels": {"count": 1, "sum": [0, 0, 256], "square_sum": [0, 0, 65536]}}, "pixels from 0 to 255"),
        ({"pixels": {"count": 0, "sum": [0, 0, 0], "square_sum": [0, 0, 0]}}, "pixels from 0 to 255"),
        ({"first_sample": 1}, "is not the sample id"),
        ({"shards": [{"name": "b.beton"}]}, "a list of shards"),
        ({"sha256_card": "0"}, "was changed after it was written"),
        ({"sha256_index": "0"}, "sha256_index"),
        ({"colour": "red"}, "key 'colour'"),
        ({"source": []}, "a mapping"),
        ({"split": 3}, "a text"),
    ],
)
def test_a_wrong_card_is_one_sentence(tmp_path: Path, changes: dict[str, object], sentence: str) -> None:
    path = write_set(tmp_path / "a.beton", random_images(30, 8, 8))
    change_card(path, **changes)
    with pytest.raises(UserError, match=sentence):
        Beton.open(path)


def test_a_missing_file_or_card_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    with pytest.raises(UserError, match="does not exist"):
        Beton.open(path)
    write_set(path, random_images(30, 8, 8))
    card_path(path).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Beton.open(path)
    card_path(path).unlink()
    with pytest.raises(UserError, match="has no card"):
        Beton.open(path)


def test_a_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = write_set(tmp_path / "a.beton", random_images(30, 8, 8))
    card = Card.read(path)
    card.write(tmp_path / "b.beton")
    assert Card.read(tmp_path / "b.beton") == card


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"classes"', ' "classes"'),  # the same content in another text
        ('"class1"', '"class9"'),
        ('"raw"', '"r\\u0061w"'),
        ('"request": {}', '"request": {"a": NaN}'),
        ('"request": {}', '"request": {"a": 1e999}'),
        ('"request": {}', '"request": {"a": "\\ud800"}'),
        ('"request": {}', f'"request": {{"a": {"[" * 400}{"]" * 400}}}'),
        ('"request": {}', f'"request": {{"a": {"[" * 100_000}{"]" * 100_000}}}'),
        ('"request": {}', f'"request": {{"a": {"9" * 5000}}}'),
        ('"split": "train"', '"split": "train", "split": "train"'),
    ],
)
def test_an_edited_card_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = write_set(tmp_path / "a.beton", random_images(30, 8, 8))
    text = card_path(path).read_text()
    assert text.count(old) == 1
    card_path(path).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=r"was changed after it was written|not valid JSON"):
        Beton.open(path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    images = random_images(20, 8, 8)
    return write_small_pages(tmp_path_factory.mktemp("small") / "a.beton", images), images


numbers = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 2**15), st.integers(2**63 - 9, 2**63 + 9))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_number_in_the_index_can_lead_outside_the_file(
    small_file: tuple[Path, list[np.ndarray]], data: st.DataObject
) -> None:
    """Any one number changed, even with a card that agrees: a sentence, or reading that stays inside the file."""
    path, images = small_file
    whole = path.read_bytes()
    header = np.frombuffer(whole[: HEADER.itemsize], HEADER)
    place = int(header[0]["alloc_table"])
    kind = data.draw(st.sampled_from(["header", "metadata", "alloc"]))
    offset, dtype, count = {
        "header": (0, HEADER, 1),
        "metadata": (DESCRIPTORS_END, METADATA, 20),
        "alloc": (place, ALLOC, 40),
    }[kind]
    records = np.frombuffer(whole, dtype, count, offset).copy()
    flat = recfunctions.flatten_descr(dtype)
    row = data.draw(st.integers(0, count - 1))
    name = data.draw(st.sampled_from([name for name, _ in flat]))
    target = records["image"] if kind == "metadata" and name in (IMAGE.names or ()) else records
    width = target.dtype[name].itemsize
    target.view(np.recarray)[name][row : row + 1].view(f"u{width}")[:] = data.draw(numbers) % 2 ** (8 * width)
    changed = path.with_name("changed.beton")
    changed.write_bytes(whole[:offset] + records.tobytes() + whole[offset + records.nbytes :])
    try:
        write_card(changed, images, 4, 3, "train", jpeg=False)  # reads the index for its hash
        beton = Beton.open(changed)
        for sample in range(beton.num_samples):
            beton.image(sample)
        assert beton.words.shape == (20, 6)
    except UserError:
        pass
