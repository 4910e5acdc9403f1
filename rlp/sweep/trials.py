"""Trials run once each, on one or several devices; the setting of each regulariser with the best validation accuracy.

What a trial found is read from its run, so there is nothing else to keep: a killed sweep goes on with the run that it
was killed in. Only a training that became NaN or infinite leaves no finished run; a note says that it is done.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
import json
import os
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rlp.data.beton import Beton
from rlp.errors import UserError
from rlp.files import write_atomically
from rlp.reproduce.study import CommandError, check_same, in_parallel, train_run
from rlp.runlog import METRICS, SUMMARY, read_rows, read_summary
from rlp.stopping import score_of
from rlp.sweep.plan import Sweep, Training

NOT_FINITE = 3
"""Exit status of train_rlp.py where a loss became NaN or infinite."""


@dataclass(frozen=True)
class Outcome:
    """What one training came to.

    Attributes:
        training: which.
        accuracy: on the validation samples, at the checkpoint that counts; None where a loss was not finite.
        epoch: of that checkpoint, from 1 on.
        seconds: of the training.
    """

    training: Training
    accuracy: float | None
    epoch: int | None
    seconds: float | None


def run_all(sweep: Sweep, trainings: Sequence[Training], jobs: int, what: str) -> list[Outcome]:
    """Train what is not there yet, ``jobs`` at a time; what each came to, in order.

    Raises:
        UserError: a folder holds a run of another configuration or of other samples, or a run failed.
    """
    hash_of = cache(lambda path: Beton.open(path).card.sha256)
    for training in trainings:  # all are checked before the first is trained
        check_same(training.folder, training.config, "the sweep")
        if (training.folder / SUMMARY).is_file():  # train_rlp.py itself looks when it goes on with a run
            _check_samples(training, hash_of)
    slots = device_slots(jobs, devices())
    waiting = [training for training in trainings if not _is_done(sweep, training)]
    tasks = [(training.name, _task(sweep, training, slots)) for training in waiting]
    in_parallel(tasks, jobs, what, len(trainings) - len(waiting))
    return [_outcome(training) for training in trainings]


def _check_samples(training: Training, hash_of: Callable[[str], str]) -> None:
    """Refuse a finished run of files that are others now: accuracies on different samples are not to be compared."""
    trained = read_summary(training.folder)["data"]
    for split in ("train", "val"):
        path = getattr(training.config.data, split)
        if trained[split]["sha256"] != hash_of(path):
            raise UserError(
                f"{training.folder} holds a run of another data.{split} than {path} is now: its hash differs; expected "
                "the same file: give another --out, or remove that folder"
            )


def best_of(outcomes: Sequence[Outcome]) -> Outcome:
    """The best on the validation samples, of equals the earlier.

    Raises:
        UserError: all trials failed.
    """
    finite = [outcome for outcome in outcomes if outcome.accuracy is not None]
    if not finite:
        name = outcomes[0].training.regulariser.name
        raise UserError(f"in all {len(outcomes)} trials of {name} a loss became NaN or infinite; expected gentler ones")
    return max(finite, key=lambda outcome: outcome.accuracy or 0.0)


def devices() -> list[str]:
    """GPUs by the names that CUDA_VISIBLE_DEVICES takes; none on a machine without."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name != "-1"] if torch.cuda.is_available() else []
    return [str(number) for number in range(torch.cuda.device_count())]


def device_slots(jobs: int, names: Sequence[str]) -> "SimpleQueue[Mapping[str, str]]":
    """What each of ``jobs`` trainings at a time finds in its environment: GPUs in turn; nothing where there is none."""
    slots: SimpleQueue[Mapping[str, str]] = SimpleQueue()
    for number in range(jobs):
        slots.put({"CUDA_VISIBLE_DEVICES": names[number % len(names)]} if names else {})
    return slots


@contextmanager
def _taken(slots: "SimpleQueue[Mapping[str, str]]") -> Any:
    slot = slots.get()
    try:
        yield slot
    finally:
        slots.put(slot)


def _task(sweep: Sweep, training: Training, slots: "SimpleQueue[Mapping[str, str]]") -> Callable[[], None]:
    def call() -> None:
        file = sweep.out / "configs" / f"{training.folder.name}.yaml"
        with _taken(slots) as variables:
            _note(sweep, training).unlink(missing_ok=True)  # it was of a run that has been removed
            try:
                train_run(training.config, file, f"training {training.name}", sweep.space.threads, variables)
            except CommandError as error:
                if error.status != NOT_FINITE:
                    raise
                note = {"training": training.name, "why": str(error).splitlines()[-1]}
                write_atomically(_note(sweep, training), json.dumps(note, ensure_ascii=False) + "\n")

    return call


def _note(sweep: Sweep, training: Training) -> Path:
    return sweep.out / "not-finite" / f"{training.folder.name}.json"


def _is_done(sweep: Sweep, training: Training) -> bool:
    if (training.folder / SUMMARY).is_file():
        return True
    return _note(sweep, training).is_file() and (training.folder / "config.yaml").is_file()  # unless it was removed


def _outcome(training: Training) -> Outcome:
    if not (training.folder / SUMMARY).is_file():
        return Outcome(training, None, None, None)
    epochs = [row for row in read_rows(training.folder / METRICS) if row["kind"] == "epoch"]
    # Of equally good epochs best.pt is the earlier, as max takes it.
    row = max(epochs, key=score_of) if _takes_best(training) else epochs[-1]
    seconds = read_summary(training.folder)["seconds"]
    return Outcome(training, row["val"]["accuracy"], row["epoch"], seconds)


def _takes_best(training: Training) -> bool:
    return training.regulariser.checkpoint == "best"
