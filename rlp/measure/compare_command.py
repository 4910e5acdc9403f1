"""The subcommand ``compare`` of ``python -m rlp.measure``."""

import argparse
from pathlib import Path
from typing import Any

from rlp.errors import UserError
from rlp.files import write_atomically
from rlp.measure.baselines import MEASURES
from rlp.measure.compare import compare, save_comparison
from rlp.measure.compare_figure import agreement_figure, png
from rlp.measure.compare_table import comparison_table


def add_compare(commands: Any) -> None:
    """Add the subcommand."""
    about = "every measure on the same runs and samples, and which of them to believe"
    listed = "\n".join(f"  {name:14} {claim}" for name, claim in MEASURES.items())
    part = commands.add_parser(
        "compare",
        help=about,
        description=about,
        epilog=f"measures:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    part.set_defaults(call=_compare)
    part.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    part.add_argument(
        "--measures", nargs="+", choices=MEASURES, metavar="MEASURE", help="(default: all that can be taken of a run)"
    )
    part.add_argument("--taps", nargs="+", metavar="TAP", help="modules or globs (default: those of the run)")
    part.add_argument("--samples", type=int, metavar="N", help="members, and as many non-members, at most")
    part.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: 0)")
    part.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    part.add_argument(
        "--out",
        metavar="FOLDER",
        help="of compare.json and compare.png (default: RUN/measure; needed for several runs)",
    )


def _compare(arguments: argparse.Namespace) -> int:
    a = arguments
    if a.out is None and len(a.runs) > 1:
        raise UserError(f"--out is missing; expected a folder for what {len(a.runs)} runs have in common")
    if a.seed < 0:
        raise UserError(f"--seed is {a.seed}; expected at least 0")
    folder = Path(a.out) if a.out else Path(a.runs[0]) / "measure"
    found = compare(
        a.runs,
        a.measures,
        taps=a.taps,
        samples=a.samples,
        seed=a.seed,
        device=a.device,
        say=lambda what: print(what, flush=True),
    )
    print("\n" + comparison_table(found))
    files = [save_comparison(found, folder / "compare.json")]
    if found.agreement:
        files.append(write_atomically(folder / "compare.png", png(agreement_figure(found.agreement))))
    print("\nwritten: " + ", ".join(map(str, files)))
    return 0
