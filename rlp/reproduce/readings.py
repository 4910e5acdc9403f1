"""What a study's runs read: the papers' way, by the heads of the training, and ours, by fresh heads on fresh draws.

Every reading becomes one array of κ values by draw and sample, so that any contrast is a sum over such arrays.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
import json
from pathlib import Path
from typing import Any

import numpy as np

from rlp.checkpoint import checkpoint_path
from rlp.errors import UserError
from rlp.measure.probe import ProbeOptions, probe
from rlp.measure.reading import Reading, load_readings
from rlp.measure.run import open_run
from rlp.reproduce.finding import Contrast, Selection
from rlp.reproduce.study import Study
from rlp.runlog import METRICS, Row, read_rows

TRAINING = ("training heads, online", "training heads, eval")
"""The papers' own: the heads that were trained beside the network (and that the penalty acts on), while both moved, and
in eval mode on the training images at the end of the epoch."""
FRESH = ("fresh heads, converged", "fresh heads, budget")
"""Ours: heads fitted to the frozen network's features with random labels of their own, to convergence, or for a fixed
number of steps; on which features, the size's file says."""
PROTOCOL = {"fresh heads, converged": "converged", "fresh heads, budget": "budget"}
MODE = {"training heads, online": "online", "training heads, eval": "eval"}


@dataclass(frozen=True)
class Values:
    """κ by draw and sample of one reading of one run.

    Attributes:
        members: float32 [K, N]; of training heads, whose samples are not kept, means [K, 1].
        others: of non-members, [K, N], or None for training heads.
        ids: sample ids of the members, and of the non-members, or None.
        facts: n, N, D, chance, tap and the controls.
    """

    members: np.ndarray
    others: np.ndarray | None
    ids: tuple[np.ndarray, np.ndarray] | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class Point:
    """Where a run is read: its tap, the epoch, and how many samples fresh heads are fitted to (None: all)."""

    tap: str
    epoch: int
    samples: int | None


def points_of(study: Study, contrast: Contrast) -> dict[tuple[Selection, int], Point]:
    """For each reading of a contrast and each seed, where that is in the trained runs."""
    samples = matched_samples(study, contrast) if contrast.matched else None
    found = {}
    for selection in contrast.over:
        for seed in study.seeds:
            final = epoch_row(study.folder(selection.variant, seed), 1.0)
            epoch = epoch_row(study.folder(selection.variant, seed), selection.trained)["epoch"]
            found[selection, seed] = Point(_tap(selection.tap, final["heads"]), epoch, samples)
    return found


def matched_samples(study: Study, contrast: Contrast) -> int:
    """The fewest members or non-members that any run of the contrast has: so many are read in each."""
    folders = {study.folder(selection.variant, seed) for selection in contrast.over for seed in study.seeds}
    return min(len(group.ids) for folder in folders for group in open_run(folder, device="cpu").groups.values())


def _tap(name: str, heads: Sequence[Row]) -> str:
    taps = [tap for _, tap in sorted({(row["depth"], row["tap"]) for row in heads})]
    known = {"first": taps[0], "before last": taps[max(0, len(taps) - 2)], "last": taps[-1]} if taps else {}
    known |= {tap: tap for tap in taps}
    if name not in known:
        raise UserError(f"tap '{name}' has no head in the runs; expected one of {', '.join(known)}")
    return known[name]


@cache
def _epochs(folder: Path) -> list[Row]:
    return [row for row in read_rows(folder / METRICS) if row["kind"] == "epoch"]


def epoch_row(folder: Path, trained: float) -> Row:
    """The metrics of the epoch at which so large a share of the training was done, at least the first."""
    epochs = _epochs(folder)
    if not epochs:
        raise UserError(f"{folder / METRICS} holds no epoch; expected a finished run")
    return epochs[max(1, round(trained * len(epochs))) - 1]


def accuracy(study: Study, selection: Selection, seed: int, of: str) -> np.ndarray:
    """Class accuracy on the test or training images, [1, 1]."""
    row = epoch_row(study.folder(selection.variant, seed), selection.trained)
    part = row["val"] if of == "test_accuracy" else row.get("train_eval") or row["train"]
    return np.array([[part["accuracy"]]], np.float32)


def training_values(study: Study, selection: Selection, seed: int, point: Point, mode: str) -> Values:
    """The training heads' κ at a point, a mean for each draw, in mode ``online`` or ``eval``."""
    folder = study.folder(selection.variant, seed)
    row = epoch_row(folder, selection.trained)
    heads = [head for head in row["heads"] if (head["split"], head["tap"]) == ("train", point.tap)]
    heads = sorted((head for head in heads if head["mode"] == mode), key=lambda head: head["draw"])
    if not heads:
        raise UserError(f"{folder} has no {mode} reading at epoch {row['epoch']}; expected run.eval_every 1")
    first = heads[0]
    leaks = [h["kappa"] for h in row["heads"] if (h["split"], h["mode"], h["tap"]) == ("val", "eval", point.tap)]
    n, floors = first["num_labels"], [head["floor"] for head in heads if head["floor"] is not None]
    facts = {
        "tap": point.tap, "n": n, "N": first["count"], "D": first["dim"], "chance": 1 / n,
        "class_only": float(np.mean([(n * floor - 1) / (n - 1) for floor in floors])) if floors else None,
        "leak": float(np.mean(leaks)) if leaks else None,
    }  # fmt: skip
    values = np.array([[head["kappa"]] for head in heads], np.float32)
    return Values(values, None, None, facts)


def probe_tasks(study: Study, points: Iterable[tuple[Selection, int, Point]]) -> list[tuple[str, Callable[[], None]]]:
    """What has to be probed and was not yet: one task for each run, epoch, number of samples and protocol."""
    taps: dict[tuple[str, int, int, int | None], list[str]] = {}
    for selection, seed, point in points:
        known = taps.setdefault((selection.variant, seed, point.epoch, point.samples), [])
        known += [point.tap] if point.tap not in known else []
    tasks = []
    for (variant, seed, epoch, samples), names in taps.items():
        for protocol in PROTOCOL.values():
            point = Point(names[0], epoch, samples)
            options = _options(study, variant, seed, point, protocol, sorted(names))
            if not is_probed(Path(options.out or ""), options):
                tasks.append((f"{variant}, seed {seed}, {protocol}", _prober(study.folder(variant, seed), options)))
    return tasks


def _prober(run: Path, options: ProbeOptions) -> Callable[[], None]:
    def call() -> None:
        probe(run, options)

    return call


def probe_folder(study: Study, variant: str, seed: int, point: Point, protocol: str) -> Path:
    """Where the fresh heads' readings of a run lie."""
    parts = [protocol, f"epoch{point.epoch}", "" if point.samples is None else f"N{point.samples}"]
    return study.folder(variant, seed) / "measure" / "reproduce" / "-".join(filter(None, parts))


def _options(study: Study, variant: str, seed: int, point: Point, protocol: str, taps: Sequence[str]) -> ProbeOptions:
    run = study.folder(variant, seed)
    row = next(row for row in _epochs(run) if row["epoch"] == point.epoch)
    checkpoint = checkpoint_path(run / "checkpoints", row["step"])
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} is missing; expected it to be kept: set run.keep_last to all epochs")
    chosen = study.size.fresh.get(protocol, {}) | study.finding.fresh
    settings: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in chosen.items()}
    settings |= {"protocols": (protocol,), "n": (row["heads"][0]["num_labels"],), "draws": study.draws}
    settings |= {"taps": tuple(taps), "samples": point.samples, "checkpoint": str(checkpoint)}
    try:
        return ProbeOptions(out=str(probe_folder(study, variant, seed, point, protocol)), **settings)
    except TypeError as error:
        raise UserError(f"size {study.size.name}: fresh holds a key that the probe does not know: {error}") from None


def is_probed(folder: Path, options: ProbeOptions) -> bool:
    """Whether the folder holds a reading with these options; where the files lie does not matter."""
    try:
        before = dict(json.loads((folder / "probe.json").read_text(encoding="utf-8"))["options"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    wanted = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(options).items()}
    places = ("out", "checkpoint", "device")
    return all(before.get(name) == value for name, value in wanted.items() if name not in places)


@cache
def _probed(folder: Path) -> tuple[list[Row], list[Reading]]:
    rows = json.loads((folder / "probe.json").read_text(encoding="utf-8"))["rows"]
    return rows, load_readings(folder / "readings.npz")


def fresh_values(study: Study, selection: Selection, seed: int, point: Point, protocol: str) -> Values:
    """The fresh heads' κ at a point by draw and sample, of members and of as many non-members."""
    rows, readings = _probed(probe_folder(study, selection.variant, seed, point, protocol))
    row = _one([r for r in rows if (r["tap"], r["protocol"]) == (point.tap, protocol)], point, protocol)
    parts = [
        _one([r for r in readings if _matches(r, point.tap, protocol, group)], point, protocol)
        for group in ("members", "non-members")
    ]
    n = row["n"]
    members, others = ((n * part.correct.astype(np.float32) - 1) / (n - 1) for part in parts)
    means = {name: None if row[name] is None else row[name]["mean"] for name in ("untrained", "noise", "leak")}
    facts = {name: row[name] for name in ("tap", "n", "N", "D", "chance", "class_only", "effective_rank", "converged")}
    return Values(members, others, (parts[0].ids, parts[1].ids), facts | means)


def _matches(reading: Reading, tap: str, protocol: str, group: str) -> bool:
    condition = reading.condition
    return (condition.tap, condition.protocol, condition.group) == (tap, protocol, group)


def _one(found: Sequence[Any], point: Point, protocol: str) -> Any:
    if len(found) != 1:
        raise UserError(f"{len(found)} {protocol} readings at tap {point.tap}; expected one: give fresh one value each")
    return found[0]
