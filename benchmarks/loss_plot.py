"""Picture of `benchmarks.loss`: time against n and against the number of draws, with the floor."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.loss_cases import MODES
from benchmarks.loss_contenders import OURS
from rlp.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

# Okabe & Ito (2008): colours that stay apart for every kind of colour vision.
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
OWN_COLOUR, GREY = "#0072B2", "#666666"
LABEL_GAP = 0.062
"""Least distance of two labels, as a share of the panel's height."""


def write_plot(rows: Sequence[Row], path: Path) -> Path | None:
    """Draw the sweeps as a PNG; None without matplotlib or anything to draw."""
    sweeps = list(dict.fromkeys(row["case"] for row in rows if row["is_sweep"] and row["reason"] is None))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    if not sweeps:
        return None
    across = min(2, len(sweeps))
    down = -(-len(sweeps) // across)
    figure = Figure(figsize=(6.6 * across, 4.3 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    names = list(dict.fromkeys(row["contender"] for row in rows if row["is_sweep"] and row["contender"] != OURS))
    colours = {OURS: OWN_COLOUR} | {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    for panel, key in zip(panels, sweeps, strict=False):
        _draw(panel, [row for row in rows if row["case"] == key and row["reason"] is None], colours)
    for panel in panels[len(sweeps) :]:
        panel.set_axis_off()
    figure.suptitle(f"{MODES['both']}: losses and gradients of weights and features ({path.stem})", fontsize=11)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return write_atomically(path, buffer.getvalue())


def _draw(axes: "Axes", rows: Sequence[Row], colours: dict[str, str]) -> None:
    """One sweep: a line and a band (the range over rounds) for each contender, the floor dashed."""
    first = rows[0]
    varied = "heads" if len({row["heads"] for row in rows}) > 1 else "num_labels"
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row["contender"], []).append(row)
    ends = []
    for name in sorted(lines, key=lambda name: name == OURS):  # ours on top
        points = sorted(lines[name], key=lambda row: row[varied])
        where = [row[varied] for row in points]
        low, middle, high = ([1e3 * row["seconds"][part] for row in points] for part in ("low", "median", "high"))
        axes.fill_between(where, low, high, color=colours[name], alpha=0.2, linewidth=0)
        axes.plot(
            where, middle, color=colours[name], marker="o", markersize=3.5, linewidth=2.4 if name == OURS else 1.5
        )
        ends.append((name, colours[name], where[-1], middle[-1]))
    floors = sorted({row[varied]: 1e3 * row["floor"]["median"] for row in rows}.items())
    axes.plot(*zip(*floors, strict=True), color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
    ends.append(("floor", GREY, *floors[-1]))
    axes.set(xscale="log", yscale="log", ylabel="ms")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.set_xlabel("H, number of draws" if varied == "heads" else "n, number of random labels")
    own = f"C={first['classes']}, " if first["classes"] else ""
    axes.set_title(
        f"{first['title']}\nB={first['batch']}, D={first['dim']}" + (f", {own[:-2]}" if own else ""), fontsize=9
    )
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, ends)


def _label(axes: "Axes", ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Names at the right edge, at the height of their line's end or as near as their neighbours let them."""
    axes.autoscale_view()
    to_share = axes.transLimits.transform  # of what the scale gives, not of the data
    scale = axes.transScale.transform
    wanted = sorted((float(to_share(scale((x, y)))[1]), name, colour, x, y) for name, colour, x, y in ends)
    heights = [share for share, *_ in wanted]
    for place in range(1, len(heights)):  # upwards, then back down from the top edge
        heights[place] = max(heights[place], heights[place - 1] + LABEL_GAP)
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], 1 - LABEL_GAP * (len(heights) - 1 - place))
    for height, (_, name, colour, x, y) in zip(heights, wanted, strict=True):
        axes.annotate(
            name, (x, y), (1.03, height), xycoords="data", textcoords="axes fraction", color=colour, fontsize=8,
            va="center", arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.4, "linewidth": 0.7},
        )  # fmt: skip
