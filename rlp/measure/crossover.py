"""``python -m rlp.measure crossover``: each sample once as member and once as non-member, compared with itself.

For every seed two networks are trained on complementary halves of the training set. The members of one are the
non-members of the other, with the same random labels, so the difference of their readings leaves nothing but having
been trained on: neither which samples they are nor which labels they drew.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

import numpy as np

import rlp
from rlp.checkpoint import list_checkpoints
from rlp.config import keys_by_path, parse, to_dict, to_yaml
from rlp.data.card import Card
from rlp.data.open_file import file_sha256
from rlp.errors import UserError
from rlp.files import write_atomically
from rlp.measure.pooled_table import pooled_table
from rlp.measure.pooling import CONTROLS, Key, Row, Side, by_sample, load_side, pooled_row
from rlp.measure.preprocess import FEATURES
from rlp.measure.probe import HEADS, ProbeOptions, probe
from rlp.measure.run import GROUPS
from rlp.runfolder import IDENTITY, check_same_run
from rlp.runlog import SUMMARY, read_summary
from rlp.schema import TrainConfig

RESULTS = "crossover.json"
SCHEMA = 1
PROTOCOLS = ("converged", "views", "budget", "retrieval")


def crossover(config: TrainConfig, seeds: Sequence[int], options: ProbeOptions | None = None) -> list[Row]:
    """Train, probe and compare; the networks lie in ``run.dir/seedS-members`` and ``run.dir/seedS-non-members``.

    What is there already is used again: a finished network of the same settings, a checkpoint of one that is not
    finished, and a probe with the same options.

    Args:
        config: of the networks, but for ``run.seed`` and the half; ``data.member_fraction`` 1 or 0.5.
        seeds: of the networks, each once.
        options: of the probe.

    Returns:
        a row for each condition, as in ``probe.json``, with estimates over all seeds and Δ paired by sample. Written to
        ``run.dir/crossover.json`` too.

    Raises:
        UserError: the folder holds something else, a network of other settings, or a training failed.
    """
    options = options or ProbeOptions(protocols=PROTOCOLS)
    _check(config, seeds, options)
    folder = Path(config.run.dir)
    pairs = []
    for number, seed in enumerate(seeds):
        sides = []
        for group in GROUPS:
            half = half_config(config, seed, group)
            print(f"seed {seed} ({number + 1} of {len(seeds)}), {group}: {half.run.dir}", flush=True)
            _train(half)
            sides.append(_probed(Path(half.run.dir), options))
        pairs.append((sides[0], sides[1]))
    rows = [_row(folder.name, seeds, key, pairs) for key in pairs[0][0].readings]
    content = {
        "schema": SCHEMA,
        "run": {"name": folder.name, "model": config.model.name, "seeds": list(seeds), "config": to_dict(config)},
        "options": _plain(options),
        "rows": rows,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / RESULTS, text + "\n")
    return rows


def _check(config: TrainConfig, seeds: Sequence[int], options: ProbeOptions) -> None:
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds is {' '.join(map(str, seeds))!r}; expected seeds of networks, each once")
    if config.data.member_fraction not in (0.5, 1.0):
        raise UserError(
            f"data.member_fraction is {config.data.member_fraction}; expected 0.5, or 1 and crossover halves the set"
        )
    if not set(options.protocols) <= set(PROTOCOLS):
        raise UserError(f"--protocols is {' '.join(options.protocols)!r}; expected some of {', '.join(PROTOCOLS)}")
    if (Path(config.run.dir) / IDENTITY).exists():
        raise UserError(f"run.dir {config.run.dir} holds a run; expected a new folder, for a run in each subfolder")


def half_config(config: TrainConfig, seed: int, group: str) -> TrainConfig:
    """The configuration of one network: its seed, its half, and a folder of its own in ``run.dir``."""
    folder = Path(config.run.dir) / f"seed{seed}-{group}"
    return replace(
        config,
        run=replace(config.run, dir=str(folder), seed=seed, resume=None, overwrite=False),
        data=replace(config.data, member_fraction=0.5, members=group),
    )


# Training.


def _train(config: TrainConfig) -> None:
    """Train a network as ``train_rlp.py`` does, from where it stands, unless it is finished."""
    folder = Path(config.run.dir)
    if (folder / SUMMARY).exists():
        _check_finished(folder, config)
        return
    script = Path(rlp.__file__).resolve().parent.parent / "train_rlp.py"
    if not script.is_file():
        raise UserError(f"{script} is missing; expected the training script beside the package")
    settings = write_atomically(folder.parent / f"{folder.name}.yaml", to_yaml(config))
    # A process of its own: weights and order depend on nothing that was trained before.
    command = [sys.executable, str(script), "--config", str(settings), "--run.resume", "auto"]
    status = _run(command)
    if status or not (folder / SUMMARY).exists():
        raise UserError(
            f"training {folder} ended with status {status}; once mended, the same command goes on from there"
        )


def _run(command: list[str]) -> int:
    return subprocess.run(command, check=False).returncode


def _check_finished(folder: Path, config: TrainConfig) -> None:
    """Refuse a finished network that is not the one asked for."""
    summary = read_summary(folder)
    trained = {
        "config": summary["config"],
        "data": {split: facts["sha256"] for split, facts in summary["data"].items()},
    }
    hashes = {"train": Card.read(config.data.train).sha256, "val": Card.read(config.data.val).sha256}
    try:
        remarks = check_same_run(trained, to_dict(config), hashes)
    except UserError as error:
        remarks = [str(error)]
    if remarks:
        raise UserError(f"{folder} is finished, with other settings: {remarks[0]}; expected another run.dir for these")


# Probing.


def _plain(options: ProbeOptions) -> Row:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(options).items()}


def _probed(run_dir: Path, options: ProbeOptions) -> Side:
    """Probe a network, unless the same probe of the same weights lies there."""
    folder = run_dir / "measure" / "crossover"
    options = replace(options, out=str(folder))
    if not _is_probed(run_dir, folder, options):
        probe(run_dir, options)
    return load_side(folder)


def _is_probed(run_dir: Path, folder: Path, options: ProbeOptions) -> bool:
    try:
        content = json.loads((folder / "probe.json").read_text("utf-8"))
        same = {**content["options"], "out": None} == {**_plain(options), "out": None}
        weights = file_sha256(list_checkpoints(run_dir / "checkpoints")[-1])
        return same and content["run"]["checkpoint_sha256"] == weights
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return False


# Comparing.


def _paired(pair: tuple[Side, Side], key: Key) -> tuple[np.ndarray, np.ndarray]:
    """Readings of all samples as members and as non-members, both [K, N] in one order."""
    members, others = [], []
    for mine, theirs in (pair, pair[::-1]):
        ids, seen = by_sample(mine.readings[key]["members"])
        same, unseen = by_sample(theirs.readings[key]["non-members"])
        _, a, b = np.intersect1d(ids, same, assume_unique=True, return_indices=True)
        if not len(a):
            raise UserError("the two networks were probed on other samples; expected complementary halves of one set")
        members.append(seen[:, a])
        others.append(unseen[:, b])
    return np.concatenate(members, axis=1), np.concatenate(others, axis=1)


def _row(name: str, seeds: Sequence[int], key: Key, pairs: Sequence[tuple[Side, Side]]) -> Row:
    """One condition over all seeds."""
    both = [_paired(pair, key) for pair in pairs]
    told = [side.rows[key] for pair in pairs for side in pair]
    controls = {group: list(_control(pairs, key, group)) for group in CONTROLS}
    return pooled_row(name, seeds, told, [a for a, _ in both], [b for _, b in both], controls, paired=True)


def _control(pairs: Sequence[tuple[Side, Side]], key: Key, group: str) -> Iterator[np.ndarray]:
    """Readings of a control in both networks of each seed, [K, N]."""
    for pair in pairs:
        found = [by_sample(side.readings[key][group])[1] for side in pair if group in side.readings[key]]
        if found:
            yield np.concatenate(found, axis=1)


# The command line.


def add_crossover(subparsers: Any) -> None:
    """Add the subcommand to ``python -m rlp.measure``; every ``--section.key`` of ``train_rlp.py`` is an option."""
    about = "train two networks on complementary halves for each seed, and compare each sample with itself"
    part = subparsers.add_parser(
        "crossover", help=about, description=f"{about}. --section.key VALUE as in train_rlp.py."
    )
    defaults = ProbeOptions()
    part.set_defaults(call=run_crossover)
    part.add_argument(
        "--config", action="append", required=True, metavar="FILE", help="of the networks; run.dir gets all"
    )
    numbers: dict[str, tuple[Sequence[int], str]] = {
        "seeds": ((0, 1, 2), "seeds of networks, a pair each"),
        "n": (defaults.n, "numbers of random labels"),
    }
    for name, (value, text) in numbers.items():
        shown = f"{text} (default: {' '.join(map(str, value)) or 'as probe'})"
        part.add_argument(f"--{name}", nargs="+", type=int, default=list(value), metavar="N", help=shown)
    part.add_argument(
        "--draws", type=int, default=defaults.draws, metavar="N", help="fresh labellings (default: %(default)s)"
    )
    part.add_argument("--samples", type=int, metavar="N", help="samples of either half, at most")
    part.add_argument("--taps", nargs="+", default=[], metavar="TAP", help="modules or globs")
    choices: dict[str, tuple[Sequence[str], Sequence[str]]] = {
        "protocols": (PROTOCOLS, PROTOCOLS),
        "heads": (HEADS, defaults.heads),
        "features": (FEATURES, defaults.features),
    }
    for name, (known, value) in choices.items():
        part.add_argument(
            f"--{name}", nargs="+", choices=known, default=list(value), help=f"(default: {' '.join(value)})"
        )
    part.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the probe (default: auto)")
    for path in keys_by_path(TrainConfig):
        part.add_argument(f"--{path}", dest=path, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run_crossover(arguments: argparse.Namespace) -> int:
    """The subcommand: print the table, and where the numbers are."""
    given = vars(arguments)
    if "run.seed" in given:
        raise UserError(f"--run.seed is {given['run.seed']}; expected --seeds, which sets it for each network")
    argv = [word for file in arguments.config for word in ("--config", file)]
    argv += [f"--{path}={given[path]}" for path in keys_by_path(TrainConfig) if path in given]
    config = parse(TrainConfig, argv)
    options = ProbeOptions(
        taps=tuple(arguments.taps),
        n=tuple(arguments.n),
        draws=arguments.draws,
        protocols=tuple(arguments.protocols),
        heads=tuple(arguments.heads),
        features=tuple(arguments.features),
        samples=arguments.samples,
        device=arguments.device,
    )
    rows = crossover(config, arguments.seeds, options)
    print(f"{pooled_table(rows, paired=True)}\n\nwritten to {Path(config.run.dir) / RESULTS}")
    return 0
