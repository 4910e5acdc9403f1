"""The page of one or several runs: python -m rlp.report RUN... [--out FILE].

One HTML file with everything inside: curves, κ and Δ against depth beside their controls, scores, images and every
reading. What is missing is said, with the command that makes it. Exit status: 0; 2 for a user's mistake; 130 after
Ctrl-C.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys

from rlp.errors import UserError, exit_on_user_error
from rlp.report.page import PAGE, write_page

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and print where it lies; ends the process with 2 for a user's mistake."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m rlp.report", description=__doc__, formatter_class=raw)
    parser.add_argument("run", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    about = f"the page (default: {PAGE} in the folder of the run; needed for several)"
    parser.add_argument("--out", metavar="FILE", type=Path, help=about)
    arguments = parser.parse_args(argv)
    with exit_on_user_error():
        try:
            path = write_page(arguments.run, arguments.out)
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed, and the page needs it; install it") from error
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return INTERRUPTED
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
