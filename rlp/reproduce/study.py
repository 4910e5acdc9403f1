"""The runs behind a finding: configurations resolved, data written where it is missing, networks trained once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
import dataclasses
from dataclasses import dataclass
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

from rlp.config import parse, show, to_yaml
from rlp.errors import UserError
from rlp.files import write_atomically
from rlp.reproduce.finding import ROOT, Finding, Size
from rlp.runlog import SUMMARY
from rlp.schema import TrainConfig

LINES = 12
"""Last lines of a failed command that are shown."""


@dataclass(frozen=True)
class Study:
    """One finding at one size.

    Attributes:
        finding, size: what is tested, and how large.
        seeds: of the backbones.
        draws: random labellings, of training heads and of fresh ones.
        out: folder of everything that is written.
        data: the .beton files, ``train`` and ``val``.
    """

    finding: Finding
    size: Size
    seeds: tuple[int, ...]
    draws: int
    out: Path
    data: dict[str, str]

    @property
    def variants(self) -> list[str]:
        """Their names, in the order of the file."""
        return list(self.finding.variants)

    def folder(self, variant: str, seed: int) -> Path:
        """Where a run lies."""
        return self.out / f"{variant}-seed{seed}"

    def config(self, variant: str, seed: int) -> TrainConfig:
        """The whole configuration of a run.

        Raises:
            UserError: a setting does not exist or does not fit.
        """
        settings: dict[str, Any] = self.size.settings | {"heads.draws": self.draws}
        settings |= self.finding.settings_of(variant, self.size.name)
        settings |= {"run.seed": seed, "run.dir": str(self.folder(variant, seed))}
        settings |= {f"data.{split}": path for split, path in self.data.items()}
        arguments = ["--config", str(self.size.base)]
        for name, value in settings.items():
            arguments += [f"--{name}={text_of(value)}"]
        return parse(TrainConfig, arguments)


def text_of(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list):
        return "[" + ", ".join(map(text_of, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {text_of(item)}" for name, item in value.items()) + "}"
    return show(value)


def prepare_data(size: Size, out: Path) -> dict[str, str]:
    """Write the size's data below ``out``, unless it lies there already; returns the two paths.

    Raises:
        UserError: the size has none that can be made here, or writing failed.
    """
    if size.data is None:
        raise UserError(f"--size {size.name} needs --data.train FILE and --data.val FILE: {size.about}")
    files = {split: str(out / "data" / f"{split}.beton") for split in ("train", "val")}
    write_data(["--config", str(size.data)], files)
    return files


def write_data(arguments: Sequence[str], files: dict[str, str]) -> None:
    """write_datasets.py with these arguments, to the files ``train`` and ``val``, unless they are there already."""
    command = [sys.executable, str(script_path("data_prep/write_datasets.py")), *arguments]
    run_command([*command, *(f"--output.{split}={path}" for split, path in files.items())], "writing the data", 1)


def train_all(study: Study, jobs: int) -> None:
    """Train what is not there yet, ``jobs`` runs at a time.

    A finished run of the same configuration is taken as it is, an unfinished one goes on.

    Raises:
        UserError: a folder holds a run of another configuration, or a run failed.
    """
    waiting = []
    for variant in study.variants:  # all are checked before the first is trained
        for seed in study.seeds:
            config = study.config(variant, seed)
            check_same(study.folder(variant, seed), config)
            if not (study.folder(variant, seed) / SUMMARY).is_file():
                waiting.append((variant, seed, config))
    done = len(study.variants) * len(study.seeds) - len(waiting)
    tasks = [(f"{variant}, seed {seed}", _trainer(study, variant, seed, config)) for variant, seed, config in waiting]
    in_parallel(tasks, jobs, "training", done)


def in_parallel(tasks: Sequence[tuple[str, Callable[[], None]]], jobs: int, what: str, done: int = 0) -> None:
    """Call all tasks, ``jobs`` at a time, with a bar; the first failure ends it once those that run have ended."""
    from tqdm import tqdm

    total = done + len(tasks)
    with tqdm(total=total, initial=done, desc=what, disable=None) as bar, ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(call): name for name, call in tasks}
        try:
            for future in as_completed(futures):
                future.result()
                bar.set_postfix_str(f"{futures[future]} done", refresh=False)
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def check_same(folder: Path, config: TrainConfig, asker: str = "the finding") -> None:
    """Refuse a folder whose run was not trained as ``config`` says, which ``asker`` asks for."""
    written = folder / "config.yaml"
    if not written.is_file():
        return
    before = parse(TrainConfig, ["--config", str(written)])
    for name, value, old in _differences(config, before):
        raise UserError(
            f"{folder} holds a run with {name} {show(old)}, and {asker} asks for {show(value)}; "
            "expected the same: give another --out, or remove that folder"
        )


def _differences(config: TrainConfig, other: TrainConfig) -> Iterable[tuple[str, Any, Any]]:
    """Keys in which two configurations differ, but for the folder, with both values."""
    both = dataclasses.asdict(config), dataclasses.asdict(other)
    for section, keys in both[0].items():
        for key, value in keys.items():
            if value != both[1][section][key] and (section, key) != ("run", "dir"):
                yield f"{section}.{key}", value, both[1][section][key]


def _trainer(study: Study, variant: str, seed: int, config: TrainConfig) -> Callable[[], None]:
    def call() -> None:
        file = study.out / "configs" / f"{variant}-seed{seed}.yaml"
        train_run(config, file, f"training {variant} with seed {seed}", study.size.threads)

    return call


def train_run(
    config: TrainConfig, file: Path, what: str, threads: int, variables: Mapping[str, str] | None = None
) -> None:
    """Train one network in a process of its own, from where it stopped; its configuration is kept in ``file``."""
    write_atomically(file, to_yaml(config))
    command = [sys.executable, str(script_path("train_rlp.py")), "--config", str(file), "--run.resume", "auto"]
    run_command(command, what, threads, variables)


def script_path(name: str) -> Path:
    """A script of the repository."""
    path = ROOT / name
    if not path.is_file():
        raise UserError(f"{path} is missing; expected a checkout of the repository, whose scripts and configs are used")
    return path


class CommandError(UserError):
    """A command that failed, with its exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def run_command(command: Sequence[str], what: str, threads: int, variables: Mapping[str, str] | None = None) -> None:
    """A command in the repository's environment, with further variables; its last lines in the error if it fails."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= variables or {}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        lines = "\n".join((finished.stderr or finished.stdout).splitlines()[-LINES:])
        message = f"{what} ended with status {finished.returncode}; expected 0; its last lines were:\n{lines}"
        raise CommandError(message, finished.returncode)
