"""Command lines and files of settings for the tests of the configuration."""

from pathlib import Path

from rlp.config import parse
from rlp.schema import TrainConfig

REQUIRED_KEYS = ["--run.dir=r", "--data.train=a.beton", "--data.val=b.beton", "--model.name=small_cnn"]


def train_config(*argv: str) -> TrainConfig:
    """The configuration of a command line that also has the required keys, first."""
    return parse(TrainConfig, [*REQUIRED_KEYS, *argv])


def write(path: Path, text: str) -> str:
    """Write a file, with its folder, and give its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)
