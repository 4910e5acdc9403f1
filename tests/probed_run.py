"""A tiny finished run for the tests of the measurement: half of the samples are members, a fifth has a wrong label."""

from pathlib import Path
from typing import Any

from tiny_run import tiny_config, write_tiny_sets

from rlp.distributed import World
from train_rlp import train


def tiny_finished_run(folder: Path, samples: int = 120, **changes: Any) -> Path:
    """Train for two epochs; ``section__key=value`` changes one key. Returns the run's folder."""
    write_tiny_sets(folder, train=samples)
    settings: dict[str, Any] = {
        "data__member_fraction": 0.5,
        "data__label_noise": 0.2,
        "run__deterministic": False,
        **changes,
    }
    train(tiny_config(folder, **settings), World())
    return folder / "run"
