"""Checkpoints: written whole or not at all, loadable with ``weights_only=True``, the last k and the best kept."""

import io
from pathlib import Path
from typing import Any
import zipfile

import torch
from torch import nn

from rlp.errors import UserError
from rlp.files import write_atomically

SCHEMA = 1
_KEYS = {"schema", "model", "heads", "optimizers", "scaler", "progress", "random_states", "running", "config", "data"}


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a global step lies; names sort by step."""
    return folder / f"step-{step:09d}.pt"


def save_checkpoint(folder: Path, state: dict[str, Any], keep_last: int, best: bool) -> Path:
    """Write the checkpoint of ``state["progress"]["step"]``, then remove all but the newest ``keep_last``.

    ``best`` also writes it as ``best.pt``. A crash at any moment leaves whole files only.
    """
    buffer = io.BytesIO()
    torch.save({"schema": SCHEMA, **state}, buffer)
    content = buffer.getvalue()
    path = write_atomically(checkpoint_path(folder, state["progress"]["step"]), content)
    if best:
        write_atomically(folder / "best.pt", content)
    for old in list_checkpoints(folder)[:-keep_last]:
        old.unlink()
    return path


def restore_best(folder: Path, progress: dict[str, Any]) -> None:
    """Write ``best.pt`` of the checkpoint a run goes on from again: a crash may have come before that second write."""
    path = checkpoint_path(folder, progress["step"])
    if progress["best_step"] == progress["step"] and path.is_file():
        write_atomically(folder / "best.pt", path.read_bytes())


def step_of(path: Path) -> int:
    """Global step of a checkpoint of :func:`list_checkpoints`."""
    return int(path.stem.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of the folder, oldest first (``best.pt`` left out)."""
    return sorted(folder.glob("step-*.pt"))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, checking that it is whole.

    Raises:
        UserError: the file is missing, damaged (a checksum differs), or not a checkpoint of this schema.
    """
    state = _load_tensors(path)
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        raise UserError(f"{path} is not a checkpoint of a run: expected the keys {', '.join(sorted(_KEYS))}")
    if state["schema"] != SCHEMA:
        raise UserError(f"{path} has checkpoint schema {state['schema']}; this version reads schema {SCHEMA}")
    return state


def _load_tensors(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}")
    try:
        # torch.load does not compare the checksums that torch.save stored, so a flipped byte would pass unseen.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint: {type(error).__name__}: {_first_line(error)}"
        ) from error
    raise UserError(f"{path} is damaged: the checksum of {damaged} differs")


def load_model_weights(model: nn.Module, path: Path) -> None:
    """Start ``model`` from a run's checkpoint or a plain state dict (every name and shape must agree)."""
    state = _load_tensors(path)
    weights = state["model"] if isinstance(state, dict) and "model" in state else state
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = str(error).splitlines()
        detail = lines[1].strip() if len(lines) > 1 else str(error)
        raise UserError(f"model.weights: {path} does not fit the model: {detail}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
