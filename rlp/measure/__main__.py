"""The calibrated measurement: python -m rlp.measure SUBCOMMAND.

probe reads a finished run with fresh heads on fresh random labels, beside every control; pool joins the probes of runs
that differ in their seed; crossover trains two networks on complementary halves and compares each sample with itself;
compare sets the field's other measures beside ours; check holds those to figures that are known of them.
Exit status: 0; 2 for a user's mistake; 130 after Ctrl-C.
"""

import argparse
from collections.abc import Callable, Sequence
import json
import os
import signal
import sys
import time
from typing import Any

import torch

from rlp.errors import UserError, exit_on_user_error
from rlp.files import write_atomically
from rlp.measure import pooling
from rlp.measure.check_command import add_check
from rlp.measure.compare_command import add_compare
from rlp.measure.crossover import add_crossover
from rlp.measure.pooled_table import pooled_table
from rlp.measure.preprocess import FEATURES
from rlp.measure.probe import HEADS, IMAGES, MODES, PROTOCOLS, ProbeOptions, run_probe
from rlp.measure.table import planted_table, probe_table, rademacher_table

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status, or ends the process with 2 for a user's mistake."""
    arguments = _parser().parse_args(argv)
    with exit_on_user_error():
        try:
            status = arguments.call(arguments)
            sys.stdout.flush()
            return status or 0
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed, and {arguments.command} needs it; install it") from error
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except OSError as error:  # a full disk, a folder that may not be written
            raise UserError(f"{arguments.command} failed: {error}") from error
        except (MemoryError, RuntimeError) as error:  # the CPU's allocator has no class of its own
            known = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            if not known:
                raise
            reason = (str(error).splitlines() or ["out of memory"])[0]
            raise UserError(
                f"{arguments.command} needs more memory: {reason}; expected fewer --n or --draws"
            ) from error


def probe(arguments: argparse.Namespace) -> int:
    """Probe the run and print the tables."""
    began = time.monotonic()
    a = arguments
    options = ProbeOptions(
        taps=tuple(a.taps or ()),
        n=tuple(a.n or ()),
        draws=a.draws,
        protocols=tuple(a.protocols),
        heads=tuple(a.heads),
        features=tuple(a.features),
        hidden=a.hidden,
        width=a.width,
        modes=tuple(a.modes),
        images=tuple(a.images),
        samples=a.samples,
        tolerance=a.tolerance,
        max_steps=a.max_steps,
        seed=a.seed,
        checkpoint=a.checkpoint,
        device=a.device,
        out=a.out,
    )
    found = run_probe(a.run, options)
    tables = [
        probe_table(found.run, found.rows),
        rademacher_table(found.rademacher),
        planted_table(found.planted),
        f"written in {time.monotonic() - began:.0f} s: " + ", ".join(map(str, found.files)),
    ]
    print("\n\n".join(table for table in tables if table))
    return 0


def pool(arguments: argparse.Namespace) -> int:
    """Print the table over several runs, and write its rows where that is asked for."""
    rows = pooling.pool(arguments.runs, arguments.folder)
    print(pooled_table(rows))
    if arguments.out:
        text = json.dumps({"schema": 1, "rows": rows}, indent=1, ensure_ascii=False, allow_nan=False)
        print(f"\nwritten to {write_atomically(arguments.out, text)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m rlp.measure", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", metavar="SUBCOMMAND", required=True)
    about = "read a finished run with fresh heads on fresh draws, beside every control"
    _add_probe(commands.add_parser("probe", help=about, description=about))
    _add_pool(commands)
    add_crossover(commands)
    add_compare(commands)
    add_check(commands)
    return parser


def _add_probe(part: argparse.ArgumentParser) -> None:
    defaults = ProbeOptions()
    part.set_defaults(call=probe)
    part.add_argument("--run", metavar="RUN", required=True, help="folder of a finished run")
    part.add_argument(
        "--taps", nargs="+", metavar="TAP", help="modules or globs (default: those of the run, or else of the model)"
    )

    def several(name: str, known: Sequence[str], default: Sequence[str], about: str) -> None:
        text = f"{about}: {', '.join(known)} (default: {' '.join(default) if default != known else 'all'})"
        part.add_argument(f"--{name}", nargs="+", choices=known, default=default, metavar=name[:-1].upper(), help=text)

    def number(name: str, about: str, kind: Callable[[str], float] = int) -> None:
        value = getattr(defaults, name)
        shown = "" if value is None else f" (default: {value})"
        part.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, metavar="N", help=about + shown)

    part.add_argument(
        "--n", nargs="+", type=int, metavar="N", help="numbers of random labels (default: 2 10 100; views, budget: 10)"
    )
    number("draws", "fresh random labellings, with heads of their own each")
    several("protocols", PROTOCOLS, defaults.protocols, "what is done with the heads")
    several("heads", HEADS, defaults.heads, "kinds of heads")
    several("features", FEATURES, defaults.features, "what heads are given of the features; each erases something")
    number("hidden", "width of the hidden layer of two-layer heads")
    number("width", "width of projected features")
    several("modes", MODES, defaults.modes, "mode of the network when features are taken")
    several("images", IMAGES, defaults.images, "images that converged and budgeted heads are fitted to and scored on")
    number("samples", "members, and as many non-members, at most (default: as many as there are of both)")
    number("tolerance", "of fits until convergence: the gradient's norm over that at the beginning", float)
    number("max_steps", "passes of a fit, after which it has not converged")
    number("seed", "of fresh draws, subsets, noise and the untrained network")
    part.add_argument("--checkpoint", default="last", metavar="C", help="last, best or a file (default: %(default)s)")
    part.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    part.add_argument("--out", metavar="FOLDER", help="where results go (default: RUN/measure)")


def _add_pool(commands: Any) -> None:
    about = "one table over probed runs that differ in their seed alone"
    part = commands.add_parser("pool", help=about, description=about)
    part.set_defaults(call=pool)
    part.add_argument("runs", nargs="+", metavar="RUN", help="folders of probed runs")
    part.add_argument("--folder", default="measure", help="of the probe in each run (default: %(default)s)")
    part.add_argument("--out", metavar="FILE", help="JSON file for the rows")


if __name__ == "__main__":
    sys.exit(main())
