"""What a run leaves behind to be read: metrics.jsonl, train.log, the terminal, environment and summary.

Only the main rank writes or prints; on every other rank each method returns at once.
"""

from collections.abc import Iterator
from datetime import datetime
import importlib
import importlib.metadata
import json
import math
import os
from pathlib import Path
import platform
import subprocess
import sys
import time
from typing import Any, Self, TextIO

from rlp.errors import UserError
from rlp.files import write_atomically
from rlp.intervals import draw_interval

Row = dict[str, Any]

METRICS, LOG, SUMMARY = "metrics.jsonl", "train.log", "summary.json"
PACKAGES = ("random-label-heads", "torch", "torchvision", "numpy", "timm", "ffcv", "triton", "numba")


class RunLog:
    """Rows, log lines and progress of one run.

    A row of `metrics.jsonl` is one write of one whole line, so a killed run leaves at most its last line torn. A
    resumed run passes the step it resumes from: later rows (which it will write again) and a torn last line are
    cut off. So write the rows of a step *before* the checkpoint of that step. Numbers that are not finite are
    written as null, since JSON has no NaN.

    Args:
        directory: the run's folder; made if it is missing.
        main: whether this rank writes and prints.
        tensorboard: also write every number to `directory/tensorboard`.
        truncate_after_step: keep the rows up to and including this step; None begins a new file.
        truncate_after_epoch: of these, drop the epoch rows of later epochs: an epoch whose batches are all done but
            whose evaluation will be repeated.
        stream: where progress and messages go; None is stderr.

    Raises:
        UserError: TensorBoard is asked for and not installed, or `metrics.jsonl` is damaged before its last line.
    """

    def __init__(
        self,
        directory: str | Path,
        main: bool = True,
        tensorboard: bool = False,
        truncate_after_step: int | None = None,
        truncate_after_epoch: int | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.directory, self.main = Path(directory), main
        self._stream = stream or sys.stderr
        self._board: Any = None
        self._progress = Progress(0, 0, "", None)
        if not main:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._board = _open_board(self.directory / "tensorboard", truncate_after_step)
        kept = (
            []
            if truncate_after_step is None
            else _rows_until(self.directory / METRICS, truncate_after_step, truncate_after_epoch)
        )
        write_atomically(self.directory / METRICS, "".join(map(_line, kept)))
        self._metrics = (self.directory / METRICS).open("a", encoding="utf-8")
        self._log = (self.directory / LOG).open("w" if truncate_after_step is None else "a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Append one row to `metrics.jsonl`; a step or epoch row is also shown, logged and sent to TensorBoard."""
        if not self.main:
            return
        self._metrics.write(_line(row))
        self._metrics.flush()
        if row["kind"] == "step":
            self._show_step(row)
        elif row["kind"] == "epoch":
            os.fsync(self._metrics.fileno())
            self.info(_describe_epoch(row))
        if self._board is not None:
            for name, value in _scalars(row):
                self._board.add_scalar(name, value, row["step"])

    def info(self, message: str) -> None:
        """Print a message (above a bar, if there is one) and put it, with the time, into `train.log`."""
        if not self.main:
            return
        self._to_log(message)
        if self._progress.bar is not None:
            self._progress.bar.write(message, file=self._stream)
        else:
            print(message, file=self._stream, flush=True)

    def progress(self, total: int, initial: int = 0, desc: str = "") -> "Progress":
        """Begin a stretch of `total` steps of which `initial` are done; it ends the one before it.

        On a terminal it is a bar, elsewhere every step row is a line. Use it as a context manager.
        """
        self._progress.close()
        self._progress = Progress(total, initial, desc, self._stream if self.main else None)
        return self._progress

    def close(self) -> None:
        """End the progress and close the files; closing twice does no harm."""
        self._progress.close()
        if not self.main:
            return
        self._metrics.close()
        self._log.close()
        if self._board is not None:
            self._board.close()

    def _show_step(self, row: Row) -> None:
        loss, accuracy, lr = (
            _number(row[key], digits) for key, digits in (("class_loss", 4), ("accuracy", 3), ("lr", 3))
        )
        numbers = f"class loss {loss}  accuracy {accuracy}  lr {lr}"
        if row.get("fit_loss") is not None:
            numbers += f"  fit {_number(row['fit_loss'])}"
        left = f"{_duration(self._progress.seconds_left())} left" if self._progress.total else ""
        parts = [self._progress.desc, f"step {row['step']:,}", numbers, f"{row['images_per_s']:,.0f} images/s", left]
        line = "  ".join(part for part in parts if part)
        self._to_log(line)
        if self._progress.bar is not None:
            self._progress.bar.set_postfix_str(numbers, refresh=False)
        else:
            print(line, file=self._stream, flush=True)

    def _to_log(self, message: str) -> None:
        self._log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {message}\n")
        self._log.flush()


class Progress:
    """A stretch of steps (an epoch, an evaluation): a bar on a terminal, and the time that is left.

    Attributes:
        total, done: steps in all and so far.
        desc: what the stretch is, e.g. `epoch 3/12`.
        bar: the tqdm bar; None where there is no terminal, on other ranks, and after the end.
    """

    def __init__(self, total: int, initial: int, desc: str, stream: TextIO | None) -> None:
        self.total, self.done, self.desc = total, initial, desc
        self.bar: Any = None if stream is None else _open_bar(stream, total, initial, desc)
        self._initial, self._began = initial, time.monotonic()

    def advance(self, steps: int = 1) -> None:
        """Count `steps` more as done; cheap enough for every step."""
        self.done += steps
        if self.bar is not None:
            self.bar.update(steps)

    def seconds_left(self) -> float:
        """Time to the end of the stretch at the pace so far; NaN before the first step."""
        passed = self.done - self._initial
        return (time.monotonic() - self._began) * (self.total - self.done) / passed if passed else math.nan

    def close(self) -> None:
        """Take the bar off the terminal and forget the stretch."""
        if self.bar is not None:
            self.bar.close()
        self.bar, self.total, self.desc = None, 0, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a `metrics.jsonl`; a torn last line (a run killed while writing it) is left out.

    Raises:
        UserError: no such file, or a damaged line before the last.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing; expected the metrics of a run")
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if row is None:
            raise UserError(f"{path}, line {number}, is damaged; expected one JSON object with 'kind' and 'step'")
        rows.append(row)
    final = _parse(last)
    return rows if final is None else [*rows, final]


def last_epoch_row(directory: str | Path) -> Row:
    """The newest epoch row of a run.

    Raises:
        UserError: the run has none.
    """
    path = Path(directory) / METRICS
    rows = [row for row in read_rows(path) if row["kind"] == "epoch"]
    if not rows:
        raise UserError(f"{path} holds no epoch; expected the metrics of the resumed run beside its checkpoints")
    return rows[-1]


def write_summary(directory: str | Path, summary: Row) -> Path:
    """Write `summary.json`, the file whose presence says that the run ended; the last file a run writes."""
    text = json.dumps(_plain(summary), indent=2, ensure_ascii=False, allow_nan=False)
    return write_atomically(Path(directory) / SUMMARY, text + "\n")


def weight_text(lam: float, heads: Row) -> str:
    """``λ = 1``, and what is not the papers': the penalty, head steps, taps, a κ that λ is adapted to.

    Args:
        lam: weight λ, at the start where it is adapted.
        heads: settings ``heads`` of the run; keys that an older run lacks have their defaults.
    """
    if not lam:
        return f"λ = {lam:g}"
    said = [] if heads.get("penalty", "forget") == "forget" else [str(heads["penalty"])]
    said += [f"{heads['steps']} head steps"] if heads.get("steps", 1) > 1 else []
    said += [f"times {heads['lam_taps']}"] if heads.get("lam_taps") else []
    said += [f"adapted to κ = {heads['target_kappa']:g}"] if heads.get("target_kappa") is not None else []
    return f"λ = {lam:g}" + (f" ({', '.join(said)})" if said else "")


def read_summary(directory: str | Path) -> Row:
    """The `summary.json` of a run.

    Raises:
        UserError: the run has not ended (no such file), or the file is no summary of a known schema.
    """
    path = Path(directory) / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; it is written when the run ends") from None
    except ValueError:
        raise UserError(f"{path} is damaged; expected JSON") from None
    if not isinstance(summary, dict) or summary.get("schema") != 1:
        raise UserError(f"{path} is not a summary of schema 1")
    return summary


def environment(device: Any = None) -> Row:
    """What the numbers were made with: versions, device, processor, commit, command line; no host or user name.

    Args:
        device: the torch device of the run, whose name is recorded; None leaves it out.
    """
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "device": None if device is None else _device_name(device),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "git": _git_state(Path(__file__).resolve()),
        "argv": list(sys.argv),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: Any) -> str:
    import torch

    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _git_state(file: Path) -> Row | None:
    """Commit and dirty flag of the checkout that tracks `file`; None for an installed copy or without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _line(row: Row) -> str:
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The value with numbers that are not finite as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "kind" in row and isinstance(row.get("step"), int) else None


def _rows_until(path: Path, step: int, epoch: int | None) -> list[Row]:
    rows = read_rows(path) if path.is_file() else []
    return [
        row
        for row in rows
        if row["step"] <= step and (epoch is None or row["kind"] != "epoch" or row["epoch"] <= epoch)
    ]


def _scalars(row: Row) -> Iterator[tuple[str, float]]:
    """Numbers of a row under TensorBoard names; heads as κ of every tap, averaged over draws."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{name}", v) for name, v in value.items() if isinstance(v, int | float))
        elif isinstance(value, int | float) and key not in ("step", "epoch"):
            yield f"{row['kind']}/{key}", value
    for (split, mode, tap), kappas in _kappas(row).items():
        yield f"kappa_{split}_{mode}/{tap}", draw_interval(kappas).mean


def _kappas(row: Row) -> dict[tuple[str, str, str], list[float]]:
    """κ of every draw, by split, mode and tap, in the order of the rows."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for head in row.get("heads") or []:
        if head["kappa"] is not None:
            found.setdefault((head["split"], head["mode"], head["tap"]), []).append(head["kappa"])
    return found


def _describe_epoch(row: Row) -> str:
    """One line: loss and accuracy on both splits, and the lowest and the highest κ over the taps."""
    parts = [f"epoch {row['epoch']}"]
    for split in ("train", "val"):
        if row.get(split):
            parts.append(f"{split} loss {_number(row[split]['loss'])}, accuracy {_number(row[split]['accuracy'], 4)}")
    if row.get("nmf_area") is not None:
        parts.append(f"area {_number(row['nmf_area'])}")
    kappas = _kappas(row)
    mode = "eval" if any(key[:2] == ("train", "eval") for key in kappas) else "online"
    means = [(draw_interval(v).mean, key[2]) for key, v in kappas.items() if key[:2] == ("train", mode)]
    if means:
        ends = [f"{value:.3f} ({tap})" for value, tap in (min(means), max(means))]
        parts.append(f"κ {mode} " + " to ".join(dict.fromkeys(ends)))
    if row.get("seconds") is not None:
        parts.append(_duration(row["seconds"]))
    return " | ".join(parts)


def _number(value: float | None, digits: int = 4) -> str:
    return "none" if value is None else f"{value:.{digits}g}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def _open_bar(stream: TextIO, total: int, initial: int, desc: str) -> Any:
    """A tqdm bar on a terminal; None elsewhere, or where tqdm is not installed."""
    if not stream.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=initial, desc=desc, file=stream, dynamic_ncols=True, leave=False)


def check_tensorboard() -> None:
    """Raise a UserError if TensorBoard's writer cannot be imported."""
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        raise UserError(
            "run.tensorboard is true, but the package tensorboard is not installed; install it or set it to false"
        ) from None


def _open_board(directory: Path, truncate_after_step: int | None) -> Any:
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    purge = None if truncate_after_step is None else truncate_after_step + 1
    return SummaryWriter(str(directory), purge_step=purge)
