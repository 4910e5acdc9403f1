"""The calibrated measurement on a page: κ beside its controls and Δ, by depth, for every condition of probe.json."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlp.report.figures import draw_tap_axis, literal
from rlp.report.page_curves import run_legend
from rlp.report.page_estimates import GROUPS, condition, counted, ends_of, mean_of, shown, signed, span
from rlp.report.page_header import verdict
from rlp.report.page_html import Html, code, element, is_number, join, note, tabs
from rlp.report.page_run import PROBE, ReportRun, probe_command
from rlp.report.page_svg import INK, MARKERS, RUN_COLOURS, grid_of, inline_svg, legend, panel
from rlp.report.page_svg import VARIABLES as COLOURS
from rlp.runlog import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE, GREY = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666")
LOOKS = {"members": (BLUE, "o"), "non_members": (ORANGE, "s"), "untrained": (GREY, "^"), "noise": (PURPLE, "v"),
         "leak": (GREEN, "D")}  # fmt: skip
PROTOCOLS = {
    "converged": "Fresh heads on the frozen network, trained until a convergence test holds, scored on the images that "
    "they were fitted to.",
    "views": "Fresh heads fitted to augmented views of each image and scored on other views of the same images.",
    "budget": "Fresh heads after a fixed number of steps; κ is the mean over the logarithm of the steps.",
    "online": "The training's own heads, from its log; nothing fresh, no non-members, intervals over draws alone.",
    "retrieval": "No heads: whether the nearest neighbour of a new view of an image is that image. Chance is 1/N.",
}
READINGS = {
    "kappa": "κ that non-members or an untrained network reach as well is no memorisation: only what members have "
    "beyond them can be.",
    "delta": "Above 0 members are read better than non-members; an interval that holds 0 shows no difference, which is "
    "not proof that there is none.",
}


def probe_section(runs: list[ReportRun]) -> Html:
    """The section: figures of every condition, or the command that would make them."""
    parts = [element("h2", "Fresh heads: κ and Δ against depth", id="probe")]
    for run in (run for run in runs if not run.rows):
        parts.append(
            note(f"{run.name} was not probed: ", element("code", str(run.dir / PROBE)), " is missing. This makes it:")
        )
        parts.append(code(probe_command(run.dir / PROBE)))
    probed = [run for run in runs if run.rows]
    if probed:
        parts += [_introduction(probed), tabs("Protocol, heads and features", _conditions(probed))]
    return join(parts)


def _introduction(runs: list[ReportRun]) -> Html:
    deltas = [row["delta"] for run in runs for row in run.rows if ends_of(row["delta"])]
    away = sum(not low <= 0 <= high for low, high in map(_certain_ends, deltas))
    chance = (
        f"The page holds {len(deltas)} intervals of Δ, of which {away} miss 0; about {0.05 * len(deltas):.1f} would do "
        "so by luck if members were no different, and those that share draws or features do it together."
        if deltas
        else "No Δ has an interval here."
    )
    return element(
        "p",
        "Members are images that the network was trained on, non-members are not. Heads are fitted to each group by "
        "itself, at equal N, D, n and budget, and Δ = κ(members) − κ(non-members). Bars are 95% intervals over draws "
        f"and images of one network. {chance}",
    )


def _certain_ends(estimate: Row) -> tuple[float, float]:
    ends = ends_of(estimate)
    assert ends is not None
    return ends


def _conditions(runs: list[ReportRun]) -> list[tuple[str, Html]]:
    """Label and figures of every protocol × head × features × mode × images that a run has."""
    groups: dict[tuple[str, ...], list[tuple[ReportRun, Row]]] = {}
    for run in runs:
        for row in run.rows:
            if mean_of(row["members"]) is not None:
                key = tuple(str(row[name]) for name in ("protocol", "head", "features", "mode", "images"))
                groups.setdefault(key, []).append((run, row))
    order = list(PROTOCOLS)
    keys = sorted(groups, key=lambda key: order.index(key[0]) if key[0] in order else len(order))
    if not keys:
        return [("nothing was read", note("Every κ of the probe is missing."))]
    return [(label, _condition(groups[key], label)) for key, label in zip(keys, _labels(keys), strict=True)]


def _labels(keys: list[tuple[str, ...]]) -> list[str]:
    """The protocol, and of the other names those in which conditions of the same protocol differ."""
    labels = []
    for key in keys:
        rivals = [other for other in keys if other[0] == key[0]]
        differing = [part for place, part in enumerate(key[1:], 1) if len({other[place] for other in rivals}) > 1]
        labels.append(", ".join([key[0], *differing]))
    return labels


def _condition(pairs: list[tuple[ReportRun, Row]], name: str) -> Html:
    first = pairs[0][1]
    parts: list[Html] = [element("p", PROTOCOLS.get(first["protocol"], ""), " ", f"Here: {condition(first)}.")]
    parts.append(element("p", READINGS["kappa"], *([" ", READINGS["delta"]] if _has_delta(pairs) else [])))
    # Of retrieval n is N, which may differ between runs.
    groups: dict[int, list[tuple[ReportRun, Row]]] = {}
    for run, row in pairs:
        groups.setdefault(0 if first["protocol"] == "retrieval" else row["n"], []).append((run, row))
    parts.append(_group_legend([row for _, row in pairs]))
    runs = list({run.name: run for run, _ in pairs}.values())
    if len(runs) > 1:
        parts += [element("p", "Runs in the figures of Δ:", class_="muted"), run_legend(runs)]
    parts += [_of_n(groups[n], runs, f"{name}-{n}") for n in sorted(groups)]
    return join(parts)


def _has_delta(pairs: Sequence[tuple[ReportRun, Row]]) -> bool:
    return any(mean_of(row["delta"]) is not None for _, row in pairs)


def _group_legend(rows: Sequence[Row]) -> Html:
    entries = [
        (COLOURS[colour], marker, GROUPS[key])
        for key, (colour, marker) in LOOKS.items()
        if any(mean_of(row.get(key)) is not None for row in rows)
    ]
    if any(is_number(row.get("class_only")) for row in rows):
        entries.append(("ink", "--", "class-only floor: knowing nothing but the class"))
    return legend(entries)


def _of_n(pairs: list[tuple[ReportRun, Row]], runs: list[ReportRun], name: str) -> Html:
    """κ of every run, and Δ of all of them, at one n."""
    by_run = [
        (run, sorted((row for other, row in pairs if other is run), key=lambda row: row["depth"])) for run in runs
    ]
    by_run = [(run, rows) for run, rows in by_run if rows]
    rows = [row for _, row in pairs]
    limits = _limits(rows)
    n = f"n = {span([row['n'] for row in rows])}"
    panels = [
        _kappa_panel(rows_of, limits, f"{n}: κ" + (f", {run.name}" if len(runs) > 1 else ""), f"{name}-kappa-{place}")
        for place, (run, rows_of) in enumerate(by_run)
    ]
    deltas = [(run, rows_of) for run, rows_of in by_run if _has_delta([(run, row) for row in rows_of])]
    if deltas:
        panels.append(_delta_panel(deltas, runs, f"{n}: Δ, members − non-members", name))
    return grid_of(panels, caption=_caption(rows), below=_deepest(by_run) if deltas else "")


def _caption(rows: Sequence[Row]) -> str:
    """n, N, D, draws, chance, controls: what the numbers must not be shown without."""
    chances = " to ".join(dict.fromkeys(f"{end([row['chance'] for row in rows]):.3g}" for end in (min, max)))
    others = [counted(row["non_members"], "samples") for row in rows]
    floors = [row["class_only"] for row in rows if is_number(row.get("class_only"))]
    leaks = [(row, ends) for row in rows if (ends := ends_of(row.get("leak")))]
    missed = sum(not low <= 0 <= high for _, (low, high) in leaks)
    parts = [
        f"n = {span([row['n'] for row in rows])}, chance = accuracy {chances} = κ 0, ",
        f"N = {span([row['N'] for row in rows])} members",
        f" and {span(others)} non-members" if any(others) else "",
        f", D = {span([row['D'] for row in rows])}, {span([row['draws'] for row in rows])} draws, ",
        f"{span([row.get('steps') for row in rows])} steps, ",
        f"class-only floor {signed(max(floors))}" if floors else "class-only floor: none",
        f"; leak check: {missed} of {len(leaks)} intervals miss 0" if leaks else "; no leak check",
    ]
    return "".join(parts) + "."


def _deepest(by_run: Sequence[tuple[ReportRun, list[Row]]]) -> str:
    """Δ at the deepest tap in words: what it says of one run, or how many runs say what."""
    last = [rows[-1] for _, rows in by_run]
    if len(last) == 1:
        return f"At {last[0]['tap']} Δ = {shown(last[0]['delta'])}. {verdict(last[0])}"
    found = [ends for row in last if (ends := ends_of(row["delta"]))]
    above, below = sum(low > 0 for low, _ in found), sum(high < 0 for _, high in found)
    return (
        f"At the deepest tap the interval of Δ lies above 0 in {above} of {len(found)} runs, below 0 in {below}, and "
        f"holds 0 in {len(found) - above - below}."
    )


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """One scale of κ for all panels of an n."""
    values = [0.0]
    for row in rows:
        for key in LOOKS:
            mean = mean_of(row.get(key))
            values += [*(ends_of(row.get(key)) or ()), *([] if mean is None else [mean])]
        values += [row["class_only"]] if is_number(row.get("class_only")) else []
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05
    return low - room, high + room


def _kappa_panel(rows: list[Row], limits: tuple[float, float], title: str, name: str) -> Html:
    figure, axes = panel()
    present = [key for key in LOOKS if any(mean_of(row.get(key)) is not None for row in rows)]
    for place, key in enumerate(present):
        shift = 0.14 * (place - (len(present) - 1) / 2)
        draw_estimates(axes, [row.get(key) for row in rows], shift, *LOOKS[key])
    for place, row in enumerate(rows):
        if is_number(row.get("class_only")):
            axes.hlines(row["class_only"], place - 0.42, place + 0.42, color=INK, linestyle=(0, (3, 2)), linewidth=1)
    _finish(axes, [row["tap"] for row in rows], title, "κ of random labels")
    axes.set_ylim(*limits)
    words = [f"{row['tap']}: members {shown(row['members'])}, non-members {shown(row['non_members'])}" for row in rows]
    return inline_svg(figure, f"{title} against depth. {'; '.join(words)}", name)


def _delta_panel(groups: Sequence[tuple[ReportRun, list[Row]]], runs: list[ReportRun], title: str, name: str) -> Html:
    """Δ of every run with its interval and the line at 0; taps in the order of the run that has most."""
    figure, axes = panel()
    taps = _all_taps([rows for _, rows in groups])
    words = []
    for place, (run, rows) in enumerate(groups):
        by_tap = {row["tap"]: row["delta"] for row in rows}
        shift = (place - (len(groups) - 1) / 2) * min(0.16, 0.7 / len(groups))
        number = runs.index(run)
        look = (RUN_COLOURS[number % len(RUN_COLOURS)], MARKERS[number % len(MARKERS)])
        draw_estimates(axes, [by_tap.get(tap) for tap in taps], shift, *(look if len(runs) > 1 else (INK, "o")))
        words.append(f"{run.name}: " + ", ".join(f"{tap} {shown(by_tap.get(tap))}" for tap in taps))
    _finish(axes, taps, title, "Δ = κ(members) − κ(non-members)")
    return inline_svg(figure, f"{title} against depth. {'; '.join(words)}", f"{name}-delta")


def _all_taps(groups: Sequence[Sequence[Row]]) -> list[str]:
    depth: dict[str, int] = {}
    for rows in sorted(groups, key=len, reverse=True):
        for row in rows:
            depth.setdefault(row["tap"], row["depth"])
    return sorted(depth, key=lambda tap: depth[tap])


def draw_estimates(axes: "Axes", estimates: Sequence[Row | None], shift: float, colour: str, marker: str) -> None:
    """Means with their intervals at places 0, 1, ... + shift, joined by a thin line; what is missing leaves a gap."""
    found = [(place + shift, mean, ends_of(estimate)) for place, estimate in enumerate(estimates)
             if (mean := mean_of(estimate)) is not None]  # fmt: skip
    if not found:
        return
    axes.plot([across for across, _, _ in found], [mean for _, mean, _ in found], color=colour, marker=marker,
              markersize=4, linewidth=0.8)  # fmt: skip
    for across, _, ends in found:
        if ends:
            axes.vlines(across, *ends, color=colour, linewidth=1.6)


def _finish(axes: "Axes", taps: list[str], title: str, label: str) -> None:
    axes.axhline(0, color=GREY, linewidth=0.9)
    draw_tap_axis(axes, taps)
    axes.set_ylabel(label)
    axes.set_title(literal(title), fontsize=9.5)
    axes.grid(axis="y", alpha=0.3)
