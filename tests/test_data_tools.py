"""python -m rlp.data: what the tools print is true of the set, and what is wrong with a set is seen."""

import errno
from pathlib import Path
import re
import subprocess
import sys
from typing import Any

import numpy as np
from PIL import Image
import pytest
from scipy import stats
from small_sets import change_card, random_images, write_set, write_shards

from rlp.data import bench as bench_module
from rlp.data import verify as verify_module
from rlp.data.__main__ import main
from rlp.data.beton import Beton, Card, card_path
from rlp.data.contact_sheet import BAR, PAPER, SIDE, Grid, chosen_rows, thumbnail, write_contact_sheet
from rlp.data.inspect_set import (
    class_lines,
    class_test,
    correlations,
    describe,
    frequency_test,
    shortened,
    word_checks,
    word_lines,
)
from rlp.data.loader import ffcv_installed
from rlp.errors import UserError

PAGE = 4096


@pytest.fixture
def small_set(tmp_path: Path) -> Path:
    return write_set(tmp_path / "a.beton", random_images(1200, 4, 4), page_size=PAGE)


def plant(path: Path, column: int, words: np.ndarray) -> Beton:
    """Overwrite a column of words, int64 [N], in the file."""
    places = Beton.open(path).layout["words"]
    with open(path, "r+b") as file:
        for place, word in zip(places.tolist(), words.tolist(), strict=True):
            file.seek(place + 4 * column)
            file.write(int(word).to_bytes(4, "little"))
    return Beton.open(path)


def error_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The message of a user's mistake, which ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# The random words.


def test_words_as_they_are_written_are_uniform(small_set: Path) -> None:
    lines = word_lines(Beton.open(small_set))
    assert lines[0] == "Random words: 6 columns of 1,200 samples"
    assert lines[-1].startswith("uniform: yes (45 tests, ")  # 6 columns, three n, twice but n = 100; 15 pairs
    assert "NO" not in "\n".join(lines)


def test_labels_that_are_not_equally_frequent_are_flagged(small_set: Path) -> None:
    words = Beton.open(small_set).words[:, 1]
    verdict = word_lines(plant(small_set, 1, np.where(words < 2**30, words + 2**31, words)))[-1]
    assert verdict.startswith("uniform: NO: draw1 (2 labels are equally frequent), draw1 (10 labels")
    assert "draw0" not in verdict
    assert "draw2" not in verdict


def test_a_constant_column_is_flagged(small_set: Path) -> None:
    assert "uniform: NO: draw2 (2 labels" in word_lines(plant(small_set, 2, np.full(1200, 7)))[-1]


def test_draws_that_depend_on_one_another_are_flagged(small_set: Path) -> None:
    lines = word_lines(plant(small_set, 2, Beton.open(small_set).words[:, 0]))
    assert lines[-1].startswith("uniform: NO: draw0 and draw2 (two columns are uncorrelated) (")
    assert "largest |correlation| 1.0000 of draw0 and draw2; expected about 0.0" in "\n".join(lines)


def test_labels_that_depend_on_the_class_are_flagged(small_set: Path) -> None:
    """Each class has a quarter of the range to itself: over all classes the words are uniform."""
    beton = Beton.open(small_set)
    verdict = word_lines(plant(small_set, 0, (beton.words[:, 0] + beton.label * 2**32) // 4))[-1]
    assert verdict.startswith("uniform: NO: draw0 (2 labels do not depend on the class), draw0 (10 labels do not")


def test_few_samples_decide_nothing(tmp_path: Path) -> None:
    images = random_images(9, 4, 4)
    beton = Beton.open(write_set(tmp_path / "a.beton", images))
    assert word_lines(beton)[-1] == "uniform: cannot be told from so few samples; expected at least 10"
    assert "class3" in describe(beton)
    beton = Beton.open(write_set(tmp_path / "b.beton", random_images(30, 4, 4)))
    assert word_lines(beton)[-2] == "  dependence on the class is not tested: fewer than two classes have 10 samples"
    assert word_lines(beton)[-1].startswith("uniform: yes (21 tests, ")  # 6 columns at n = 2; 15 pairs


def test_the_statistics_are_those_of_scipy() -> None:
    generator = np.random.default_rng(3)
    label, random_label = generator.integers(0, 7, 2000), generator.integers(0, 10, 2000)
    label[:30] = 7  # a class of 30 samples, too few for 10 labels
    counts = np.bincount(random_label)
    assert frequency_test(random_label, 10) == (pytest.approx(stats.chisquare(counts).statistic), 9)
    table = np.zeros((7, 10), int)
    np.add.at(table, (label[label < 7], random_label[label < 7]), 1)
    expected: Any = stats.chi2_contingency(table, correction=False)
    assert class_test(label, random_label, 10) == (pytest.approx(expected.statistic), expected.dof)
    assert class_test(label, np.zeros(2000, int), 10) == (0.0, 1)
    words = generator.integers(0, 2**32, (70_000, 5), np.uint32)  # more than are summed at once
    words[:, 4] = words[:, 0] // 3 + words[:, 1] // 2
    np.testing.assert_allclose(correlations(words), np.corrcoef(words.T.astype(float)), atol=1e-9)
    words[:, 2] = 9
    assert np.abs(correlations(words)[2]).max() == 0


def test_p_values_of_random_words_are_uniform(tmp_path: Path) -> None:
    beton = Beton.open(write_set(tmp_path / "a.beton", random_images(1000, 1, 1), draws=200))
    for check in word_checks(beton):
        if check.name.startswith(("10 ", "two")):
            assert stats.kstest(check.p, "uniform").pvalue > 0.001, check.name
            assert len(check.p) in (203, 203 * 202 // 2)


# Card and classes.


def test_inspect_prints_what_is_inside(small_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small_set)]) == 0
    printed = capsys.readouterr().out
    for line in (
        r"split +train",
        r"samples +1,200 \(ids 0 to 1199\)",
        r"classes +4",
        r"images +4 x 4 px, mode raw \(1,200 raw\), 48 bytes an image",
        rf"bytes +{small_set.stat().st_size:,}",
        r"words +3 draws and noise, noise_class, member, seed 5",
        r"shards +none, one file",
        r"near-duplicates +not looked for",
        r"  3 class3 300 25\.00% █{40}",
        r"uniform: yes",
        rf"contact sheet: {re.escape(str(small_set.with_suffix('.png')))}",
    ):
        assert re.search(line, printed), line
    assert main(["inspect", str(small_set), "--sheet", "none"]) == 0
    assert "contact sheet" not in capsys.readouterr().out


def test_inspect_of_shards_of_different_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [*random_images(7, 8, 9), *random_images(5, 300, 20)]
    many = write_shards(tmp_path / "a.beton", images, 3, jpeg=True, page_size=1 << 15)
    assert main(["inspect", str(many)]) == 0
    printed = capsys.readouterr().out
    assert "9 to 20 px wide, 8 to 300 px high, mode jpg (12 JPEG)" in printed
    assert "shards          3 of 4 samples, a-00000-of-00003.beton and so on" in printed
    assert Image.open(tmp_path / "a.png").size == (Grid(12).width, Grid(12).height)
    assert main(["inspect", str(tmp_path / "a-00001-of-00003.beton"), "--sheet", "none"]) == 0
    assert "4 (ids 4 to 7)" in capsys.readouterr().out


def test_class_histogram(tmp_path: Path) -> None:
    beton = Beton.open(write_set(tmp_path / "a.beton", random_images(10, 4, 4)))
    assert class_lines(beton) == [
        "Samples a class: 2 to 3 (median 2)",
        "  0 class0 3 30.00% " + "█" * 40,
        "  1 class1 3 30.00% " + "█" * 40,
        "  2 class2 2 20.00% " + "█" * 27,
        "  3 class3 2 20.00% " + "█" * 27,
    ]


def test_many_classes_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_set(tmp_path / "a.beton", random_images(100, 4, 4), classes=60)
    lines = class_lines(Beton.open(path))
    assert lines[1] == "  smallest 1, quarter 1, median 2, three quarters 2, largest 2; all with --classes"
    assert len(lines) == 2 + 5 + 1 + 5
    assert main(["inspect", str(path), "--classes"]) == 0
    printed = capsys.readouterr().out
    assert all(f" class{c} " in printed for c in range(60))


def test_long_names_are_cut() -> None:
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abcde…"
    assert shortened("two\nlines", 20) == "two lines"


# The contact sheet.


def test_known_pixels_are_at_their_place(tmp_path: Path) -> None:
    images = random_images(30, 8, 8)
    beton = Beton.open(write_set(tmp_path / "a.beton", images))
    path = write_contact_sheet(beton, tmp_path / "new" / "a.png", 12)
    sheet, grid, rows = np.asarray(Image.open(path)), Grid(12), chosen_rows(beton, 12)
    assert sheet.shape == (grid.height, grid.width, 3)
    for place, row in enumerate(rows.tolist()):
        left, top = grid.corner(place)
        expected = images[row].repeat(SIDE // 8, 0).repeat(SIDE // 8, 1)
        np.testing.assert_array_equal(sheet[top : top + SIDE, left : left + SIDE], expected)
    assert "#{:02x}{:02x}{:02x}".format(*sheet[0, 0]) == PAPER
    bars = (sheet == [int(BAR[i : i + 2], 16) for i in (1, 3, 5)]).all(2).sum(0)
    heights = {int(h) for h in bars if h}
    assert max(heights) / min(heights) == pytest.approx(8 / 7, abs=0.03)  # 30 samples of 4 classes: 8, 8, 7, 7
    assert path.read_bytes() == write_contact_sheet(beton, tmp_path / "again.png", 12).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.beton", "a.json", "again.png", "new"]


def test_samples_are_spread_over_the_classes(tmp_path: Path) -> None:
    beton = Beton.open(write_set(tmp_path / "a.beton", random_images(50, 4, 4), classes=5))
    rows = chosen_rows(beton, 22)
    assert len(set(rows.tolist())) == 22
    assert np.bincount(beton.label[rows]).tolist() == [5, 5, 4, 4, 4]
    assert (np.diff(beton.label[rows]) >= 0).all()
    assert set(chosen_rows(beton, 12)) <= set(rows)
    assert beton.label[chosen_rows(beton, 3)].tolist() == [0, 1, 3]
    assert sorted(chosen_rows(beton, 99)) == list(range(50))


@pytest.mark.parametrize(
    ("shape", "size"), [((8, 8), (128, 128)), ((32, 20), (80, 128)), ((100, 50), (50, 100)), ((1000, 3), (1, 128))]
)
def test_thumbnails_fit_and_keep_their_proportions(shape: tuple[int, int], size: tuple[int, int]) -> None:
    assert thumbnail(np.zeros((*shape, 3), np.uint8)).size == size


def test_a_sheet_of_long_names_many_classes_and_one_draw(tmp_path: Path) -> None:
    path = write_set(tmp_path / "a.beton", random_images(300, 5, 7), classes=200, draws=1)
    change_card(path, classes=[f"{'a very long name ' * 9}{c}" for c in range(200)])
    write_contact_sheet(Beton.open(path), tmp_path / "a.png", 300)
    assert Image.open(tmp_path / "a.png").size == (Grid(300).width, Grid(300).height)


def test_a_sheet_never_replaces_the_set(small_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = small_set.read_bytes()
    error = error_of(capsys, "inspect", small_set, "--sheet", small_set)
    assert "expected a name that ends in .png, or none" in error
    assert small_set.read_bytes() == before


def test_a_sheet_that_cannot_be_written(small_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "could not be written" in error_of(capsys, "inspect", small_set, "--sheet", small_set / "a.png")
    assert "--samples is 0; expected 1 to 4096" in error_of(capsys, "inspect", small_set, "--samples", 0)


# The other subcommands.


def test_verify(small_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(small_set)]) == 0
    assert "1200 samples" in capsys.readouterr().out
    plant(small_set, 0, np.r_[Beton.open(small_set).words[:-1, 0], 1])
    assert main(["verify", str(small_set)]) == 1
    assert f"{small_set}: sample 1199: its random words are not those of seed 5" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "verify", "bench", "duplicates", "merge"])
def test_bad_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert str(tmp_path / "none.beton") in error_of(capsys, command, tmp_path / "none.beton")
    assert "is a folder; expected a .beton" in error_of(capsys, command, tmp_path)
    assert "is a folder" in error_of(capsys, command, ".")


def test_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = write_shards(tmp_path / "a.beton", random_images(30, 4, 4), 3, merge=False)
    assert main(["merge", str(many)]) == 0
    assert f"{card_path(many)}: 30 samples in 3 shards, " in capsys.readouterr().out
    assert Beton.open(many).num_samples == 30


def test_duplicates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = random_images(12, 32, 32)
    path = write_set(tmp_path / "a.beton", [*images, images[3], images[5]])
    assert main(["duplicates", str(path), "--distance", "2"]) == 0
    assert f"{path}: 2 of 14 samples are near-duplicates of earlier ones (" in capsys.readouterr().out
    assert Beton.open(path).card.duplicates["dropped"] == [12, 13]
    assert main(["inspect", str(path), "--sheet", "none"]) == 0
    assert re.search(r"near-duplicates 2 \(distance 2, ", capsys.readouterr().out)
    np.save(tmp_path / "e.npy", np.eye(14)[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 10]])
    assert main(["duplicates", str(path), "--embeddings", str(tmp_path / "e.npy")]) == 0
    assert "3 of 14 samples" in capsys.readouterr().out
    assert "--distance is 99.0" in error_of(capsys, "duplicates", path, "--distance", 99)


def rows_of(printed: str) -> dict[str, tuple[float, float]]:
    """Kind -> seconds to the first batch and images a second, of a printed table."""
    found = re.findall(r"^(\w+) +\w+Loader +([\d.]+) +([\d,]+) +[\d,]+ to [\d,]+ +5$", printed, re.MULTILINE)
    return {kind: (float(first), float(rate.replace(",", ""))) for kind, first, rate in found}


KINDS = ("ffcv", "resident") if ffcv_installed() else ("resident",)


@pytest.mark.parametrize(("kind", "expected"), [("all", KINDS), ("auto", ("auto",)), ("resident", ("resident",))])
def test_bench(small_set: Path, capsys: pytest.CaptureFixture[str], kind: str, expected: tuple[str, ...]) -> None:
    argv = ["bench", str(small_set), "--kind", kind, "--batch-size", "16", "--workers", "1", "--seconds", "0.01"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert tuple(rows) == expected
    assert all(first > 0 and rate > 0 for first, rate in rows.values())
    assert "1,200 images of 4 x 4 px, raw, 48 bytes an image" in printed
    assert re.search(r"\d+ cores, 1 threads, torch \d", printed)


@pytest.mark.skipif(not ffcv_installed(), reason="needs FFCV")
def test_bench_of_sizes_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_set(tmp_path / "a.beton", [*random_images(9, 20, 20), *random_images(9, 30, 20)], jpeg=True)
    argv = ["bench", str(path), "--batch-size", "6", "--seconds", "0.01"]
    assert main([*argv, "--image-size", "16"]) == 0
    printed = capsys.readouterr().out
    assert tuple(rows_of(printed)) == ("ffcv",)
    assert "resident is left out: data.loader is resident, which keeps images as they are, but" in printed
    assert "differ in size; expected --image-size S" in error_of(capsys, *argv)


def test_bench_counts_the_images_of_all_epochs(small_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks once a look: the rate is what was read between two looks."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(bench_module.time, "perf_counter", lambda: float(next(ticks)))
    table = bench_module.bench(small_set, "resident", batch_size=500, workers=1, seconds=5)
    # Six ticks: a look after each of five batches of 500 over three epochs, and one at the end.
    assert rows_of(table) == {"resident": (1.0, round(2500 / 6))}


def test_bench_refuses_what_cannot_be(small_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--batch-size is 2000; expected 1 to 1200" in error_of(capsys, "bench", small_set, "--batch-size", 2000)
    assert "--seconds is 0.0; expected a number above 0" in error_of(capsys, "bench", small_set, "--seconds", 0)
    assert "workers is -1" in error_of(capsys, "bench", small_set, "--workers", -1)


def test_a_set_too_large_for_memory_is_left_out(small_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "_RESIDENT_LIMIT", 1000)
    if ffcv_installed():
        table = bench_module.bench(small_set, batch_size=16, seconds=0.01)
        assert tuple(rows_of(table)) == ("ffcv",)
        assert "resident is left out: " in table
    else:
        with pytest.raises(UserError, match="ask for it with --kind resident"):
            bench_module.bench(small_set, batch_size=16, seconds=0.01)


# The command as such.


def test_an_interrupt_is_status_130(
    small_set: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_module, "verify", interrupted)
    assert main(["verify", str(small_set)]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_full_disk_is_one_sentence(
    small_set: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Card, "write", full)
    error = error_of(capsys, "duplicates", small_set)
    assert f"error: duplicates of {small_set} failed: [Errno {errno.ENOSPC}] No space left on device\n" in error


def test_a_missing_package_is_named(
    small_set: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    error = error_of(capsys, "inspect", small_set)
    assert error == "error: SciPy (scikit-learn brings it) is not installed, and inspect needs it; install it\n"


def test_the_command_line(small_set: Path) -> None:
    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rlp.data", *argv]
        root = Path(__file__).resolve().parent.parent
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    helped = run("--help")
    assert helped.returncode == 0
    assert all(name in helped.stdout for name in ("inspect", "verify", "bench", "merge", "duplicates", "FILE"))
    plant(small_set, 1, np.r_[7, Beton.open(small_set).words[1:, 1]])
    verified = run("verify", str(small_set))
    assert verified.returncode == 1
    assert f"{small_set}: sample 0: its random words" in verified.stdout
    assert "Traceback" not in verified.stderr
    mistaken = run("verify", str(small_set.with_name("b.beton")))
    assert (mistaken.returncode, mistaken.stdout) == (2, "")
    assert mistaken.stderr.startswith("error: ")
