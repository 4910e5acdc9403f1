"""The benchmark of loaders: made sets, checks that find planted errors, the page cache, whole runs at tiny sizes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
import json
import os
from pathlib import Path
import re
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import harness, loader, stale
from benchmarks.loader_cases import CASES, Case, Contender, Epochs, Item
from benchmarks.loader_checks import why_wrong
from benchmarks.loader_contenders import BARE, CONTENDERS, OURS, PILLOW, RESIDENT, move_picture
from benchmarks.loader_plot import write_plot
from benchmarks.loader_process import ContenderError, Process, cached_share, drop_cache
from benchmarks.loader_sets import CLASSES, ImageSet, make_sets
from benchmarks.loader_tables import targets
from rlp.data.beton import Beton

pytestmark = pytest.mark.timeout(200)

CPU = torch.device("cpu")
SMALL, LARGE = 600, 160
BY_KEY = {case.key: case for case in CASES}
BY_NAME = {contender.name: contender for contender in CONTENDERS}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageSet]:
    pytest.importorskip("sklearn")
    return make_sets(tmp_path_factory.mktemp("sets"), SMALL, LARGE)


def test_the_forms_of_a_set_hold_the_same_images(sets: dict[str, ImageSet]) -> None:
    for images in sets.values():
        pixels, labels, beton = images.pixels(), images.labels(), Beton.open(images.beton)
        assert np.bincount(labels, minlength=CLASSES).min() > 0
        assert np.array_equal(beton.label, labels)
        for i in (0, 7, len(labels) - 1):
            assert np.array_equal(beton.image(i), pixels[i])
    assert len(sets["jpeg"].jpegs()) == LARGE
    sizes = [path.stat().st_size for path in sets["jpeg"].jpegs()]
    assert 18_000 < np.mean(sizes) < 32_000
    assert len({sets["small"].pixels()[i].tobytes() for i in range(SMALL)}) == SMALL


def serial(case: Case, images: ImageSet, device: torch.device) -> Epochs:
    """The case done one by one with Pillow: what a right contender is."""
    from PIL import Image

    pixels, labels = images.pixels(), images.labels()

    def epoch(number: int) -> Iterator[Item]:
        rng = np.random.default_rng(number)
        order = rng.permutation(len(labels)) if case.train else np.arange(len(labels))
        for first in range(0, len(order), case.batch_size):
            rows = order[first : first + case.batch_size]
            if len(rows) == case.batch_size or not case.train:
                moved = [move_picture(case, (Image.fromarray(pixels[i]), 0, 0), rng)[0] for i in rows]
                image = torch.from_numpy(np.stack(moved)).permute(0, 3, 1, 2)
                yield image, torch.from_numpy(labels[rows]), torch.from_numpy(rows)

    return epoch


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_a_right_epoch_passes(case: Case, sets: dict[str, ImageSet]) -> None:
    images = sets[case.images]
    assert why_wrong(serial(case, images, CPU)(0), case, images) is None


def change(place: int, alter: Callable[[torch.Tensor], torch.Tensor], item: Item) -> Item:
    parts = [part.clone() for part in item]
    parts[place] = alter(parts[place])
    return parts[0], parts[1], parts[2]


def repeat_a_sample(item: Item) -> Item:
    image, label, index = (part.clone() for part in item)
    for part in (image, label, index):
        part[1] = part[0]
    return image, label, index


WRONG: dict[str, tuple[str, Callable[[Item], Item], str]] = {
    "a label": ("a", partial(change, 1, lambda label: (label + 1) % CLASSES), "labels are not those"),
    "floats": ("a", partial(change, 0, lambda image: image.float()), r"images are torch\.float32"),
    "too small": ("d", partial(change, 0, lambda image: image[..., :100]), "expected uint8 of 224 px"),
    "twice": ("a", repeat_a_sample, "comes 2 times in an epoch"),
    "one pixel off": ("e", partial(change, 0, lambda image: image.roll(1, -1)), "pixels differ"),
    "one grey level": ("a", partial(change, 0, lambda image: image ^ 1), "pixels differ from the original's by 1.00"),
    "another's image": ("b", partial(change, 0, lambda image: image.roll(1, 0)), "are no shift of their original"),
    "another's crop": ("c", partial(change, 0, lambda image: image.roll(1, 0)), "are found in their original"),
    "upside down": ("c", partial(change, 0, lambda image: image.flip(-2)), "are found in their original"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_planted_error_is_found(name: str, sets: dict[str, ImageSet]) -> None:
    key, alter, message = WRONG[name]
    case = BY_KEY[key]
    images = sets[case.images]
    reason = why_wrong((alter(item) for item in serial(case, images, CPU)(0)), case, images)
    assert reason is not None
    assert re.search(message, reason), reason


@pytest.mark.parametrize(
    ("key", "lazy", "message"),
    [
        ("b", {"flip": False}, "1 directions"),
        ("b", {"padding": 0}, r"have \d different shifts"),
        ("b", {"padding": 6}, "no shift"),
        ("c", {"flip": False}, "0% are mirrored"),
        ("c", {"train": False}, "crops cover"),
        ("e", {"train": True}, "pixels differ|samples come"),
    ],
)
def test_another_augmentation_is_found(key: str, lazy: dict[str, Any], message: str, sets: dict[str, ImageSet]) -> None:
    case = BY_KEY[key]
    images = sets[case.images]
    done = serial(replace(case, **lazy), images, CPU)(0)
    if not lazy.get("train", True):
        done = list(done)[: LARGE // case.batch_size]
    reason = why_wrong(done, case, images)
    assert reason is not None
    assert re.search(message, reason), reason


@pytest.mark.parametrize("count", [1, -1])
def test_a_missing_batch_is_found(count: int, sets: dict[str, ImageSet]) -> None:
    case, images = BY_KEY["a"], sets["small"]
    batches = list(serial(case, images, CPU)(0))[:count]
    assert why_wrong(batches, case, images) == f"{256 * len(batches)} samples come in an epoch; expected 512"


@pytest.mark.parametrize(("name", "key"), [(RESIDENT, "a"), (RESIDENT, "b"), (BARE, "b"), (PILLOW, "c")])
def test_contenders_do_what_their_case_asks_for(name: str, key: str, sets: dict[str, ImageSet]) -> None:
    contender, images = BY_NAME[name], sets[BY_KEY[key].images]
    if contender.why_missing():
        pytest.skip(str(contender.why_missing()))
    with Process(contender, BY_KEY[key], images, CPU) as process:
        assert process.check() is None
        assert process.launch > process.opening > 0
        process.forget()
        assert process.time() > 0
        assert process.time(cold=True) > 0


@pytest.mark.slow
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_every_contender_passes_the_check_of_a_large_case(contender: Contender, sets: dict[str, ImageSet]) -> None:
    case = next(case for case in CASES if case.images != "small" or contender.in_memory if contender.serves(case))
    if contender.why_missing() or contender.start_only:
        pytest.skip(contender.why_missing() or "only started")
    with Process(contender, case, sets[case.images], CPU) as process:
        assert process.check() is None


def test_dropped_files_leave_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 300_000)
    assert cached_share([path]) == 1
    drop_cache([path])
    if cached_share([path]) == 1:
        pytest.skip("this file system keeps its pages")
    assert cached_share([path]) == 0
    path.read_bytes()
    assert cached_share([path]) == 1


# Builders at the top level: the processes of contenders import them.


def raising(case: Case, images: ImageSet, device: torch.device) -> Epochs:
    raise RuntimeError("no such luck\nand a long story")


def dying(case: Case, images: ImageSet, device: torch.device) -> Epochs:
    os._exit(3)


def failing_later(case: Case, images: ImageSet, device: torch.device) -> Epochs:
    epochs = serial(case, images, device)

    def epoch(number: int) -> Iterator[Item]:
        if number:
            raise KeyError("gone")
        return epochs(number)

    return epoch


def doubling(case: Case, images: ImageSet, device: torch.device) -> Epochs:
    epochs = serial(case, images, device)
    return lambda number: (repeat_a_sample(item) for item in epochs(number))


def test_faults_are_told(sets: dict[str, ImageSet]) -> None:
    for build, message in ((raising, "RuntimeError: no such luck"), (dying, "its process ended without a word")):
        with pytest.raises(ContenderError, match=f"^{message}$"):
            Process(Contender("unlucky", build, ""), BY_KEY["a"], sets["small"], CPU)


FEW = (
    BY_NAME[RESIDENT],
    BY_NAME[PILLOW],
    BY_NAME[BARE],
    Contender("doubling", doubling, "Gives a sample twice."),
    Contender("failing later", failing_later, "Raises."),
    Contender("absent", serial, "Is not there.", needs=("no_such_package",)),
)
TINY = loader.Plan(SMALL, LARGE, rounds=2, cold_rounds=1, turn_seconds=0.0, starts=1, cases="b")


def test_a_whole_run_writes_table_plot_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in loader.NEEDS:
        if find_spec(module) is None:
            pytest.skip(f"needs {module}")
    monkeypatch.setattr(loader.Plan, "of", lambda quick, rounds, cases: TINY)
    monkeypatch.setattr(loader, "CONTENDERS", FEW)
    loader.main(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*-loader-cpu.json")
    rows = json.loads(path.read_text("utf-8"))["rows"]
    reasons = {row["contender"]: row["reason"] for row in rows if row["reason"]}
    assert "comes 2 times" in reasons["doubling"]
    assert reasons["failing later"].startswith("KeyError")
    assert reasons["absent"] == "needs no_such_package, which is not installed"
    warm = {row["contender"]: row for row in rows if row["measure"] == "warm" and not row["reason"]}
    assert set(warm) == {RESIDENT, PILLOW, BARE}
    assert all(len(row["rounds"]) == 2 for row in warm.values())
    ratios = [a / b for a, b in zip(warm[PILLOW]["rounds"], warm[RESIDENT]["rounds"], strict=True)]
    assert warm[PILLOW]["over_ours"]["low"] == pytest.approx(min(ratios), rel=2e-3)
    starts = {row["contender"]: row for row in rows if row["measure"] == "start"}
    assert set(starts) >= {RESIDENT, PILLOW, BARE}
    assert all(row["first_launch"] > row["first_opening"] > 0 for row in starts.values())
    text = path.with_suffix(".md").read_text("utf-8")
    assert f"]({path.stem}.png)" in text
    assert "absent: needs no_such_package" in text
    assert text.count("**rlp, resident**") == 2
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "## Targets" in capsys.readouterr().out
    assert stale.why_stale(harness.read_source("loader"), "cpu", tmp_path) is None


def row_of(case: str, contender: str, *rounds: float) -> dict[str, Any]:
    return {"case": case, "contender": contender, "measure": "warm", "reason": None, "rounds": list(rounds)}


def test_targets_are_ratios_within_rounds() -> None:
    rows = [row_of("b", RESIDENT, 100, 50), row_of("b", PILLOW, 5, 1), row_of("b", BARE, 300, 90)]
    lines = {line[0]: line[2:] for line in targets(rows)}
    assert lines[f"b: {RESIDENT} / {PILLOW}"] == ["35.00 [20.00, 50.00]", "yes"]
    assert lines[f"b: {RESIDENT} / {BARE}"] == ["0.444 [0.333, 0.556]", "no"]
    assert lines[f"c: {OURS} / {PILLOW}"] == ["–", "not measured"]


def test_nothing_to_draw_is_no_plot(tmp_path: Path) -> None:
    assert write_plot([row_of("b", RESIDENT, 1) | {"reason": "wrong"}], tmp_path / "plot.png") is None


def test_an_unknown_case_is_one_sentence() -> None:
    with pytest.raises(loader.UserError, match="--cases names x; expected some of a, b, c, d, e"):
        loader.main(["--cases", "a,x", "--device", "cpu"])
