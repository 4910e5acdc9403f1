"""One finding of the papers, trained, read in two ways and judged: python -m rlp.reproduce NAME.

Everything goes below --out: the runs, verdict.json, verdict.md and verdict.png/.pdf. Exit status: 0, whatever the
verdict; 2 for a user's mistake; 130 after Ctrl-C. Called again, it takes what is finished as it is.
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
from rlp.reproduce.arguments import positive, seed
from rlp.reproduce.finding import finding_names, load_finding, load_size, size_names
from rlp.runlog import environment

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Reproduce one finding; returns the exit status, or ends the process with 2 for a user's mistake."""
    arguments = _parser().parse_args(argv)
    with exit_on_user_error():
        try:
            if arguments.list:
                print(_listing())
                return 0
            if arguments.name is None:
                raise UserError(f"no finding is named; expected one of {', '.join(finding_names())}")
            reproduce(arguments, list(sys.argv[1:] if argv is None else argv))
            return 0
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed, and reproducing needs it; install it") from error
        except OSError as error:
            raise UserError(f"reproducing failed: {error}") from error
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return INTERRUPTED


def reproduce(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Train, read, judge, write."""
    from rlp.report.figures import FORMATS, rendered
    from rlp.reproduce import study as studies
    from rlp.reproduce.figure import verdict_figure
    from rlp.reproduce.readings import points_of, probe_tasks
    from rlp.reproduce.table import as_json, as_markdown, summary_lines
    from rlp.reproduce.verdict import judge

    if len(set(arguments.seeds)) < len(arguments.seeds):  # one network counted twice has no spread
        raise UserError(f"--seeds is {' '.join(map(str, arguments.seeds))!r}; expected each seed once")
    finding, size = load_finding(arguments.name), load_size(arguments.size)
    out = Path(arguments.out or Path("runs") / "paper" / finding.name)
    study = studies.Study(finding, size, tuple(arguments.seeds), arguments.draws, out, _data(arguments))
    for variant in study.variants:
        study.config(variant, study.seeds[0])  # a wrong setting is found before anything is written
    if not study.data:
        study = dataclasses.replace(study, data=studies.prepare_data(size, out))
    jobs = arguments.jobs or max(1, len(os.sched_getaffinity(0)) // size.threads)
    studies.train_all(study, jobs)
    places = {contrast: points_of(study, contrast) for contrast in finding.contrasts}
    wanted = [
        (selection, seed, point)
        for contrast in finding.contrasts
        if contrast.of == "kappa"
        for (selection, seed), point in places[contrast].items()
    ]
    studies.in_parallel(probe_tasks(study, wanted), 1, "probing")
    judged = [each for contrast in finding.contrasts for each in judge(study, contrast, places[contrast])]
    facts = environment()
    command = "python -m rlp.reproduce " + shlex.join(argv)
    figure = verdict_figure(study, judged)
    for suffix in FORMATS:
        write_atomically(out / f"verdict.{suffix}", rendered(figure, suffix))
    content = as_json(study, judged, facts) | {"command": command}
    write_atomically(out / "verdict.md", as_markdown(study, judged, facts, command))
    write_atomically(out / "verdict.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print("\n".join([*summary_lines(study, judged), f"written: {out / 'verdict.md'}, {out / 'verdict.png'}"]))


def _data(arguments: argparse.Namespace) -> dict[str, str]:
    given = {"train": arguments.data_train, "val": arguments.data_val}
    if len(set(map(bool, given.values()))) > 1:
        missing = next(split for split, path in given.items() if not path)
        raise UserError(f"--data.{missing} is missing; expected both --data.train and --data.val, or neither")
    return {split: str(path) for split, path in given.items() if path}


def _listing() -> str:
    lines = []
    for name in finding_names():
        finding = load_finding(name)
        lines.append(f"{name}: {finding.claim} ({finding.source}; {len(finding.variants)} trainings a seed)")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m rlp.reproduce", description=__doc__, formatter_class=raw)
    parser.add_argument("name", nargs="?", metavar="NAME", help="the finding; --list prints them")
    parser.add_argument("--list", action="store_true", help="print the findings and what they claim")
    parser.add_argument("--size", choices=size_names(), default="digits", help="(default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=seed, default=[0, 1, 2], metavar="S", help="of the networks (0 1 2)")
    parser.add_argument("--draws", type=positive, default=5, help="random labellings (default: %(default)s)")
    parser.add_argument("--out", metavar="FOLDER", help="(default: runs/paper/NAME)")
    parser.add_argument("--jobs", type=positive, metavar="J", help="trainings at a time (default: as cores allow)")
    parser.add_argument("--data.train", dest="data_train", metavar="FILE", help="a .beton in place of the size's own")
    parser.add_argument("--data.val", dest="data_val", metavar="FILE", help="likewise")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
