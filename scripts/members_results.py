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
"""Files ``NAME-{converged,budget}.json`` of the data's folder, and what the networks are: CIFAR-10."""
DIGITS = {
    "none": "none",
    "forget": "−log(1 − p)",
    "steps": "the same, 5 steps of the heads",
    "restarts": "the same, 5 steps, restarts, fresh draws",
    "target": "−log(1 − p), λ adapted to κ = 0.1",
    "uniform": "cross-entropy to uniform",
    "entropy": "negative entropy",
    "dof": "degrees of freedom",
    "reversal": "gradient reversal, λ = 0.01",
    "joint": "joint mode, μ = 0.1",
}
"""Files ``digits-NAME.json``: 40% wrong labels, and a penalty of λ = 1."""
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
    rows = {kind: read_rows(arguments.data, NETWORKS, f"{{}}-{kind}.json") for kind in ("converged", "budget")}
    print(table(rows["converged"], ("protocol", "tap")), end="\n\n")
    print(table(rows["budget"], ("tap", "features")), end="\n\n")
    print(table(read_rows(arguments.data, DIGITS, "digits-{}.json"), ("protocol", "features")))
    heads = json.loads((arguments.data / "networks.json").read_text("utf-8"))
    trained = {NETWORKS[name]: [row["training_heads"] for row in found] for name, found in heads.items()}
    print(f"\n{write_atomically(arguments.figure, rendered(figure(rows, trained)))}")


def read_rows(folder: Path, names: dict[str, str], pattern: str) -> dict[str, list[Row]]:
    """The pooled rows of each network that has them, by what it is."""
    paths = {title: folder / pattern.format(name) for name, title in names.items()}
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
                name,
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


def figure(rows: dict[str, dict[str, list[Row]]], trained: dict[str, list[float]]) -> "Figure":
    """κ of every group at convergence (n = 10), and Δ after a small budget, network by network.

    ``trained``: κ of the heads that trained beside each network, by seed.
    """
    from matplotlib.figure import Figure

    found = Figure(figsize=(10.5, 5), layout="constrained")
    left, right = found.subplots(1, 2, sharey=True)
    names = [name for name in rows["converged"] if name in rows["budget"]]
    for place, name in enumerate(names):
        row = next(r for r in rows["converged"][name] if r["protocol"] == "converged" and r["n"] == 10)
        for offset, (group, style) in enumerate(GROUPS.items()):
            label = "" if place else group.replace("_", "-")
            point(left, row[group], place + 0.15 * (offset - 1.5), style, label)
        label = "" if place else "training heads, by seed"
        left.plot(trained[name], [place] * len(trained[name]), "k|", markersize=14, label=label or None)
        for offset, (features, colour) in enumerate(FEATURES.items()):
            last = next(r for r in reversed(rows["budget"][name]) if r["features"] == features)
            point(right, last["delta"], place + 0.2 * (offset - 1), (colour, "o"), "" if place else features)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set(
        xlabel="κ at the last layer (n = 10)", xlim=(-0.01, None), title="Fresh heads, converged: D, N and n alone"
    )
    right.set(xlabel="Δ = κ(members) − κ(non-members), small budget", title="Small budget: overfitted networks differ")
    right.axvline(0, color="black", linewidth=0.8)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        place = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.14)}
        axes.legend(fontsize=8, ncols=5, columnspacing=1, frameon=False, **place)
    return found


def point(axes: "Axes", estimate: Row, y: float, style: tuple[str, str], label: str) -> None:
    """A mean with its interval; ``style`` is colour and marker."""
    mean, (colour, marker) = estimate["mean"], style
    reach = [[mean - estimate["low"]], [estimate["high"] - mean]] if estimate["low"] is not None else None
    axes.errorbar(mean, y, xerr=reach, color=colour, marker=marker, markersize=5, linestyle="", label=label or None)


def rendered(drawn: "Figure") -> bytes:
    """PNG."""
    buffer = BytesIO()
    drawn.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
