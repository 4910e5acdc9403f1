"""A contact sheet: samples of a set with their ids, classes and random labels, and the sizes of its classes, as PNG."""

from bisect import bisect_right
from dataclasses import dataclass
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlp.data.beton import Beton
from rlp.data.inspect_set import shortened, spread
from rlp.errors import UserError
from rlp.files import write_atomically
from rlp.labels import random_labels
from rlp.philox import random_bits

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

SIDE = 128  # of a thumbnail, in pixels
MARGIN, GAP, TITLE, CAPTION, BARS = 32, 16, 84, 50, 200
LABELS = 8  # random labels under a thumbnail
NUM_LABELS = 10
_MOST_SAMPLES = 4096
_NAMED_CLASSES = 16  # up to so many bars have their names written below
PAPER, INK, SOFT, LINE, BAR = "#fbfbf8", "#22262b", "#6b7280", "#d9dbd6", "#4477aa"
CHIPS = (
    *("#cfe1f2", "#fde0c5", "#cdebd6", "#f6cfd6", "#e2d5f0"),
    *("#fdf0bf", "#cfeef0", "#e6dccf", "#dfe9bd", "#dcdfe4"),
)
"""Background of each random label."""


@dataclass(frozen=True)
class Grid:
    """Where things are on a sheet of ``count`` samples, all in pixels."""

    count: int

    @property
    def columns(self) -> int:
        """Thumbnails in a row: 8 of many, as many as there are of few, but at least 4 of room."""
        return min(8, max(4, self.count))

    @property
    def rows(self) -> int:
        return math.ceil(self.count / self.columns)

    @property
    def width(self) -> int:
        return 2 * MARGIN + self.columns * (SIDE + GAP) - GAP

    @property
    def height(self) -> int:
        return TITLE + self.rows * (SIDE + CAPTION + GAP) + BARS + MARGIN

    def corner(self, place: int) -> tuple[int, int]:
        """Left and upper edge of a thumbnail."""
        row, column = divmod(place, self.columns)
        return MARGIN + column * (SIDE + GAP), TITLE + row * (SIDE + CAPTION + GAP)


def write_contact_sheet(beton: Beton, path: str | Path, samples: int = 64) -> Path:
    """Draw the sheet and write it in one step; returns its path.

    Args:
        beton: the open set.
        path: the PNG; a file that is there is replaced.
        samples: thumbnails, fewer where the set has fewer.

    Raises:
        UserError: the path is no PNG or cannot be written, or an image is damaged.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"--sheet is {path}; expected a name that ends in .png, or none")
    if not 1 <= samples <= _MOST_SAMPLES:
        raise UserError(f"--samples is {samples}; expected 1 to {_MOST_SAMPLES}")
    content = io.BytesIO()
    draw_sheet(beton, chosen_rows(beton, samples)).save(content, "PNG")
    try:
        return write_atomically(path, content.getvalue())
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from None


def chosen_rows(beton: Beton, count: int) -> np.ndarray:
    """Rows of up to ``count`` samples, equally many of each class as far as it goes, int64 in the order of the sheet.

    Of each class come the samples with the smallest of a random word of their own, so that the choice is always the
    same. Of more classes than ``count`` as many are taken, equally spaced.
    """
    word = random_bits(beton.card.words_seed, f"{beton.card.split}.sheet", beton.index, 1)[:, 0]
    order = np.lexsort((word, beton.label))
    label = beton.label[order]
    present, starts = np.unique(label, return_index=True)
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    if len(present) > count:
        kept = present[np.arange(count) * len(present) // count]
        return order[(rank == 0) & np.isin(label, kept)]
    first = np.sort(np.lexsort((label, rank))[:count])  # the first of each class, then the second of each ...
    return order[first]


def thumbnail(image: np.ndarray) -> "Image":
    """uint8 [H, W, 3] fitted into a square: enlarged by a whole factor so that pixels stay square, or reduced."""
    from PIL import Image

    picture, longest = Image.fromarray(image), max(image.shape[:2])
    if longest <= SIDE:
        factor = SIDE // longest
        return picture.resize((image.shape[1] * factor, image.shape[0] * factor), Image.Resampling.NEAREST)
    height, width = (max(1, round(edge * SIDE / longest)) for edge in image.shape[:2])
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def draw_sheet(beton: Beton, rows: np.ndarray) -> "Image":
    """The sheet of the given rows as an RGB image of the size that :class:`Grid` says."""
    from PIL import Image, ImageDraw
    from tqdm import tqdm

    grid = Grid(len(rows))
    sheet = Image.new("RGB", (grid.width, grid.height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _title(draw, beton, grid, len(rows))
    words = beton.stored_words(rows)[:, : min(LABELS, beton.card.draws)].astype(np.int64)
    labels = random_labels(words, NUM_LABELS)
    for place, row in enumerate(tqdm(rows.tolist(), desc="contact sheet", unit=" images", disable=None)):
        left, top = grid.corner(place)
        picture = thumbnail(beton.image(row))
        draw.rectangle((left - 1, top - 1, left + SIDE, top + SIDE), "#f0f0ec", LINE)
        sheet.paste(picture, (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
        name = beton.card.classes[int(beton.label[row])]
        _caption(draw, (left, top + SIDE), f"#{beton.index[row]}", name, labels[place].tolist())
    _class_bars(draw, beton, grid)
    return sheet


def _title(draw: "ImageDraw", beton: Beton, grid: Grid, shown: int) -> None:
    card, width = beton.card, grid.width - 2 * MARGIN
    kind = f"{card.split}, {card.num_samples:,} samples of {len(card.classes):,} classes"
    _text(draw, (MARGIN, 20), f"{beton.path.name}: {kind}", 22, INK, width)
    labels = f"random labels (n = {NUM_LABELS}) of the first {min(LABELS, card.draws)} of {card.draws} draws"
    note = f"{shown} samples, with the {labels}"
    _text(draw, (MARGIN, 50), note, 14, SOFT, width)


def _caption(draw: "ImageDraw", corner: tuple[int, int], sample: str, name: str, labels: list[int]) -> None:
    """Class name, sample id on the right of it, and below a chip for each random label."""
    left, top = corner
    id_width = int(draw.textlength(sample, _font(12))) + 1
    _text(draw, (left, top + 6), name, 13, INK, SIDE - id_width - 6)
    _text(draw, (left + SIDE - id_width, top + 7), sample, 12, SOFT, id_width)
    for place, value in enumerate(labels):
        x, y = left + place * (SIDE // LABELS), top + 28
        draw.rounded_rectangle((x, y, x + SIDE // LABELS - 3, y + 16), 3, CHIPS[value])
        draw.text((x + (SIDE // LABELS - 2) / 2, y + 8.5), str(value), INK, _font(11), "mm")


def _class_bars(draw: "ImageDraw", beton: Beton, grid: Grid) -> None:
    """Samples of every class; of many classes by size, without names."""
    counts = np.bincount(beton.label, minlength=len(beton.card.classes))
    few = len(counts) <= _NAMED_CLASSES
    values = counts if few else np.sort(counts)[::-1]
    top, width = grid.height - BARS - MARGIN + 12, grid.width - 2 * MARGIN
    head = "Samples a class" if few else f"Samples a class, {len(counts):,} classes by size"
    draw.line((MARGIN, top, MARGIN + width, top), LINE)
    _text(draw, (MARGIN, top + 12), f"{head}: {spread(counts)}", 14, INK, width)
    base, step = grid.height - MARGIN - 22, width / len(values)
    gap = min(8.0, step * 0.2) if step > 3 else 0.0
    for place, count in enumerate(values.tolist()):
        left, right = MARGIN + place * step + gap / 2, MARGIN + (place + 1) * step - gap / 2
        height = (base - top - 60) * count / values.max()
        draw.rectangle((left, base - height, max(left, right - 1), base), BAR)
        if few:
            name, middle = _fitted(draw, beton.card.classes[place], 12, right - left), (left + right) / 2
            draw.text((middle, base - height - 4), f"{count:,}", SOFT, _font(11), "ms")
            draw.text((middle, base + 6), name, INK, _font(12), "ma")
    draw.line((MARGIN, base, MARGIN + width, base), LINE)


def _text(draw: "ImageDraw", corner: tuple[float, float], text: str, size: int, colour: str, room: float) -> None:
    draw.text(corner, _fitted(draw, text, size, room), colour, _font(size))


def _fitted(draw: "ImageDraw", text: str, size: int, room: float) -> str:
    """The text, cut with an ellipsis where it is wider than ``room`` pixels."""
    text, font = shortened(text, 200), _font(size)
    widths = range(1, len(text) + 1)
    fitting = bisect_right(widths, room, key=lambda width: draw.textlength(shortened(text, width), font))
    return shortened(text, fitting) if fitting else ""


def _font(size: int) -> "FreeTypeFont | ImageFont":
    from PIL.ImageFont import load_default

    return load_default(size)
