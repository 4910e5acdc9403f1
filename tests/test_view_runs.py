"""Whole runs on views: what is seen is logged and summed up, both loaders train alike, a changed view is no resume."""

from dataclasses import replace
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import assert_same_tensors, final_state, tiny_config, write_tiny_sets

from rlp.data.card import Card
from rlp.distributed import World
from rlp.errors import UserError
import train_rlp

VIEW: dict[str, Any] = {
    "data__fraction": 0.8,
    "data__imbalance": 2.0,
    "data__member_fraction": 0.7,
    "data__label_noise": 0.3,
    "data__color_jitter": [0.2, 0.2, 0.2, 0.1],
    "data__randaugment": [1, 5],
    "data__cutout": 3,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_sets(tmp_path)
    return tmp_path


def run(folder: Path, name: str, **changes: Any) -> Path:
    directory = folder / name
    train_rlp.train(tiny_config(folder, **{"run__dir": str(directory), "train__epochs": 2, **changes}), World())
    return directory


def test_the_view_is_logged_and_summed_up(folder: Path) -> None:
    directory = run(folder, "a", **VIEW)
    log = (directory / "train.log").read_text("utf-8")
    assert "data.fraction 0.8: 80 of 100 samples" in log
    assert "data.label_noise 0.3 (symmetric): " in log
    summary = json.loads((directory / "summary.json").read_text("utf-8"))
    seen = summary["data"]["train"]["view"]
    assert [step["setting"] for step in seen["steps"]] == [
        "data.fraction 0.8", "data.imbalance 2.0", "data.member_fraction 0.7 (members)"
    ]  # fmt: skip
    assert seen["samples"] == summary["data"]["train"]["num_samples"] < 80
    assert 0 < seen["wrong_labels"] < seen["samples"]
    assert summary["data"]["val"]["view"] == {"samples": 37, "steps": [], "labels": "true", "wrong_labels": 0}


def test_both_loaders_train_alike_to_the_bit(folder: Path) -> None:
    pytest.importorskip("ffcv")
    states = [final_state(run(folder, kind, **VIEW, data__loader=kind)) for kind in ("resident", "ffcv")]
    assert_same_tensors(states[0]["model"], states[1]["model"])
    assert_same_tensors(states[0]["heads"], states[1]["heads"])


def test_a_resumed_run_needs_the_same_samples_and_labels(folder: Path) -> None:
    path = folder / "train.beton"
    card = Card.read(path)
    replace(card, duplicates={"method": "by hand", "distance": 1, "dropped": [3]}).write(path)
    directory = run(folder, "a", data__drop_duplicates=True)
    before = (directory / "summary.json").read_bytes()
    replace(card, duplicates={"method": "by hand", "distance": 2, "dropped": [3, 4]}).write(path)
    with pytest.raises(UserError, match="the training samples or their labels are not those that the run to resume"):
        run(folder, "a", data__drop_duplicates=True, run__resume="auto", train__epochs=3)
    assert (directory / "summary.json").read_bytes() == before
