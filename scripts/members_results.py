"""The tables and the figure of docs/results/members.md, from the pooled probes in docs/results/data.

    python scripts/members_results.py [--data docs/results/data] [--figure docs/images/members.png]

Prints the tables as Markdown, and draws κ at convergence beside Δ of the small budget.
"""

import argparse
from io import BytesIO
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlp.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

NETWORKS = {
    "clean": "clean labels",
    "noise": "40% wrong labels",
    "clean-aug": "clean labels, flip + crop",
    "noise-aug": "40% wrong, flip + crop",
    "pen-forget": "40% wrong, −log(1 − p), λ = 1",
    "pen-steps": "the same, 5 steps of the heads",
    "pen-uniform": "40% wrong, to uniform, λ = 1",
}
"""Files ``NAME-{converged,budget}.json`` of the data's folder, and what the networks are."""
FEATURES = {"raw": "#666666", "residual": "#0072B2", "residual-predicted": "#D55E00"}
GROUPS = {
    "members": ("#0072B2", "o"),
    "non_members": ("#D55E00", "s"),
    "untrained": ("#666666", "x"),
    "noise": ("#666666", "+"),
}


def main() -> None:
    """Print the tables, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("docs/results/data"))
    parser.add_argument("--figure", type=Path, default=Path("docs/images/members.png"))
    arguments = parser.parse_args()
    rows = {kind: read_rows(arguments.data, kind) for kind in ("converged", "budget")}
    print(table(rows["converged"], ("protocol", "tap")), end="\n\n")
    print(table(rows["budget"], ("tap", "features")))
    print(f"\n{write_atomically(arguments.figure, rendered(figure(rows)))}")


def read_rows(folder: Path, kind: str) -> dict[str, list[Row]]:
    """The pooled rows of each network that has them, by its name."""
    paths = {name: folder / f"{name}-{kind}.json" for name in NETWORKS}
    return {name: json.loads(path.read_text("utf-8"))["rows"] for name, path in paths.items() if path.is_file()}


def table(rows: dict[str, list[Row]], keys: tuple[str, str]) -> str:
    """Markdown, a line for each network and condition."""
    head = (
        "network", *keys, "D", "N", "n", "seeds × draws", "chance", "κ members", "κ non-members", "Δ",
        "sd of Δ: seed, draw", "untrained", "noise", "class-only", "leak", "eff. rank",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, found in rows.items():
        for row in found:
            estimates = [row[group] for group in ("members", "non_members", "delta")]
            cells = (
                NETWORKS[name],
                *(row[key] for key in (*keys, "D", "N", "n")),
                f"{len(row['seeds'])} × {row['draws']}",
                f"{row['chance']:g}",
                *(interval(estimate) for estimate in estimates),
                f"{number(row['delta']['sd_seed'])}, {number(row['delta']['sd_draw'])}",
                *(number((row[control] or {}).get("mean")) for control in ("untrained", "noise")),
                number(row["class_only"]),
                interval(row["leak"]) if row["leak"] else "–",
                f"{row['effective_rank']:.0f}",
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Three digits, a true minus, and a dash for none."""
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def interval(estimate: Row) -> str:
    """Mean and 95% interval."""
    if estimate["low"] is None:
        return number(estimate["mean"])
    return f"{number(estimate['mean'])} [{number(estimate['low'])}, {number(estimate['high'])}]"


def figure(rows: dict[str, dict[str, list[Row]]]) -> "Figure":
    """κ of every group at convergence (n = 10), and Δ after a small budget, network by network."""
    from matplotlib.figure import Figure

    found = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = found.subplots(1, 2, sharey=True)
    for name, place in zip(rows["converged"], range(len(NETWORKS)), strict=False):
        row = next(r for r in rows["converged"][name] if r["protocol"] == "converged" and r["n"] == 10)
        for offset, (group, (colour, marker)) in enumerate(GROUPS.items()):
            point(
                left,
                row[group],
                place + 0.15 * (offset - 1.5),
                colour,
                marker,
                group.replace("_", "-") if not place else "",
            )
        for offset, (features, colour) in enumerate(FEATURES.items()):
            last = [r for r in rows["budget"].get(name, []) if r["features"] == features][-1]
            point(right, last["delta"], place + 0.2 * (offset - 1), colour, "o", features if not place else "")
    left.set_yticks(range(len(rows["converged"])), [NETWORKS[name] for name in rows["converged"]])
    left.invert_yaxis()
    left.set(xlabel="κ of fresh heads, converged (n = 10)", xlim=(0, None), title="At convergence all read the same")
    right.set(
        xlabel="Δ = κ(members) − κ(non-members), small budget", title="Of what the class leaves, members show more"
    )
    right.axvline(0, color="black", linewidth=0.8)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.legend(fontsize=8, loc="best")
    return found


def point(axes: "Axes", estimate: Row, y: float, colour: str, marker: str, label: str) -> None:
    """A mean with its interval."""
    mean = estimate["mean"]
    reach = [[mean - estimate["low"]], [estimate["high"] - mean]] if estimate["low"] is not None else None
    axes.errorbar(mean, y, xerr=reach, color=colour, marker=marker, markersize=5, linestyle="", label=label or None)


def rendered(drawn: "Figure") -> bytes:
    """PNG."""
    buffer = BytesIO()
    drawn.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
