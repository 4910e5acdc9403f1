"""How training went: loss, accuracy and the training heads' κ by epoch."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from rlp.intervals import draw_interval
from rlp.report.figures import curve_markers, draw_epoch_axis, draw_kappa_curves, draw_split_curves
from rlp.report.page_estimates import signed, span
from rlp.report.page_html import Html, element, folded, is_number, join
from rlp.report.page_run import ReportRun
from rlp.report.page_svg import (
    MARKERS,
    RUN_COLOURS,
    VARIABLES,
    depth_legend,
    grid_of,
    inline_svg,
    legend,
    panel,
)
from rlp.report.readings import plural, readings
from rlp.runlog import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPLITS = [("orange", "D", "training, running over the epoch"), ("blue", "o", "training, clean, eval mode"),
          ("green", "s", "validation")]  # fmt: skip


def curves(runs: list[ReportRun]) -> Html:
    """The section: curves of one run, or runs compared and then each by itself."""
    if len(runs) == 1:
        return join([element("h2", "Training", id="training"), _of_run(runs[0], "0")])
    each = [folded(f"Curves of {run.name}", _of_run(run, str(place))) for place, run in enumerate(runs)]
    return join([element("h2", "Training", id="training"), _compared(runs), *each])


def _of_run(run: ReportRun, name: str) -> Html:
    split = [
        _split_panel(run, key, title, name) for key, title in (("loss", "class loss"), ("accuracy", "class accuracy"))
    ]
    parts = [
        _split_legend(run.epochs),
        grid_of(split, caption=f"Class loss and accuracy by epoch. {_samples(run)}",
                below="The gap between training and validation is how far the network fits its training images better "
                "than new ones; it says nothing of single images."),
    ]  # fmt: skip
    heads = [row for epoch in run.epochs for row in epoch.get("heads") or [] if row["split"] == "train"]
    modes = [mode for mode in ("eval", "online") if any(row["mode"] == mode for row in heads)]
    if not modes:
        return join(
            [*parts, element("p", "This run had no random-label heads, so there is no κ by epoch.", class_="muted")]
        )
    taps = [tap for tap in run.taps if tap in {row["tap"] for row in heads}]
    n = ", ".join(map(str, sorted({row["num_labels"] for row in heads})))
    draws = [len({row["draw"] for row in epoch.get("heads") or []}) for epoch in run.epochs]
    chance = ", ".join(f"{1 / count:.3g}" for count in sorted({row["num_labels"] for row in heads}))
    caption = (
        "κ of the heads that were trained beside the network; line: mean over "
        f"{span([count for count in draws if count])} draws, band: lowest to highest draw. "
        f"n = {n}, chance = accuracy {chance} = κ 0, N = {span([int(row['count']) for row in heads])}, "
        f"D = {span([row['dim'] for row in heads])}. {_controls(run)}"
    )
    parts += [
        depth_legend(taps),
        grid_of([_kappa_panel(run, mode, name) for mode in modes], caption=caption,
                below="These are not fresh heads: under a penalty they are the very heads that the network learns to "
                "fool, and without one they lag behind heads fitted to the finished network."),
    ]  # fmt: skip
    return join(parts)


def _samples(run: ReportRun) -> str:
    final = run.epochs[-1]
    counts = [
        f"{int(final[key]['count']):,} {name}"
        for key, name in (("train", "training"), ("val", "validation"))
        if final.get(key)
    ]
    return f"N = {' and '.join(counts)} images; one network, so no interval."


def _controls(run: ReportRun) -> str:
    """Class-only floor and leak check of the deepest tap at the end."""
    heads = run.epochs[-1].get("heads") or []
    train = readings(heads, "train", "eval") or readings(heads, "train", "online")
    val = readings(heads, "val", "eval")
    words = []
    if train and train[-1].floors:
        words.append(f"class-only floor {signed(draw_interval(train[-1].floors).mean)}")
    if val:
        interval = val[-1].interval
        ends = (
            ""
            if interval.low is None or interval.high is None
            else f" [{signed(interval.low)}, {signed(interval.high)}]"
        )
        words.append(f"leak check {signed(interval.mean)}{ends}")
    return f"Controls at {(train or val)[-1].tap} after the last epoch: {', '.join(words)}." if words else ""


def _split_legend(epochs: list[Row]) -> Html:
    present = [any(epoch.get(key) for epoch in epochs) for key in ("train", "train_eval", "val")]
    return legend([entry for entry, there in zip(SPLITS, present, strict=True) if there])


def _split_panel(run: ReportRun, key: str, title: str, name: str) -> Html:
    figure, axes = panel()
    draw_split_curves(axes, run.epochs, key, title)
    axes.set_title(title, fontsize=9.5)
    draw_epoch_axis(axes, run.epochs)
    final = run.epochs[-1]
    last = [f"{split} {final[split][key]:.3f}" for split in ("train", "val")
            if final.get(split) and is_number(final[split][key])]  # fmt: skip
    alt = f"{title} against the epoch over {plural(len(run.epochs), 'epoch')}; at the end: {', '.join(last)}"
    return inline_svg(figure, alt, f"{key}-{name}")


def _kappa_panel(run: ReportRun, mode: str, name: str) -> Html:
    figure, axes = panel()
    draw_kappa_curves(axes, run.epochs, mode)
    title = "κ of the training heads, " + ("eval mode, clean images" if mode == "eval" else "running over the epoch")
    axes.set_title(title, fontsize=9.5)
    draw_epoch_axis(axes, run.epochs)
    final = readings(run.epochs[-1].get("heads") or [], "train", mode)
    ends = ", ".join(f"{reading.tap} {signed(reading.interval.mean)}" for reading in final)
    return inline_svg(figure, f"{title}, by epoch and tap; at the end: {ends or 'not read'}", f"kappa-{mode}-{name}")


def run_legend(runs: list[ReportRun]) -> Html:
    """Colour and marker of every run."""
    return legend([(VARIABLES[RUN_COLOURS[place % len(RUN_COLOURS)]], MARKERS[place % len(MARKERS)], run.name)
                   for place, run in enumerate(runs)])  # fmt: skip


def _compared(runs: list[ReportRun]) -> Html:
    def validation(row: Row) -> float | None:
        return (row.get("val") or {}).get("accuracy")

    def deepest(row: Row) -> float | None:
        found = readings(row.get("heads") or [], "train", "eval") or readings(row.get("heads") or [], "train", "online")
        return found[-1].interval.mean if found else None

    panels = [
        _run_panel(runs, "class accuracy on validation images", validation, "runs-accuracy"),
        _run_panel(runs, "κ of the training heads at the deepest tap", deepest, "runs-kappa"),
    ]
    return join([
        run_legend(runs),
        grid_of(panels, caption="The runs beside each other, a line each; κ is the mean over draws, its draws, "
                "controls and conditions are with each run below.",
                below="Runs that differ in more than one setting do not say which of them made the difference; "
                "one seed each cannot say that any did."),
    ])  # fmt: skip


def _run_panel(runs: list[ReportRun], title: str, value: Callable[[Row], float | None], name: str) -> Html:
    figure, axes = panel()
    ends = []
    for place, run in enumerate(runs):
        points = [(row["epoch"], number) for row in run.epochs if (number := value(row)) is not None]
        if points:
            look = curve_markers(len(points), MARKERS[place % len(MARKERS)])
            axes.plot(*zip(*points, strict=True), color=RUN_COLOURS[place % len(RUN_COLOURS)], **look)
            ends.append(f"{run.name} {signed(points[-1][1])}")
    _finish(axes, title, max(runs, key=lambda run: len(run.epochs)).epochs)
    return inline_svg(figure, f"{title} by epoch; at the end: {', '.join(ends) or 'nothing was read'}", name)


def _finish(axes: "Axes", title: str, epochs: list[Row]) -> None:
    axes.set_title(title, fontsize=9.5)
    draw_epoch_axis(axes, epochs)
