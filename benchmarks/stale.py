"""Which benchmark results are older than the code they measure, and, with --run, new ones for them.

    python -m benchmarks.stale [--device auto|cpu|cuda] [--run] [--all] [--out FOLDER]

A result is fresh when the hash of the measured files that it carries is today's; results of other devices do not
count. What cannot run here for want of a module is skipped by name.
"""

import argparse
from collections.abc import Iterator, Sequence
import importlib.util
import json
from pathlib import Path
import subprocess
import sys

import torch

from benchmarks.harness import RESULTS, ROOT, SHARED, Source, device_slug, read_source
from rlp.distributed import choose_device
from rlp.errors import UserError


def benchmark_names(root: Path = ROOT) -> list[str]:
    """The benchmarks under `root`, in alphabetical order."""
    return sorted(path.stem for path in (root / "benchmarks").glob("*.py") if path.stem not in SHARED)


def newest_result(name: str, device: str, folder: Path = RESULTS) -> Path | None:
    """The latest result of the benchmark on the device (its slug), or None."""
    day = "[0-9]" * 4 + "-" + "[0-9]" * 2 + "-" + "[0-9]" * 2
    return max(folder.glob(f"{day}-{name}-{device}.json"), default=None)


def why_stale(source: Source, device: str, folder: Path = RESULTS) -> str | None:
    """Why the benchmark has to run again on this device, as a short clause; None when its result is fresh."""
    newest = newest_result(source.name, device, folder)
    if newest is None:
        return f"no result on {device}"
    try:
        measured = json.loads(newest.read_text("utf-8"))["sources"]["sha256"]
    except (ValueError, KeyError, TypeError):
        return f"{newest.name} is no result"
    return None if measured == source.sha256 else f"{newest.name} is older than the code it measures"


def plan(device: torch.device, everything: bool, folder: Path) -> Iterator[tuple[str, bool, str]]:
    """Name, whether to run it, and why, of each benchmark."""
    for name in benchmark_names():
        source = read_source(name)
        missing = [module for module in source.needs if importlib.util.find_spec(module) is None]
        reason = why_stale(source, device_slug(device), folder)
        if missing:
            yield name, False, f"skipped, needs {', '.join(missing)}, which is not installed"
        elif reason is None and not everything:
            yield name, False, "skipped, its newest result is fresh"
        else:
            yield name, True, reason or "asked for"


def main(argv: Sequence[str] | None = None) -> None:
    """List the benchmarks and run those that are due."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--run", action="store_true", help="run what is due (without it: only say so)")
    parser.add_argument("--all", action="store_true", help="fresh ones too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    device = choose_device(options.device)
    failed = []
    for name, due, reason in plan(device, options.all, options.out):
        print(f"benchmark {name}: {'due, ' if due else ''}{reason}", flush=True)
        if due and options.run and not run_alone(name, device, options.out):
            failed.append(name)
    if failed:
        raise UserError(f"{', '.join(failed)} failed as shown above")


def run_alone(name: str, device: torch.device, folder: Path) -> bool:
    """Run the benchmark in a process of its own, so that none inherits memory or caches; True if it succeeded."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--device", device.type, "--out", str(folder.resolve())]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
