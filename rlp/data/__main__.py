"""Tools for prepared sets: python -m rlp.data SUBCOMMAND FILE.

FILE is a .beton with its card beside it, or the name of a set that was written in shards (train.beton where there are
train-00000-of-00004.beton and so on). Exit status: 0; 1 when verify finds damage; 2 for a user's mistake; 130 after
Ctrl-C.
"""

import argparse
from collections.abc import Callable, Sequence
import os
from pathlib import Path
import signal
import sys

from rlp.errors import UserError, exit_on_user_error

DAMAGED, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status, or ends the process with 2 for a user's mistake."""
    arguments = _parser().parse_args(argv)
    with exit_on_user_error():
        if arguments.file.is_dir():
            raise UserError(f"{arguments.file} is a folder; expected a .beton, or the name of a sharded set")
        try:
            status = arguments.run(arguments)
            sys.stdout.flush()
            return status
        except ModuleNotFoundError as error:
            package = "SciPy (scikit-learn brings it)" if "scipy" in str(error.name) else error.name
            raise UserError(f"{package} is not installed, and {arguments.command} needs it; install it") from error
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except OSError as error:  # a full disk, a folder that may not be written
            raise UserError(f"{arguments.command} of {arguments.file} failed: {error}") from error


def inspect(arguments: argparse.Namespace) -> int:
    """Print what is in the set, and draw the contact sheet."""
    from rlp.data.beton import Beton
    from rlp.data.contact_sheet import write_contact_sheet
    from rlp.data.inspect_set import describe

    beton = Beton.open(arguments.file)
    print(describe(beton, arguments.classes), flush=True)
    if arguments.sheet != "none":
        path = Path(arguments.sheet or arguments.file.with_suffix(".png"))
        print(f"\ncontact sheet: {write_contact_sheet(beton, path, arguments.samples)}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Print what is damaged; 1 when anything is."""
    from rlp.data.verify import verify as verify_set

    if not arguments.file.exists() and not arguments.file.with_suffix(".json").exists():
        raise UserError(f"{arguments.file} does not exist; write it with write_datasets.py")
    report = verify_set(arguments.file, progress=True)
    print(report.text)
    return 0 if report.ok else DAMAGED


def bench(arguments: argparse.Namespace) -> int:
    """Print the table of the loaders."""
    from rlp.data.bench import bench as bench_set

    a = arguments
    print(bench_set(a.file, a.kind, a.batch_size, a.workers, a.image_size, a.seconds, progress=True))
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Write the card of a set from those of its shards."""
    from rlp.data.card import card_path
    from rlp.data.shards import merge_cards

    card = merge_cards(arguments.file)
    print(f"{card_path(arguments.file)}: {card.num_samples} samples in {len(card.shards)} shards, {card.size} bytes")
    return 0


def duplicates(arguments: argparse.Namespace) -> int:
    """Write the near-duplicates into the card."""
    from rlp.data.duplicates import record_duplicates

    card = record_duplicates(arguments.file, arguments.distance, arguments.embeddings, progress=True)
    found = card.duplicates
    print(
        f"{arguments.file}: {len(found['dropped'])} of {card.num_samples} samples are near-duplicates of earlier ones "
        f"({found['method']}, distance {found['distance']}); data.drop_duplicates leaves them out"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m rlp.data", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", metavar="SUBCOMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        part = commands.add_parser(run.__name__, help=about, description=about)
        part.add_argument("file", metavar="FILE", type=Path, help="the .beton, or the name of a sharded set")
        part.set_defaults(run=run)
        return part

    part = command(inspect, "what is in a set, whether its random labels are uniform, and a contact sheet")
    part.add_argument("--sheet", metavar="OUT.png", help="contact sheet; none for none (default: FILE ending in .png)")
    part.add_argument("--samples", type=int, default=64, help="samples on the sheet (default: %(default)s)")
    part.add_argument("--classes", action="store_true", help="every class, however many there are")
    command(verify, "read every byte and name the samples that are damaged")
    part = command(bench, "images a second of this machine's loaders")
    part.add_argument("--batch-size", type=int, default=256, help="images a batch (default: %(default)s)")
    part.add_argument("--workers", type=int, default=0, help="threads; 0 for the number of cores (default)")
    part.add_argument(
        "--image-size", metavar="S", type=int, default=0, help="random crops to S x S pixels (default: no)"
    )
    part.add_argument("--seconds", type=float, default=3.0, help="of each of five passes (default: %(default)s)")
    kinds = ("auto", "ffcv", "resident", "all")
    part.add_argument("--kind", choices=kinds, default="all", help="which loader (default: all that can read the set)")
    command(merge, "write the card of a set from the cards of its shards")
    part = command(duplicates, "find near-duplicates once and list them in the card, for data.drop_duplicates")
    distance = "bits of 64 (default: 6), or with embeddings 1 - cosine (default: 0.02)"
    part.add_argument("--distance", metavar="D", type=float, help=distance)
    part.add_argument("--embeddings", metavar="F.npy", type=Path, help="float [N, D]; without it images are hashed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
