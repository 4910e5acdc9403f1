"""What every benchmark shares: interleaved timing, the fingerprint of the code it measures, the dated result.

A benchmark is a module ``benchmarks/NAME.py`` with

- ``MEASURES``: a literal list of globs, relative to the repository, of the source files whose speed it measures;
- ``NEEDS`` (optional): a literal list of modules without which it cannot run;
- ``main(argv)``: runs it and writes ``results/YYYY-MM-DD-NAME-DEVICE.{json,md}`` with `write_result`.

The result keeps a hash of the measured files and of the benchmark, so that `benchmarks.stale` finds the results that
are older than their code. Machines are noisy and drift, so the cases of one benchmark take turns in one run, and what
counts is their ratio within a round.
"""

import argparse
import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
import gc
import hashlib
import json
from pathlib import Path
import re
import statistics
import time
from typing import Any

import torch

from rlp.distributed import choose_device
from rlp.errors import UserError
from rlp.files import write_atomically
from rlp.runlog import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHARED = (
    "__init__",
    "harness",
    "stale",
    "loss_cases",
    "loss_contenders",
    "loss_plot",
    "loss_tables",
    "loader_cases",
    "loader_checks",
    "loader_contenders",
    "loader_plot",
    "loader_process",
    "loader_sets",
    "loader_tables",
    "overhead_cases",
    "overhead_memory",
    "overhead_plot",
    "overhead_tables",
)
"""Modules of this folder that are no benchmarks."""


@dataclass(frozen=True)
class Spread:
    """Median and range of the repeated measurements of one quantity."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Source:
    """What a benchmark declares about itself, read without importing it."""

    name: str
    measures: tuple[str, ...]
    needs: tuple[str, ...]
    sha256: str


def time_interleaved(
    cases: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, calls: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds per call of each case, one entry a round.

    In a round every case is called `calls` times in a row; the case that begins moves by one from round to round, so
    that drift of the machine falls on all alike. Device work is waited for around each group of calls.

    Args:
        cases: name -> what to time.
        device: where the work runs.
        rounds: number of entries per case.
        calls: calls in a group.
        warmup: untimed calls of each case before the first round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        for _ in range(warmup):
            case()
    names = list(cases)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            _wait_for(device)
            start = time.perf_counter()
            for _ in range(calls):
                cases[name]()
            _wait_for(device)
            seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, Spread]:
    """Time of each case over the time of `base` in the same round."""
    return {
        name: Spread.of([mine / its for mine, its in zip(values, seconds[base], strict=True)])
        for name, values in seconds.items()
    }


def peak_memory(case: Callable[[], object], device: torch.device) -> int | None:
    """Largest number of bytes allocated on a CUDA device during one call; None on the CPU, which does not say."""
    if device.type != "cuda":
        return None
    gc.collect()  # what earlier cases left in cycles
    _wait_for(device)
    torch.cuda.reset_peak_memory_stats(device)
    case()
    _wait_for(device)
    return torch.cuda.max_memory_allocated(device)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_source(name: str, root: Path = ROOT) -> Source:
    """The declarations of ``benchmarks/NAME.py`` under `root`, with the hash of what it measures and of itself.

    Raises:
        UserError: the module declares no ``MEASURES``, or one of its globs names no file.
    """
    path = root / "benchmarks" / f"{name}.py"
    declared = _literals(path, ("MEASURES", "NEEDS"))
    if not declared.get("MEASURES"):
        raise UserError(f"benchmarks/{name}.py declares no MEASURES, the list of globs of the files that it measures")
    measures = tuple(declared["MEASURES"])
    return Source(name, measures, tuple(declared.get("NEEDS", ())), _hash_files(path, measures, root))


def _literals(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    found = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def _hash_files(benchmark: Path, globs: Sequence[str], root: Path) -> str:
    files = {benchmark}
    for glob in globs:
        matches = [path for path in root.glob(glob) if path.is_file()]
        if not matches:
            raise UserError(f"benchmarks/{benchmark.name} measures '{glob}', which names no file")
        files.update(matches)
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(
            f"{path.relative_to(root).as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()


def device_slug(device: torch.device) -> str:
    """The device in file names: ``cpu``, or the GPU's name in small letters and dashes, as in ``nvidia-h200``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def arguments(
    description: str | None, argv: Sequence[str] | None, more: Mapping[str, Mapping[str, Any]] | None = None
) -> argparse.Namespace:
    """The options all benchmarks have: ``device`` (torch.device), ``rounds`` (0 = the benchmark's own), ``out``.

    `more` are the benchmark's own: flag -> keyword arguments of ``add_argument``.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rounds", type=int, default=0, help="measurements of each case (0: the benchmark's own)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    for flag, keywords in (more or {}).items():
        parser.add_argument(flag, **keywords)
    options = parser.parse_args(argv)
    options.device = choose_device(options.device)
    return options


def write_result(
    name: str,
    device: torch.device,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    table: str,
    out: Path = RESULTS,
) -> Path:
    """Write the dated result as JSON and, beside it, the Markdown `table` for people; return the JSON's path.

    A result of the same day, benchmark and device is replaced. The JSON holds ``benchmark``, ``date``, ``device`` (its
    slug), ``command``, ``sources`` (globs and hash), ``environment``, ``settings`` and ``rows``.
    """
    source = read_source(name)
    about = environment(device)
    del about["argv"]  # it names a folder of this machine
    slug, today = device_slug(device), date.today().isoformat()
    command = f"python -m benchmarks.{name} --device {device.type}"
    result = {
        "schema": 1,
        "benchmark": name,
        "date": today,
        "device": slug,
        "command": command,
        "sources": {"globs": list(source.measures), "sha256": source.sha256},
        "environment": about,
        "settings": dict(settings),
        "rows": list(rows),
    }
    stem = f"{today}-{name}-{slug}"
    machine = f"{about['device']} · {about['cpu']}, {about['cores']} cores · torch {torch.__version__}"
    listed = ", ".join(f"{key} {value}" for key, value in settings.items())
    page = f"# {name}, {today}\n\n{machine}  \n{listed}  \n`{command}`\n\n{table}\n"
    write_atomically(out / f"{stem}.md", page)
    return write_atomically(out / f"{stem}.json", json.dumps(result, indent=1) + "\n")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the columns after the first are aligned to the right."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
