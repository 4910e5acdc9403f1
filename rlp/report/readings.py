"""The head rows of an epoch, gathered by tap: what table and figures both show."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rlp.intervals import Interval, draw_interval


@dataclass(frozen=True)
class Reading:
    """All draws at one tap, read on one split in one mode; one entry per draw in the tuples.

    Attributes:
        tap, depth, dim: name, position from input to output, and D, the number of features the heads see.
        num_labels, count: n random labels; N samples.
        accuracies: random-label accuracy.
        kappas: κ = (n · accuracy - 1) / (n - 1), which is 0 at chance and 1 when every label is right.
        floors: κ of the best guess from the class alone; empty where the rows hold none (validation).
    """

    tap: str
    depth: int
    dim: int
    num_labels: int
    count: int
    accuracies: tuple[float, ...]
    kappas: tuple[float, ...]
    floors: tuple[float, ...]

    @property
    def draws(self) -> int:
        """K, the number of draws."""
        return len(self.kappas)

    @property
    def interval(self) -> Interval:
        """Mean κ over draws and its 95% interval: the spread over draws of this one backbone."""
        return draw_interval(self.kappas)


def readings(heads: Iterable[dict[str, Any]], split: str, mode: str) -> list[Reading]:
    """The rows of `split` (train, val) and `mode` (online, eval) as one reading per tap, in depth order.

    Args:
        heads: the `heads` of an epoch row of metrics.jsonl.
        split, mode: which rows to take; none of them gives an empty list.
    """
    taps: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in heads:
        if row["split"] == split and row["mode"] == mode and row["kappa"] is not None:
            taps.setdefault((row["depth"], row["tap"]), []).append(row)
    return [_reading(sorted(taps[key], key=lambda row: row["draw"])) for key in sorted(taps)]


def _reading(rows: list[dict[str, Any]]) -> Reading:
    first = rows[0]
    floors = [row["floor"] for row in rows if row["floor"] is not None]
    return Reading(
        tap=first["tap"],
        depth=first["depth"],
        dim=first["dim"],
        num_labels=first["num_labels"],
        count=int(first["count"]),
        accuracies=tuple(row["accuracy"] for row in rows),
        kappas=tuple(row["kappa"] for row in rows),
        floors=tuple(_kappa(floor, first["num_labels"]) for floor in floors),
    )


def _kappa(accuracy: float, num_labels: int) -> float:
    return (num_labels * accuracy - 1) / (num_labels - 1)


def plural(count: int, noun: str) -> str:
    """`1 epoch`, `12 epochs`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
