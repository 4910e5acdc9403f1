"""The two figures of a run: how training went, and where in depth the random labels can be read.

Matplotlib is imported when a figure is drawn, always through its objects: no global state, no display.
"""

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlp.errors import UserError
from rlp.files import write_atomically
from rlp.intervals import draw_interval
from rlp.report.readings import Reading, plural, readings
from rlp.runlog import METRICS, SUMMARY, Row, read_rows, read_summary, weight_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008): eight colours that stay apart for every kind of colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
FORMATS = ("png", "pdf")
DPI = 160


def write_figures(run_dir: str | Path, summary: Row | None = None) -> list[Path]:
    """Draw `figures/training` and `figures/depth` (PNG and PDF) of a run and return the paths written.

    A run without heads has nothing to show against depth: only the training figure is drawn.

    Args:
        run_dir: a folder with `metrics.jsonl`.
        summary: what `summary.json` holds or will hold; None reads the file if it is there. It names model, λ and
            seed in the titles, which go without them when there is neither.

    Raises:
        UserError: no metrics, no finished epoch in them, or matplotlib is not installed.
    """
    run_dir = Path(run_dir)
    epochs = [row for row in read_rows(run_dir / METRICS) if row["kind"] == "epoch"]
    if not epochs:
        raise UserError(f"{run_dir / METRICS} holds no finished epoch; expected at least one to draw")
    if summary is None and (run_dir / SUMMARY).is_file():
        summary = read_summary(run_dir)
    figures = {"training": training_figure(epochs, summary)}
    if epochs[-1].get("heads"):
        figures["depth"] = depth_figure(epochs[-1], summary)
    return [
        write_atomically(run_dir / "figures" / f"{name}.{suffix}", rendered(figure, suffix))
        for name, figure in figures.items()
        for suffix in FORMATS
    ]


def training_figure(epochs: list[Row], summary: Row | None = None) -> "Figure":
    """Loss, class accuracy and, where there are heads, κ of every tap, each against the epoch.

    κ is read in eval mode on clean training images where the rows have it, else it is the running (online) value.
    The line is the mean over draws, the band reaches from the lowest to the highest draw.

    Args:
        epochs: the epoch rows of metrics.jsonl, at least one.
        summary: for the title, see :func:`write_figures`.
    """
    mode = _mode(epochs)
    figure = new_figure(12.0 if mode else 8.0, 3.9)
    axes = figure.subplots(1, 3 if mode else 2, squeeze=False)[0]
    draw_split_curves(axes[0], epochs, "loss", "class loss")
    draw_split_curves(axes[1], epochs, "accuracy", "class accuracy")
    if mode:
        draw_kappa_curves(axes[2], epochs, mode)
        _kappa_legend(axes[2])
    axes[0].legend(fontsize=8)
    for panel in axes:
        draw_epoch_axis(panel, epochs)
    figure.suptitle("Training\n" + _facts(epochs[-1], summary), fontsize=10)
    return figure


def depth_figure(epoch: Row, summary: Row | None = None) -> "Figure":
    """κ at every tap, from input to output: points of every draw, their mean and its 95% interval over draws.

    Three kinds: heads read in eval mode on clean training images; their running value over the epoch (train mode,
    augmented); and the leak check, the same heads on validation images, whose labels they never saw.

    Args:
        epoch: an epoch row of metrics.jsonl with head rows.
        summary: for the title, see :func:`write_figures`.
    """
    kinds = [
        (readings(epoch["heads"], "train", "eval"), -0.18, BLUE, "o", "training images, clean, eval mode"),
        (readings(epoch["heads"], "train", "online"), 0.0, ORANGE, "D", "training images, running over the epoch"),
        (readings(epoch["heads"], "val", "eval"), 0.18, GREEN, "s", "leak check: validation images"),
    ]
    taps = {reading.tap: reading for kind in kinds for reading in kind[0]}
    in_order = sorted(taps.values(), key=lambda reading: reading.depth)
    place = {reading.tap: position for position, reading in enumerate(in_order)}
    figure = new_figure(max(7.2, 2.6 + 0.62 * len(place)), 4.6)
    axes = figure.subplots()
    for kind, shift, colour, marker, label in kinds:
        _draw_readings(axes, kind, place, shift, colour, marker, label)
    _draw_floors(axes, kinds[0][0] or kinds[1][0], place)
    axes.axhline(0, color=GREY, linewidth=1, label="chance")
    draw_tap_axis(axes, [reading.tap for reading in in_order])
    axes.set_ylabel("κ of random labels")
    axes.grid(axis="y", alpha=0.3)
    note = "points: draws; marker: their mean; bar: its 95% interval over draws, for this one trained network"
    figure.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False, title=note, title_fontsize=8)
    axes.set_title("Random labels read at each depth\n" + _facts(epoch, summary), fontsize=10)
    return figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the figures need the package matplotlib, which is not installed") from None
    return Figure(figsize=(width, height), layout="constrained")


def rendered(figure: "Figure", suffix: str) -> bytes:
    """The file's content; the same figure gives the same bytes, so neither time nor version is written into it."""
    metadata = {"CreationDate": None} if suffix == "pdf" else {"Software": None}
    buffer = BytesIO()
    figure.savefig(buffer, format=suffix, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def _facts(epoch: Row, summary: Row | None) -> str:
    """What a number must not be shown without: n, N, draws, λ, epochs, seed."""
    rows = epoch.get("heads") or []
    parts = [summary["config"].get("model", {}).get("name")] if summary else []
    if rows:
        parts.append("n = " + ", ".join(map(str, sorted({row["num_labels"] for row in rows}))))
    parts.append(f"N = {(epoch.get('train_eval') or epoch['train'])['count']:,}")
    if rows:
        parts.append(plural(len({row["draw"] for row in rows}), "draw"))
    if summary:
        parts.append(weight_text(summary["lam"], summary["config"].get("heads", {})))
    parts.append(plural(epoch["epoch"], "epoch"))
    if summary:
        parts.append(f"seed {summary['seed']}")
    return "   ".join(part for part in parts if part)


def _mode(epochs: list[Row]) -> str | None:
    """The reading to follow over time: eval where there is one, else online; None without heads."""
    modes = {row["mode"] for epoch in epochs for row in epoch.get("heads") or [] if row["split"] == "train"}
    return next((mode for mode in ("eval", "online") if mode in modes), None)


def draw_split_curves(axes: "Axes", epochs: list[Row], key: str, label: str) -> None:
    """`key` (loss, accuracy) of the epoch rows against the epoch, for the three ways of reading it."""
    for split, name, colour, marker in (
        ("train", "training, running over the epoch", ORANGE, "D"),
        ("train_eval", "training, clean, eval mode", BLUE, "o"),
        ("val", "validation", GREEN, "s"),
    ):
        points = [(row["epoch"], row[split][key]) for row in epochs if row.get(split)]
        points = [point for point in points if point[1] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=name, **curve_markers(len(points), marker))
    axes.set_title(label, fontsize=10)


def draw_kappa_curves(axes: "Axes", epochs: list[Row], mode: str) -> None:
    """κ on the training images against the epoch: mean of the draws at each tap, band from lowest to highest draw."""
    by_tap: dict[str, list[tuple[int, Reading]]] = {}
    for row in epochs:
        for reading in readings(row.get("heads") or [], "train", mode):
            by_tap.setdefault(reading.tap, []).append((row["epoch"], reading))
    for (tap, points), colour in zip(by_tap.items(), depth_colours(len(by_tap)), strict=True):
        when = [epoch for epoch, _ in points]
        kappas = [reading.kappas for _, reading in points]
        means = [draw_interval(values).mean for values in kappas]
        axes.fill_between(when, list(map(min, kappas)), list(map(max, kappas)), color=colour, alpha=0.2, linewidth=0)
        axes.plot(when, means, color=colour, label=literal(tap), **curve_markers(len(points), "o"))
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_title(f"κ of random labels ({mode}); band: all draws", fontsize=10)


def _kappa_legend(axes: "Axes") -> None:
    handles, names = axes.get_legend_handles_labels()  # deepest first, as the curves usually lie
    axes.legend(handles[::-1], names[::-1], fontsize=8 if len(names) < 9 else 6.5, loc="center left",
                bbox_to_anchor=(1.0, 0.5), frameon=False)  # fmt: skip


def draw_epoch_axis(axes: "Axes", epochs: list[Row]) -> None:
    """Whole epochs across, also where there is only one."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if len(epochs) == 1:
        axes.set_xlim(epochs[0]["epoch"] - 1, epochs[0]["epoch"] + 1)
    axes.grid(alpha=0.3)


def _draw_readings(
    axes: "Axes",
    kind: list[Reading],
    place: dict[str, int],
    shift: float,
    colour: str,
    marker: str,
    label: str,
) -> None:
    """Every draw as a faint point, the mean as a marker and, from two draws on, the interval around it."""
    for reading in kind:
        across = place[reading.tap] + shift
        spread = [across + 0.05 * offset for offset in offsets(reading.draws)]
        axes.scatter(spread, reading.kappas, s=10, color=colour, alpha=0.35, linewidths=0)
    across = [place[reading.tap] + shift for reading in kind]
    means = [reading.interval.mean for reading in kind]
    axes.plot(across, means, color=colour, marker=marker, markersize=5, linewidth=1, label=label if kind else None)
    halves = [reading.interval.half_width for reading in kind]
    known = [half for half in halves if half is not None]
    if known and len(known) == len(halves):
        axes.errorbar(across, means, yerr=known, fmt="none", ecolor=colour, capsize=3)


def _draw_floors(axes: "Axes", kind: list[Reading], place: dict[str, int]) -> None:
    with_floor = [reading for reading in kind if reading.floors]
    for number, reading in enumerate(with_floor):
        floor, across = draw_interval(reading.floors).mean, place[reading.tap]
        label = "class-only floor: knowing nothing but the class" if number == 0 else ""
        axes.hlines(floor, across - 0.42, across + 0.42, color="black", linestyle=(0, (3, 2)), label=label)


def draw_tap_axis(axes: "Axes", taps: list[str]) -> None:
    """Taps across, from input to output; names that would run into each other are turned."""
    crowded = max(map(len, taps)) * len(taps) > 60
    look: Any = {"rotation": 35, "ha": "right"} if crowded else {"rotation": 0, "ha": "center"}
    axes.set_xticks(range(len(taps)), list(map(literal, taps)), **look)
    axes.set_xlim(-0.6, len(taps) - 0.4)
    axes.set_xlabel("tap, from input to output")


def literal(text: str) -> str:
    """A name as Matplotlib shows it letter by letter: between two dollar signs it would read mathematics."""
    return text.replace("$", r"\$")


def depth_colours(count: int) -> Iterable[Any]:
    """Dark to light with depth, in a map that reads the same for every kind of colour vision and in grey."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.88 * position / max(count - 1, 1)) for position in range(count)]


def offsets(draws: int) -> list[float]:
    """Places in [-1, 1] that keep the points of equal κ apart."""
    return [0.0] if draws == 1 else [2 * draw / (draws - 1) - 1 for draw in range(draws)]


def curve_markers(points: int, marker: str) -> dict[str, Any]:
    """Markers where there are few points (one alone would be invisible as a line), none on long runs."""
    return {"marker": marker if points <= 30 else "", "markersize": 4}
