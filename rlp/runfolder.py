"""The folder of a run: may it be used, and from which checkpoint does the run go on."""

from pathlib import Path
import shutil
from typing import Any

from rlp.checkpoint import list_checkpoints, load_checkpoint
from rlp.errors import UserError

RUN_ENTRIES = {
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "train.log",
    "summary.json",
    "checkpoints",
    "figures",
    "tensorboard",
}
"""All that a run writes; ``run.overwrite`` removes these names and refuses a folder that holds others."""

# Keys that may differ when a run goes on: they change how fast or how long it runs, not what a step computes.
_FREE_KEYS = {"train.epochs", "data.workers", "data.loader", "data.resident_limit_gb", "data.verify"}
_FREE_KEYS |= {"data.eval_batch_size", "data.train", "data.val"}


def find_resume_point(run_dir: Path, resume: str | None, overwrite: bool) -> dict[str, Any] | None:
    """The checkpoint a run starts from: its state, or None for a fresh start.

    ``resume="auto"`` takes the newest checkpoint of the folder and starts afresh when there is none; a path names
    one. Nothing is written or removed here.

    Raises:
        UserError: the folder holds a run and neither resume nor overwrite was asked for, or both were.
    """
    if resume is not None and overwrite:
        raise UserError("run.resume and run.overwrite exclude each other; give one of them")
    if resume is not None and resume != "auto":
        return load_checkpoint(Path(resume))
    if resume == "auto":
        checkpoints = list_checkpoints(run_dir / "checkpoints")
        return load_checkpoint(checkpoints[-1]) if checkpoints else None
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run.dir {run_dir} is a file; expected a folder")
    if not overwrite and run_dir.is_dir() and any(run_dir.iterdir()):
        raise UserError(
            f"run.dir {run_dir} is not empty; expected a new folder, --run.resume auto to go on with that run, "
            "or --run.overwrite true to replace it"
        )
    return None


def prepare_run_folder(run_dir: Path, fresh: bool) -> None:
    """Make the folder; a fresh start removes what an earlier run left, a resumed one only torn temporary files."""
    strangers = sorted({entry.name for entry in run_dir.glob("*")} - RUN_ENTRIES)
    strangers = [name for name in strangers if not name.endswith(".tmp")]
    if fresh and strangers:
        raise UserError(f"run.dir {run_dir} holds '{strangers[0]}', which no run wrote; expected another folder")
    run_dir.mkdir(parents=True, exist_ok=True)
    for entry in RUN_ENTRIES if fresh else ():
        path = run_dir / entry
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for torn in [*run_dir.glob(".*.tmp"), *run_dir.glob("checkpoints/.*.tmp")]:
        torn.unlink()
    (run_dir / "checkpoints").mkdir(exist_ok=True)


def check_same_run(state: dict[str, Any], config: dict[str, Any], data: dict[str, str]) -> None:
    """Refuse to go on with another experiment: settings that shape a step, and the data's hashes, must agree.

    Args:
        state: a checkpoint.
        config: the present configuration, ``{section: {key: value}}``.
        data: sha256 of the present .beton files, ``{"train": ..., "val": ...}``.
    """
    for section, keys in config.items():
        for key, value in keys.items():
            name = f"{section}.{key}"
            if name in _FREE_KEYS or (section == "run" and key != "seed"):
                continue
            before = state["config"].get(section, {}).get(key)
            if before != value:
                raise UserError(f"{name} is {value!r}, but the run to resume has {before!r}; expected the same value")
    for split, digest in data.items():
        if state["data"].get(split) != digest:
            raise UserError(f"data.{split} is not the file that the run to resume was trained on (its hash differs)")
