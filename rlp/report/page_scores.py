"""Scores of single samples: read from scores.parquet, and their histograms for members and non-members."""

from collections.abc import Sequence
from dataclasses import dataclass
import math
from pathlib import Path
from typing import Any

import numpy as np

from rlp.errors import UserError
from rlp.report.figures import literal
from rlp.report.page_estimates import signed
from rlp.report.page_html import Html, code, element, join, note, tabs
from rlp.report.page_run import SCORES, ReportRun, probe_command
from rlp.report.page_svg import grid_of, inline_svg, legend, panel

ENOUGH_DRAWS = 30
"""From about so many draws on the score of one sample says something (measured on digits)."""
COLUMNS = ("index", "split", "group", "class", "given", "true", "noisy", "planted", "tap", "depth", "n", "N", "draws",
           "protocol", "head", "features", "mode", "images", "log_p", "correct")  # fmt: skip
_CONDITION = ("protocol", "head", "features", "mode", "images", "n", "draws")
BLUE, ORANGE, GREY, PURPLE = "#0072B2", "#D55E00", "#666666", "#CC79A7"


@dataclass(frozen=True)
class Scores:
    """Mean log p of the samples in one condition at the deepest tap.

    Attributes:
        protocol, head, features, mode, images, n, draws: the condition.
        tap: the deepest of it.
        columns: per sample index, split, group, class, given, true, noisy, planted, log_p; samples without a log_p
            are left out.
    """

    protocol: str
    head: str
    features: str
    mode: str
    images: str
    n: int
    draws: int
    tap: str
    columns: dict[str, np.ndarray]

    def of(self, group: str, column: str = "log_p") -> np.ndarray:
        """One column of one group."""
        return self.columns[column][self.columns["group"] == group]


def read_scores(run: ReportRun) -> list[Scores]:
    """Every condition of RUN/measure/scores.parquet that has log-probabilities; none without the file.

    Raises:
        UserError: pyarrow is not installed, or the file is damaged or lacks a column.
    """
    path = run.dir / SCORES
    if not path.is_file():
        return []
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path} needs the package pyarrow, which is not installed") from None
    try:
        stored = parquet.read_schema(path).names
        missing = [name for name in COLUMNS if name not in stored]
        if missing:
            raise UserError(f"{path} has no column '{missing[0]}'; write it again with `{probe_command(path)}`")
        table = parquet.read_table(path, columns=list(COLUMNS))
        keys = table.select(_CONDITION).group_by(list(_CONDITION), use_threads=False).aggregate([])
        found = []
        for condition in keys.to_pylist():
            part = table.filter(_equal(condition))
            deepest = max(part["depth"].unique().to_pylist())
            found += _scores(condition, part.filter(_equal({"depth": deepest})))
        return found
    except (OSError, ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no table of samples: {reason}") from None


def _equal(values: dict[str, Any]) -> Any:
    """An expression of pyarrow: columns that have these values."""
    from pyarrow.dataset import field

    first, *others = [field(name) == value for name, value in values.items()]
    for other in others:
        first = first & other
    return first


def _scores(condition: dict[str, Any], part: Any) -> list[Scores]:
    names = ("index", "split", "group", "class", "given", "true", "noisy", "planted", "log_p")
    columns = {name: part[name].to_numpy(zero_copy_only=False) for name in names}
    known = np.isfinite(columns["log_p"].astype(np.float64))
    if not known.any():
        return []
    tap = str(part["tap"][0].as_py())
    return [Scores(**condition, tap=tap, columns={name: column[known] for name, column in columns.items()})]


def chosen(scores: Sequence[Scores]) -> Scores | None:
    """The condition that the gallery is chosen by: converged, linear, eval, clean, n = 10 where there are; else the
    first of the file. The choice looks at no score."""

    def key(one: Scores) -> tuple[bool, ...]:
        return (
            one.protocol != "converged",
            one.head != "linear",
            one.mode != "eval",
            one.images != "clean",
            one.n != 10,
        )

    return min(scores, key=key, default=None)


def scores_section(runs: list[ReportRun], scores: dict[str, list[Scores]]) -> Html:
    """Histograms of members and non-members for every condition; a panel for each run.

    Args:
        runs: of the page.
        scores: by name of the run, from :func:`read_scores`.
    """
    parts = [element("h2", "Scores of single images", id="scores")]
    for run in runs:
        if not scores[run.name]:
            where = element("code", str(run.dir / SCORES))
            parts.append(note(f"{run.name} has no table of scores: ", where, " is missing or empty. This makes it:"))
            parts.append(code(probe_command(run.dir / SCORES)))
    groups: dict[str, list[tuple[ReportRun, Scores]]] = {}
    for run in runs:
        for one in scores[run.name]:
            groups.setdefault(_label(one), []).append((run, one))
    if groups:
        shown = {_label(one) for run in runs if (one := chosen(scores[run.name]))}
        labels = sorted(groups, key=lambda label: label not in shown)
        parts += [
            element("p", "The score of an image is the mean over draws of the log-probability that fresh heads give "
                    "its random label: the higher, the better known."),
            tabs("Condition", [(label, _histograms(groups[label], place)) for place, label in enumerate(labels)]),
        ]  # fmt: skip
    return join(parts)


def _label(one: Scores) -> str:
    usual = {"linear", "raw", "eval", "clean"}
    words = [
        one.protocol,
        f"n = {one.n}",
        *(word for word in (one.head, one.features, one.mode, one.images) if word not in usual),
    ]
    return ", ".join(words)


def _histograms(pairs: Sequence[tuple[ReportRun, Scores]], number: int) -> Html:
    values = np.concatenate([one.columns["log_p"].astype(np.float64) for _, one in pairs])
    low, high = np.quantile(values, [0.002, 0.998])
    low, high = min(low, -math.log(pairs[0][1].n)), max(high, -math.log(pairs[0][1].n))
    edges = np.linspace(low, high, 41) if high > low else np.linspace(low - 0.5, low + 0.5, 41)
    panels = [
        _panel(run, one, edges, f"scores-{number}-{place}", len(pairs) > 1) for place, (run, one) in enumerate(pairs)
    ]
    wrong = any(_noisy(one).size for _, one in pairs)
    entries = [("blue", "-", "members"), ("orange", "--", "non-members"), ("muted", "--", "chance, log 1/n")]
    entries += [("purple", "-", "members with a wrong label")] if wrong else []
    one = pairs[0][1]
    draws = " and ".join(sorted({str(one.draws) for _, one in pairs}))
    caption = (
        f"Density of the score at the deepest tap, {one.head} heads, {one.features} features, {one.mode} mode, "
        f"{one.images} images; {'; '.join(_summary(run, one, len(pairs) > 1) for run, one in pairs)}; chance: "
        f"log 1/{one.n} = {signed(-math.log(one.n), 2)}; control: non-members. The outermost 0.2% on either side are "
        "left out."
    )
    below = (
        f"Each score is a mean over {draws} draws; with fewer than about {ENOUGH_DRAWS} much of the width of both "
        "curves may be the luck of the labels. Curves that lie on each other mean that this score does not tell who "
        "was trained on."
    )
    return join([legend(entries), grid_of(panels, caption=caption, below=below)])


def _summary(run: ReportRun, one: Scores, named: bool) -> str:
    words = []
    for group in ("members", "non-members"):
        values = one.of(group).astype(np.float64)
        if values.size:
            quarters = np.quantile(values, [0.25, 0.5, 0.75])
            middle, low, high = (signed(float(quarters[place]), 2) for place in (1, 0, 2))
            words.append(f"{group} N = {values.size:,}, median {middle}, middle half [{low}, {high}]")
    return (f"{run.name}, " if named else "") + f"{one.tap}, n = {one.n}: " + ", ".join(words)


def _noisy(one: Scores) -> np.ndarray:
    """Scores of the members whose given label is wrong."""
    wrong = (one.columns["group"] == "members") & one.columns["noisy"].astype(bool)
    return one.columns["log_p"][wrong].astype(np.float64)


def _panel(run: ReportRun, one: Scores, edges: np.ndarray, name: str, named: bool) -> Html:
    figure, axes = panel()
    width = edges[1] - edges[0]
    for values, colour, filled, style in (
        (one.of("members"), BLUE, True, "-"),
        (one.of("non-members"), ORANGE, False, (0, (3, 1.5))),
        (_noisy(one), PURPLE, False, "-"),
    ):
        if not values.size:
            continue
        heights = np.histogram(values.astype(np.float64), edges)[0] / (values.size * width)
        if filled:
            axes.stairs(heights, edges, color=colour, fill=True, alpha=0.2, linewidth=0)
        axes.stairs(heights, edges, color=colour, linestyle=style, linewidth=1.3)
    axes.axvline(-math.log(one.n), color=GREY, linestyle=(0, (3, 2)), linewidth=1)
    title = f"{one.tap}, n = {one.n}" + (f", {run.name}" if named else "")
    axes.set_title(literal(title), fontsize=9.5)
    axes.set_xlabel("mean log p of the random label")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    return inline_svg(figure, f"Histogram of scores: {_summary(run, one, named)}", name)


def scores_of(runs: Sequence[ReportRun]) -> dict[str, list[Scores]]:
    """:func:`read_scores` of every run, by its name."""
    return {run.name: read_scores(run) for run in runs}


def resolve(path: str, run_dir: Path) -> Path:
    """A data path as the settings have it: from here, or from a folder above the run."""
    given = Path(path)
    places = [given, *(folder / given for folder in run_dir.resolve().parents)]
    return next((place for place in places if place.with_suffix(".json").is_file()), given)
