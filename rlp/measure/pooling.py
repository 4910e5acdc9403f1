"""Several probed networks as one table: what a claim about more than one network needs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
import json
from pathlib import Path
from typing import Any

import numpy as np

from rlp.errors import UserError
from rlp.measure.estimate import Estimate, delta_estimate, kappa_estimate, mean_estimate
from rlp.measure.reading import Condition, Reading, load_readings
from rlp.runlog import read_summary

CONTROLS = ("untrained", "noise", "leak")

Row = dict[str, Any]
Key = tuple[Any, ...]
Values = list[np.ndarray]


@dataclass(frozen=True)
class Side:
    """What was found in one network.

    Attributes:
        readings: by condition, then by group.
        rows: the probe's rows by condition.
        run, options: of ``probe.json``.
    """

    readings: dict[Key, dict[str, Reading]]
    rows: dict[Key, Row]
    run: Row
    options: Row


def load_side(folder: Path) -> Side:
    """The results of a probe.

    Raises:
        UserError: the folder holds none.
    """
    path = folder / "probe.json"
    try:
        content = json.loads(path.read_text("utf-8"))
        rows = {key_of_row(row): row for row in content["rows"]}
        run, options = content["run"], content["options"]
    except FileNotFoundError:
        raise UserError(f"{path} is missing; expected what `python -m rlp.measure probe` writes") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no probe of this version: {error}") from error
    readings: dict[Key, dict[str, Reading]] = {}
    for reading in load_readings(folder / "readings.npz"):
        readings.setdefault(_key_of(reading.condition), {})[reading.condition.group] = reading
    return Side(readings, rows, run, options)


def _key_of(condition: Condition) -> Key:
    return key_of_row({**asdict(condition), "n": condition.num_labels})


def key_of_row(row: Row) -> Key:
    """What two networks must agree in for their readings to be of one kind."""
    return tuple(row[name] for name in ("protocol", "head", "features", "mode", "images", "depth", "tap", "n"))


def by_sample(reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 [N], ascending, and the share of right answers over the views of each sample, [K, N] (bool if one)."""
    ids, counts = np.unique(reading.ids, return_counts=True)
    views = int(counts[0])
    if not (counts == views).all():
        raise ValueError("samples occur in differing numbers of views")
    correct = reading.correct[:, np.argsort(reading.ids, kind="stable")].reshape(len(reading.correct), len(ids), views)
    return ids, correct[..., 0] if views == 1 else correct.mean(axis=2)


def pooled_row(
    name: str, seeds: Sequence[int], told: Sequence[Row], members: Values, others: Values, controls: dict[str, Values],
    paired: bool,
) -> Row:  # fmt: skip
    """One condition over all seeds, as a row of ``probe.json``.

    Args:
        name: of the row's ``run``.
        seeds: of the networks, or of their pairs.
        told: the probes' rows.
        members, others: readings by seed, ``[K, N]``.
        controls: the same of each control that there is.
        paired: row and column of ``members`` and ``others`` are the same draw and sample.
    """
    first = told[0]
    n, retrieval = first["n"], first["protocol"] == "retrieval"
    estimates = {
        "members": _kappa(members, n, retrieval),
        "non_members": _kappa(others, n, retrieval),
        "delta": _delta(members, others, n, retrieval, paired),
    } | {group: _kappa(values, n, retrieval) for group, values in controls.items() if values}
    shared = ("protocol", "tap", "depth", "D", "n", "head", "features", "mode", "images", "note")
    means = ("class_only", "effective_rank", "participation_ratio", "converged")
    return {
        "run": name,
        "seeds": list(seeds),
        **{field: first[field] for field in shared},
        "N": min(row["N"] for row in told),
        "draws": min(len(each) for each in members),
        "steps": max(row["steps"] for row in told),
        "chance": 1 / n,
        "accuracy": float(np.mean([each.mean() for each in members])),
        **dict.fromkeys(CONTROLS),
        **{group: estimate.as_dict() for group, estimate in estimates.items()},
        **{field: float(np.mean([row[field] for row in told])) for field in means},
        "curve": [],
    }


def _kappa(values: Values, n: int, retrieval: bool) -> Estimate:
    if not retrieval:
        return kappa_estimate(values, n)
    return mean_estimate([(n * each - 1.0) / (n - 1) for each in values])  # no draws: samples alone are an interval


def _delta(members: Values, others: Values, n: int, retrieval: bool, paired: bool) -> Estimate:
    if not retrieval:
        return delta_estimate(members, others, n, paired=paired)
    if paired:
        return mean_estimate([(1.0 * a - b) * (n / (n - 1)) for a, b in zip(members, others, strict=True)])
    # Without draws a network has one number; networks alone tell how far it would move.
    gains = [(1.0 * a.mean() - b.mean()) * (n / (n - 1)) for a, b in zip(members, others, strict=True)]
    return mean_estimate([np.full((1, 1), gain) for gain in gains])


def pool(run_dirs: Sequence[str | Path], folder: str = "measure") -> list[Row]:
    """Rows over several runs that differ in their seed alone, with estimates over seed, draw and sample.

    Args:
        run_dirs: folders of probed runs.
        folder: in each, where its probe lies.

    Raises:
        UserError: a run is not probed, or not since it went on; or the runs differ in more than their seed, or were
            probed with other options.
    """
    paths = [Path(path) for path in run_dirs]
    sides = [load_side(path / folder) for path in paths]
    for path, side in zip(paths, sides, strict=True):
        _check_current(path, side)
    _check_alike(paths, sides)
    seeds = [side.run["seed"] for side in sides]
    name = " ".join(path.resolve().name for path in paths)
    keys = [key for key in sides[0].readings if all(key in side.readings for side in sides)]
    return [_pooled(name, seeds, key, sides) for key in keys]


def _pooled(name: str, seeds: Sequence[int], key: Key, sides: Sequence[Side]) -> Row:
    def values(group: str) -> Values:
        return [by_sample(side.readings[key][group])[1] for side in sides if group in side.readings[key]]

    told = [side.rows[key] for side in sides]
    controls = {group: values(group) for group in CONTROLS}
    return pooled_row(name, seeds, told, values("members"), values("non-members"), controls, paired=False)


def _check_current(path: Path, side: Side) -> None:
    """Refuse the probe of a run that was trained further since: its settings are those of the end."""
    probed, ended = side.run.get("steps"), read_summary(path).get("steps")
    if side.options.get("checkpoint") == "last" and probed != ended:
        raise UserError(f"{path} was probed at step {probed} and has gone on to step {ended}; probe it again")


def _check_alike(paths: Sequence[Path], sides: Sequence[Side]) -> None:
    seeds = [side.run["seed"] for side in sides]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the runs have the seeds {', '.join(map(str, seeds))}; expected each seed once")
    for path, side in zip(paths[1:], sides[1:], strict=True):
        given = [("probe", sides[0].options, side.options), ("run", _settings(paths[0]), _settings(path))]
        for what, first, other in given:
            for name in sorted(first.keys() | other.keys()):
                if name not in ("out", "device") and first.get(name) != other.get(name):
                    raise UserError(
                        f"{name} of the {what} is {other.get(name)!r} in {path} and {first.get(name)!r} in {paths[0]}; "
                        "expected runs that differ in their seed alone"
                    )


def _settings(run_dir: Path) -> Row:
    """By ``section.key``, but for those of the run itself; and what the files held, which may have been rewritten."""
    summary = read_summary(run_dir)
    sections = [(section, keys) for section, keys in summary["config"].items() if section != "run"]
    files = {f"{split} file's sha256": facts["sha256"] for split, facts in summary.get("data", {}).items()}
    return files | {f"{section}.{name}": value for section, keys in sections for name, value in keys.items()}
