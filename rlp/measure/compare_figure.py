"""The heat map of a comparison: how every score agrees with every other."""

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from rlp.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]


def agreement_figure(rows: list[Row]) -> "Figure":
    """Kendall's τ of each pair of scores, written into its field; empty where it does not exist.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the figure needs matplotlib; install it") from None
    names = list(dict.fromkeys(name for row in rows for name in (row["a"], row["b"])))
    values = np.full((len(names), len(names)), np.nan)
    for row in rows:
        if row["kendall"] is not None:
            a, b = names.index(row["a"]), names.index(row["b"])
            values[a, b] = values[b, a] = row["kendall"]["mean"]
    side = 2.5 + 0.42 * len(names)
    figure = Figure(figsize=(side, side * 0.9), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    for (a, b), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(b, a, f"{value:.1f}".replace("-", "−"), ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(image, label="Kendall's τ, members", shrink=0.8)
    first = rows[0]
    axes.set_title(f"N = {first['N']:,}, {first['runs']} run{'s' if first['runs'] > 1 else ''}, chance 0", fontsize=9)
    return figure


def png(figure: "Figure") -> bytes:
    """The figure as a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()
