"""The page of one or several runs: one HTML file that needs nothing beside itself."""

from collections.abc import Sequence
from pathlib import Path

from rlp.errors import UserError
from rlp.files import write_atomically
from rlp.report.page_compare import compare_section
from rlp.report.page_curves import curves
from rlp.report.page_features import features_section
from rlp.report.page_gallery import gallery_section
from rlp.report.page_guide import guide
from rlp.report.page_header import header
from rlp.report.page_html import Html, document, element, join
from rlp.report.page_probe import probe_section
from rlp.report.page_run import ReportRun, read_runs
from rlp.report.page_scores import scores_of, scores_section
from rlp.report.page_svg import depth_style, page_style
from rlp.report.page_table import table_section

PAGE = "report.html"


def write_page(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page of the runs; returns its path.

    Args:
        folders: of the runs, at least one; what a run lacks (no probe, not ended, data moved) the page says.
        out: the HTML file; None is ``RUN/report.html``, for one run only.

    Raises:
        UserError: a folder is no run, a file in it is damaged, several runs without ``out``, or the page cannot be
            written.
    """
    runs = read_runs([Path(folder) for folder in folders])
    if not runs:
        raise UserError("no run is named; expected at least one folder")
    if out is None and len(runs) > 1:
        raise UserError(
            f"{len(runs)} runs are named, which have no place in common; say where the page goes with --out FILE"
        )
    path = Path(out) if out is not None else runs[0].dir / PAGE
    if path.is_dir():
        raise UserError(f"--out is {path}, a folder; expected the name of a file")
    text = build_page(runs)
    try:
        return write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from None


def build_page(runs: list[ReportRun]) -> str:
    """The page as text; the same runs give the same text."""
    from tqdm import tqdm

    scores = scores_of(runs)
    sections = [
        lambda: curves(runs),
        lambda: probe_section(runs),
        lambda: features_section(runs),
        lambda: scores_section(runs, scores),
        lambda: gallery_section(runs, scores),
        lambda: compare_section(runs),
        lambda: table_section(runs),
        guide,
    ]
    with page_style():
        style = element("style", Html(depth_style()))
        drawn = [section() for section in tqdm(sections, desc="page", unit=" sections", disable=None, leave=False)]
    body = join([style, element("header", header(runs), _contents(runs)), element("main", *drawn)])
    title = f"Report of {runs[0].name}" if len(runs) == 1 else f"Report of {len(runs)} runs"
    return document(title, body)


def _contents(runs: Sequence[ReportRun]) -> Html:
    """Links to the sections that the page has."""
    probed, compared = any(run.rows for run in runs), any(run.compared for run in runs)
    links = [("training", "Training", True), ("probe", "κ and Δ against depth", True), ("features", "Behind κ", probed),
             ("scores", "Scores", True), ("gallery", "Images", True), ("compare", "Other measures", compared),
             ("table", "Every reading", probed),
             ("guide", "How to read this page", True)]  # fmt: skip
    items = [element("li", element("a", name, href=f"#{target}")) for target, name, there in links if there]
    return element("nav", element("ul", *items), aria_label="Sections")
