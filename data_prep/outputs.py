"""Which .betons a configuration asks for, and which of them are there already."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.partial import remove_partial, was_interrupted
from data_prep.schema import OutputConfig
from data_prep.sources import Source
from data_prep.writer import Split
from rlp.data.beton import Beton
from rlp.data.card import Card, card_path
from rlp.data.shards import find_shards, shard_bounds, shard_path
from rlp.errors import UserError

_REPLACES = "--output.overwrite true replaces"


def betons_of(output: OutputConfig) -> list[Path]:
    """The paths by which train and val are opened once they are whole; of one shard: its own paths."""
    betons = [Path(output.train), Path(output.val)]
    return betons if output.shard is None else [shard_path(path, output.shard, output.shards) for path in betons]


def pairs_of(output: OutputConfig, source: Source) -> Iterator[list[Split]]:
    """What is written together: train and val, or, of shards, one of each at a time.

    Raises:
        UserError: more shards than samples.
    """
    whole = [Split("train", Path(output.train), source.train), Split("val", Path(output.val), source.val)]
    if not output.shards:
        yield whole
        return
    for split in whole:
        if output.shards > len(split.samples):
            held = f"{len(split.samples)} samples of the {split.name} split"
            raise UserError(f"output.shards is {output.shards}, more than the {held}")
    for number in range(output.shards) if output.shard is None else [output.shard]:
        yield [_shard(split, number, output.shards) for split in whole]


def _shard(split: Split, number: int, count: int) -> Split:
    first, last = shard_bounds(number, count, len(split.samples))
    samples = split.samples.take(np.arange(first, last))
    return Split(split.name, shard_path(split.path, number, count), samples, first)


def up_to_date(pair: list[Split], request: dict[str, Any], listing: str, overwrite: bool) -> list[Card] | None:
    """The cards of what is there if it is what is asked for; None if it is to be written.

    Raises:
        UserError: something else is there and may not be overwritten.
    """
    betons = [split.path for split in pair]
    if not any(path.exists() for beton in betons for path in (beton, card_path(beton))):
        return None
    try:
        cards = [Beton.open(beton).card for beton in betons]
    except UserError as error:
        # What a killed write left behind may be replaced; any other odd file may be somebody's.
        if overwrite or was_interrupted(betons):
            return None
        raise UserError(f"{error}; {_REPLACES} what is there") from None
    asked = [(split.name, request, listing, split.first_sample, len(split.samples), ()) for split in pair]
    if [_asked_by(card) for card in cards] == asked:
        if was_interrupted(betons):
            remove_partial(betons)
        return cards
    if overwrite:
        return None
    raise UserError(f"{betons[0]} and {betons[1]} were written from another configuration or source; {_REPLACES} them")


def _asked_by(card: Card) -> tuple[object, ...]:
    return card.split, card.request, card.source.get("listing"), card.first_sample, card.num_samples, card.shards


def in_the_way(output: OutputConfig) -> list[Path]:
    """Files of the set in another number of shards, or of somebody's, that must not lie beside what is asked for."""
    found = []
    for beton in (Path(output.train), Path(output.val)):
        if output.shards and beton.exists():
            found.append(beton)
        if output.shards and card_path(beton).exists() and not _is_card(beton):
            found.append(card_path(beton))  # merging would refuse to replace it, but only after the work
        for count, numbers in find_shards(beton).items():
            if count != output.shards:
                shards = [shard_path(beton, number, count) for number in numbers]
                found += [path for shard in shards for path in (shard, card_path(shard)) if path.exists()]
    return found


def _is_card(beton: Path) -> bool:
    try:
        Card.read(beton)
    except UserError:
        return False
    return True


def check_way(output: OutputConfig) -> None:
    """Raise :class:`UserError` when the set is there in another number of shards, unless it may be overwritten."""
    if not output.overwrite and (found := in_the_way(output)):
        raise UserError(f"{found[0]} is there, but output.shards is {output.shards}; {_REPLACES} it")


def clear_way(output: OutputConfig) -> None:
    """Remove what :func:`in_the_way` finds, once all that replaces it is whole."""
    for path in in_the_way(output):
        try:
            path.unlink()
        except OSError as error:
            raise UserError(f"{path} could not be removed: {error.strerror or error}") from None
