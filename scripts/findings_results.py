"""The table of docs/results/findings.md, from the folders that `python -m rlp.reproduce` has written.

    python scripts/findings_results.py runs/paper

Prints Markdown: a section for each finding, a line for each contrast and reading.
"""

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HEAD = (
    "contrast",
    "expected",
    "reading",
    "of",
    "first → last",
    "n",
    "N",
    "D",
    "chance",
    "controls",
    "estimate",
    "verdict",
)
CONTROLS = ("class-only", "untrained", "noise", "leak")


def main() -> None:
    """Print every finding below the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for path in sorted(parser.parse_args().folder.glob("*/verdict.json")):
        print(section(json.loads(path.read_text("utf-8"))))


def section(found: Row) -> str:
    """One finding: what is claimed, of which source, and every contrast."""
    lines = [f"### {found['finding']}", "", f"{found['claim']} ({found['source']})", ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in found["verdicts"]]
    return "\n".join([*lines, "", *found["remarks"], ""])


def cells(row: Row) -> list[str]:
    """The first and the last point of the contrast, their circumstances, and what came of it."""
    first, last = row["points"][0], row["points"][-1]
    facts = {key.replace("_", "-"): value for key, value in last["facts"].items()}
    controls = [f"{name} {number(facts[name])}" for name in CONTROLS if facts.get(name) is not None]
    values = " → ".join(number(point["estimate"]["mean"]) for point in (first, last))
    whole = [f"{facts[name]:.0f}" if facts.get(name) is not None else "–" for name in ("n", "N", "D")]
    chance = f"{facts['chance']:.3g}" if facts.get("chance") is not None else "–"
    estimate, source = row["estimate"], "papers'" if row["papers_own"] else "ours"
    interval = f"{number(estimate['mean'])} [{number(estimate['low'])}, {number(estimate['high'])}]"
    told = [row["contrast"], row["expected"], f"{row['reading']} ({source})", row["quantity"], values]
    return [*told, *whole, chance, ", ".join(controls) or "–", interval, f"**{row['verdict']}**"]


def number(value: float | None) -> str:
    """Three digits and a true minus."""
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


if __name__ == "__main__":
    main()
