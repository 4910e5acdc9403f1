"""The page of runs: it stands alone, says every number with its conditions, and shows without an error in a browser."""

from collections.abc import Callable
from html.parser import HTMLParser
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

from browser import opened, screenshot
from fake_probe import estimate, fake_probe, probe_row, write_fake_probe, write_fake_scores, write_probe
from fake_run import epoch_row, fake_summary, write_fake_run
import pytest
from tiny_run import tiny_config, write_tiny_sets

from rlp.data.beton import Beton
from rlp.data.loader import open_loader
from rlp.data.view import ViewOptions, make_view
from rlp.distributed import World
from rlp.errors import UserError
from rlp.report.figures import write_figures
from rlp.report.page import write_page
from rlp.report.page_estimates import primary, shown
from rlp.report.page_gallery import data_url
from rlp.report.page_header import verdict
from rlp.report.page_html import element, number_cell, table
from rlp.report.page_scores import COLUMNS
from rlp.report.page_svg import inline_svg, page_style, panel
from rlp.report.page_table import COLUMNS as READING_COLUMNS
from rlp.runlog import METRICS, read_rows, write_summary
from train_rlp import train

pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")

ROOT = Path(__file__).resolve().parent.parent
TAPS = ["block1", "block2", "block3"]
HOSTILE = '<script>alert("x")</script>&"\''


class Page(HTMLParser):
    """What a page is made of; complains about tags that are closed in the wrong order."""

    VOID = ("br", "img", "input", "meta")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.headings: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of all elements of that name."""
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(*folders: Path, out: Path | None = None) -> Page:
    """The page of the runs, parsed and held to the rules that hold for all of them."""
    return checked(write_page(folders, out).read_text("utf-8"))


def checked(text: str) -> Page:
    """A page, parsed and held to the rules."""
    assert len(text) < 3e6
    page = Page(text)
    outside = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "action", "data") and v]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in outside)
    assert not re.search(r"url\((?!#)|@import|https?://|//cdn", text)
    names = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(set(names)) == len(names)
    assert all(value[1:] in names for value in outside if value.startswith("#"))
    assert all(svg.get("aria-label") for svg in page.named("svg"))
    assert all(image.get("alt") for image in page.named("img"))
    assert all(heading.get("scope") in ("col", "row") for heading in page.named("th"))
    assert len(page.named("table")) == len(page.named("caption"))
    return page


def made_up(folder: Path, seed: int = 0, taps: list[str] = TAPS, draws: int = 4) -> Path:
    """A run without a probe."""
    summary = write_fake_run(folder, taps, draws, epochs=3)
    write_summary(folder, summary | {"seed": seed, "environment": {"argv": ["train_rlp.py", "--run.seed", str(seed)]}})
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of seconds, with made-up measurements."""
    folder = tmp_path_factory.mktemp("trained")
    write_tiny_sets(folder)
    train(tiny_config(folder), World())
    run = folder / "run"
    taps = ["block1", "block2", "block3"]
    write_fake_probe(run, taps)
    write_fake_scores(run, taps, members=100, others=37, classes=4)
    write_page([run])
    return run


@pytest.fixture
def page(trained: Path) -> Page:
    """The page of :func:`trained`."""
    return checked((trained / "report.html").read_text("utf-8"))


def test_a_page_has_every_section_of_a_probed_run(page: Page) -> None:
    for name in ("training", "probe", "features", "scores", "gallery", "table", "guide"):
        assert name in [attrs.get("id") for attrs in page.named("h2")]
    for words in ("small_cnn", "λ = 0", "Rademacher", "Planted truth", "It bounds the heads' class.",
                  "effective rank", "luck of the labels", "python -m rlp.measure probe"):  # fmt: skip
        assert words in page.text
    assert "is missing" not in page.text


def test_other_measures_are_shown_where_a_run_was_compared(tmp_path: Path) -> None:
    run, plain = made_up(tmp_path / "run"), made_up(tmp_path / "plain", seed=1)
    assert "Other measures" not in checked(write_page([run]).read_text("utf-8")).text
    estimate = {"mean": 0.875, "low": 0.75, "high": 0.9375}
    finding = {"measure": "knn", "quantity": "MA", "tap": "block3", "count": 60, "chance": None, "value": estimate,
               "non_members": None, "controls": {"untrained <b>": 0.25}, "settings": "k = 30"}  # fmt: skip
    planted = {"score": "feldman_zhang", "planted": "wrong label", "N": 60, "count": 12, "chance": 0.5}
    planted |= {"members": estimate, "non_members": {"mean": 0.5, "low": None, "high": None}}
    folder = run / "measure" / "baselines"
    folder.mkdir(parents=True)
    (folder / "rows.json").write_text(json.dumps({"findings": [finding], "planted": [planted]}))
    text = checked(write_page([run, plain], tmp_path / "page.html").read_text("utf-8")).text
    for words in (
        "Other measures",
        "feldman_zhang",
        "0.875 [0.750, 0.938]",
        "untrained <b> 0.250",
        "k = 30",
        "wrong label",
    ):
        assert words in text
    for step, outdated in ((1, True), (read_rows(run / METRICS)[-1]["step"], False)):
        (folder / "rows.json").write_text(json.dumps({"schema": 1, "step": step, "findings": [finding]}))
        text = checked(write_page([run], tmp_path / "page.html").read_text("utf-8")).text
        assert ("was compared at step 1, and has gone on to step" in text) == outdated
    for content, message in (
        ("{", r"rows.json is damaged"),
        ("[1]", r"rows.json is no table of schema 1"),
        ('{"schema": 2, "findings": []}', r"rows.json is no table of schema 1"),
    ):
        (folder / "rows.json").write_text(content)
        with pytest.raises(UserError, match=message):
            write_page([run])


def test_every_reading_is_in_the_table_with_all_its_columns(trained: Path, page: Page) -> None:
    rows = json.loads((trained / "measure/probe.json").read_text("utf-8"))["rows"]
    wanted = {"n", "N", "D", "draws", "chance", "κ members", "κ non-members", "Δ"}
    assert wanted | {"untrained", "noise", "class-only", "leak"} <= {name for name, _ in READING_COLUMNS}
    for row in rows:
        for key in ("members", "non_members", "delta", "untrained", "noise", "leak"):
            assert shown(row[key]) in page.text
    assert sum(attrs.get("scope") == "row" for attrs in page.named("th")) >= len(rows)


def test_captions_give_conditions_and_controls(page: Page) -> None:
    assert "n = 10, chance = accuracy 0.1 = κ 0, N = 90 members and 90 non-members" in page.text
    assert "class-only floor 0.040; leak check: 0 of 3 intervals miss 0" in page.text
    assert "At block3 Δ = 0.030 [−0.010, 0.070]. The interval holds 0" in page.text


def test_the_gallery_shows_the_ends_of_the_ranking(page: Page) -> None:
    alts = [str(image["alt"]) for image in page.named("img")]
    assert len(alts) == 24
    assert alts[0] == "training image 0, class class0, score −1.00"
    assert alts[12] == "training image 99, class class3, score −1.99"
    assert alts[3] == "training image 3, given label class0, score −1.03"
    assert "given class0, true class3" in page.text


def test_data_that_moved_or_changed_is_said(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "measure" / "probe.json").unlink()
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    summary["data"]["train"]["sha256"] = "0" * 64
    (run / "summary.json").write_text(json.dumps(summary), "utf-8")
    assert "is not the file that the run was trained on" in page_of(run).text
    summary["config"]["data"]["train"] = "nowhere/train.beton"
    (run / "summary.json").write_text(json.dumps(summary), "utf-8")
    assert "nowhere/train.beton does not exist" in page_of(run).text


def test_a_page_without_a_probe_names_the_command(tmp_path: Path) -> None:
    run = made_up(tmp_path / "a run")
    page = page_of(run)
    assert f"python -m rlp.measure probe --run '{run}'" in page.text
    assert "κ of the training heads at block3" in page.text
    assert "python train_rlp.py --run.seed 0" in page.text


def test_a_run_without_heads(tmp_path: Path) -> None:
    page = page_of(made_up(tmp_path / "run", taps=[]))
    assert "no random-label heads" in page.text
    assert len(page.named("svg")) == 2


def test_a_run_that_has_not_ended(tmp_path: Path) -> None:
    write_fake_run(tmp_path / "run", TAPS, draws=1, epochs=1)
    page = page_of(tmp_path / "run")
    assert "no: the last finished epoch is shown" in page.text
    assert "unknown model" in page.text


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [made_up(tmp_path / name / "run", seed) for seed, name in enumerate(("a", "b", "c"))]
    for seed, run in enumerate(runs[:2]):
        write_fake_probe(run, TAPS if seed else TAPS[1:], labels=(10,), seed=seed, protocols=("converged", "retrieval"))
    page = page_of(*runs, out=tmp_path / "page.html")
    assert "3 runs side by side" in page.text
    for words in ("a/run", "b/run", "c/run was not probed", "0 of 2 runs, below 0 in 0, and holds 0 in 2"):
        assert words in page.text


def test_hostile_names_stay_text(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    content = fake_probe([HOSTILE, "$x^2$ \\frac{"], labels=(2,), protocols=("converged", "budget"))
    content["rademacher"][0]["meaning"] = HOSTILE
    content["planted"][0]["planted"] = HOSTILE
    write_probe(run, content)
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    summary["config"]["model"]["name"] = HOSTILE
    summary["environment"]["argv"] = ["train.py", HOSTILE + "\x00\ud800"]
    (run / "summary.json").write_text(json.dumps(summary), "utf-8")
    page = page_of(run)
    assert len(page.named("script")) == 1
    assert HOSTILE in page.text


def test_dollar_signs_in_names_are_no_mathematics(tmp_path: Path) -> None:
    """Names of folders and of modules stand in figures."""
    taps = ["$\\x$", "a$b"]
    runs = [made_up(tmp_path / name, taps=taps) for name in ("$\\x$", "lr$1")]
    for run in runs:
        write_fake_probe(run, taps, labels=(10,))
        write_fake_scores(run, taps, members=20, others=20, classes=2)
    page = page_of(*runs, out=tmp_path / "page.html")
    assert "n = 10: κ, $\\x$" in page.text
    write_figures(runs[0])


def test_a_missing_number_is_one_that_scripts_can_sort_by() -> None:
    """JavaScript's Number("-inf") is none, and a table with it would come out in no order."""
    cells = table("t", [("a", ""), ("b", "")], [["x", number_cell(None)], ["y", number_cell(-2.5)]], sort=True)
    assert re.findall('data-v="([^"]*)"', cells) == ["-Infinity", "-2.5"]


def test_draws_that_change_at_restarts_are_counted_by_epoch(tmp_path: Path) -> None:
    run = made_up(tmp_path / "run")
    rows = [json.loads(line) for line in (run / METRICS).read_text("utf-8").splitlines()]
    for row in rows:
        for head in row.get("heads", []):
            head["draw"] += 4 * row["epoch"]
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert "line: mean over 4 draws" in page_of(run).text


def test_the_gallery_shows_what_the_network_saw_of_canaries(tmp_path: Path) -> None:
    write_tiny_sets(tmp_path)
    config = tiny_config(tmp_path, data__canary_noise=0.3, data__canary_duplicates=0.3, train__epochs=1)
    train(config, World())
    write_fake_scores(tmp_path / "run", TAPS, members=100, others=37, classes=4)
    images = [image["src"] for image in page_of(tmp_path / "run").named("img")]
    options = ViewOptions(canary_noise=0.3, canary_duplicates=0.3)
    loader = open_loader(config.data.train, train=False, batch_size=100, seed=0, world=World(), view=options)
    seen = next(loader.epoch(0))
    pixels = seen.image.permute(0, 2, 3, 1).contiguous().numpy()
    assert images == [data_url(pixels[row])[0] for row in [*range(12), *range(99, 87, -1)]]
    kinds = make_view(Beton.open(config.data.train), options).planted
    assert {"noise", "duplicate"} <= {str(kinds[row]) for row in [*range(12), *range(88, 100)]}


def test_element_escapes_all_but_markup() -> None:
    assert element("p", "a < b", element("b", '"'), title="'\"") == '<p title="&#x27;&quot;">a &lt; b<b>&quot;</b></p>'


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows.clear(),
        lambda rows: [row.update(members=None, non_members=None, delta=None) for row in rows],
        lambda rows: [row.update(members=estimate(0.2, None, 1), delta=estimate(0.0, None, 1)) for row in rows],
        lambda rows: [row.update(class_only=None, leak=None, untrained=None, noise=None) for row in rows],
        lambda rows: [row.update(curve=[[1, None, None]], converged=None, effective_rank=None) for row in rows],
        lambda rows: rows.__delitem__(slice(1, None)),
        lambda rows: [row["members"].update(mean=None) for row in rows if row["depth"] == 1],
    ],
)  # fmt: skip
def test_gaps_in_a_probe_are_gaps_on_the_page(tmp_path: Path, spoil: Callable[[list], object]) -> None:
    run = made_up(tmp_path / "run", taps=["block1"], draws=1)
    content = fake_probe(TAPS, labels=(2,), protocols=("converged", "budget"))
    spoil(content["rows"])
    write_probe(run, content)
    page_of(run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("measure/probe.json", "{", "is damaged"),
        ("measure/probe.json", '{"schema": 9, "rows": []}', "no table of schema 1"),
        ("measure/probe.json", '{"schema": 1, "rows": [{"tap": "a"}]}', "row 0, has no 'protocol'"),
        ("measure/scores.parquet", "PAR1", "no table of samples"),
        ("summary.json", "[]", "not a summary"),
        (METRICS, "", "no finished epoch"),
    ],
)
def test_damaged_files_are_errors(tmp_path: Path, name: str, content: str, message: str) -> None:
    run = made_up(tmp_path / "run")
    (run / "measure").mkdir()
    (run / name).write_text(content, "utf-8")
    with pytest.raises(UserError, match=message):
        write_page([run])


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    run, other = made_up(tmp_path / "run"), made_up(tmp_path / "other")
    for folders, out, message in (
        ([tmp_path / "none"], None, "is no folder"),
        ([run, run], tmp_path / "x.html", "named twice"),
        ([run, other], None, "--out FILE"),
        ([run], tmp_path, "a folder"),
        ([tmp_path], None, "metrics.jsonl is missing"),
    ):
        with pytest.raises(UserError, match=message):
            write_page(folders, out)


def test_the_command_line(tmp_path: Path) -> None:
    run = made_up(tmp_path / "run", taps=["fc"], draws=2)

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rlp.report", *words]
        return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)

    done = call(str(run))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{run / 'report.html'}: 0.")
    failed = call(str(tmp_path / "none"))
    assert failed.returncode == 2
    assert failed.stderr == f"error: {tmp_path / 'none'} is no folder; expected the folder of a run\n"


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = made_up(tmp_path / "run", taps=["fc"], draws=2)
    first = write_page([run]).read_bytes()
    assert write_page([run]).read_bytes() == first


def test_no_number_on_an_axis_loses_digits() -> None:
    with page_style():
        figure, axes = panel()
        axes.plot([0, 1 / 3], [0.0625, 0.1])
        axes.set_yticks([0.0625, 0.0875])
        axes.set_title("0.123456 µ")
        drawn = inline_svg(figure, 'a "label" of 0.98765', "name")
    texts = re.findall(r">([^<>]+)</text>", drawn)
    assert {"0.0625", "0.0875", "0.123456 µ"} <= set(texts)
    assert 'aria-label="a &quot;label&quot; of 0.98765"' in drawn


def test_verdicts_follow_the_interval() -> None:
    def said(mean: float, half: float | None) -> str:
        return verdict(probe_row("converged", "fc", 0, 10, delta=estimate(mean, half)))

    assert "lies above 0" in said(0.1, 0.05)
    assert "lies below 0" in said(-0.1, 0.05)
    assert "holds 0" in said(0.1, 0.2)
    assert "nothing can be said" in said(0.1, None)
    full = probe_row("converged", "fc", 0, 10, members=estimate(1.0), non_members=estimate(0.999), delta=estimate(0, 0))
    assert "had no room" in verdict(full)


def test_the_page_begins_with_converged_linear_heads_at_ten_labels() -> None:
    rows = fake_probe(["a", "b"], labels=(2, 10))["rows"]
    found = [(row["protocol"], row["n"], row["tap"]) for row in primary(rows[::-1])]
    assert found == [("converged", 10, "a"), ("converged", 10, "b")]
    assert primary([]) == []


def test_the_columns_of_scores_are_those_that_the_probe_writes() -> None:
    from rlp.measure.scores import COLUMNS as WRITTEN

    assert set(COLUMNS) <= set(WRITTEN)


@pytest.mark.parametrize("shape", [(1, 1, 3), (32, 32, 3), (500, 3, 3), (300, 400, 3)])
def test_images_of_every_size_are_embedded_small(shape: tuple[int, int, int]) -> None:
    import numpy as np

    source, square = data_url(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    assert source.startswith("data:image/png;base64,")
    assert len(source) < 40_000
    assert square == (max(shape) <= 64)


def test_summaries_of_old_runs_have_no_leak_without_validation(tmp_path: Path) -> None:
    row = epoch_row(1, 1, ["fc"], 1)
    row["heads"], row["val"] = [head for head in row["heads"] if head["split"] == "train"], None
    (tmp_path / METRICS).write_text(json.dumps(row) + "\n", "utf-8")
    write_summary(tmp_path, fake_summary(row))
    assert "leak check –" in page_of(tmp_path).text


# --- in a browser -----------------------------------------------------------------------------------------------

TRY = """<script>
for (const button of document.querySelectorAll("thead button")) { button.click(); button.click(); }
document.querySelectorAll(".choice input")[2].click();
const filter = document.querySelector(".tall .filter");
filter.value = "retrieval block2";
filter.dispatchEvent(new Event("input"));
</script></body>"""


def test_the_page_opens_without_a_word_on_the_console(trained: Path) -> None:
    seen = opened(trained / "report.html")
    assert seen.console == []
    shown_at_first = re.findall(r'<section class="tab" data-label="([^"]*)">', seen.dom)
    assert shown_at_first == ["converged"]
    assert len(re.findall(r'<section class="tab"[^>]* hidden=""', seen.dom)) == 4


def test_tabs_sorting_and_filter_work(trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "tried.html"
    page.write_text((trained / "report.html").read_text("utf-8").replace("</body>", TRY), "utf-8")
    seen = opened(page)
    assert seen.console == []
    assert re.findall(r'<section class="tab" data-label="([^"]*)">', seen.dom) == ["budget"]
    table = seen.dom[seen.dom.index('id="table"') :]
    assert re.search(r'aria-sort="descending"><button type="button">part. ratio', table)
    rows = re.findall(r"<tr( hidden=\"\")?><th scope=\"row\">.*?</tr>", table)
    assert (len(rows), rows.count("")) == (27, 1)
    ratios = [float(ratio) for ratio in re.findall(r'data-v="([\d.]+)">[\d.]+</td></tr>', table)]
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios)) > 1


def test_the_browser_test_sees_an_error(tmp_path: Path) -> None:
    page = tmp_path / "faulty.html"
    page.write_text("<!DOCTYPE html><title>x</title><script>nothing.there()</script>", "utf-8")
    assert any("nothing is not defined" in line for line in opened(page).console)


@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_fits_the_window(trained: Path, tmp_path: Path, width: int) -> None:
    """Something is drawn, and nothing reaches out of the window to the right."""
    image = pytest.importorskip("PIL.Image")
    over = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    measure = f"<script>document.title = `${{innerWidth}} ${{{over}}}`;</script></body>"
    page = tmp_path / f"{width}.html"
    page.write_text((trained / "report.html").read_text("utf-8").replace("</body>", measure), "utf-8")
    assert f"<title>{width} 0</title>" in opened(page, width).dom
    picture = image.open(screenshot(page, tmp_path / "page.png", width, 2000)).convert("L")
    assert picture.size == (width, 2000)
    assert len(picture.getcolors()) > 50
