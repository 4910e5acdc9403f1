"""The verdict in words and numbers: ``verdict.json`` and ``verdict.md``."""

from collections.abc import Sequence
import dataclasses
from typing import Any

from rlp.measure.estimate import Estimate
from rlp.reproduce.study import Study
from rlp.reproduce.verdict import Judged, Shown, remarks

SCHEMA = 1
FACTS = ("n", "N", "D", "chance", "class_only", "untrained", "noise", "leak", "effective_rank")


def as_json(study: Study, judged: Sequence[Judged], environment: dict[str, Any]) -> dict[str, Any]:
    """All that was judged, as plain data."""
    finding = study.finding
    return {
        "schema": SCHEMA,
        "finding": finding.name,
        "claim": finding.claim,
        "source": finding.source,
        "size": study.size.name,
        "seeds": list(study.seeds),
        "draws": study.draws,
        "verdicts": [_entry(each) for each in judged],
        "remarks": [*([finding.note] if finding.note else []), *remarks(study, judged)],
        "variants": {variant: finding.settings_of(variant, study.size.name) for variant in study.variants},
        "configs": {
            variant: [f"configs/{variant}-seed{seed}.yaml" for seed in study.seeds] for variant in study.variants
        },
        "environment": environment,
    }


def _entry(judged: Judged) -> dict[str, Any]:
    return {
        "contrast": judged.contrast.what,
        "expected": judged.contrast.expected,
        "reading": judged.reading,
        "papers_own": judged.own,
        "quantity": judged.quantity,
        "verdict": judged.verdict,
        "estimate": judged.estimate.as_dict(),
        "paired_samples": judged.paired,
        "points": [
            {**dataclasses.asdict(shown.selection), "estimate": shown.estimate.as_dict(), "facts": shown.facts}
            for shown in judged.points
        ],
    }


def as_markdown(study: Study, judged: Sequence[Judged], environment: dict[str, Any], command: str) -> str:
    """The same for people."""
    finding = study.finding
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    lines = [
        f"# {finding.name}",
        "",
        f"{finding.claim} ({finding.source})",
        "",
        f"Size {study.size.name}: {study.size.about} Seeds {', '.join(map(str, study.seeds))}; {study.draws} draws.",
        "",
        *_verdict_table(judged),
        "",
        "An interval is 95%, over seed, draw and sample; a verdict is *undecided* where it holds 0.",
        *(f"{line}" for line in [finding.note, *remarks(study, judged)] if line),
        "",
        "![the readings, and the contrasts with their intervals](verdict.png)",
        "",
        "## The readings",
        "",
        *_reading_table(judged),
        "",
        "κ = (n·accuracy − 1)/(n − 1): 0 at chance. Δ = κ of members − κ of non-members. Controls: *class-only*, κ",
        "from knowing the class alone; *untrained*, the same network with fresh weights; *noise*, Gaussian features of",
        "equal covariance; *leak*, the heads on samples that they were not fitted to, which must lie at 0.",
        "",
        "## How",
        "",
        "```",
        command,
        "```",
        "",
        "Settings on top of the size's base configuration:",
        "",
        *(f"- {variant}: `{finding.settings_of(variant, study.size.name)}`" for variant in study.variants),
        "",
        f"Fresh heads: `{study.size.fresh}`"
        + (f", on top of it `{finding.fresh}`" if finding.fresh else "")
        + f". The whole configurations lie in `configs/`. {packages}; {environment['cpu']}; "
        f"Python {environment['python']}.",
        "",
    ]
    return "\n".join(lines)


def _verdict_table(judged: Sequence[Judged]) -> list[str]:
    rows = ["| contrast | expected | reading | of | estimate | verdict |", "|---|---|---|---|---|---|"]
    for each in judged:
        whose = "the papers' own" if each.own else "ours"
        rows.append(
            f"| {each.contrast.what} | {each.contrast.expected} | {each.reading} ({whose}) | {each.quantity} | "
            f"{number(each.estimate)} | **{each.verdict}** |"
        )
    return rows


def _reading_table(judged: Sequence[Judged]) -> list[str]:
    head = ["reading", "where", "of", "value", "seeds", "draws", *(name.replace("_", "-") for name in FACTS)]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    seen = set()
    for each in judged:
        for shown in each.points:
            row = _reading_row(each, shown)
            if row not in seen:  # one reading may take part in several contrasts
                rows.append(row)
            seen.add(row)
    return rows


def _reading_row(judged: Judged, shown: Shown) -> str:
    place = f"{shown.selection.variant} {shown.facts.get('tap', '')}".strip()
    if shown.selection.trained < 1:
        place += f", {shown.selection.trained:.0%} trained"
    cells = [judged.reading, place, judged.quantity, number(shown.estimate)]
    cells += [str(shown.estimate.seeds), str(shown.estimate.draws)]
    return "| " + " | ".join([*cells, *(_cell(name, shown.facts.get(name)) for name in FACTS)]) + " |"


def number(estimate: Estimate) -> str:
    """Mean and interval, with the sign that a minus has in print."""
    return str(estimate).replace("-", "−")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "–"
    text = f"{value:.0f}" if name in ("n", "N", "D") else f"{value:.3g}" if name == "chance" else f"{value:.3f}"
    return text.replace("-", "−")


def summary_lines(study: Study, judged: Sequence[Judged]) -> list[str]:
    """The verdicts for the terminal."""
    lines = [f"{study.finding.name}: {study.finding.claim}"]
    for each in judged:
        whose = "papers" if each.own else "ours"
        lines.append(
            f"  {each.contrast.what} ({each.contrast.expected}) | {whose}: {each.reading}, {each.quantity} "
            f"{number(each.estimate)} | {each.verdict}"
        )
    return lines
