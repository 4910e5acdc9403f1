"""The Rademacher reading with the sentence that says what it bounds, and how well scores find planted samples."""

from rlp.report.figures import draw_tap_axis
from rlp.report.page_estimates import ends_of, estimate_cell, mean_of, shown, span
from rlp.report.page_html import Cell, Html, element, join, number_cell, table
from rlp.report.page_probe import GREY, draw_estimates
from rlp.report.page_svg import RUN_COLOURS, VARIABLES, grid_of, inline_svg, legend, panel
from rlp.runlog import Row


def rademacher(rows: list[Row], number: int) -> Html:
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
    axes.axhline(0, color=GREY, linewidth=0.9)
    draw_tap_axis(axes, taps)
    axes.set_title("n = 2: 2 · accuracy − 1", fontsize=9.5)
    axes.grid(axis="y", alpha=0.3)
    words = [f"{row['tap']} {row.get('group', 'members')} {shown(row['estimate'])}" for row in group]
    drawn = inline_svg(figure, f"Rademacher reading at each tap. {'; '.join(words)}", f"rademacher-{number}")
    what = ", ".join(f"{key} = {span([row.get(key) for row in group])}" for key in ("N", "D", "draws"))
    caption = f"n = 2, chance is 0, {what}, 95% intervals; controls: non-members, untrained network, noise features."
    marks = legend([(VARIABLES[looks[name][0]], looks[name][1], name) for name in present])
    below = str(rows[0].get("meaning", ""))
    return join([element("h4", "Rademacher reading"), marks, grid_of([drawn], caption=caption, below=below)])


def planted(rows: list[Row]) -> Html:
    """AUROC of the score for samples whose truth is known, as a table."""
    if not rows:
        return Html("")
    keys = ("members", "non_members", "untrained", "class_loss")
    heads = ["AUROC members", "non-members", "untrained", "the network's loss"]
    names = ("planted", "protocol", "head", "features", "mode", "images", "tap")
    columns = [*((name, "") for name in names), ("D", ""), ("n", "random labels"), ("N", "samples scored"),
               ("planted N", "how many of them are planted"), ("draws", ""), ("chance", ""),
               *((head, "") for head in heads)]  # fmt: skip
    body: list[list[str | Cell]] = [
        [
            *(str(row.get(name, "–")) for name in names),
            *(number_cell(row.get(key)) for key in ("D", "n", "N", "count", "draws")),
            number_cell(row.get("chance", 0.5), 1),
            *(estimate_cell(row.get(key)) for key in keys),
        ]
        for row in rows
    ]
    strong = sum(1 for row in rows if (ends := ends_of(row.get("members"))) and not ends[0] <= 0.5 <= ends[1])
    text = (
        f"Does the score find samples that had to be memorised? Chance is 0.5, above it planted samples are better "
        f"known; {strong} of {len(rows)} intervals of members miss 0.5. Read members beside non-members and the "
        "untrained network: a kind that these know as well is only easier to tell apart, not memorised."
    )
    return join(
        [
            element("h4", "Planted truth"),
            element("p", text),
            table("AUROC of mean log p, planted against plain samples", columns, body, sort=True),
        ]
    )
