"""Regularisers at one tuning budget: python -m rlp.sweep CONFIG [--section.key value ...].

CONFIG is a file, or the name of one in configs/sweep. Each regulariser gets equally many trials over its own search
space, chosen on validation samples that are neither trained on nor the test split; the chosen setting is retrained
with fresh seeds. Everything goes below --out: the runs, sweep.json, sweep.md and sweep.png/.pdf. Called again, it goes
on. Exit status: 0; 2 for a user's mistake; 130 after Ctrl-C.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import json
import os
from pathlib import Path
import shlex
import sys
from typing import TYPE_CHECKING

from rlp.errors import UserError, exit_on_user_error
from rlp.files import write_atomically
from rlp.reproduce.arguments import positive, seed
from rlp.runlog import environment

if TYPE_CHECKING:
    from rlp.sweep.plan import Sweep
    from rlp.sweep.result import Result
    from rlp.sweep.space import Regulariser
    from rlp.sweep.trials import Outcome

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sweep; returns the exit status, or ends the process with 2 for a user's mistake."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments, overrides = _parser().parse_known_args(given)
    with exit_on_user_error():
        try:
            sweep(arguments, overrides, "python -m rlp.sweep " + shlex.join(given))
            return 0
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed, and a sweep needs it; install it") from error
        except OSError as error:
            raise UserError(f"the sweep failed: {error}") from error
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return INTERRUPTED


def sweep(arguments: argparse.Namespace, overrides: Sequence[str], command: str) -> None:
    """Search, choose, retrain, read, write."""
    from rlp.sweep.plan import check_networks
    from rlp.sweep.table import summary_lines
    from rlp.sweep.trials import devices
    from rlp.sweep.validation import write_validation

    plan = _planned(arguments, overrides)
    count = write_validation(plan)
    check_networks(plan)
    gpus = 0 if plan.base.run.device == "cpu" else len(devices())
    cores = len(os.sched_getaffinity(0)) // plan.space.threads
    results = _results(plan, arguments.jobs or gpus or max(1, cores))
    _write(plan, results, count, command)
    print("\n".join([*summary_lines(results), f"written: {plan.out / 'sweep.md'}, {plan.out / 'sweep.png'}"]))


def _planned(arguments: argparse.Namespace, overrides: Sequence[str]) -> "Sweep":
    """The sweep that is asked for, checked before anything is written, and its data."""
    from rlp.reproduce.fields import check_known
    from rlp.reproduce.study import write_data
    from rlp.sweep.plan import Sweep, option_names
    from rlp.sweep.space import read_space

    space = read_space(_space_file(arguments.config))
    for name in arguments.only or ():
        check_known(name, list(space.regularisers), "--only")
    names = tuple(arguments.only or space.regularisers)
    out = Path(arguments.out or Path("runs") / "sweep" / space.name)
    plan = Sweep(space, names, arguments.trials or space.trials, tuple(arguments.seeds), out, tuple(overrides))
    plan.check()
    given = {key for key in option_names(overrides) if key in ("data.train", "data.val")}
    if len(given) == 1:
        raise UserError(f"{given.pop()} is given alone; expected both --data.train and --data.val, or neither")
    if space.data is None or given:
        return plan
    files = {split: str(out / "data" / f"{name}.beton") for split, name in (("train", "train"), ("val", "test"))}
    write_data(["--config", str(space.data)], files)
    return dataclasses.replace(plan, data=files)


def _results(plan: "Sweep", jobs: int) -> "list[Result]":
    """Every trial, the best of each regulariser retrained, and readings of those."""
    from rlp.reproduce.study import in_parallel
    from rlp.sweep.readings import probe_tasks, read_final
    from rlp.sweep.result import Result
    from rlp.sweep.trials import best_of, run_all

    def of(regulariser: "Regulariser", outcomes: "Sequence[Outcome]") -> "list[Outcome]":
        return [outcome for outcome in outcomes if outcome.training.regulariser is regulariser]

    outcomes = run_all(plan, plan.all_trials(), jobs, "trials")
    chosen = {each.name: best_of(of(each, outcomes)) for each in plan.regularisers()}
    wanted = [
        plan.final(each, seed, chosen[each.name].training.params) for each in plan.regularisers() for seed in plan.seeds
    ]
    retrained = run_all(plan, wanted, jobs, "retraining")
    in_parallel(probe_tasks(plan, retrained), 1, "probing")
    finals = [read_final(plan, outcome) for outcome in retrained if outcome.accuracy is not None]
    return [
        Result(
            regulariser=each,
            trials=of(each, outcomes),
            chosen=chosen[each.name],
            retrained=of(each, retrained),
            finals=[final for final in finals if final.outcome.training.regulariser is each],
        )
        for each in plan.regularisers()
    ]


def _write(plan: "Sweep", results: "Sequence[Result]", selection: int, command: str) -> None:
    from rlp.report.figures import FORMATS, rendered
    from rlp.sweep.figure import sweep_figure
    from rlp.sweep.result import as_json
    from rlp.sweep.table import as_markdown

    facts = {"command": command, "environment": environment()}
    figure = sweep_figure(plan, results)
    for suffix in FORMATS:
        write_atomically(plan.out / f"sweep.{suffix}", rendered(figure, suffix))
    content = as_json(plan, results, selection, facts)
    write_atomically(plan.out / "sweep.md", as_markdown(plan, results, selection, facts))
    write_atomically(plan.out / "sweep.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _space_file(given: str) -> Path:
    """The file itself, or that of configs/sweep of this name."""
    from rlp.reproduce.finding import ROOT

    named = ROOT / "configs" / "sweep" / f"{given}.yaml"
    return named if named.is_file() and not Path(given).is_file() else Path(given)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m rlp.sweep", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("config", metavar="CONFIG", help="the search space: a file, or a name in configs/sweep")
    parser.add_argument("--trials", type=positive, metavar="T", help="of each regulariser (default: the file's)")
    parser.add_argument(
        "--seeds", nargs="+", type=seed, default=[0, 1, 2], metavar="S", help="of the retrained networks (0 1 2)"
    )
    parser.add_argument("--jobs", type=positive, metavar="J", help="trainings at a time (default: one a GPU or core)")
    parser.add_argument("--out", metavar="FOLDER", help="(default: runs/sweep/NAME)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these regularisers")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
