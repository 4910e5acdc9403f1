"""What lies behind κ: the budget curve, the features' spectrum, the Rademacher reading and planted truth."""

from collections.abc import Sequence

from rlp.report.figures import depth_colours
from rlp.report.page_estimates import condition, counted, ends_of, estimate_cell, mean_of, shown, span
from rlp.report.page_html import Cell, Html, element, is_number, join, number_cell, table
from rlp.report.page_probe import GREY, draw_estimates
from rlp.report.page_run import ReportRun
from rlp.report.page_svg import RUN_COLOURS, depth_legend, grid_of, inline_svg, legend, panel
from rlp.runlog import Row


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
        _rademacher([row for row in probe.get("rademacher") or [] if isinstance(row, dict)], number),
        _planted([row for row in probe.get("planted") or [] if isinstance(row, dict)]),
    ]
    parts = [part for part in found if part]
    return [element("h3", run.name), *parts] if named and parts else parts


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
        f"κ of members (solid) and non-members (dashed) after so many steps of the heads, mean over {span([r['draws'] for r in rows])} draws; "
        f"{'; '.join(dict.fromkeys(name for name, _ in groups))}. n = {span([r['n'] for r in rows])} (chance is κ 0), "
        f"N = {span([r['N'] for r in rows])}. Intervals and controls of the area under the curve are in the table of all readings."
    )
    below = "Where a curve still rises, κ is a statement about the budget; curves of two networks compare only at equal steps."
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
    group = sorted(
        (row for row in members if all(row.get(k) == members[0].get(k) for k in same)), key=lambda row: row["depth"]
    )
    control = [
        row for row in spectra if row.get("group") == "untrained" and all(row.get(k) == members[0].get(k) for k in same)
    ]
    taps = [row["tap"] for row in group]
    what = ", ".join(
        f"{members[0][key]}{end}"
        for key, end in zip(same, (" features", " mode", " images", " protocol"), strict=True)
        if key in members[0]
    )
    caption = (
        f"Left: eigenvalues of the features' covariance as shares of their sum, largest first. Right: how many directions the "
        f"features have; D = {span([row['D'] for row in group])}, N = {span([row.get('N') for row in group])} members, {what}. "
        "Descriptions of these features: no n, no chance, no interval; control: the untrained network."
    )
    below = (
        "Gradient steps learn large directions first, so κ at a small budget follows the spectrum; a converged linear head "
        "reads hardly more than D, N and n."
    )
    panels = [_eigenvalue_panel(group, f"spectrum-{number}"), _rank_panel(group, control, f"ranks-{number}")]
    marks = [("blue", "o", "effective rank"), ("orange", "s", "participation ratio"), ("muted", "^", "effective rank, untrained"),
             ("ink", "-", "D, the most there can be")]  # fmt: skip
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
    from rlp.report.figures import draw_tap_axis

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
    draw_tap_axis(axes, [row["tap"] for row in rows])
    axes.set_title("directions that the features have", fontsize=9.5)
    axes.grid(axis="y", alpha=0.3)
    words = [f"{row['tap']}: {_positive(row.get('effective_rank')):.1f} of D = {row['D']}" for row in rows]
    return inline_svg(figure, f"Effective rank and participation ratio at each tap. {'; '.join(words)}", name)


def _positive(value: object) -> float:
    return float(value) if is_number(value) and value > 0 else float("nan")  # type: ignore[arg-type,operator]


def _rademacher(rows: list[Row], number: int) -> Html:
    """2·acc - 1 at n = 2 by tap, with the sentence that the probe gives it."""
    rows = [row for row in rows if mean_of(row.get("estimate")) is not None]
    if not rows:
        return Html("")
    same = ("head", "features", "mode", "images")
    group = sorted(
        (row for row in rows if all(row.get(k) == rows[0].get(k) for k in same)), key=lambda row: row["depth"]
    )
    taps = list(dict.fromkeys(row["tap"] for row in group))
    figure, axes = panel()
    looks = {
        "members": (RUN_COLOURS[0], "o"),
        "non-members": (RUN_COLOURS[1], "s"),
        "untrained": (GREY, "^"),
        "noise": (RUN_COLOURS[3], "v"),
    }
    present = [name for name in looks if any(row.get("group", "members") == name for row in group)]
    for place, name in enumerate(present):
        by_tap = {row["tap"]: row["estimate"] for row in group if row.get("group", "members") == name}
        draw_estimates(axes, [by_tap.get(tap) for tap in taps], 0.14 * (place - (len(present) - 1) / 2), *looks[name])
    from rlp.report.figures import draw_tap_axis

    axes.axhline(0, color=GREY, linewidth=0.9)
    draw_tap_axis(axes, taps)
    axes.set_title("n = 2: 2 · accuracy − 1", fontsize=9.5)
    axes.grid(axis="y", alpha=0.3)
    words = [f"{row['tap']} {row.get('group', 'members')} {shown(row['estimate'])}" for row in group]
    drawn = inline_svg(figure, f"Rademacher reading at each tap. {'; '.join(words)}", f"rademacher-{number}")
    caption = (
        f"n = 2, chance is 0, N = {span([row.get('N') for row in group])}, D = {span([row.get('D') for row in group])}, "
        f"{span([row.get('draws', counted(row['estimate'], 'draws')) for row in group])} draws, 95% intervals; controls: non-members, untrained network, noise features."
    )
    meaning = str(rows[0].get("meaning") or rows[0].get("sentence") or "")
    marks = [
        ("blue", "o", "members"),
        ("orange", "s", "non-members"),
        ("muted", "^", "untrained network"),
        ("purple", "v", "noise features"),
    ]
    shown_marks = [mark for mark, name in zip(marks, looks, strict=True) if name in present]
    return join([
        element("h4", "Rademacher reading"), legend(shown_marks), grid_of([drawn], caption=caption, below=meaning),
    ])  # fmt: skip


def _planted(rows: list[Row]) -> Html:
    """AUROC of the score for samples whose truth is known, as a table."""
    if not rows:
        return Html("")
    keys = ("members", "non_members", "untrained", "class_loss")
    heads = ["AUROC members", "non-members", "untrained", "the network's loss"]
    columns = [("planted", "kind of sample"), ("protocol", ""), ("heads", ""), ("features", ""), ("tap", ""), ("n", "random labels"), ("N", "samples scored"),
               ("planted N", "how many of them are planted"), ("draws", ""), ("chance", ""), *((head, "") for head in heads)]  # fmt: skip
    body: list[list[str | Cell]] = [
        [str(row.get("planted", "?")), str(row.get("protocol", "–")), str(row.get("head", "–")), str(row.get("features", "–")), str(row.get("tap", "–")),
         *(number_cell(row.get(key)) for key in ("n", "N", "count", "draws")), number_cell(row.get("chance", 0.5), 1), *(estimate_cell(row.get(key)) for key in keys)]
        for row in rows
    ]  # fmt: skip
    strong = sum(1 for row in rows if (ends := ends_of(row.get("members"))) and not ends[0] <= 0.5 <= ends[1])
    text = (
        f"Does the score find samples that had to be memorised? Chance is 0.5, above it planted samples are better known; {strong} of "
        f"{len(rows)} intervals of members miss 0.5. Read members beside non-members and the untrained network: a kind that these "
        "know as well is only easier to tell apart, not memorised."
    )
    return join(
        [
            element("h4", "Planted truth"),
            element("p", text),
            table("AUROC of mean log p, planted against plain samples", columns, body, sort=True),
        ]
    )
