"""The table a run ends with."""

from statistics import fmean
from typing import Any

from rlp.intervals import Interval
from rlp.report.readings import Reading, plural, readings
from rlp.runlog import weight_text

LEGEND = """\
κ = (n·acc - 1)/(n - 1): 0 is guessing, 1 is every random label right; [..] is the 95% interval over draws of this one
trained network; other seeds of the network usually move κ more than other draws do.
κ is what these heads, with this D, n, N and training time, tell apart from the features. Heads fitted to samples that
the network never trained on can reach as much, so κ alone proves no memorisation: compare at equal settings.
Class-only κ is reached by knowing nothing but the class. Leak check: the same heads on images and labels they never
saw; it must lie at 0 (about 1 in 20 of its intervals misses 0 by luck), or something is wrong with the run."""

COLUMNS = ["tap", "D", "n", "draws", "acc", "chance", "κ", "95%", "class-only κ", "online κ", "leak check κ", "95%"]


def summary_table(summary: dict[str, Any]) -> str:
    """The end of a run as plain text: one line per tap in depth order, and how to read it.

    `acc` and `κ` are read in eval mode on the clean training images; `online κ` is the running value of the last
    epoch, in train mode on augmented images; the leak check is read on the validation images.

    Args:
        summary: what `summary.json` holds, schema 1.
    """
    head = [_title(summary), _accuracy_line(summary)]
    rows = summary["final"].get("heads") or []
    table = _tap_rows(rows)
    if not table:
        return "\n".join([*head, "No random-label heads: heads.taps is empty."])
    return "\n".join([*head, "", *_aligned([COLUMNS, *table]), "", LEGEND])


def _title(summary: dict[str, Any]) -> str:
    name = summary["config"].get("model", {}).get("name")
    counts = ", ".join(f"{summary['data'][split]['num_samples']:,} {split}" for split in ("train", "val"))
    facts = [
        f"N = {counts}",
        weight_text(summary["lam"], summary["config"].get("heads", {})),
        plural(summary["epochs"], "epoch"),
    ]
    facts += [plural(summary["steps"], "step"), f"seed {summary['seed']}"]
    # Heads of another kind, or on other features, are another measurement.
    rows = summary["final"].get("heads") or []
    facts += dict.fromkeys(f"{row['kind']} heads on {row['features']} features" for row in rows if "kind" in row)
    return "   ".join([*([name] if name else []), *facts])


def _accuracy_line(summary: dict[str, Any]) -> str:
    """Class accuracy; on clean training images in eval mode where the row has it, else running over the epoch."""
    final = summary["final"]
    clean = final.get("train_eval")
    parts = [f"train {_share(clean or final['train'])}" + ("" if clean else " (running, augmented)")]
    if final.get("val"):
        parts.append(f"val {_share(final['val'])}")
    return "class accuracy: " + "   ".join(parts)


def _share(metrics: dict[str, Any]) -> str:
    return "none" if metrics["accuracy"] is None else f"{100 * metrics['accuracy']:.2f}%"


def _tap_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    by_kind = [
        {reading.tap: reading for reading in readings(rows, *kind)}
        for kind in (("train", "eval"), ("train", "online"), ("val", "eval"))
    ]
    present = {tap: reading for kind in by_kind for tap, reading in kind.items()}
    in_order = sorted(present.values(), key=lambda reading: reading.depth)
    return [_tap_row(reading, *(kind.get(reading.tap) for kind in by_kind)) for reading in in_order]


def _tap_row(any_: Reading, clean: Reading | None, online: Reading | None, leak: Reading | None) -> list[str]:
    floors = clean.floors if clean else online.floors if online else ()
    return [
        any_.tap,
        str(any_.dim),
        str(any_.num_labels),
        str(any_.draws),
        f"{fmean(clean.accuracies):.4f}" if clean else "-",
        f"{1 / any_.num_labels:.4g}",
        *_mean_and_interval(clean),
        f"{fmean(floors):.3f}" if floors else "-",
        f"{online.interval.mean:.3f}" if online else "-",
        *_mean_and_interval(leak),
    ]


def _mean_and_interval(reading: Reading | None) -> tuple[str, str]:
    return (f"{reading.interval.mean:.3f}", _ends(reading.interval)) if reading else ("-", "-")


def _ends(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return "one draw"
    return f"[{interval.low:.3f}, {interval.high:.3f}]"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns two spaces apart, the first to the left, the rest to the right, a rule under the first row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
