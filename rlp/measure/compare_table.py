"""The tables of a comparison as text: no number without N, chance, a control and an interval."""

from collections.abc import Sequence
from typing import Any

from rlp.measure.compare import Comparison
from rlp.measure.table import aligned, number

Row = dict[str, Any]

REFERENCE = "feldman_zhang"
"""The score that the others are set beside, where it was taken."""

COLUMNS = {
    "findings": (
        "measure", "quantity", "tap", "N", "member", "95%", "non-member", "95%", "chance", "controls", "settings",
    ),
    "planted": ("score", "N", "planted", "chance", "AUROC member", "95%", "AUROC non-member", "95%"),
    "agreement": ("score", "runs", "N", "chance", "Kendall τ", "95%", "Spearman ρ", "95%"),
    "granulated": ("measure", "seeds", "pairs", "chance", "granulated τ", "95%", "worst setting", "its τ"),
    "partial": ("measure", "runs", "chance", "partial ρ", "95%"),
}  # fmt: skip

LEGEND = """\
Of every score larger means more memorised. AUROC: chance that a planted sample scores higher than a plain one; on
non-members, which the network never saw, it is a control: a score that is as good there tells hard samples, not
memorised ones. τ and ρ are taken within each run and averaged; granulated τ compares runs that differ in one setting
only, by the gap of accuracy between members and non-members; partial ρ is that over all runs, given train accuracy.
Both also take the numbers of taps, as the first table has them: some, such as nmf's area, are less for more memory, and
-1 is the best that they can reach."""


def comparison_table(found: Comparison) -> str:
    """Everything as text."""
    parts = [_runs(found.runs), _findings(found.findings)]
    parts += [_planted(run["run"], found.planted) for run in found.runs]
    parts += [_agreement(found.agreement), _granulated(found.granulated), _partial(found.partial), LEGEND]
    return "\n\n".join(part for part in parts if part)


def _titled(title: str, kind: str, rows: list[list[str]]) -> str:
    return "\n".join([title, *aligned([list(COLUMNS[kind]), *rows])]) if rows else ""


def _estimate(estimate: Row | None) -> tuple[str, str]:
    """Two cells, mean and interval; dashes where there is none."""
    if estimate is None:
        return "-", "-"
    ends = "-" if estimate["low"] is None else f"[{number(estimate['low'])}, {number(estimate['high'])}]"
    return number(estimate["mean"]), ends


def _runs(runs: Sequence[Row]) -> str:
    lines = []
    for run in runs:
        cost = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in run["seconds"].items())
        lines.append(
            f"{run['run']}   seed {run['seed']}   N = {run['N']:,} members and as many non-members   "
            f"train accuracy {run['train_accuracy']:.1%}   gap {run['gap']:.1%}   cost: {cost}"
        )
        lines += [f"  left out: {name}: {why}" for name, why in run["left_out"].items()]
    return "\n".join(lines)


def _findings(rows: Sequence[Row]) -> str:
    cells = [
        [
            row["measure"],
            row["quantity"],
            row["tap"] or "-",
            str(row["count"]),
            *_estimate(row["value"]),
            *_estimate(row["non_members"]),
            number(row["chance"]),
            " ".join(f"{name} {number(value)}" for name, value in row["controls"].items()) or "-",
            row["settings"],
        ]
        for row in rows
    ]
    return _titled("Numbers of taps and runs", "findings", cells)


def _planted(run: str, rows: Sequence[Row]) -> str:
    tables = []
    mine = [row for row in rows if row["run"] == run]
    for kind in dict.fromkeys(row["planted"] for row in mine):
        ranked = sorted((row for row in mine if row["planted"] == kind), key=lambda row: -row["members"]["mean"])
        cells = [
            [
                row["score"], str(row["N"]), str(row["count"]), f"{row['chance']:.1f}",
                *_estimate(row["members"]), *_estimate(row["non_members"]),
            ]
            for row in ranked
        ]  # fmt: skip
        tables.append(_titled(f"{run}: {kind}, AUROC of each score", "planted", cells))
    return "\n\n".join(tables)


def _agreement(rows: Sequence[Row]) -> str:
    """Every score beside the reference; the whole matrix is in the JSON and in the figure."""
    names = list(dict.fromkeys(name for row in rows for name in (row["a"], row["b"])))
    if not names:
        return ""
    reference = REFERENCE if REFERENCE in names else names[0]
    mine = [row for row in rows if reference in (row["a"], row["b"])]
    cells = [
        [
            row["b"] if row["a"] == reference else row["a"], str(row["runs"]), str(row["N"]), "0",
            *_estimate(row["kendall"]), *_estimate(row["spearman"]),
        ]
        for row in sorted(mine, key=lambda row: -(row["kendall"] or {"mean": -2})["mean"])
    ]  # fmt: skip
    return _titled(f"Rank correlation with {reference}, members", "agreement", cells)


def _between_seeds(row: Row) -> str:
    if row["interval"] is not None:
        return "[{:.3f}, {:.3f}]".format(*row["interval"])
    return "one seed" if row["seeds"] == 1 else "seeds agree"


def _granulated(rows: Sequence[Row]) -> str:
    cells = [
        [
            row["measure"], str(row["seeds"]), str(row["pairs"]), "0", number(row["granulated"]),
            _between_seeds(row),
            row["worst"], number(row["worst_tau"]),
        ]
        for row in sorted(rows, key=lambda row: -row["granulated"])
    ]  # fmt: skip
    return _titled("Which run generalises worse: pairs of runs that differ in one setting", "granulated", cells)


def _partial(rows: Sequence[Row]) -> str:
    ranked = sorted(rows, key=lambda row: -row["partial"]["mean"])
    cells = [[row["measure"], str(row["runs"]), "0", *_estimate(row["partial"])] for row in ranked]
    return _titled("Which run generalises worse, given its train accuracy", "partial", cells)
