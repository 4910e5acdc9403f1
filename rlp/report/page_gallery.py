"""The training images that fresh heads know best and least, out of the .beton."""

from base64 import b64encode
from dataclasses import fields
import io
from pathlib import Path

import numpy as np

from rlp.data.beton import Beton
from rlp.data.canaries import Canaries, noise_images
from rlp.data.view import ViewOptions, make_view
from rlp.errors import UserError
from rlp.report.page_estimates import signed
from rlp.report.page_html import Html, element, join, note
from rlp.report.page_run import ReportRun
from rlp.report.page_scores import ENOUGH_DRAWS, Scores, chosen, resolve

IMAGES_PER_PAGE = 48
SIDE = 96
"""Longest edge of an embedded image in pixels; larger ones are reduced."""


def gallery_section(runs: list[ReportRun], scores: dict[str, list[Scores]]) -> Html:
    """The section; of a run without scores or without its data file it says so."""
    parts = [element("h2", "Best and least known training images", id="gallery")]
    each = max(4, min(12, IMAGES_PER_PAGE // (2 * len(runs))))
    for run in runs:
        parts += [element("h3", run.name)] if len(runs) > 1 else []
        one = chosen(scores[run.name])
        parts.append(_of_run(run, one, each) if one else note("No scores, so no gallery: see the section above."))
    return join(parts)


def _of_run(run: ReportRun, one: Scores, each: int) -> Html:
    members = (one.columns["group"] == "members") & (one.columns["split"] == "train")
    rows = np.flatnonzero(members)
    if not len(rows):
        return note("The table of scores has no members of the training file.")
    try:
        beton = _open(run)
        canaries = _canaries(run, beton)
    except UserError as error:
        return note(f"The images cannot be shown: {error}.")
    inside = (one.columns["index"][rows] >= beton.card.first_sample) & (
        one.columns["index"][rows] < beton.card.first_sample + beton.num_samples
    )
    rows = rows[inside]
    order = rows[np.argsort(-one.columns["log_p"][rows].astype(np.float64), kind="stable")]
    each = min(each, max(1, len(order) // 2))
    enough = one.draws >= ENOUGH_DRAWS
    few = f"Here there were {one.draws}" + ("" if enough else ": much of this order may be the luck of the labels")
    text = (
        f"Chosen by the score (mean log p of the random label, chance {signed(-np.log(one.n), 2)}) at the deepest tap, "
        f"{one.tap}: {one.protocol} protocol, {one.head} heads, {one.features} features, n = {one.n}, N = "
        f"{len(order):,} members. A high score of a single image needs about {ENOUGH_DRAWS} draws to mean something. "
        f"{few}. There is no interval for a single image, and its control, the same image as a non-member, "
        "needs a second network (crossover)."
    )
    return join([
        element("p", text) if enough else note(text),
        element("h4", f"The {each} best known"),
        _grid(order[:each], 1, one, beton, canaries),
        element("h4", f"The {each} least known"),
        _grid(order[::-1][:each], len(order), one, beton, canaries),
    ])  # fmt: skip


def _open(run: ReportRun) -> Beton:
    """The training set, if it is the one that the run was trained on."""
    name = run.setting("data", "train")
    if not name:
        raise UserError("the run's settings do not name its training data")
    beton = Beton.open(resolve(str(name), run.dir))
    told = (run.summary.get("data") or {}).get("train", {}).get("sha256")
    if told and told != beton.card.sha256:
        raise UserError(f"{beton.path} is not the file that the run was trained on (its hash differs)")
    return beton


def _canaries(run: ReportRun, beton: Beton) -> Canaries | None:
    """What the run planted; given labels, which have no say in the images, are left as the file has them."""
    names = {field.name for field in fields(ViewOptions)} - {"label_noise", "label_file", "label_key"}
    settings = {name: value for name, value in run.config["data"].items() if name in names}
    return make_view(beton, ViewOptions(**settings)).canaries


def _shown(beton: Beton, canaries: Canaries | None, row: int) -> np.ndarray:
    """The image that the network saw of a row: its own, its original's, or noise."""
    if canaries is None:
        return beton.image(row)
    image = beton.image(int(canaries.shown[row]))
    return noise_images(beton.card, beton.index[[row]], *image.shape[:2])[0] if canaries.is_noise[row] else image


def _grid(rows: np.ndarray, first_rank: int, one: Scores, beton: Beton, canaries: Canaries | None) -> Html:
    step = 1 if first_rank == 1 else -1
    cells = [_cell(int(row), first_rank + step * place, one, beton, canaries) for place, row in enumerate(rows)]
    return element("ol", *cells, class_="gallery")


def _cell(row: int, rank: int, one: Scores, beton: Beton, canaries: Canaries | None) -> Html:
    sample, score = int(one.columns["index"][row]), float(one.columns["log_p"][row])
    given, true = (_class(beton, int(one.columns[key][row])) for key in ("given", "true"))
    wrong = bool(one.columns["noisy"][row])
    planted = str(one.columns["planted"][row] or "")
    words = [element("span", f"given {given}, true {true}" if wrong else given)]
    words += [element("span", f"planted: {planted}", class_="muted")] if planted else []
    words.append(element("span", f"#{sample} · {signed(score, 2)} · rank {rank:,}", class_="muted"))
    try:
        image = _shown(beton, canaries, sample - beton.card.first_sample)
    except UserError as error:
        return element("li", element("span", str(error)), *words)
    source, small = data_url(image)
    alt = f"training image {sample}, {'given label ' if wrong else 'class '}{given}, score {signed(score, 2)}"
    return element("li", element("img", src=source, alt=alt, class_="small" if small else None), *words)


def _class(beton: Beton, label: int) -> str:
    return str(beton.card.classes[label]) if 0 <= label < len(beton.card.classes) else str(label)


def data_url(image: np.ndarray) -> tuple[str, bool]:
    """uint8 [H, W, 3] as a PNG in a URL, reduced to :data:`SIDE` pixels; and whether its pixels should stay square."""
    from PIL import Image

    picture, longest = Image.fromarray(image), max(image.shape[:2])
    if longest > SIDE:
        height, width = (max(1, round(edge * SIDE / longest)) for edge in image.shape[:2])
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + b64encode(buffer.getvalue()).decode(), longest <= 64


def beton_path(run: ReportRun) -> Path | None:
    """Where the training images are looked for."""
    name = run.setting("data", "train")
    return resolve(str(name), run.dir) if name else None
