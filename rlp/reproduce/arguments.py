"""Types of command-line arguments, for argparse: what does not fit is one sentence of the parser's."""

import argparse


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, 1, 2**63)


def seed(text: str) -> int:
    """Seed of a network."""
    return _integer(text, 0, 2**63)


def _integer(text: str, low: int, above: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no integer") from None
    if not low <= value < above:
        raise argparse.ArgumentTypeError(f"{value} is not from {low} to 2^63 - 1")
    return value
