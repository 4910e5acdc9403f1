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

from rlp.errors import UserError, exit_on_user_error
from rlp.files import write_atomically
from rlp.runlog import environment

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
    from rlp.report.figures import FORMATS, rendered
    from rlp.reproduce.fields import check_known
    from rlp.reproduce.study import in_parallel, write_data
    from rlp.sweep.figure import sweep_figure
    from rlp.sweep.plan import Sweep, check_networks, option_names
    from rlp.sweep.readings import probe_tasks, read_final
    from rlp.sweep.result import Result, as_json
    from rlp.sweep.space import read_space
    from rlp.sweep.table import as_markdown, summary_lines
    from rlp.sweep.trials import best_of, devices, run_all
    from rlp.sweep.validation import write_validation

    space = read_space(_space_file(arguments.config))
    for name in arguments.only or ():
        check_known(name, list(space.regularisers), "--only")
    names = tuple(arguments.only or space.regularisers)
    out = Path(arguments.out or Path("runs") / "sweep" / space.name)
    plan = Sweep(space, names, arguments.trials or space.trials, tuple(arguments.seeds), out, tuple(overrides))
    plan.check()  # a wrong setting is found before anything is written
    given = {key for key in option_names(overrides) if key in ("data.train", "data.val")}
    if len(given) == 1:
        raise UserError(f"{given.pop()} is given alone; expected both --data.train and --data.val, or neither")
    if space.data is not None and not given:
        files = {split: str(out / "data" / f"{name}.beton") for split, name in (("train", "train"), ("val", "test"))}
        write_data(["--config", str(space.data)], files)
        plan = dataclasses.replace(plan, data=files)
    count = write_validation(plan)
    check_networks(plan)
    jobs = arguments.jobs or len(devices()) or max(1, len(os.sched_getaffinity(0)) // space.threads)
    outcomes = run_all(plan, plan.all_trials(), jobs, "trials")
    chosen = {
        each.name: best_of([o for o in outcomes if o.training.regulariser is each]) for each in plan.regularisers()
    }
    wanted = [
        plan.final(each, seed, chosen[each.name].training.params) for each in plan.regularisers() for seed in plan.seeds
    ]
    retrained = run_all(plan, wanted, jobs, "retraining")
    in_parallel(probe_tasks(plan, retrained), 1, "probing")
    finals = [read_final(plan, outcome) for outcome in retrained if outcome.accuracy is not None]
    results = [
        Result(
            each,
            [o for o in outcomes if o.training.regulariser is each],
            chosen[each.name],
            [o for o in retrained if o.training.regulariser is each],
            [f for f in finals if f.outcome.training.regulariser is each],
        )
        for each in plan.regularisers()
    ]
    facts = {"command": command, "environment": environment()}
    figure = sweep_figure(plan, results)
    for suffix in FORMATS:
        write_atomically(out / f"sweep.{suffix}", rendered(figure, suffix))
    content = as_json(plan, results, count, facts)
    write_atomically(out / "sweep.md", as_markdown(plan, results, count, facts))
    write_atomically(out / "sweep.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print("\n".join([*summary_lines(results), f"written: {out / 'sweep.md'}, {out / 'sweep.png'}"]))


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
    parser.add_argument("--trials", type=_positive, metavar="T", help="of each regulariser (default: the file's)")
    parser.add_argument(
        "--seeds", nargs="+", type=_seed, default=[0, 1, 2], metavar="S", help="of the retrained networks (0 1 2)"
    )
    parser.add_argument("--jobs", type=_positive, metavar="J", help="trainings at a time (default: one a GPU or core)")
    parser.add_argument("--out", metavar="FOLDER", help="(default: runs/sweep/NAME)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these regularisers")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 2^31 - 1")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
