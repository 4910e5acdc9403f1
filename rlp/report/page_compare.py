"""The field's other measures beside ours, where a run was compared (``python -m rlp.measure compare``)."""

from rlp.errors import UserError
from rlp.report.page_estimates import estimate_cell
from rlp.report.page_html import Cell, Html, element, join, number_cell, table
from rlp.report.page_run import COMPARED, ReportRun
from rlp.runlog import Row

PLANTED = (
    ("run", "name of the folder"),
    ("score", "of single samples; larger is more memorised"),
    ("planted", "what is told from plain samples"),
    ("N", "members that are scored"),
    ("count", "of them planted"),
    ("chance", "AUROC of guessing"),
    ("AUROC members", "probability that a planted sample scores higher, and 95% interval"),
    ("AUROC non-members", "control: as good there tells hard samples, not memorised ones"),
)
FINDINGS = (
    ("run", "name of the folder"),
    ("measure", ""),
    ("quantity", ""),
    ("tap", "where; empty for the whole run"),
    ("N", "samples it rests on"),
    ("chance", "what guessing gives, where there is such a thing"),
    ("members", "mean and 95% interval"),
    ("non-members", "mean and 95% interval"),
    ("controls", ""),
    ("settings", "what else it depends on"),
)
"""Heading and explanation of each column."""


def compare_section(runs: list[ReportRun]) -> Html:
    """The section; empty when no run was compared.

    Raises:
        UserError: what lies in a run's folder is no such table.
    """
    for run in runs:
        _check(run)
    planted = [_planted(run, row) for run in runs for row in run.compared.get("planted", [])]
    findings = [_finding(run, row) for run in runs for row in run.compared.get("findings", [])]
    if not findings:
        return Html("")
    about = (
        "Each says of the same samples how much of them is memory; docs/measures.md says what may be believed of which."
    )
    parts = [element("h2", "Other measures", id="compare"), element("p", about)]
    parts += [element("p", old) for run in runs if (old := _outdated(run))]
    if planted:
        parts.append(table("How well scores find planted truth", PLANTED, planted, sort=True))
    parts.append(element("div", table("Numbers of taps and runs", FINDINGS, findings, sort=True), class_="tall"))
    return join(parts)


def _check(run: ReportRun) -> None:
    tables = [run.compared.get(name, []) for name in ("findings", "planted")] if isinstance(run.compared, dict) else []
    if not tables or run.compared.get("schema", 1) != 1 or not all(isinstance(rows, list) for rows in tables):
        raise UserError(
            f"{run.dir / COMPARED} is no table of schema 1; expected what `python -m rlp.measure compare` writes"
        )


def _outdated(run: ReportRun) -> str:
    """In words, where the run has gone on since it was compared."""
    taken, last = run.compared.get("step"), run.epochs[-1]["step"]
    if taken is None or taken == last:
        return ""
    return f"{run.name} was compared at step {taken:,}, and has gone on to step {last:,} since: compare it again."


def _planted(run: ReportRun, row: Row) -> list[str | Cell]:
    counts = [number_cell(row["N"]), number_cell(row["count"]), number_cell(row["chance"], 1)]
    estimates = [estimate_cell(row["members"]), estimate_cell(row["non_members"])]
    return [run.name, row["score"], row["planted"], *counts, *estimates]


def _finding(run: ReportRun, row: Row) -> list[str | Cell]:
    controls = [f"{name} {number_cell(value).text}" for name, value in row["controls"].items()]
    return [
        run.name,
        row["measure"],
        row["quantity"],
        row["tap"] or "–",
        number_cell(row["count"]),
        number_cell(row["chance"]),
        estimate_cell(row["value"]),
        estimate_cell(row["non_members"]),
        ", ".join(controls) or "–",
        row["settings"],
    ]
