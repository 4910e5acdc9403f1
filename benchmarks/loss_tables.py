"""The page of `benchmarks.loss`: a summary, a table for each case, one for each sweep, and what contenders compute."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.harness import markdown_table
from benchmarks.loss_cases import MODES
from benchmarks.loss_contenders import OURS, Contender

Row = dict[str, Any]

HOW = """Floor: the least operations and bytes of the case (every input read once, every output written once) over the \
rates of a large matrix product and a large copy measured between the contenders; both shares are of these rates, with \
the floor's operations and bytes. Ratios are taken within rounds; brackets are ranges over rounds. Extra memory is \
neither input nor output. Inputs lie where the last call left them: small cases are read from the cache, which the \
floor does not know."""


def page(rows: Sequence[Row], contenders: Iterable[Contender]) -> str:
    """All of it, in Markdown."""
    parts = ["## Summary", markdown_table(_SUMMARY, list(_summary(rows))), HOW]
    for key in dict.fromkeys(row["case"] for row in rows if not row["is_sweep"]):
        mine = [row for row in rows if row["case"] == key]
        parts += [f"## {key}: {mine[0]['title']}, {_sizes(mine[0])}", markdown_table(_HEADER, _ordered(mine))]
    for key in dict.fromkeys(row["case"] for row in rows if row["is_sweep"]):
        parts += _sweep([row for row in rows if row["case"] == key])
    met = {row["contender"] for row in rows}
    parts += ["## What the contenders compute"]
    parts += ["\n".join(f"- {one.name}: {one.note}" for one in contenders if one.name in met)]
    return "\n\n".join(parts)


_SUMMARY = ["case, asked for", "ours, ms", "floor, ms", "ours / floor", "best other", "best other / ours", "extra MiB"]


def _summary(rows: Sequence[Row]) -> Iterator[list[str]]:
    ours = [row for row in rows if row["contender"] == OURS and not row["is_sweep"]]
    for row in ours:
        name = f"{row['case']}, {label(row['mode'])}"
        if row["reason"] is not None:
            yield [name, row["reason"], *["–"] * 5]
            continue
        best = best_other(rows, row)
        yield [
            name,
            _ms(row["seconds"]),
            _number(1e3 * row["floor"]["median"]),
            _ratio(row["over_floor"]),
            "–" if best is None else best["contender"],
            "–" if best is None else _ratio(best["over_ours"]),
            _mib(row["extra_bytes"]) if "extra_bytes" in row else "–",
        ]


def best_other(rows: Iterable[Row], row: Row) -> Row | None:
    """The fastest contender of others in the row's case and mode, if any was timed."""
    same = [
        one
        for one in rows
        if not one.get("is_ours", True)
        and one["reason"] is None
        and all(one[key] == row[key] for key in ("case", "mode", "num_labels", "heads"))
    ]
    return min(same, key=lambda one: one["seconds"]["median"], default=None)


def label(mode: str) -> str:
    """A mode, for people."""
    name, comma, rest = mode.partition(",")
    return MODES.get(name, name) + comma + rest


_HEADER = [
    "asked for, contender", "ms", "/ ours", "/ floor", "% of copy", "% of product", "peak MiB", "extra MiB",
]  # fmt: skip


def _ordered(rows: Sequence[Row]) -> list[list[str]]:
    """By mode, in each with the contenders in their order; those that were not timed at all come last."""
    modes = list(dict.fromkeys(row["mode"] for row in sorted(rows, key=_place_of_mode)))
    return [_line(row) for mode in modes for row in rows if row["mode"] == mode]


def _place_of_mode(row: Row) -> tuple[int, str]:
    name = row["mode"].partition(",")[0]
    return ([*MODES].index(name) if name in MODES else len(MODES), row["mode"])


def _line(row: Row) -> list[str]:
    if row["reason"] is not None:
        mode = "" if row["mode"] == "all" else f"{label(row['mode'])}: "
        return [f"{mode}{row['contender']}: {row['reason']}", *["–"] * (len(_HEADER) - 1)]
    return [
        f"{label(row['mode'])}: {row['contender']}",
        _ms(row["seconds"]),
        "–" if row["over_ours"] is None else _ratio(row["over_ours"]),
        _ratio(row["over_floor"]),
        f"{100 * row['of_bandwidth']:.0f}",
        f"{100 * row['of_products']:.0f}",
        _mib(row.get("peak_bytes")),
        _mib(row.get("extra_bytes")),
    ]


def _sweep(rows: Sequence[Row]) -> list[str]:
    """Median milliseconds, contenders as columns and sizes as rows."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    sizes = list(dict.fromkeys((row["heads"], row["num_labels"]) for row in rows))
    by_place = {(row["contender"], row["heads"], row["num_labels"]): row for row in rows}
    varies = "H" if len({heads for heads, _ in sizes}) > 1 else "n"
    lines, reasons = [], []
    for heads, n in sizes:
        found = [by_place.get((name, heads, n)) for name in names]
        timed = [row for row in found if row is not None and row["reason"] is None]
        floor = _number(1e3 * timed[0]["floor"]["median"]) if timed else "–"
        cells = [_ms(row["seconds"], False) if row and row["reason"] is None else "–" for row in found]
        lines.append([f"{heads if varies == 'H' else n:,}", *cells, floor])
        reasons += [(row["contender"], row["reason"]) for row in found if row and row["reason"] is not None]
    notes = "\n".join(f"- {name}: {reason}" for name, reason in dict.fromkeys(reasons))
    title = f"## {rows[0]['title']}: {MODES['both']}, ms"
    return [title, markdown_table([varies, *names, "floor"], lines), *([f"Not timed:\n\n{notes}"] if notes else [])]


def _sizes(row: Row) -> str:
    own = f"H={row['heads']}" if row["classes"] is None else f"C={row['classes']}"
    return f"B={row['batch']}, D={row['dim']}, {own}, n={row['num_labels']:,}"


def _ms(spread: Row, with_range: bool = True) -> str:
    middle, low, high = (_number(1e3 * spread[part]) for part in ("median", "low", "high"))
    return f"{middle} [{low}, {high}]" if with_range else middle


def _ratio(spread: Row) -> str:
    return f"{_number(spread['median'])} [{_number(spread['low'])}, {_number(spread['high'])}]"


def _number(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _mib(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:,.1f}"
