"""The tables that a probe prints: no κ without n, N, chance, controls and an interval."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

COLUMNS = (
    "tap",
    "D",
    "n",
    "N",
    "draws",
    "chance",
    "acc",
    "κ member",
    "95%",
    "κ non-member",
    "95%",
    "Δ",
    "95%",
    "untrained",
    "noise",
    "class-only",
    "leak",
    "95%",
    "steps",
    "conv.",
    "eff. rank",
)
PLANTED_COLUMNS = (
    "planted",
    "tap",
    "n",
    "N",
    "count",
    "chance",
    "AUROC member",
    "95%",
    "non-member",
    "untrained",
    "class loss member",
    "class loss non-member",
)
RADEMACHER_COLUMNS = ("tap", "D", "n", "N", "draws", "chance", "member", "95%", "non-member", "untrained", "noise")

LEGEND = """\
κ = (n·acc - 1)/(n - 1): 0 is guessing, 1 is every random label right. acc is that of members; [..] is the 95% interval
over draws and samples of this one network: another seed of the network usually moves κ more.
Δ = κ(member) - κ(non-member) at equal N, D, n and head is the calibrated number: it alone speaks of having been trained
on. untrained: the same network with fresh weights. noise: Gaussian features of equal mean and covariance. class-only:
what knowing the class alone gives. leak: heads fitted to half of the members, scored on the other half, must be 0 (1 in
20 of its intervals misses 0 by luck). eff. rank: directions that the heads' features have. "-": cannot exist there."""


def probe_table(facts: Row, rows: Sequence[Row]) -> str:
    """The rows as text, one table for each protocol, head, features, mode and images, with what is needed to read them.

    Args:
        facts: ``run`` of ``probe.json``.
        rows: ``rows`` of ``probe.json``.
    """
    parts = [_title(facts)]
    for title, note, group in grouped(rows):
        lines = aligned([list(COLUMNS), *(_cells(row) for row in group)])
        parts.append("\n".join([title, *([note] if note else []), *lines]))
    return "\n\n".join([*parts, LEGEND])


def planted_table(planted: Sequence[Row]) -> str:
    """AUROC of planted truth as text; empty where nothing is planted."""
    tables = []
    for title, _, group in grouped(planted):
        lines = aligned([list(PLANTED_COLUMNS), *(_planted_cells(row) for row in group)])
        tables.append(
            "\n".join([f"{title}: AUROC of mean log p of the random label, planted against the rest", *lines])
        )
    return "\n\n".join(tables)


def rademacher_table(rows: Sequence[Row]) -> str:
    """The readings of n = 2 as text, with the sentence on what they bound; empty where there are none."""
    tables, meaning = [], ""
    for title, _, group in grouped(rows):
        by_tap: dict[str, dict[str, Row]] = {}
        for row in group:
            by_tap.setdefault(row["tap"], {})[row["group"]] = row
            meaning = row["meaning"]
        lines = aligned([list(RADEMACHER_COLUMNS), *(_rademacher_cells(found) for found in by_tap.values())])
        tables.append("\n".join([f"{title}: 2·acc - 1 at n = 2", *lines]))
    return "\n\n".join([*tables, meaning]) if tables else ""


def _title(facts: Row) -> str:
    shares = [
        f"{name} accuracy {100 * facts[key]:.2f}%"
        for name, key in (("train", "train_accuracy"), ("val", "val_accuracy"))
        if facts.get(key) is not None
    ]
    first = "   ".join(
        [facts["name"], facts["model"], facts["penalty"], f"seed {facts['seed']}", f"step {facts['steps']:,}"]
    )
    second = (
        f"N = {facts['samples']:,} of each: members are {facts['members']}, non-members {facts['non_members']}; "
        f"augmented views: {facts['augmentation']}"
    )
    return "\n".join(["   ".join([first, *shares]), second])


def grouped(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """Title, note and rows of each table, in the order of the rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        head = "" if row["head"] == "none" else f", {row['head']} head"
        title = f"{row.get('protocol', 'converged')}{head}, {row['features']} features, {row['mode']} mode, "
        groups.setdefault(title + f"{row['images']} images", []).append(row)
    return [(title, group[0].get("note", ""), group) for title, group in groups.items()]


def _cells(row: Row) -> list[str]:
    return [
        row["tap"],
        *(str(row[key]) for key in ("D", "n", "N", "draws")),
        f"{row['chance']:.3g}",
        f"{row['accuracy']:.4f}",
        *mean_and_interval(row["members"]),
        *mean_and_interval(row["non_members"]),
        *mean_and_interval(row["delta"]),
        _mean(row["untrained"]),
        _mean(row["noise"]),
        number(row["class_only"]),
        *mean_and_interval(row["leak"]),
        str(row["steps"]),
        "-" if row["protocol"] in ("online", "retrieval", "budget") else f"{row['converged']:.0%}",
        number(row["effective_rank"], 1),
    ]


def _planted_cells(row: Row) -> list[str]:
    facts = [row["planted"], row["tap"], *(str(row[key]) for key in ("n", "N", "count")), f"{row['chance']:.1f}"]
    others = ("non_members", "untrained", "class_loss", "class_loss_non_members")
    return [*facts, *mean_and_interval(row["members"]), *(_mean(row[key]) for key in others)]


def _rademacher_cells(found: dict[str, Row]) -> list[str]:
    row = found["members"]
    facts = [row["tap"], *(str(row[key]) for key in ("D", "n", "N", "draws")), f"{row['chance']:.0f}"]
    others = [
        _mean(found[name]["estimate"] if name in found else None) for name in ("non-members", "untrained", "noise")
    ]
    return [*facts, *mean_and_interval(row["estimate"]), *others]


def mean_and_interval(estimate: Row | None) -> tuple[str, str]:
    """Two cells of an estimate; dashes where there is none."""
    if estimate is None:
        return "-", "-"
    if estimate["low"] is None:
        return _mean(estimate), "one draw"
    return _mean(estimate), f"[{number(estimate['low'])}, {number(estimate['high'])}]"


def _mean(estimate: Row | None) -> str:
    return "-" if estimate is None else number(estimate["mean"])


def number(value: float | None, digits: int = 3) -> str:
    """A cell."""
    return "-" if value is None else f"{value:.{digits}f}"


def aligned(rows: list[list[str]]) -> list[str]:
    """Columns two spaces apart, the first to the left, the rest to the right, a rule under the first row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
