"""Estimates as probe.json has them, in words and for axes; every part of one may be missing."""

from collections.abc import Sequence
from typing import Any

from rlp.report.page_html import Cell, is_number
from rlp.runlog import Row

GROUPS = {
    "members": "members",
    "non_members": "non-members",
    "untrained": "untrained network",
    "noise": "noise features",
    "leak": "leak check",
}
"""Keys of a row that hold estimates of κ, and what is shown for them."""


def signed(value: float, digits: int = 3) -> str:
    """A number with a real minus sign, and none before zero."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def mean_of(estimate: Any) -> float | None:
    """The mean, None where there is none."""
    value = estimate.get("mean") if isinstance(estimate, dict) else None
    return float(value) if is_number(value) else None


def ends_of(estimate: Any) -> tuple[float, float] | None:
    """Both ends of the interval, None where there is none."""
    if mean_of(estimate) is None or not (is_number(estimate.get("low")) and is_number(estimate.get("high"))):
        return None
    return float(estimate["low"]), float(estimate["high"])


def shown(estimate: Any) -> str:
    """``0.123 [0.110, 0.140]``."""
    mean, ends = mean_of(estimate), ends_of(estimate)
    if mean is None:
        return "–"
    return f"{signed(mean)} [{signed(ends[0])}, {signed(ends[1])}]" if ends else f"{signed(mean)} [no interval]"


def estimate_cell(estimate: Any) -> Cell:
    """An estimate in a table, which sorts by its mean."""
    mean = mean_of(estimate)
    return Cell(shown(estimate), float("-inf") if mean is None else mean)


def counted(estimate: Any, key: str) -> int | None:
    """A count of an estimate (seeds, draws, samples)."""
    value = estimate.get(key) if isinstance(estimate, dict) else None
    return value if isinstance(value, int) else None


def span(values: Sequence[Any]) -> str:
    """Whole numbers in words: ``1,438``, or ``8 to 30`` where they differ, ``?`` without any."""
    found = sorted({value for value in values if isinstance(value, int)})
    if not found:
        return "?"
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def condition(row: Row) -> str:
    """Head, features, mode and images of a row in words."""
    head = "no head" if row["protocol"] == "retrieval" else f"{row['head']} heads"
    return f"{head}, {row['features']} features, {row['mode']} mode, {row['images']} images"


def primary(rows: Sequence[Row]) -> list[Row]:
    """The rows that the page begins with: one condition at all its taps, from input to output.

    Converged linear heads on clean images in eval mode where they were read, at n = 10 if possible; the rest of the
    choice is the first in the file. The choice looks at no result.
    """
    known = [row for row in rows if mean_of(row["members"]) is not None]
    if not known:
        return []

    def key(row: Row) -> tuple[bool, ...]:
        wishes = {"protocol": "converged", "head": "linear", "mode": "eval", "images": "clean", "n": 10}
        return (row["delta"] is None, *(row[name] != value for name, value in wishes.items()))

    first = min(known, key=key)
    same = ("protocol", "head", "features", "mode", "images", "n")
    group = [row for row in known if all(row[name] == first[name] for name in same)]
    return sorted(group, key=lambda row: row["depth"])
