"""The page of `benchmarks.loader`: targets, a table for each case, starts, and what the contenders do."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.harness import Spread, markdown_table
from benchmarks.loader_cases import Contender
from benchmarks.loader_contenders import BARE, EVERYTHING, OURS, PILLOW, PLAIN_FFCV, RESIDENT

Row = dict[str, Any]
LONGEST_START = 3.0  # seconds

HOW = """Images per second, median and range over the rounds of one run in which the contenders took turns, each in a \
process of its own, with batches of 256 images of 32 px or 64 of 256 px. The ratio is to this project's first loader \
of the case, taken within rounds. Cold: the files were dropped from the page cache before the epoch (folders and \
inodes were not). All give uint8 images, labels and numbers of samples; each was checked first."""

HOW_STARTS = """Seconds from launching the interpreter to the first batch. The first start finds none of numba's \
compiled code on the disk, later ones what it left. Opening leaves out what comes before the set is opened: the \
interpreter, torch, and for others than this project the import of their packages (torchvision's brings timm along). \
What every augmentation takes longer than the loader alone is mostly the work on the first batch itself, which is the \
GPU's where there is one."""


class Target(NamedTuple):
    """Ours is to be at least `factor` times as fast as another in a case."""

    case: str
    ours: str
    other: str
    factor: float


TARGETS = (
    Target("b", RESIDENT, PILLOW, 20),
    Target("b", RESIDENT, BARE, 0.5),
    Target("c", OURS, PILLOW, 2.5),
    Target("c", OURS, PLAIN_FFCV, 1),
)


def page(rows: Sequence[Row], contenders: Iterable[Contender]) -> str:
    """All of it, in Markdown."""
    parts = ["## Targets", markdown_table(["target", "asked for", "measured", "reached"], list(targets(rows)))]
    for key in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == key and row["measure"] != "start"]
        parts += [f"## {key}: {mine[0]['title']}", _case_table(mine)] if mine else []
    starts = [row for row in rows if row["measure"] == "start"]
    parts += [HOW] + (["## Starts", _start_table(starts), HOW_STARTS] if starts else [])
    met = {row["contender"] for row in rows}
    parts += ["## What the contenders do"]
    parts += ["\n".join(f"- {one.name}: {one.note}" for one in contenders if one.name in met)]
    return "\n\n".join(parts)


def targets(rows: Sequence[Row]) -> Iterator[list[str]]:
    """A line for each target."""
    rates = {(row["case"], row["contender"]): row["rounds"] for row in rows if row["measure"] == "warm" and _good(row)}
    for target in TARGETS:
        name = f"{target.case}: {target.ours} / {target.other}"
        ours, other = (rates.get((target.case, one)) for one in (target.ours, target.other))
        if not ours or not other:
            yield [name, f"≥ {target.factor:g}", "–", "not measured"]
            continue
        ratio = Spread.of([mine / its for mine, its in zip(ours, other, strict=True)])
        yield [name, f"≥ {target.factor:g}", _spread(vars(ratio)), "yes" if ratio.median >= target.factor else "no"]
    starts = [row for row in rows if row["measure"] == "start" and row["contender"] == EVERYTHING and _good(row)]
    for row in starts:
        reached = row["launch"]["median"] <= LONGEST_START
        name = f"{row['case']}: {EVERYTHING}, later start"
        yield [name, f"≤ {LONGEST_START:g} s", f"{_spread(row['launch'])} s", "yes" if reached else "no"]
    if not starts:
        yield [f"{EVERYTHING}, later start", f"≤ {LONGEST_START:g} s", "–", "not measured"]


def _good(row: Row) -> bool:
    return row["reason"] is None


def _case_table(rows: Sequence[Row]) -> str:
    """The fastest first, and last those that could not be measured, with the reason."""
    found = {measure: {row["contender"]: row for row in rows if row["measure"] == measure and _good(row)}
             for measure in ("warm", "cold")}  # fmt: skip
    lines = []
    for row in sorted(found["warm"].values(), key=lambda row: -row["images_per_s"]["median"]):
        cold = found["cold"].get(row["contender"])
        share = "–" if cold is None else _number(cold["images_per_s"]["median"] / row["images_per_s"]["median"])
        lines.append(
            [
                _bold(row),
                _spread(row["images_per_s"]),
                _spread(row["over_ours"]) if row["over_ours"] else "–",
                _spread(cold["images_per_s"]) if cold else "–",
                share,
            ]
        )
    for row in rows:
        if not _good(row):
            cache = "" if row["measure"] == "all" else f", {row['measure']}"
            lines.append([f"{row['contender']}{cache}: {row['reason']}", *["–"] * 4])
    return markdown_table(["contender", "images/s, warm", "/ ours", "images/s, cold", "cold / warm"], lines)


def _start_table(rows: Sequence[Row]) -> str:
    header = ["case, contender", "first start, s", "later starts, s", "opening, first, s", "opening, later, s"]
    lines = [
        [
            f"{row['case']}, {_bold(row)}",
            _number(row["first_launch"]),
            _spread(row["launch"]),
            _number(row["first_opening"]),
            _spread(row["opening"]),
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def _bold(row: Row) -> str:
    return f"**{row['contender']}**" if row["is_ours"] else row["contender"]


def _spread(spread: Row) -> str:
    return f"{_number(spread['median'])} [{_number(spread['low'])}, {_number(spread['high'])}]"


def _number(value: float) -> str:
    """Three significant digits below 100, whole numbers above."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"
