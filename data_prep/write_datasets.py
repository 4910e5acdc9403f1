"""Write a data set to a pair of .betons: ``python data_prep/write_datasets.py --config configs/data/digits.yaml``.

Every key can be set on the command line: ``--source.path ~/imagenet --output.workers 8``.
"""

# Worker processes import this file too: what costs time to import is imported where it is used.
from collections.abc import Sequence
from dataclasses import asdict
import json
from pathlib import Path
import signal
import sys
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script: the repository's root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from data_prep.schema import PrepareConfig
    from data_prep.sources import Source
    from data_prep.writer import Contents
    from rlp.data.card import Card

TERMINATED = 143
INTERRUPTED = 130


def prepare(config: "PrepareConfig", progress: bool = False) -> tuple[list["Card"], bool]:
    """Write the .betons a configuration asks for, unless they are there already.

    A sharded set is written shard by shard, each whole or not at all, and what is whole is not written again; its
    cards are merged when ``output.shard`` is null.

    Returns:
        The cards of train and val (of one shard, when ``output.shard`` asks for one), and whether any of it was
        written just now (False: all was up to date).

    Raises:
        UserError: a source or an image is bad, other files are in the way, or writing failed.
    """
    from data_prep.outputs import betons_of, check_way, clear_way, pairs_of, up_to_date
    from data_prep.sources import open_source
    from data_prep.workers import Encoder, automatic_workers
    from data_prep.writer import write_splits
    from rlp.data.shards import merge_cards

    output = config.output
    source = open_source(config.source)
    contents = _contents(config, source)
    check_way(output)
    workers = output.workers or automatic_workers(len(source.train) + len(source.val))
    cards, written = [], False
    with Encoder(workers) as encoder:  # starts no process before there is work
        for pair in pairs_of(output, source):
            found = up_to_date(pair, contents.request, source.listing, output.overwrite)
            cards = found or write_splits(pair, contents, encoder, progress)
            written |= found is None
    if output.shard is None:
        clear_way(output)
        if output.shards:
            cards = [merge_cards(beton) for beton in betons_of(output)]
    return cards, written


def _contents(config: "PrepareConfig", source: "Source") -> "Contents":
    from data_prep.encode import ImageOptions
    from data_prep.writer import Contents

    image = ImageOptions(**asdict(config.image), convert_rgb=config.source.convert_rgb)
    about = {"kind": source.kind, "name": source.name, "listing": source.listing}
    return Contents(source.classes, image, config.words.draws, config.words.seed, about, _request(config))


def _request(config: "PrepareConfig") -> dict[str, Any]:
    """What decides the contents, as a card holds it. The path is not in it: cards are published, and the listing
    tells the source."""
    request = {name: section for name, section in asdict(config).items() if name != "output"}
    del request["source"]["path"]
    return json.loads(json.dumps(request))


def main(argv: Sequence[str] | None = None) -> int:
    """The script; returns the exit status: 0, 2 for a user's mistake, 130 or 143 when stopped by a signal."""
    from data_prep.outputs import betons_of
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
        print("stopped: nothing was written but whole shards, if any were asked for", file=sys.stderr)
        return INTERRUPTED
    for card, path in zip(cards, betons_of(config.output), strict=True):
        print(f"{path}: {_described(card)}" + ("" if written else " (up to date)"))
    return 0


def _terminate(*_: object) -> None:
    """Turn SIGTERM into an exception, so that partial files are removed and workers end."""
    raise SystemExit(TERMINATED)


def _described(card: "Card") -> str:
    size = f"{card.width}x{card.height}" if card.height else f"up to {card.max_width}x{card.max_height}"
    return (
        f"{card.num_samples} images of {len(card.classes)} classes, {size} px {card.image_mode}, "
        f"{card.draws} draws, {card.size / 1e6:.1f} MB" + (f" in {len(card.shards)} shards" if card.shards else "")
    )


if __name__ == "__main__":
    sys.exit(main())
