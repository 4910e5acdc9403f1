"""The table over several networks: no κ without n, N, chance, controls and an interval."""

from collections.abc import Sequence
from typing import Any

from rlp.measure.table import aligned, grouped, mean_and_interval, number

Row = dict[str, Any]

COLUMNS = (
    "tap", "D", "n", "N", "seeds", "draws", "chance", "acc", "κ member", "95%", "κ non-member", "95%", "Δ", "95%",
    "sd seed", "sd draw", "untrained", "noise", "class-only", "leak", "95%", "eff. rank",
)  # fmt: skip

PAIRED = (
    "Δ compares the same samples with the same random labels, in two networks trained on complementary halves: above\n"
    "0 only if having been trained on helps."
)
LEGEND = """\
κ = (n·acc - 1)/(n - 1): 0 is guessing, 1 is every random label right. Δ = κ(member) - κ(non-member) at equal N, D, n
and head. [..] is the 95% interval over seeds, draws and samples (one seed: over draws and samples of that network).
sd: between seeds, and between draws of one seed, of Δ. untrained: the same network with fresh weights. noise: Gaussian
features of equal mean and covariance. class-only: what knowing the class alone gives. leak: heads fitted to half of the
members, scored on the other half, must be 0. eff. rank: directions that the heads' features have."""


def pooled_table(rows: Sequence[Row], paired: bool = False) -> str:
    """The rows of `rlp.measure.pooling` as text, one table for each protocol, head, features, mode and images."""
    parts = []
    for title, note, group in grouped(rows):
        lines = aligned([list(COLUMNS), *(_cells(row) for row in group)])
        parts.append("\n".join([title, *([note] if note else []), *lines]))
    return "\n\n".join([*parts, *([PAIRED] if paired else []), LEGEND])


def _cells(row: Row) -> list[str]:
    return [
        row["tap"],
        *(str(value) for value in (row["D"], row["n"], row["N"], len(row["seeds"]), row["draws"])),
        f"{row['chance']:.3g}",
        f"{row['accuracy']:.4f}",
        *mean_and_interval(row["members"]),
        *mean_and_interval(row["non_members"]),
        *mean_and_interval(row["delta"]),
        *(number(row["delta"][name]) for name in ("sd_seed", "sd_draw")),
        *(number(row[name] and row[name]["mean"]) for name in ("untrained", "noise")),
        number(row["class_only"]),
        *mean_and_interval(row["leak"]),
        number(row["effective_rank"], 1),
    ]
