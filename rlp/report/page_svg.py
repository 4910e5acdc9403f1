"""Figures of a page: Matplotlib's SVG, small, with the page's own fonts and its colours for light and dark."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import StringIO
import re
from typing import TYPE_CHECKING, Any

from rlp.errors import UserError
from rlp.report.figures import BLUE, GREEN, GREY, ORANGE, depth_colours, new_figure
from rlp.report.page_html import Html, element, join, markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PURPLE, SKY, AMBER, INK = "#CC79A7", "#56B4E9", "#E69F00", "#000000"
VARIABLES = {
    BLUE: "blue", ORANGE: "orange", GREEN: "green", PURPLE: "purple", SKY: "sky", AMBER: "amber",
    GREY: "muted", INK: "ink", "#b0b0b0": "grid",
}  # fmt: skip
"""Colours that figures are drawn in, and the variables of page.css that stand for them."""
RUN_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, GREY)
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
DEPTH_STOPS = 20
"""The colours of depth are rounded to the variables --depth-0 (shallowest) to --depth-20."""

_GLYPHS = dict(zip(MARKERS, "●■◆▲▼✚✖", strict=True)) | {"--": "┄", "-": "━"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.4,
}


@contextmanager
def page_style() -> Iterator[None]:
    """Matplotlib's settings for a page, around the drawing of figures; before and after they are as they were."""
    try:
        from matplotlib import rc_context
    except ImportError:
        raise UserError("the page's figures need the package matplotlib, which is not installed") from None
    with rc_context(_STYLE):
        yield


def panel(width: float = 4.6, height: float = 3.0) -> "tuple[Figure, Axes]":
    """A figure of one panel, in inches; of these the text is 8.5 points high."""
    figure = new_figure(width, height)
    return figure, figure.subplots()


def inline_svg(figure: "Figure", label: str, name: str) -> Html:
    """The figure as an SVG element that takes the width it is given.

    Args:
        figure: drawn within :func:`page_style`.
        label: what is to be seen, for those who do not see it.
        name: unlike that of every other figure on the page; the same figure and name give the same text.
    """
    from matplotlib import rc_context

    buffer = StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    opening, _, content = text.partition(">")
    content = re.sub(r"\s*<metadata>.*?</metadata>", "", content, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', opening)
    drawn = f'<svg {box[0] if box else ""} role="img" aria-label="{markup(label)}">' + _shortened(content)
    return Html(_with_variables(drawn))


def _shortened(content: str) -> str:
    """Without comments, names that nothing refers to, needless decimals and blanks: a third of the bytes."""
    content = re.sub(r"<!--.*?-->", "", content, flags=re.DOTALL)
    content = re.sub(r'<g id="[^"]*"', "<g", content)
    # Coordinates only: the numbers on the axes are text, of which no digit may go.
    content = re.sub(r'="[^"]*"', lambda found: re.sub(r"(\d+\.\d{2})\d+", r"\1", found[0]), content)
    content = re.sub(r' xmlns(:xlink)?="[^"]*"', "", content).replace("xlink:href", "href")
    content = re.sub(r"font-family: [^;\"]*;?|font: [^;\"]*(?=;|\")", _font, content)
    return re.sub(r"\s*\n\s*", "\n", content)


def _font(found: "re.Match[str]") -> str:
    """Size and weight stay, the family is the page's."""
    words = found[0].removeprefix("font: ").split()
    if found[0].startswith("font-family"):
        return ""
    size = next((word for word in words if word.endswith("px")), "8.5px")
    bold = "; font-weight: 600" if {"bold", "700"} & set(words) else ""
    return f"font-size: {size}{bold}"


def _with_variables(text: str) -> str:
    for colour, variable in VARIABLES.items():
        text = re.sub(f"(?<=: ){colour}", f"var(--{variable})", text, flags=re.IGNORECASE)
    for colour, variable in _depth_variables().items():
        text = text.replace(f": {colour}", f": var(--{variable})")
    return text  # what Matplotlib leaves without a colour is black: page.css makes it --ink


@cache
def _depth_variables() -> dict[str, str]:
    from matplotlib.colors import to_hex

    found = {}
    for count in range(1, 65):
        for place, colour in enumerate(depth_colours(count)):
            found[to_hex(colour)] = depth_variable(place, count)
    return found


def depth_variable(place: int, count: int) -> str:
    """The variable of the colour of a tap: number ``place`` of ``count`` from the input."""
    return f"depth-{round(DEPTH_STOPS * place / max(count - 1, 1))}"


def depth_style() -> str:
    """The variables --depth-0 to --depth-20 for light and for dark paper, as CSS: viridis, less its ends."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    def themed(first: float, last: float) -> str:
        steps = range(DEPTH_STOPS + 1)
        values = (to_hex(colormaps["viridis"](first + (last - first) * step / DEPTH_STOPS)) for step in steps)
        return "".join(f"--depth-{step}:{value};" for step, value in enumerate(values))

    return f":root{{{themed(0.0, 0.82)}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{themed(0.4, 1.0)}}}}}"


def legend(entries: list[tuple[str, str, str]], title: str = "") -> Html:
    """Colour (a variable's name), marker and text of each curve, as a line of the page that wraps."""
    shown = [
        element("li", element("span", _GLYPHS[marker], style=f"color:var(--{colour})", aria_hidden="true"), " ", text)
        for colour, marker, text in entries
    ]
    return element("ul", *([element("li", title, class_="muted")] if title else []), *shown, class_="legend")


def depth_legend(taps: list[str]) -> Html:
    """The legend of curves that are one tap each, from input to output."""
    entries = [(depth_variable(place, len(taps)), "-", tap) for place, tap in enumerate(taps)]
    return legend(entries, "tap, from input to output:")


def grid_of(figures: list[Html], *, caption: str = "", below: str = "") -> Html:
    """Panels beside each other where there is room, with a caption (what is shown) and a sentence on what it means."""
    parts = [element("div", *(element("div", drawn, class_="panel") for drawn in figures), class_="panels")]
    if caption or below:
        words = join([caption, *([element("span", below, class_="reading")] if below else [])], " ")
        parts.append(element("figcaption", words))
    return element("figure", *parts)
