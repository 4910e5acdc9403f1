"""What lies behind κ: the budget curve and the features' spectrum, and what page_bounds.py adds to them."""

from collections.abc import Sequence

from rlp.report.figures import depth_colours, draw_tap_axis
from rlp.report.page_bounds import planted, rademacher
from rlp.report.page_estimates import condition, shown, span
from rlp.report.page_html import Html, element, folded, is_number, join
from rlp.report.page_probe import GREY
from rlp.report.page_run import ReportRun
from rlp.report.page_svg import RUN_COLOURS, depth_legend, grid_of, inline_svg, legend, panel
from rlp.runlog import Row

SMALLEST_SHARE = 1e-7
"""Of the variance; smaller ones are rounding, and are cut off."""


def features_section(runs: list[ReportRun]) -> Html:
    """The section, of what the probes have; empty without a probe."""
    parts = [part for number, run in enumerate(runs) if run.probe for part in _of_run(run, number, len(runs) > 1)]
    return (
        join([element("h2", "Behind κ: budget, spectrum, bounds, planted truth", id="features"), *parts])
        if parts
        else Html("")
    )


def _of_run(run: ReportRun, number: int, named: bool) -> list[Html]:
    probe = run.probe or {}
    found = [
        _budget(run, number),
        _spectra([row for row in probe.get("spectra") or [] if isinstance(row, dict)], number),
        rademacher([row for row in probe.get("rademacher") or [] if isinstance(row, dict)], number),
        planted([row for row in probe.get("planted") or [] if isinstance(row, dict)]),
    ]
    parts = [part for part in found if part]
    return [folded(f"Behind κ of {run.name}", *parts)] if named and parts else parts


def _budget(run: ReportRun, number: int) -> Html:
    """κ against the head's steps for every tap; a panel for each n and condition."""
    rows = [row for row in run.rows if row["protocol"] == "budget" and row.get("curve")]
    if not rows:
        return Html("")
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((condition(row), row["n"]), []).append(row)
    panels = [
        _budget_panel(
            sorted(group, key=lambda row: row["depth"]),
            run.taps,
            f"n = {n}: κ against the heads' steps",
            f"budget-{number}-{place}",
        )
        for place, ((_, n), group) in enumerate(groups.items())
    ]
    caption = (
        f"κ of members (solid) and non-members (dashed) after so many steps of the heads, mean over "
        f"{span([row['draws'] for row in rows])} draws; {'; '.join(dict.fromkeys(name for name, _ in groups))}. "
        f"n = {span([row['n'] for row in rows])} (chance is κ 0), N = {span([row['N'] for row in rows])}, D = "
        f"{span([row['D'] for row in rows])}. Intervals and controls of the area under the curve: in the section above "
        "and in the table of all readings."
    )
    below = "Where a curve still rises, κ is about the budget; curves of two networks compare only at equal steps."
    return join([
        element("h4", "Budget"), depth_legend(run.taps), grid_of(panels, caption=caption, below=below),
    ])  # fmt: skip


def _budget_panel(rows: Sequence[Row], taps: list[str], title: str, name: str) -> Html:
    figure, axes = panel()
    colours = dict(zip(taps, depth_colours(len(taps)), strict=True))
    words = []
    for row in rows:
        for column, style in ((1, "-"), (2, (0, (3, 2)))):
            points = [
                (point[0], point[column]) for point in row["curve"] if len(point) > column and is_number(point[column])
            ]
            if points:
                axes.plot(*zip(*points, strict=True), color=colours[row["tap"]], linestyle=style, linewidth=1.2)
        words.append(
            f"{row['tap']}: area {shown(row['members'])} for members, {shown(row['non_members'])} for non-members"
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axhline(0, color=GREY, linewidth=0.9)
    axes.set_xlabel("steps of the heads")
    axes.set_title(title, fontsize=9.5)
    axes.grid(alpha=0.3)
    return inline_svg(figure, f"{title}. {'; '.join(words)}", name)


def _spectra(spectra: list[Row], number: int) -> Html:
    """Eigenvalues and ranks of one condition's features: the first that the file has, for members."""
    members = [row for row in spectra if row.get("group", "members") == "members" and row.get("eigenvalues")]
    if not members:
        return Html("")
    same = ("features", "mode", "images", "protocol")
    alike = [row for row in spectra if all(row.get(key) == members[0].get(key) for key in same)]
    group = sorted((row for row in members if row in alike), key=lambda row: row["depth"])
    control = [row for row in alike if row.get("group") == "untrained"]
    taps = [row["tap"] for row in group]
    what = ", ".join(
        f"{members[0][key]}{end}"
        for key, end in zip(same, (" features", " mode", " images", " protocol"), strict=True)
        if key in members[0]
    )
    caption = (
        f"Eigenvalues of the features' covariance as shares of their sum, largest first; and how many directions the "
        f"features have. D = {span([row['D'] for row in group])}, N = {span([row.get('N') for row in group])} members, "
        f"{what}. These describe features, not labels: no n, no chance, no interval; control: the untrained network."
    )
    below = (
        "Gradient steps learn large directions first, so κ at a small budget follows the spectrum. Two networks whose "
        "κ differ only as their effective ranks do need no memorisation to explain it."
    )
    panels = [_eigenvalue_panel(group, f"spectrum-{number}"), _rank_panel(group, control, f"ranks-{number}")]
    marks = [("blue", "o", "effective rank"), ("orange", "s", "participation ratio"),
             ("muted", "^", "effective rank, untrained"), ("ink", "-", "D, the most there can be")]  # fmt: skip
    return join([
        element("h4", "Spectrum and effective rank"), depth_legend(taps),
        legend([mark for mark in marks if control or "untrained" not in mark[2]]),
        grid_of(panels, caption=caption, below=below),
    ])  # fmt: skip


def _eigenvalue_panel(rows: Sequence[Row], name: str) -> Html:
    figure, axes = panel()
    for row, colour in zip(rows, depth_colours(len(rows)), strict=True):
        values = [float(value) for value in row["eigenvalues"] if is_number(value) and value > 0]
        total = sum(values)
        places = _spread(len(values))
        if values:
            look = {"marker": "o", "markersize": 3} if len(values) == 1 else {}
            axes.plot(
                [place + 1 for place in places], [values[place] / total for place in places], color=colour, **look
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(SMALLEST_SHARE, axes.get_ylim()[0]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("eigenvalue number")
    axes.set_title("share of the variance", fontsize=9.5)
    axes.grid(alpha=0.3)
    words = ", ".join(
        f"{row['tap']} {row['effective_rank']:.1f}" for row in rows if is_number(row.get("effective_rank"))
    )
    return inline_svg(figure, f"Spectrum of the features at each tap; effective rank: {words}", name)


def _spread(count: int, most: int = 160) -> list[int]:
    """Places 0 to count - 1; of many those that a logarithmic axis can show."""
    if count <= most:
        return list(range(count))
    return sorted({round((count - 1) ** (step / (most - 1))) for step in range(most)} | {0})


def _rank_panel(rows: Sequence[Row], control: Sequence[Row], name: str) -> Html:
    figure, axes = panel()
    places = range(len(rows))
    for key, colour, marker in (("effective_rank", RUN_COLOURS[0], "o"), ("participation_ratio", RUN_COLOURS[1], "s")):
        axes.plot(places, [_positive(row.get(key)) for row in rows], color=colour, marker=marker, markersize=4)
    if control:
        by_tap = {row["tap"]: _positive(row.get("effective_rank")) for row in control}
        axes.plot(
            places,
            [by_tap.get(row["tap"], float("nan")) for row in rows],
            color=GREY,
            marker="^",
            markersize=4,
            linewidth=0.8,
        )
    for place, row in enumerate(rows):
        axes.hlines(row["D"], place - 0.35, place + 0.35, color="#000000", linewidth=1.2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    draw_tap_axis(axes, [row["tap"] for row in rows])
    axes.set_title("directions that the features have", fontsize=9.5)
    axes.grid(axis="y", alpha=0.3)
    words = [f"{row['tap']}: {_positive(row.get('effective_rank')):.1f} of D = {row['D']}" for row in rows]
    return inline_svg(figure, f"Effective rank and participation ratio at each tap. {'; '.join(words)}", name)


def _positive(value: object) -> float:
    return float(value) if is_number(value) and value > 0 else float("nan")
