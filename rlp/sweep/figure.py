"""The figure of a sweep: every trial and the retrained networks, then noisy points, calibration, κ and Δ."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlp.measure.estimate import Estimate
from rlp.report.figures import BLUE, GREEN, GREY, ORANGE, new_figure
from rlp.sweep.plan import Sweep
from rlp.sweep.result import Result, numbers_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (
    ("accuracy", {"test_accuracy": ("test, retrained", BLUE)}),
    ("accuracy on noisy points", {"noisy_given": ("given (wrong) label", ORANGE), "noisy_true": ("true label", GREEN)}),
    ("calibration error (ECE), test", {"ece": ("ECE", BLUE)}),
    ("fresh heads", {"kappa": ("κ", BLUE), "delta": ("Δ", ORANGE)}),
)


def sweep_figure(sweep: Sweep, results: Sequence[Result]) -> "Figure":
    """One row a regulariser, one panel a kind of number."""
    figure = new_figure(3.6 * len(PANELS) + 1.4, 0.5 * len(results) + 2.2)
    panels = figure.subplots(1, len(PANELS), sharey=True, squeeze=False)[0]
    for axes, (title, wanted) in zip(panels, PANELS, strict=True):
        for place, (name, (label, colour)) in enumerate(wanted.items()):
            shift = 0.22 * (place - (len(wanted) - 1) / 2)
            estimates = [numbers_of(result, results)[name] for result in results]
            _draw(axes, estimates, shift, label, colour)
        axes.set_xlabel(title)
        axes.grid(axis="x", alpha=0.3)
    _draw_trials(panels[0], results)
    panels[0].set_yticks(range(len(results)), [result.regulariser.name for result in results])
    panels[0].set_ylim(len(results) - 0.5, -0.5)
    for axes in panels:
        axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    seeds = f"{sweep.trials} trials each, {len(sweep.seeds)} retrained; bars: 95% intervals"
    figure.suptitle(f"{sweep.space.name}: regularisers at one tuning budget ({seeds})", fontsize=11)
    return figure


def _draw(axes: "Axes", estimates: Sequence[Estimate | None], shift: float, label: str, colour: str) -> None:
    known = [(row + shift, estimate) for row, estimate in enumerate(estimates) if estimate is not None]
    axes.plot([e.mean for _, e in known], [row for row, _ in known], "o", color=colour, label=label, zorder=3)
    for row, estimate in known:
        if estimate.low is not None and estimate.high is not None:
            axes.plot([estimate.low, estimate.high], [row, row], color=colour, linewidth=2, alpha=0.6)


def _draw_trials(axes: "Axes", results: Sequence[Result]) -> None:
    """Validation accuracy of every trial, losers in grey."""
    shift = 0.25
    trials = [
        (row + shift, outcome.accuracy)
        for row, result in enumerate(results)
        for outcome in result.trials
        if outcome.accuracy is not None
    ]
    axes.plot([a for _, a in trials], [row for row, _ in trials], "|", color=GREY, label="validation, every trial")
    chosen = [result.chosen.accuracy or 0.0 for result in results]
    rows = [row + shift for row in range(len(results))]
    axes.plot(chosen, rows, "|", color=ORANGE, markersize=9, markeredgewidth=2, label="validation, chosen")
