#!/usr/bin/env python
"""Write the tables of all keys into docs/configuration.md, between the lines that mark their place.

python scripts/update_configuration_docs.py
"""

from pathlib import Path
import re
import sys

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_prep.schema import PrepareConfig  # noqa: E402
from rlp.config import markdown  # noqa: E402
from rlp.schema import TrainConfig  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"


def updated(text: str) -> str:
    """The page with the tables of the present schemas."""
    for root in (TrainConfig, PrepareConfig):
        begin, end = f"<!-- begin {root.__name__} -->", f"<!-- end {root.__name__} -->"
        block = f"{begin}\n\n{markdown(root)}\n{end}"
        text, count = re.subn(f"{begin}.*?{end}", lambda _: block, text, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise ValueError(f"{PAGE} has {count} places for {root.__name__}; expected one, between {begin} and {end}")
    return text


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
