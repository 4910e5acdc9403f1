"""The figure of a finding: above, the readings of every contrast in order; below, its estimate by each reading."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlp.report.figures import BLUE, GREEN, GREY, ORANGE, new_figure
from rlp.reproduce.study import Study
from rlp.reproduce.verdict import OPPOSITE, REPRODUCED, Judged

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PURPLE, SKY, BROWN = "#CC79A7", "#56B4E9", "#8A5A00"
STYLES = {
    ("training heads, online", "κ"): (ORANGE, "D"),
    ("training heads, eval", "κ"): (BROWN, "s"),
    ("fresh heads, converged", "κ"): (BLUE, "o"),
    ("fresh heads, converged", "Δ"): (SKY, "o"),
    ("fresh heads, budget", "κ"): (GREEN, "^"),
    ("fresh heads, budget", "Δ"): (PURPLE, "^"),
}


def verdict_figure(study: Study, judged: Sequence[Judged]) -> "Figure":
    """Two panels for each contrast."""
    contrasts = list(dict.fromkeys(each.contrast for each in judged))
    figure = new_figure(5.2 * len(contrasts) + 1.2, 7.4)
    axes = figure.subplots(2, len(contrasts), squeeze=False, height_ratios=(3, 2))
    for column, contrast in enumerate(contrasts):
        mine = [each for each in judged if each.contrast == contrast]
        _draw_levels(axes[0][column], mine)
        _draw_contrasts(axes[1][column], mine)
    handles = {
        label: handle for panel in axes[0] for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=min(3, len(handles)), fontsize=8,
        frameon=False, title="bars: 95% intervals over seed, draw and sample", title_fontsize=8,
    )  # fmt: skip
    seeds = f"{len(study.seeds)} seeds x {study.draws} draws"
    figure.suptitle(f"{study.finding.name} ({study.size.name}, {seeds})", fontsize=11)
    return figure


def _name(judged: Judged) -> str:
    return judged.reading if judged.quantity == "accuracy" else f"{judged.reading}: {judged.quantity}"


def _style(judged: Judged) -> tuple[str, str]:
    return STYLES.get((judged.reading, judged.quantity), (GREY, "o"))


def _draw_levels(axes: "Axes", judged: Sequence[Judged]) -> None:
    """Each reading's level at every place of the contrast."""
    for number, each in enumerate(judged):
        colour, marker = _style(each)
        across = [place + 0.04 * (number - (len(judged) - 1) / 2) for place in range(len(each.points))]
        means = [shown.estimate.mean for shown in each.points]
        axes.plot(across, means, color=colour, marker=marker, markersize=5, linewidth=1, label=_name(each))
        _bars(axes, across, [shown.estimate for shown in each.points], colour, vertical=True)
    first = judged[0].points
    labels = [shown.selection.label for shown in first]
    if any(shown.selection.trained < 1 for shown in first):
        labels = [
            f"{shown.selection.label.split(' last')[0]}, {shown.selection.trained:.0%} trained" for shown in first
        ]
    if _one_tap(first):
        labels = [label.replace(" last", "") for label in labels]
    axes.set_xticks(range(len(first)), labels, rotation=25, ha="right", fontsize=8)
    axes.set_xlim(-0.5, len(first) - 0.5)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.grid(axis="y", alpha=0.3)
    axes.set_ylabel("class accuracy" if judged[0].quantity == "accuracy" else "κ and Δ of random labels")
    axes.set_title(f"{judged[0].contrast.what}\n{_facts(judged)}".strip(), fontsize=9)


def _facts(judged: Sequence[Judged]) -> str:
    """n and N, which no κ is shown without."""
    facts = [shown.facts for each in judged for shown in each.points if shown.facts]
    if not facts:
        return ""
    n, counts = sorted({fact["n"] for fact in facts}), sorted({fact["N"] for fact in facts})
    ends = dict.fromkeys(f"{count:,.0f}" for count in (counts[0], counts[-1]))
    return f"n = {', '.join(f'{value:.0f}' for value in n)}   N = {' to '.join(ends)}"


def _one_tap(points: Sequence[Any]) -> bool:
    return all(shown.selection.tap == "last" for shown in points)


def _draw_contrasts(axes: "Axes", judged: Sequence[Judged]) -> None:
    """Each reading's contrast with its interval and verdict."""
    margin = judged[0].contrast.margin if judged[0].contrast.expected == "chance" else 0.0
    for number, each in enumerate(judged):
        colour, marker = _style(each)
        axes.plot([each.estimate.mean], [number], color=colour, marker=marker, linestyle="none")
        _bars(axes, [number], [each.estimate], colour, vertical=False)
        weight = "bold" if each.verdict in (REPRODUCED, OPPOSITE) else "normal"
        axes.annotate(
            each.verdict, (1.02, number), xycoords=("axes fraction", "data"), fontsize=8, va="center", weight=weight
        )
    axes.axvline(0, color=GREY, linewidth=1)
    if margin:
        axes.axvspan(-margin, margin, color=GREY, alpha=0.15)
    axes.set_yticks(range(len(judged)), [_name(each) for each in judged], fontsize=7)
    axes.set_ylim(len(judged) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(f"{_measure(judged[0])} (expected: {judged[0].contrast.expected})", fontsize=8)


def _measure(judged: Judged) -> str:
    count = len(judged.contrast.over)
    return "level" if count == 1 else "last − first" if count == 2 else "rise of the fitted line, end to end"


def _bars(axes: "Axes", places: Sequence[float], estimates: Sequence[Any], colour: str, vertical: bool) -> None:
    """The intervals that are known."""
    for place, estimate in zip(places, estimates, strict=True):
        if estimate.low is None or estimate.high is None:
            continue
        ends = [estimate.low, estimate.high]
        line = ([place, place], ends) if vertical else (ends, [place, place])
        axes.plot(*line, color=colour, linewidth=2, alpha=0.6)
