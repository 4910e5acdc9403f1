"""Several .betons as one set: names and bounds of the shards, and the exact merge of their cards.

Shard s of n holds the consecutive samples s*N//n to (s+1)*N//n - 1 of a set of N. Each is a .beton with a card of its
own; the merged card beside them, named after the set, is what a sharded set is opened by.
"""

from pathlib import Path
import re
from typing import Any

from rlp.data.beton import Beton
from rlp.data.card import Card, card_path, combined_sha256, fingerprint_text
from rlp.errors import UserError
from rlp.files import write_atomically

MOST_SHARDS = 99_999
_ALIKE = ("split", "classes", "image_mode", "columns", "draws", "word_names", "words_seed", "request")


def shard_path(beton: str | Path, number: int, count: int) -> Path:
    """Where shard ``number`` (from 0) of ``count`` of a set lies: ``train-00000-of-00004.beton`` of train.beton."""
    beton = Path(beton)
    return beton.with_name(f"{beton.stem}-{number:05d}-of-{count:05d}{beton.suffix}")


def shard_bounds(number: int, count: int, num_samples: int) -> tuple[int, int]:
    """First sample of a shard, and first sample after it."""
    return number * num_samples // count, (number + 1) * num_samples // count


def find_shards(beton: str | Path) -> dict[int, list[int]]:
    """Which shards of a set are there (the file or its card): their numbers in order, by the count in the name."""
    beton = Path(beton)
    name = re.compile(re.escape(beton.stem) + r"-([0-9]{5})-of-([0-9]{5})\.(beton|json)")
    found: dict[int, set[int]] = {}
    for entry in beton.parent.iterdir() if beton.parent.is_dir() else ():
        if match := name.fullmatch(entry.name):
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    return {count: sorted(numbers) for count, numbers in sorted(found.items())}


def merge_cards(path: str | Path) -> Card:
    """Write the card of a sharded set from those of its shards, and return it.

    All that it says of the samples equals what the card of the same set in one file says. A merge that is there
    already is left alone, so merging twice does no harm.

    Args:
        path: the set's .beton, a name that no file has; the shards lie beside it.

    Raises:
        UserError: a shard is missing, damaged, or of another set, or the card cannot be written.
    """
    path = Path(path)
    shards = _all_shards(path)
    cards = [Beton.open(shard).card for shard in shards]
    _check_belong(shards, cards)
    merged = _merged(shards, cards)
    if card_path(path).exists():
        old = Card.read(path)  # a card may be replaced; anything else of that name is somebody's
        if {**old.__dict__, "duplicates": {}} == merged.__dict__:
            return old
    try:
        write_atomically(card_path(path), merged.to_json())
    except OSError as error:
        raise UserError(f"{card_path(path)} could not be written: {error.strerror or error}") from None
    return merged


def check_shard_cards(path: Path, merged: Card) -> None:
    """Hold the cards of the shards, where they are there, to the merged card, which alone is needed to read the set.

    Raises:
        UserError: a shard's card is damaged, or of another shard.
    """
    first = 0
    for shard in merged.shards:
        beton = path.parent / shard["name"]
        if card_path(beton).exists():
            card = Card.read(beton)
            found = {**_entry(beton, card), "first_sample": card.first_sample}
            if found != {**shard, "first_sample": first}:
                raise UserError(f"{card_path(beton)} and {card_path(path)} describe different shards")
        first += shard["num_samples"]


def _all_shards(path: Path) -> list[Path]:
    if path.exists():
        raise UserError(f"{path} is there; shards can be merged only under a name that no file has")
    found = find_shards(path)
    if not found:
        raise UserError(f"{path} has no shards to merge; expected files like {shard_path(path, 0, 4).name} beside it")
    if len(found) > 1:
        counts = " and of ".join(str(count) for count in found)
        raise UserError(f"{path} has shards of {counts}; remove those that do not belong to it")
    ((count, numbers),) = found.items()
    shards = [shard_path(path, number, count) for number in range(count)]
    if missing := [shard for number, shard in enumerate(shards) if number not in numbers]:
        raise UserError(
            f"{missing[0]} is missing; {path} cannot be merged from {count - len(missing)} of {count} shards"
        )
    if numbers != list(range(count)):
        raise UserError(f"{shard_path(path, numbers[-1], count)} is not one of {count} shards; remove it")
    return shards


def _check_belong(shards: list[Path], cards: list[Card]) -> None:
    """All of one set, each at its place in it."""
    first = _said(cards[0])
    total = sum(card.num_samples for card in cards)
    for number, (shard, card) in enumerate(zip(shards, cards, strict=True)):
        said = _said(card)
        if odd := [key for key in said if said[key] != first[key]]:
            raise UserError(f"{shard} is of another set than {shards[0].name}: their cards differ in '{odd[0]}'")
        expected = shard_bounds(number, len(cards), total)
        if (card.first_sample, card.first_sample + card.num_samples) != expected:
            raise UserError(
                f"{shard} holds the samples {card.first_sample} to {card.first_sample + card.num_samples - 1}; "
                f"expected {expected[0]} to {expected[1] - 1} of {total}: the shards overlap or leave a gap"
            )


def _said(card: Card) -> dict[str, Any]:
    """What the cards of all shards must say alike."""
    source = {f"source.{key}": value for key, value in card.source.items() if key != "fingerprint"}
    return {**{key: getattr(card, key) for key in _ALIKE}, "source": sorted(source), **source, "shards": card.shards}


def _merged(shards: list[Path], cards: list[Card]) -> Card:
    first = cards[0]
    constant = len({(card.height, card.width) for card in cards}) == 1  # 0 x 0 where they vary
    versions = {key: {card.written_by.get(key, "none"): None for card in cards} for key in first.written_by}
    fingerprint = sum(_fingerprint(shard, card) for shard, card in zip(shards, cards, strict=True))
    return Card(
        **{key: getattr(first, key) for key in _ALIKE},
        num_samples=sum(card.num_samples for card in cards),
        first_sample=0,
        height=first.height if constant else 0,
        width=first.width if constant else 0,
        max_height=max(card.max_height for card in cards),
        max_width=max(card.max_width for card in cards),
        pixels=_sum_pixels(cards),
        source={**first.source, "fingerprint": fingerprint_text(fingerprint)},
        size=sum(card.size for card in cards),
        sha256=combined_sha256([card.sha256 for card in cards]),
        sha256_index=combined_sha256([card.sha256_index for card in cards]),
        written_by={key: ", ".join(found) for key, found in versions.items()},
        created=max(card.created for card in cards),
        shards=tuple(_entry(shard, card) for shard, card in zip(shards, cards, strict=True)),
    )


def _entry(beton: Path, card: Card) -> dict[str, Any]:
    """A shard in the list ``shards`` of the merged card."""
    kept = ("num_samples", "size", "sha256", "sha256_index")
    return {"name": beton.name, **{key: getattr(card, key) for key in kept}}


def _fingerprint(shard: Path, card: Card) -> int:
    try:
        return int(card.source["fingerprint"], 16)
    except (KeyError, ValueError):
        raise UserError(f"{card_path(shard)}: 'source' has no fingerprint; expected 64 hexadecimal digits") from None


def _sum_pixels(cards: list[Card]) -> dict[str, Any]:
    """Sums of integers: exact, whatever the shards."""
    pixels = [card.pixels for card in cards]
    sums = {key: [sum(p[key][channel] for p in pixels) for channel in range(3)] for key in ("sum", "square_sum")}
    return {"count": sum(p["count"] for p in pixels), **sums}
