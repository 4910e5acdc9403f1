"""Write a data set to a pair of .betons: ``python data_prep/write_datasets.py --config configs/data/digits.yaml``.

Every key can be set on the command line: ``--source.path ~/imagenet --output.workers 8``.
"""

# Worker processes import this file too: what costs time to import is imported where it is used.
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
import signal
import sys
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script: the repository's root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from data_prep.schema import PrepareConfig
    from data_prep.sources import Source
    from rlp.data.card import Card

TERMINATED = 143
INTERRUPTED = 130


def prepare(config: "PrepareConfig", progress: bool = False) -> tuple[list["Card"], bool]:
    """Write the .betons a configuration asks for, unless they are there already.

    Returns:
        The cards of train and val, and whether they were written just now (False: they were up to date).

    Raises:
        UserError: a source or an image is bad, other files are in the way, or writing failed.
    """
    from data_prep.encode import ImageOptions
    from data_prep.sources import open_source
    from data_prep.writer import Contents, Split, write_splits

    source = open_source(config.source)
    betons = [Path(config.output.train), Path(config.output.val)]
    request = _request(config)
    if (cards := _up_to_date(betons, request, source, config.output.overwrite)) is not None:
        return cards, False
    image = ImageOptions(**asdict(config.image), convert_rgb=config.source.convert_rgb)
    about = {"kind": source.kind, "name": source.name, "listing": source.listing}
    contents = Contents(source.classes, image, config.words.draws, config.words.seed, about, request)
    splits = [Split("train", betons[0], source.train), Split("val", betons[1], source.val)]
    return write_splits(splits, contents, config.output.workers, progress), True


def _request(config: "PrepareConfig") -> dict[str, Any]:
    """What decides the contents. The path is not in it: cards are published, and the listing tells the source."""
    request = {name: section for name, section in asdict(config).items() if name != "output"}
    del request["source"]["path"]
    return request


def _up_to_date(betons: list[Path], request: dict[str, Any], source: "Source", overwrite: bool) -> list["Card"] | None:
    """The cards of what is there if it is what is asked for; None if it is to be written.

    Raises:
        UserError: something else is there and may not be overwritten.
    """
    from data_prep.partial import remove_partial, was_interrupted
    from rlp.data.beton import Beton
    from rlp.data.card import card_path
    from rlp.errors import UserError

    there = [path for beton in betons for path in (beton, card_path(beton)) if path.exists()]
    if not there:
        return None
    try:
        cards = [Beton.open(beton).card for beton in betons]
    except UserError as error:
        # What a killed write left behind may be replaced; any other odd file may be somebody's.
        if overwrite or was_interrupted(betons):
            return None
        raise UserError(f"{error}; --output.overwrite true replaces what is there") from None
    asked = [(split, request, source.listing) for split in ("train", "val")]
    if [(card.split, card.request, card.source.get("listing")) for card in cards] == asked:
        if was_interrupted(betons):
            remove_partial(betons)
        return cards
    if overwrite:
        return None
    raise UserError(
        f"{betons[0]} and {betons[1]} were written from another configuration or source; "
        f"--output.overwrite true replaces them"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The script; returns the exit status: 0, 2 for a user's mistake, 130 or 143 when stopped by a signal."""
    from data_prep.schema import PrepareConfig
    from rlp.config import parse
    from rlp.errors import UserError

    signal.signal(signal.SIGTERM, _terminate)
    try:
        config = parse(PrepareConfig, list(sys.argv[1:] if argv is None else argv))
        cards, written = prepare(config, progress=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return INTERRUPTED
    for card, path in zip(cards, (config.output.train, config.output.val), strict=True):
        print(f"{path}: {_described(card)}" + ("" if written else " (up to date)"))
    return 0


def _terminate(*_: object) -> None:
    """Turn SIGTERM into an exception, so that partial files are removed and workers end."""
    raise SystemExit(TERMINATED)


def _described(card: "Card") -> str:
    size = f"{card.width}x{card.height}" if card.height else f"up to {card.max_width}x{card.max_height}"
    return (
        f"{card.num_samples} images of {len(card.classes)} classes, {size} px {card.image_mode}, "
        f"{card.draws} draws, {card.size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
