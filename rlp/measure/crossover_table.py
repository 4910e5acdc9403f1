"""The table that a crossover prints: no κ without n, N, chance, controls and an interval."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

COLUMNS = (
    "tap", "D", "n", "N", "seeds", "draws", "chance", "acc", "κ member", "95%", "κ non-member", "95%", "Δ", "95%",
    "sd seed", "sd draw", "untrained", "noise", "class-only", "leak", "95%",
)  # fmt: skip

LEGEND = """\
κ = (n·acc - 1)/(n - 1): 0 is guessing, 1 is every random label right. Δ = κ(member) - κ(non-member) of the same samples
with the same random labels, in two networks trained on complementary halves: above 0 only if having been trained on
helps. N: samples that heads are fitted to, of either half. [..] is the 95% interval over seeds, draws and samples (one
seed: over draws and samples of that one pair of networks). sd: between seeds, and between draws of one pair, of Δ.
untrained: the same network with fresh weights. noise: Gaussian features of equal mean and covariance. class-only: what
knowing the class alone gives. leak: heads fitted to half of the members, scored on the other half, must be 0."""


def crossover_table(rows: Sequence[Row]) -> str:
    """The rows as text, one table for each protocol, head, features, mode and images."""
    tables: dict[str, list[list[str]]] = {}
    for row in rows:
        head = "" if row["head"] == "none" else f", {row['head']} head"
        note = f" ({row['note']})" if row["note"] else ""
        title = f"{row['protocol']}{head}, {row['features']} features, {row['mode']} mode, {row['images']} images{note}"
        tables.setdefault(title, [list(COLUMNS)]).append(_cells(row))
    parts = ["\n".join([title, *_aligned(cells)]) for title, cells in tables.items()]
    return "\n\n".join([*parts, LEGEND])


def _cells(row: Row) -> list[str]:
    return [
        row["tap"],
        *(str(value) for value in (row["D"], row["n"], row["N"], len(row["seeds"]), row["draws"])),
        f"{row['chance']:.3g}",
        f"{row['accuracy']:.4f}",
        *_both(row["members"]),
        *_both(row["non_members"]),
        *_both(row["delta"]),
        *(_number(row["delta"][name]) for name in ("sd_seed", "sd_draw")),
        *(_number(row[name] and row[name]["mean"]) for name in ("untrained", "noise")),
        _number(row["class_only"]),
        *_both(row["leak"]),
    ]


def _both(estimate: Row | None) -> tuple[str, str]:
    if estimate is None:
        return "-", "-"
    ends = "one draw" if estimate["low"] is None else f"[{estimate['low']:.3f}, {estimate['high']:.3f}]"
    return _number(estimate["mean"]), ends


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
