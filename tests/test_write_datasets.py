"""Writing data sets: what is stored, equal bytes however it is done, and the script."""

import io
import json
from pathlib import Path
import signal

import numpy as np
from PIL import Image
import pytest
from small_sets import random_images

from data_prep import workers
from data_prep.encode import ImageOptions, Sample, encode_chunk
from data_prep.samples import Samples
from data_prep.schema import PrepareConfig
from data_prep.write_datasets import main, prepare
from rlp.data.beton import Beton
from rlp.data.card import Card
from rlp.errors import UserError
from rlp.labels import baked_words
from tests.image_folder import PAIR, ROOT, left_in, make_source, options_of, request, run_script


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path)


def test_the_pair_and_its_cards(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    cards, written = prepare(request(source, out))
    assert written
    assert left_in(out) == PAIR
    for split, count in (("train", 20), ("val", 6)):
        beton = Beton.open(out / f"{split}.beton", full_hash=True)
        files = sorted((source / split).rglob("*.*"), key=lambda path: (path.parent.name, int(path.stem)))
        np.testing.assert_array_equal(beton.images(), np.stack([np.asarray(Image.open(file)) for file in files]))
        assert beton.label.tolist() == [0] * (count // 2) + [1] * (count // 2)
        np.testing.assert_array_equal(beton.words, baked_words(0, np.arange(count), 3, split))
        card = beton.card
        assert (card.split, card.num_samples, card.classes) == (split, count, ("ant", "bee"))
        assert (card.height, card.width, card.image_mode, card.draws) == (10, 12, "raw", 3)
        pixels = beton.images().reshape(-1, 3) / 255
        np.testing.assert_allclose(card.mean, pixels.mean(0), rtol=1e-12)
        np.testing.assert_allclose(card.std, pixels.std(0), rtol=1e-12)
        assert card.source["name"] == "images"
        assert str(tmp_path) not in card.to_json()
    assert cards[0].source["fingerprint"] != cards[1].source["fingerprint"]


def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "CHUNK", 3)
    cards = {}
    for count in (0, 1, 2):
        written, _ = prepare(request(source, tmp_path / f"{count}", {"mode": "jpg", "max_side": 8}, workers=count))
        cards[count] = [json.loads(card.to_json()) for card in written]
        for card in cards[count]:
            del card["created"], card["sha256_card"]
    assert cards[0] == cards[1] == cards[2]
    for name in ("train.beton", "val.beton"):
        assert len({(tmp_path / f"{count}" / name).read_bytes() for count in (0, 1, 2)}) == 1


def test_what_is_there_is_left_alone(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    first, _ = prepare(request(source, out))
    before = {name: (out / name).stat().st_mtime_ns for name in PAIR}
    assert prepare(request(source, out)) == (first, False)
    with pytest.raises(UserError, match=r"another configuration or source; --output\.overwrite true"):
        prepare(request(source, out, words={"seed": 1}))
    (source / "train" / "bee" / "9.png").unlink()
    with pytest.raises(UserError, match="another configuration or source"):
        prepare(request(source, out))
    assert {name: (out / name).stat().st_mtime_ns for name in PAIR} == before
    second, written = prepare(request(source, out, overwrite=True))
    assert written
    assert second[0].num_samples == 19
    assert left_in(out) == PAIR


def test_a_stray_file_is_not_overwritten(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.beton").write_text("precious")
    with pytest.raises(UserError, match="overwrite true replaces what is there"):
        prepare(request(source, out))
    assert (out / "train.beton").read_text() == "precious"
    prepare(request(source, out, overwrite=True))
    assert left_in(out) == PAIR


# How images are stored


def encoded(path: Path, **options: object):
    return encode_chunk([Sample("x", 0, path)], ImageOptions(**options)).images[0]  # type: ignore[arg-type]


def test_sizes_and_modes(tmp_path: Path) -> None:
    picture = Image.fromarray(random_images(1, 40, 100)[0])
    jpeg, png = tmp_path / "a.jpg", tmp_path / "a.png"
    picture.save(jpeg)
    picture.save(png)
    assert encoded(png, max_side=50)[:3] == (1, 20, 50)
    assert encoded(png, max_side=100).content == picture.tobytes()
    assert encoded(png, size=16)[:3] == (1, 16, 16)
    assert encoded(jpeg, mode="jpg").content == jpeg.read_bytes()
    small = encoded(jpeg, mode="jpg", max_side=50)
    assert Image.open(io.BytesIO(small.content)).size == (50, 20)
    assert len(encoded(png, mode="jpg", quality=20).content) < len(encoded(png, mode="jpg").content)
    assert encoded(png, mode="smart", smart_threshold=12_000).mode == 1
    assert encoded(png, mode="smart", smart_threshold=11_999).mode == 0
    assert encoded(png, max_side=1)[:3] == (1, 1, 1)


def test_shrinking_averages_over_areas(tmp_path: Path) -> None:
    pixels = random_images(1, 8, 8)[0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    stored = np.frombuffer(encoded(tmp_path / "a.png", size=4).content, np.uint8).reshape(4, 4, 3)
    expected = pixels.reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(stored - expected).max() <= 1  # Pillow rounds after each of the two directions


def test_the_fingerprint_tells_name_label_and_content_apart() -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    base = Sample("a", 1, pixels)
    others = [
        Sample("b", 1, pixels),
        Sample("a", 2, pixels),
        Sample("a", 1, pixels + 1),
        Sample("a", 1, pixels.reshape(3, 2, 3)),
    ]
    digests = {encode_chunk([sample], ImageOptions()).digests[0] for sample in (base, *others)}
    assert len(digests) == 5


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "grey"), ("P", "palette"), ("RGBA", "RGBA"), ("CMYK", "CMYK"), ("1", "black")]
)
def test_other_colours_are_refused_or_converted(tmp_path: Path, mode: str, kind: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(path)
    with pytest.raises(UserError, match=rf"{path} is not RGB but {kind}.*--source.convert_rgb true converts"):
        encoded(path)
    assert encoded(path, convert_rgb=True).content == bytes([255] * 48)


# The script


@pytest.mark.slow
def test_the_script_from_another_folder(tmp_path: Path) -> None:
    pytest.importorskip("fastargs")
    config = ROOT / "configs" / "data" / "digits.yaml"
    process = run_script("--config", str(config), "--source.limit", "50", cwd=tmp_path)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert "data/digits/train.beton: 50 images of 10 classes, 32x32 px raw, 32 draws" in output
    assert Beton.open(tmp_path / "data/digits/val.beton", full_hash=True).images().shape == (50, 32, 32, 3)


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastargs")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main(options_of(tmp_path / "none", tmp_path / "out")) == 2
        assert main(options_of(source, tmp_path / "out", "--source.limt", "3")) == 2
        assert main(options_of(source, tmp_path / "out")) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == f"error: {tmp_path / 'none'} is not a folder; source.path must name a folder of images"
    assert errors[1].startswith("error: unknown key --source.limt; did you mean --source.limit?")
    assert len(errors) == 2


def test_cards_of_two_writes_differ_in_the_time_alone(tmp_path: Path, source: Path) -> None:
    one, two = (prepare(request(source, tmp_path / name))[0][0] for name in ("one", "two"))
    assert {**one.__dict__, "created": ""} == {**two.__dict__, "created": ""}
    assert Card.read(tmp_path / "one" / "train.beton") == one


def test_every_data_config_loads() -> None:
    pytest.importorskip("fastargs")
    from rlp.config import parse

    files = sorted((ROOT / "configs" / "data").glob("*.yaml"))
    assert {"digits", "cifar10", "cifar100", "imagenet", "folder", "npz"} <= {file.stem for file in files}
    for file in files:
        assert parse(PrepareConfig, ["--config", str(file)]).output.train.startswith(f"data/{file.stem}/")


def test_samples_are_sent_in_bounded_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer never has more than a few chunks in flight, however slowly they are taken."""
    monkeypatch.setattr(workers, "CHUNK", 1)
    asked = []

    class Watched(Samples):
        def rows(self, start: int, stop: int) -> list[Sample]:
            asked.append(start)
            return super().rows(start, stop)

    samples = Watched([str(i) for i in range(50)], np.zeros(50, np.int64), np.zeros((50, 2, 2, 3), np.uint8))
    with workers.Encoder(1) as encoder:
        for taken, _ in enumerate(encoder.chunks(samples, ImageOptions())):
            assert len(asked) <= taken + 4
    assert len(asked) == 50
