"""Every reading of every run as one table, with all its columns."""

from rlp.report.page_estimates import estimate_cell
from rlp.report.page_html import Cell, Html, element, join, number_cell, table
from rlp.report.page_run import ReportRun
from rlp.runlog import Row

COLUMNS = (
    ("run", "name of the folder"),
    ("seed", "of the network"),
    ("protocol", "how heads were fitted and scored"),
    ("head", "kind of head"),
    ("features", "what was done to the features before heads saw them"),
    ("mode", "of the network when the features were taken"),
    ("images", "clean or augmented"),
    ("tap", "where the features were taken"),
    ("depth", "of the tap, 0 is next to the input"),
    ("D", "features that a head sees"),
    ("n", "random labels"),
    ("N", "members; as many non-members"),
    ("draws", "independent labellings"),
    ("steps", "of the heads' optimiser"),
    ("converged", "share of the heads that passed the convergence test"),
    ("chance", "accuracy of guessing"),
    ("accuracy", "of members, mean over draws"),
    ("κ members", "mean and 95% interval"),
    ("κ non-members", "mean and 95% interval"),
    ("Δ", "κ(members) − κ(non-members), mean and 95% interval"),
    ("untrained", "control: the network with fresh weights"),
    ("noise", "control: Gaussian features of equal mean and covariance"),
    ("class-only", "control: κ of knowing the class alone"),
    ("leak", "control: heads scored on ids that they were not fitted to; must be 0"),
    ("eff. rank", "directions that the members' features have"),
    ("part. ratio", "participation ratio of the features"),
)
"""Heading and explanation of each column."""


def table_section(runs: list[ReportRun]) -> Html:
    """The section; empty when no run was probed."""
    rows = [_cells(run, row) for run in runs for row in run.rows]
    if not rows:
        return Html("")
    content = table(
        "All readings. A click on a heading sorts; headings explain themselves on hover.", COLUMNS, rows, sort=True
    )
    return join([element("h2", "Every reading", id="table"), element("div", content, class_="tall")])


def _cells(run: ReportRun, row: Row) -> list[str | Cell]:
    words = [str(row[key]) for key in ("protocol", "head", "features", "mode", "images", "tap")]
    return [
        run.name,
        number_cell(row.get("seed", run.seed)),
        *words,
        *(number_cell(row.get(key)) for key in ("depth", "D", "n", "N", "draws", "steps")),
        number_cell(row.get("converged"), 2),
        number_cell(row["chance"], 4),
        number_cell(row.get("accuracy"), 4),
        *(estimate_cell(row.get(key)) for key in ("members", "non_members", "delta", "untrained", "noise")),
        number_cell(row.get("class_only")),
        estimate_cell(row.get("leak")),
        number_cell(row.get("effective_rank"), 1),
        number_cell(row.get("participation_ratio"), 1),
    ]
