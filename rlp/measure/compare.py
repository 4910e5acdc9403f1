"""``python -m rlp.measure compare``: every measure on the same runs and samples, and which of them to believe."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
import json
from pathlib import Path
from typing import Any

import numpy as np

from rlp.errors import UserError
from rlp.files import write_atomically
from rlp.measure.agreement import agreement_rows
from rlp.measure.agreement_runs import RunFacts, granulated_rows, partial_rows
from rlp.measure.baselines.collect import Collected, collect
from rlp.measure.estimate import auroc_estimate
from rlp.measure.rows import planted_masks
from rlp.measure.scores import samples_table, save_scores

SCHEMA = 1

Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        runs: name, accuracies, N, seconds of each measure, and why others were left out, by run.
        findings: numbers of taps and runs, one row for each measure, quantity and tap.
        planted: AUROC of each score on each kind of planted truth, by run.
        agreement: rank correlations of scores, over runs.
        granulated, partial: over runs that differ in a setting; empty where there are too few.
    """

    runs: list[Row]
    findings: list[Row]
    planted: list[Row]
    agreement: list[Row]
    granulated: list[Row]
    partial: list[Row]


def compare(
    run_dirs: Sequence[str | Path],
    measures: Sequence[str] | None = None,
    *,
    taps: Sequence[str] | None = None,
    samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    say: Callable[[str], None] | None = None,
) -> Comparison:
    """Take every measure of every run, or what is kept of it, and set them side by side.

    In each run's ``measure/baselines`` are written ``scores.parquet`` and ``.csv``, a row a sample and a column a
    score, and ``rows.json``, the run's own findings and AUROCs, which the report page shows.

    Args:
        run_dirs: folders of finished runs, each once.
        measures, taps, samples, seed, device: as for :func:`rlp.measure.baselines.collect.collect`.
        say: told what is being taken.

    Raises:
        UserError: a run is named twice, or a measure cannot be taken of one.
    """
    paths = [Path(path) for path in run_dirs]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"the runs are {', '.join(map(str, paths))}; expected each once")
    found: list[Collected] = []
    for path, name in zip(paths, _names(paths), strict=True):
        tell = None if say is None else lambda measure, path=path: say(f"{path}: {measure}")
        taken = collect(path, measures, taps=taps, samples=samples, seed=seed, device=device, say=tell)
        _save_own(taken)
        found.append(replace(taken, name=name))
    facts = [_facts(each) for each in found]
    return Comparison(
        runs=[_run_row(each) for each in found],
        findings=[row for each in found for row in _findings(each)],
        planted=[row for each in found for row in _planted_rows(each)],
        agreement=agreement_rows([each.scores("members") for each in found], seed),
        granulated=granulated_rows(facts, seed),
        partial=partial_rows(facts, seed),
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """Of the runs' folders; where two are called alike, their paths."""
    names = [path.resolve().name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def save_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Write everything as JSON; numbers that do not exist are null."""
    content = {"schema": SCHEMA, **asdict(comparison)}
    return write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _save_own(each: Collected) -> None:
    subject, folder = each.subject, each.run.dir / "measure" / "baselines"
    groups = [(subject.members, each.scores("members")), (subject.non_members, each.scores("non-members"))]
    table = samples_table(groups, each.run.card.classes)
    save_scores(folder, table)
    rows = {"schema": SCHEMA, "step": each.run.step, "findings": _findings(each), "planted": _planted_rows(each)}
    write_atomically(folder / "rows.json", json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _every_row(each: Collected) -> list[Any]:
    return [row for found in each.found.values() for row in found.findings.rows]


def _run_row(each: Collected) -> Row:
    facts = _facts(each)
    return {
        "run": facts.name,
        "seed": facts.seed,
        "N": len(each.subject.members),
        "train_accuracy": facts.train_accuracy,
        "gap": facts.gap,
        "seconds": {name: found.seconds for name, found in each.found.items()},
        "left_out": each.left_out,
    }


def _findings(each: Collected) -> list[Row]:
    return [{"run": each.name, **asdict(row)} for row in _every_row(each)]


def _planted_rows(each: Collected) -> list[Row]:
    """AUROC of each score on each kind of planted truth among members; beside it the same of non-members."""
    rows = []
    masks = {group: planted_masks(samples) for group, samples in _groups(each).items()}
    columns = {group: each.scores(group) for group in masks}
    for kind, name in ((kind, name) for kind in masks["members"] for name in columns["members"]):
        estimates = {group: _auroc(columns[group].get(name), masks[group].get(kind)) for group in masks}
        if estimates["members"] is None:
            continue
        with_score = np.isfinite(columns["members"][name])
        rows.append(
            {
                "run": each.name,
                "planted": kind,
                "score": name,
                "N": estimates["members"]["samples"],
                "count": int((masks["members"][kind][0] & with_score).sum()),
                "chance": 0.5,
                "members": estimates["members"],
                "non_members": estimates["non-members"],
            }
        )
    return rows


def _groups(each: Collected) -> dict[str, Any]:
    return {"members": each.subject.members, "non-members": each.subject.non_members}


def _auroc(values: np.ndarray | None, masks: tuple[np.ndarray, np.ndarray] | None) -> Row | None:
    """None where there is no score or no such samples; samples without a score are left out."""
    if values is None or masks is None:
        return None
    planted, scored = masks[0], masks[1] & np.isfinite(values)
    if not planted[scored].any() or planted[scored].all():
        return None
    return auroc_estimate(values[scored], planted[scored]).as_dict()


def _facts(each: Collected) -> RunFacts:
    """The run as a whole. Of scores the mean over members counts, of other numbers the one at the deepest tap."""
    run, members, others = each.run, each.subject.members, each.subject.non_members
    train, val = (float((s.logits.argmax(dim=1).numpy() == s.given).mean()) for s in (members, others))
    values = {name: float(np.nanmean(column)) for name, column in each.scores("members").items()}
    for row in sorted(_every_row(each), key=lambda row: row.depth):
        values[f"{row.measure} {row.quantity}"] = row.value.mean
    config = asdict(run.config)
    settings = {f"{part}.{key}": value for part, keys in config.items() if part != "run" for key, value in keys.items()}
    return RunFacts(each.name, run.config.run.seed, settings, train, train - val, values)
