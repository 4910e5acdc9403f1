"""Picture of `benchmarks.loader`: bars of images per second, a panel for each case, one scale for all."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlp.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

# Okabe & Ito (2008): colours that stay apart for every kind of colour vision.
OWN_COLOUR, OTHER_COLOUR, COLD_COLOUR = "#0072B2", "#B8B8B8", "#D55E00"
_BAR_INCHES, _PANEL_INCHES = 0.27, 0.5


def write_plot(rows: Sequence[Row], path: Path) -> Path | None:
    """Draw the rates as a PNG; None without matplotlib or anything to draw."""
    warm = [row for row in rows if row["measure"] == "warm" and row["reason"] is None]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    if not warm:
        return None
    cases = list(dict.fromkeys(row["case"] for row in warm))
    bars = [sum(row["case"] == key for row in warm) for key in cases]
    heights = [_PANEL_INCHES + _BAR_INCHES * count for count in bars]
    figure = Figure(figsize=(9.2, 0.9 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    cold = {
        (row["case"], row["contender"]): row["images_per_s"]["median"]
        for row in rows
        if row["measure"] == "cold" and row["reason"] is None
    }
    for panel, key in zip(panels, cases, strict=True):
        _draw(panel, [row for row in warm if row["case"] == key], cold)
    ends = [row["images_per_s"]["median"] for row in warm] + list(cold.values())
    panels[0].set_xlim(min(ends) / 3, max(ends) * 6)  # room for the numbers
    panels[-1].set_xlabel("images per second")
    figure.suptitle(f"Data loaders: bars warm, diamonds without the page cache ({path.stem})", fontsize=11)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return write_atomically(path, buffer.getvalue())


def _draw(axes: "Axes", rows: Sequence[Row], cold: dict[tuple[str, str], float]) -> None:
    """One case, the fastest on top."""
    ordered = sorted(rows, key=lambda row: row["images_per_s"]["median"])
    for place, row in enumerate(ordered):
        spread = row["images_per_s"]
        colour = OWN_COLOUR if row["is_ours"] else OTHER_COLOUR
        axes.barh(place, spread["median"], height=0.72, color=colour)
        axes.plot([spread["low"], spread["high"]], [place, place], color="black", linewidth=1)
        diamond = cold.get((row["case"], row["contender"]))
        if diamond is not None:
            style = {"marker": "D", "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.6}
            axes.plot([diamond], [place], color=COLD_COLOUR, **style)
        right = max(spread["high"], diamond or 0)
        axes.annotate(f"{spread['median']:,.0f}", (right, place), (5, 0), textcoords="offset points", va="center",
                      fontsize=8, color=OWN_COLOUR if row["is_ours"] else "black")  # fmt: skip
    axes.set_yticks(range(len(ordered)), [row["contender"] for row in ordered], fontsize=8)
    for label, row in zip(axes.get_yticklabels(), ordered, strict=True):
        label.set_color(OWN_COLOUR if row["is_ours"] else "black")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_title(f"{ordered[0]['case']}: {ordered[0]['title']}", fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
