"""Made-up runs for the tests of log, table and figures: the rows that a trainer writes, without training."""

from pathlib import Path
from typing import Any

import numpy as np

from rlp.runlog import RunLog

STEPS_PER_EPOCH = 20
Row = dict[str, Any]


def head_rows(taps: list[str], draws: int, progress: float, num_labels: int = 10) -> list[Row]:
    """Rows of all taps and draws in the three kinds; κ rises with depth and `progress` (0..1), val lies at chance."""
    random = np.random.default_rng(int(1000 * progress))
    rows = []
    for split, mode, height in (("train", "online", 0.5), ("val", "eval", 0.0), ("train", "eval", 0.8)):
        for depth, tap in enumerate(taps):
            for draw in range(draws):
                kappa = height * progress * (depth + 1) / len(taps) + 0.02 * random.normal()
                rows.append(head_row(split, mode, tap, depth, draw, kappa, num_labels))
    return rows


def head_row(split: str, mode: str, tap: str, depth: int, draw: int, kappa: float, num_labels: int) -> Row:
    """One row as the trainer writes it; the class-only floor is an accuracy (κ = 0.03 here)."""
    return {
        "split": split, "mode": mode, "tap": tap, "depth": depth, "draw": draw, "loss": 2.3 * (1 - max(kappa, 0)),
        "accuracy": (1 + kappa * (num_labels - 1)) / num_labels, "kappa": kappa, "chance": 1 / num_labels,
        "floor": (1 + 0.03 * (num_labels - 1)) / num_labels if split == "train" else None,
        "count": 1437 if split == "train" else 360, "num_labels": num_labels, "dim": 32 * 2 ** min(depth, 3),
    }  # fmt: skip


def step_row(step: int, loss: float = 1.5) -> Row:
    """A row of kind step."""
    return {
        "kind": "step", "step": step, "epoch": step // STEPS_PER_EPOCH, "loss": loss, "class_loss": loss,
        "fit_loss": 2.3, "penalty": 0.1, "accuracy": 0.5, "lr": 0.05, "images_per_s": 1234.5,
    }  # fmt: skip


def epoch_row(epoch: int, epochs: int, taps: list[str], draws: int, num_labels: int = 10) -> Row:
    """A row of kind epoch, the first being epoch 1."""
    progress = epoch / epochs
    return {
        "kind": "epoch", "epoch": epoch, "step": epoch * STEPS_PER_EPOCH, "seconds": 3.2,
        "train": {"loss": 2.3 * (1 - 0.9 * progress), "accuracy": 0.1 + 0.89 * progress, "count": 1437},
        "val": {"loss": 2.3 * (1 - 0.7 * progress), "accuracy": 0.1 + 0.8 * progress, "count": 360},
        "heads": head_rows(taps, draws, progress, num_labels),
    }  # fmt: skip


def fake_summary(final: Row, lam: float = 0.0) -> Row:
    """A summary that ends with the epoch row `final`."""
    return {
        "schema": 1, "config": {"model": {"name": "small_cnn"}, "run": {"seed": 0}}, "environment": {},
        "data": {"train": {"num_samples": 1437, "classes": list("ab")}, "val": {"num_samples": 360, "classes": []}},
        "epochs": final["epoch"], "steps": final["step"], "seconds": 60.0, "final": final, "lam": lam, "seed": 0,
    }  # fmt: skip


def write_fake_run(directory: Path, taps: list[str], draws: int = 8, epochs: int = 6, num_labels: int = 10) -> Row:
    """Write the metrics of a whole run through RunLog; returns its summary (not written)."""
    log = RunLog(directory)
    row: Row = {}
    for epoch in range(1, epochs + 1):
        log.write(step_row(epoch * STEPS_PER_EPOCH))
        row = epoch_row(epoch, epochs, taps, draws, num_labels)
        log.write(row)
    log.close()
    return fake_summary(row)
