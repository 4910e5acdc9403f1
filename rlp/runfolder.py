"""The folder of a run: may it be used, from which checkpoint does the run go on, and what is removed for that."""

from pathlib import Path
import shutil
from typing import Any

from rlp.checkpoint import list_checkpoints, load_checkpoint, step_of
from rlp.config import keys_by_path
from rlp.errors import UserError
from rlp.runlog import SUMMARY
from rlp.schema import TrainConfig

IDENTITY = "environment.json"
"""Written first and removed never: a folder with files but without this one is no run's, and is left alone."""

RUN_ENTRIES = (
    SUMMARY,
    "measure",
    "report.html",
    "figures",
    "tensorboard",
    "checkpoints",
    "metrics.jsonl",
    "train.log",
    "config.yaml",
    IDENTITY,
)
"""All that a run writes, in the order in which a fresh start removes it: what says "complete" goes first."""

# Keys that may differ when a run goes on; those that change what is computed, with what they change, for the log.
_EFFECTS = {
    "train.epochs": "the learning rates to come",
    "heads.impl": "the rounding of the heads' losses",
    "heads.memory_mb": "the rounding of the heads' losses",
    "run.log_every": "how often λ follows heads.target_kappa",
}
_FREE_KEYS = {f"data.{key}" for key in ("train", "val", "loader", "workers", "resident_limit_gb", "verify")}
_FREE_KEYS |= {"data.eval_batch_size", "data.label_file", "train.patience"}  # the labels themselves are compared


def find_resume_point(run_dir: Path, resume: str | None, overwrite: bool) -> dict[str, Any] | None:
    """The checkpoint a run starts from: its state, or None for a fresh start. Nothing is written or removed here.

    ``resume="auto"`` takes the newest checkpoint of the folder and starts afresh where a run never came to its first;
    a path names one, of this folder or for a new one.

    Raises:
        UserError: the folder is in use and neither resume nor overwrite was asked for, or both were; it is not a
            run's; or a checkpoint is missing, damaged or of another run.
    """
    if resume is not None and overwrite:
        raise UserError("run.resume and run.overwrite exclude each other; give one of them")
    files = _check_folder(run_dir)
    if resume == "auto":
        return _newest(run_dir)
    if resume is not None:
        if files and Path(resume).resolve().parent != (run_dir / "checkpoints").resolve():
            raise UserError(
                f"run.resume {resume} is not a checkpoint of run.dir {run_dir}, which holds another run; expected one "
                "of its own, or a new folder"
            )
        return load_checkpoint(Path(resume))
    if files and not overwrite:
        raise UserError(
            f"run.dir {run_dir} is not empty; expected a new folder, --run.resume auto to go on with that run, "
            "or --run.overwrite true to replace it"
        )
    return None


def _check_folder(run_dir: Path) -> bool:
    """Whether the folder holds a run; an error if it holds anything else."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run.dir {run_dir} is a file; expected a folder")
    try:
        names = {path.relative_to(run_dir).parts[0] for path in run_dir.rglob("*") if not path.is_dir()}
    except OSError as error:
        raise UserError(f"run.dir {run_dir} cannot be read: {error.strerror}") from error
    names = {name for name in names if not _is_torn(name)}
    strangers = sorted(names if IDENTITY not in names else names - set(RUN_ENTRIES))
    if strangers:
        raise UserError(f"run.dir {run_dir} holds '{strangers[0]}', which no run wrote; expected another folder")
    return bool(names)


def _is_torn(name: str) -> bool:
    """What a killed write of one of our files left behind (``rlp.files.write_atomically``)."""
    return name.endswith(".tmp") and any(name.startswith(f".{entry}.") for entry in RUN_ENTRIES)


def _newest(run_dir: Path) -> dict[str, Any] | None:
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    if not checkpoints:
        for name in ("checkpoints/best.pt", SUMMARY):
            if (run_dir / name).exists():
                raise UserError(
                    f"run.dir {run_dir} has {name} but no checkpoint to go on from; name one with --run.resume PATH, "
                    "or replace the run with --run.overwrite true"
                )
        return None
    try:
        return load_checkpoint(checkpoints[-1])
    except UserError as error:
        before = f"; the one before it is {checkpoints[-2]} (--run.resume PATH)" if len(checkpoints) > 1 else ""
        raise UserError(f"{error}{before}") from error


def prepare_run_folder(run_dir: Path, step: int | None) -> None:
    """Make the folder and remove what the run to come will write again.

    Args:
        run_dir: a folder that :func:`find_resume_point` has accepted.
        step: global step to go on from, whose later checkpoints go; None for a fresh start, where all goes but
            :data:`IDENTITY`.
    """
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run_dir / SUMMARY).unlink(missing_ok=True)  # where it lies, the run is complete: this one is not
        if step is None:
            for name in RUN_ENTRIES[:-1]:
                _empty(run_dir / name)
        else:
            _remove_later(run_dir / "checkpoints", step)
        torn = [path for path in run_dir.iterdir() if _is_torn(path.name)]
        for path in [*torn, *(run_dir / "checkpoints").glob(".*.pt.*.tmp")]:
            path.unlink()
    except OSError as error:
        raise UserError(f"run.dir {run_dir} cannot be written: {error.strerror}") from error


def _empty(path: Path) -> None:
    """Remove a file, or the contents of a folder (which may be a link to a larger disk)."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for child in path.iterdir():
        shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()


def _remove_later(checkpoints: Path, step: int) -> None:
    """Of a run that goes back, the checkpoints after ``step``: they would be taken for the newest."""
    later = [path for path in list_checkpoints(checkpoints) if step_of(path) > step]
    best = checkpoints / "best.pt"
    if later and best.exists() and load_checkpoint(best)["progress"]["step"] > step:
        best.unlink()
    for path in later:
        path.unlink()


def check_same_run(state: dict[str, Any], config: dict[str, Any], data: dict[str, str]) -> list[str]:
    """Refuse to go on with another experiment: settings that shape a step, and the data's hashes, must agree.

    Args:
        state: a checkpoint.
        config: the present configuration, ``{section: {key: value}}``.
        data: sha256 of the present .beton files, ``{"train": ..., "val": ...}``.

    Returns:
        What differs all the same and changes the result, a sentence each.
    """
    remarks = []
    adapts = config.get("heads", {}).get("target_kappa") is not None  # then a log window is more than a row
    # A run that is older than a key did what the key's default does.
    defaults = {name: entry.default for name, entry in keys_by_path(TrainConfig).items() if not entry.required}
    for section, keys in config.items():
        for key, value in keys.items():
            name = f"{section}.{key}"
            before = state["config"].get(section, {}).get(key, defaults.get(name))
            free = section == "run" and key != "seed" and not (key == "log_every" and adapts)
            if before == value or free:
                continue
            if name not in _FREE_KEYS | _EFFECTS.keys():
                raise UserError(f"{name} is {value!r}, but the run to resume has {before!r}; expected the same value")
            if name in _EFFECTS:
                remarks.append(f"{name} was {before} and is {value}: this changes {_EFFECTS[name]}")
    for split, digest in data.items():
        if state["data"].get(split) != digest and split == "view":
            raise UserError(
                "the training samples or their labels are not those that the run to resume was trained on; expected "
                "data.label_file and the card's list of near-duplicates to be as they were"
            )
        if state["data"].get(split) != digest:
            raise UserError(f"data.{split} is not the file that the run to resume was trained on (its hash differs)")
    return remarks
