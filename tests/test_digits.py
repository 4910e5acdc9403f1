"""The demo's way: digits to .beton, training with heads, and what the penalty does to them."""

from pathlib import Path
from statistics import fmean

import pytest

from data_prep.schema import ImageConfig, OutputConfig, PrepareConfig, SourceConfig
from data_prep.write_datasets import prepare
from rlp.config import parse
from rlp.distributed import World
from rlp.runlog import read_summary
from rlp.schema import TrainConfig
from train_rlp import train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    output = OutputConfig(train=str(folder / "train.beton"), val=str(folder / "val.beton"), workers=1)
    prepare(PrepareConfig(output=output, source=SourceConfig(kind="digits"), image=ImageConfig(size=32)))
    return folder


def run_demo(folder: Path, name: str, *options: str) -> dict:
    """configs/digits_cnn.yaml, evaluated at the end alone; returns the summary."""
    data = ["--data.train", str(folder / "train.beton"), "--data.val", str(folder / "val.beton")]
    demo = ["--config", str(ROOT / "configs" / "digits_cnn.yaml"), "--run.dir", str(folder / name)]
    short = ["--data.loader", "resident", "--run.eval_every", "16"]
    train(parse(TrainConfig, [*demo, *data, *short, *options]), World())
    return read_summary(folder / name)


def kappa(summary: dict, tap: str, split: str = "train") -> float:
    """Mean over draws, eval mode."""
    heads = [h for h in summary["final"]["heads"] if (h["tap"], h["split"], h["mode"]) == (tap, split, "eval")]
    assert len(heads) == 8
    return fmean(head["kappa"] for head in heads)


def test_the_penalty_lowers_the_training_heads_accuracy(digits: Path) -> None:
    """λ = 1 against λ = 0 at the last tap, where most is read, with room for the spread over draws."""
    free = run_demo(digits, "free")
    held = run_demo(digits, "held", "--heads.lam", "1")
    assert kappa(free, "block3") > 0.1
    assert kappa(held, "block3") < 0.07
    for summary in (free, held):
        assert summary["final"]["val"]["accuracy"] > 0.9
        assert abs(kappa(summary, "block3", "val")) < 0.03  # leak check
        assert (digits / "free" / "figures" / "depth.png").stat().st_size > 10_000
