"""Pieces of an HTML page: text is escaped unless it was made here, so that no class name or path becomes markup."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
import math
import re
from typing import Any, TypeGuard

_VOID = ("br", "img", "input", "meta")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class Html(str):
    """Text that is markup already; every other string is escaped where it enters the page."""


def markup(text: str) -> Html:
    """The text, escaped unless it is :class:`Html`; characters that HTML does not know become U+FFFD."""
    return text if isinstance(text, Html) else Html(escape(_CONTROL.sub("\ufffd", text), quote=True))


def join(parts: Iterable[str], between: str = "") -> Html:
    """The parts one after the other, each escaped unless it is markup."""
    return Html(between.join(markup(part) for part in parts))


def element(name: str, *parts: str, **attributes: str | bool | None) -> Html:
    """``<name attributes>parts</name>``; ``class_`` is class, ``data_v`` data-v; None and False are left out.

    Example:
        >>> element("td", "a < b", class_="number")
        '<td class="number">a &lt; b</td>'
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        words.append(label if value is True else f'{label}="{markup(value)}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if name in _VOID else f"{opening}{join(parts)}</{name}>")


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is shown, and the number that it is sorted by (None sorts by the text)."""

    text: str
    order: float | None = None


def number_cell(value: Any, digits: int = 3) -> Cell:
    """A number with so many digits behind the point (whole ones with a comma at the thousands); anything else is –."""
    if not is_number(value):
        return Cell("–", -math.inf)
    return Cell(f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}".replace("-", "−"), float(value))


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a finite number (True and False are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def table(caption: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str | Cell]], sort: bool) -> Html:
    """A table with a caption and real headers, in a box that scrolls sideways where the page is narrow.

    Args:
        caption: says what the table holds.
        columns: heading and explanation (shown on hover; may be empty) of each.
        rows: one cell a column; the first cell of a row is its header.
        sort: whether a click on a heading sorts (where scripts run).
    """
    head = element("tr", *(element("th", name, scope="col", title=about or None) for name, about in columns))
    body = [element("tr", *(_cell(cell, place == 0) for place, cell in enumerate(row))) for row in rows]
    content = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", *body),
        class_="sortable" if sort else None,
    )
    return element("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _cell(cell: str | Cell, first: bool) -> Html:
    if isinstance(cell, str):
        cell = Cell(cell)
    # As JavaScript reads it: what is missing lies below all numbers, and "-inf" would be no number there.
    order = None if cell.order is None else f"{cell.order:.10g}".replace("inf", "Infinity")
    kind = {"class_": None if cell.order is None else "number", "data_v": order}
    return element("th", cell.text, scope="row", **kind) if first else element("td", cell.text, **kind)


def facts(pairs: Iterable[tuple[str, str]], kind: str = "facts") -> Html:
    """Names and values; ``facts`` are a grid of short ones, ``words`` a list of long ones."""
    return element(
        "dl",
        *(element("div", element("dt", name), element("dd", value)) for name, value in pairs),
        class_=kind,
    )


def folded(summary: str, *parts: str, opened: bool = False) -> Html:
    """Parts behind a line that opens them."""
    return element("details", element("summary", summary), *parts, open=opened)


def tabs(name: str, parts: Sequence[tuple[str, Html]]) -> Html:
    """Parts of which one is shown at a time; all of them, one below the other, without scripts and on paper.

    Args:
        name: what is chosen, for those who do not see the page.
        parts: label and content of each; a single one is shown as it is.
    """
    if len(parts) == 1:
        return element("div", element("h4", parts[0][0]), parts[0][1])
    shown = [
        element("section", element("h4", label), content, class_="tab", data_label=label) for label, content in parts
    ]
    return element("div", *shown, class_="tabs", data_name=name)


def note(*parts: str) -> Html:
    """A remark that must not be overlooked."""
    return element("p", *parts, class_="note")


def code(text: str) -> Html:
    """A command or a file, as it is."""
    return element("pre", element("code", text), tabindex="0")


def document(title: str, body: Html) -> str:
    """The whole page, with style and script inside of it."""
    assets = files("rlp.report") / "assets"
    style, script = ((assets / name).read_text("utf-8") for name in ("page.css", "page.js"))
    head = [
        element("meta", charset="utf-8"),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name_="color-scheme", content="light dark"),
        # The page may load nothing, not even by a fault of its own.
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:",
        ),
        element("title", title),
        element("style", Html(style)),
    ]
    parts = [element("head", *head), element("body", body, element("script", Html(script)))]
    return f"<!DOCTYPE html>\n{element('html', *parts, lang='en')}\n"
