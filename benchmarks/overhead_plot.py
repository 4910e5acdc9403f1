"""Picture of `benchmarks.overhead`: added time against the number of draws and of random labels."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.overhead_tables import TARGET_LABELS, TARGETS
from rlp.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

# Okabe & Ito (2008): colours that stay apart for every kind of colour vision.
COLOURS = ("#56B4E9", "#0072B2", "#009E73", "#E69F00", "#D55E00")
GREY = "#666666"
LABEL_GAP = 0.07
"""Least distance of two labels, as a share of the panel's height."""
AXES = {"draws": "draws (heads at each tap)", "n": "n, random labels"}
LINEAR = 10.0
"""Per cent up to which the scale is linear, so that zero and noise below it have a place."""

MARKS = (2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)


def write_plot(rows: Sequence[Row], is_cuda: bool, path: Path) -> Path | None:
    """Draw the grids with a penalty as a PNG; None without matplotlib or anything to draw."""
    shown = [row for row in rows if row["reason"] is None and row["kind"] == "shared" and row["lam"] > 0]
    shown = [row for row in shown if row["where"] == row["group"]]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    places = list(dict.fromkeys(row["where"] for row in shown))
    if not places:
        return None
    figure = Figure(figsize=(10.4, 3.9 * len(places)), layout="constrained")
    panels = figure.subplots(len(places), 2, squeeze=False, sharey="row")
    for line, place in zip(panels, places, strict=True):
        mine = [row for row in shown if row["where"] == place]
        target = next((one for one in TARGETS if one.where == place), None) if is_cuda else None
        limit = None if target is None else 100 * target.limit
        if target is not None:
            line[0].set_title(f"dashed: at most {limit:.0f}% wanted of {target.title} at n={TARGET_LABELS}", fontsize=9)
        for axes, (across, other) in zip(line, (("draws", "n"), ("n", "draws")), strict=True):
            _draw(axes, mine, across, other, limit)
        taps = mine[0]["taps"]
        line[0].set_ylabel(f"added to a step's time, %\n{place}" + (f" ({taps} taps)" if taps > 1 else ""))
    figure.suptitle(f"What heads with a penalty (λ > 0) add to a training step ({path.stem})", fontsize=11)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return write_atomically(path, buffer.getvalue())


def _draw(axes: "Axes", rows: Sequence[Row], across: str, other: str, limit: float | None) -> None:
    """A line for each value of `other`, with bars for the range over rounds."""
    ends = []
    for colour, value in zip(COLOURS, sorted({row[other] for row in rows}), strict=False):
        points = sorted((row for row in rows if row[other] == value), key=lambda row: row[across])
        where = [row[across] for row in points]
        low, middle, high = ([100 * (row["ratio"][part] - 1) for row in points] for part in ("low", "median", "high"))
        axes.fill_between(where, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(where, middle, color=colour, marker="o", markersize=4, linewidth=1.6)
        name = f"n={value:,}" if other == "n" else f"{value} draw" + ("s" if value > 1 else "")
        ends.append((middle[-1], name, colour, where[-1]))
    axes.axhline(0, color=GREY, linewidth=0.8)
    if limit is not None:
        axes.axhline(limit, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=LINEAR)
    marks = sorted({row[across] for row in rows})
    axes.set_xticks(marks, [f"{mark:,}" for mark in marks])
    bottom, top = axes.get_ylim()
    heights = [sign * mark for mark in MARKS for sign in (-1, 1) if bottom <= sign * mark <= top]
    axes.set_yticks([0, *heights], [f"{height:,}" for height in (0, *heights)])
    axes.minorticks_off()
    axes.set_xlabel(AXES[across])
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, ends)


def _label(axes: "Axes", ends: Sequence[tuple[float, str, str, float]]) -> None:
    """Names at the right edge, at the height of their line's end or as near as their neighbours let them."""
    axes.autoscale_view()
    wanted = sorted(
        (float(axes.transLimits.transform(axes.transScale.transform((x, y)))[1]), name, colour, x, y)
        for y, name, colour, x in ends
    )
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
