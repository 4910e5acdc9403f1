"""The page of `benchmarks.overhead`: the targets with their verdicts, and a table for each group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import markdown_table

Row = dict[str, Any]

HOW = """Time over that of the step without heads in the same round; brackets are ranges over rounds. Peak: bytes in \
tensors at the fullest moment of a step, network, heads, optimisers and batch included; extra: how many more than \
without heads."""
ON_CUDA = """ Time is that of host and device together: where launching kernels takes longer than running them, what \
heads add is mostly launches."""
ON_CPU = " On the CPU the peak does not know the scratch memory inside libraries."
TARGET_LABELS = 10
"""n at which the targets are judged, the default of `heads.num_labels`."""


@dataclass(frozen=True)
class Target:
    """The largest share that heads may add to the time of a step on a GPU."""

    title: str
    where: str
    draws: int
    limit: float

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """The measured rows of this many draws there, whatever n and λ."""
        return [
            row
            for row in rows
            if row["reason"] is None and (row["where"], row["draws"], row["kind"]) == (self.where, self.draws, "shared")
        ]


TARGETS = (Target("1 head", "last tap", 1, 0.03), Target("all depths x 8 draws", "all depths", 8, 0.10))


def page(rows: Sequence[Row], is_cuda: bool) -> str:
    """All of it, in Markdown."""
    parts = ["## Targets", "\n".join(verdict(target, rows, is_cuda) for target in TARGETS)]
    parts.append(HOW + (ON_CUDA if is_cuda else ON_CPU))
    for title in dict.fromkeys(row["group"] for row in rows):
        mine = [row for row in rows if row["group"] == title]
        taps = max((row.get("taps", 0) for row in mine), default=0)
        heading = f"## {title}" + (f" ({taps} taps)" if taps > 1 and mine[-1]["where"] == title else "")
        parts += [heading, markdown_table(_HEADER, [_line(row) for row in mine])]
    return "\n\n".join(parts)


def verdict(target: Target, rows: Sequence[Row], is_cuda: bool) -> str:
    """One target and what was measured, as an item of a list; judged on a GPU alone, by the slower λ at n = 10."""
    mine = target.rows(rows)
    judged = [row for row in mine if row["n"] == TARGET_LABELS]
    text = f"- {target.title}, at most {100 * target.limit:.0f}% of a step on a GPU, n={TARGET_LABELS}: "
    if not judged:
        return text + "not measured."
    text += "; ".join(f"λ={row['lam']:g} {percent(row)}" for row in judged)
    if is_cuda:
        worst = max(row["ratio"]["median"] for row in judged) - 1
        text += f": **{'reached' if worst <= target.limit else 'missed'}**"
    else:
        text += " on this CPU, for which there is no target"
    others = [row for row in mine if row["n"] != TARGET_LABELS]
    beside = "; ".join(f"n={row['n']:,} λ={row['lam']:g} {percent(row)}" for row in others)
    return text + (f". At other n: {beside}." if beside else ".")


def percent(row: Row) -> str:
    """What is added to the step's time, with its range."""
    middle, low, high = (100 * (row["ratio"][part] - 1) for part in ("median", "low", "high"))
    return f"{middle:+.1f}% [{low:+.1f}, {high:+.1f}]"


_HEADER = ["where x draws", "ms per step", "added time", "images/s", "heads' parameters", "peak MiB", "extra MiB"]


def _line(row: Row) -> list[str]:
    if row["reason"] is not None:
        return [f"{row['case']}: {row['reason']}", *["–"] * (len(_HEADER) - 1)]
    middle, low, high = (1e3 * row["seconds"][part] for part in ("median", "low", "high"))
    return [
        row["case"],
        f"{middle:.2f} [{low:.2f}, {high:.2f}]",
        "–" if row["where"] == "none" else percent(row),
        f"{row['images_per_s']:,.0f}",
        f"{row['head_parameters']:,}",
        f"{row['peak_bytes'] / 2**20:,.1f}",
        f"{row['extra_bytes'] / 2**20:,.1f}",
    ]
