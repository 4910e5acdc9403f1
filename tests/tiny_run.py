"""A tiny real run for tests: striped images of 16 px, the small CNN, seconds on one core."""

from pathlib import Path
from typing import Any

import numpy as np
from small_sets import write_set
import torch

from rlp.config import from_dict
from rlp.schema import TrainConfig

CLASSES = 4


def striped_images(count: int, seed: int) -> list[np.ndarray]:
    """Class c (0, 1, ... in turn) is a grey level with noise: learnable in a few steps, no two images alike."""
    random = np.random.default_rng(seed)
    levels = 40 + 50 * (np.arange(count) % CLASSES)
    noise = random.integers(-40, 40, (count, 16, 16, 3))
    return list(np.clip(levels[:, None, None, None] + noise, 0, 255).astype(np.uint8))


def write_tiny_sets(folder: Path, train: int = 100, val: int = 37) -> None:
    """``folder/train.beton`` and ``folder/val.beton`` with 3 draws."""
    write_set(folder / "train.beton", striped_images(train, 1), CLASSES, split="train")
    write_set(folder / "val.beton", striped_images(val, 2), CLASSES, split="val")


def tiny_settings(folder: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    """Sections of a run on :func:`write_tiny_sets`; ``section__key=value`` changes one key."""
    settings: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run"), "device": "cpu", "deterministic": True, "log_every": 2, "seed": 3},
        "data": {
            "train": str(folder / "train.beton"),
            "val": str(folder / "val.beton"),
            "batch_size": 20,
            "loader": "resident",
            "flip": True,
            "crop_padding": 2,
        },
        "model": {"name": "small_cnn", "args": {"dropout": 0.2}},
        "heads": {"taps": ["block*"], "draws": 3, "num_labels": 4},
        "train": {"epochs": 2, "lr": 0.05, "warmup_epochs": 0.5},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        settings[section][key] = value
    return settings


def tiny_config(folder: Path, **changes: Any) -> TrainConfig:
    """:func:`tiny_settings` as a checked configuration."""
    return from_dict(TrainConfig, tiny_settings(folder, **changes))


def final_state(run_dir: Path) -> dict[str, Any]:
    """The newest checkpoint of a run."""
    return torch.load(sorted((run_dir / "checkpoints").glob("step-*.pt"))[-1], weights_only=True)


def assert_same_tensors(a: Any, b: Any, where: str = "") -> None:
    """Nested tensors, lists and dicts are equal to the bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_tensors(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_tensors(x, y, f"{where}[{i}]")
    else:
        assert a == b, where
