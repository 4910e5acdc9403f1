"""Every file in configs/ is a whole configuration whose network exists and whose taps name modules of it."""

from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from torch import nn
import yaml

from data_prep.schema import PrepareConfig
from rlp.config import parse, to_yaml
from rlp.models import build_model
from rlp.models.taps import resolve_taps
from rlp.schema import TrainConfig

pytest.importorskip("fastargs")

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RUNS = sorted(CONFIGS.glob("*.yaml"))
DATA = sorted((CONFIGS / "data").glob("*.yaml"))
CLASSES = {"digits": 10, "digits8": 10, "cifar10": 10, "cifar100": 100, "imagenet": 1000}
TAPS = {
    "digits_cnn": 3,
    "digits_mlp": 4,
    "cifar10_wrn16_4": 4,
    "cifar10_small_cnn": 4,
    "cifar100_wrn16_4": 4,
    "cifar100_vgg16": 5,
    "imagenet_vit_b32": 12,
    "imagenet_resnet50": 4,
}


def load(path: Path) -> TrainConfig:
    return parse(TrainConfig, ["--config", str(path)])


def data_name(config: TrainConfig) -> str:
    """``cifar10`` of ``data/cifar10/train.beton``."""
    return Path(config.data.train).parent.name


def network(config: TrainConfig) -> nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build_model(
            config.model.name, CLASSES[data_name(config)], config.data.image_size or 32, dict(config.model.args)
        )


def test_the_promised_configs_are_there() -> None:
    assert {path.stem for path in RUNS} == set(TAPS)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_has_a_folder_of_its_own_and_data_that_a_config_writes(path: Path) -> None:
    config = load(path)
    assert config.run.dir == f"runs/{path.stem}"
    prepared = parse(PrepareConfig, ["--config", str(CONFIGS / "data" / f"{data_name(config)}.yaml")])
    assert (config.data.train, config.data.val) == (prepared.output.train, prepared.output.val)
    assert config.heads.draws <= prepared.words.draws


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_network_exists_and_every_tap_names_modules_of_it(path: Path) -> None:
    config = load(path)
    model = network(config)
    taps = resolve_taps(model, config.heads.taps)
    assert len(taps) == TAPS[path.stem]
    assert all(any(fnmatch(tap.path, pattern) for tap in taps) for pattern in config.heads.taps)
    image = torch.zeros(2, 3, *[config.data.image_size or 32] * 2, device="meta")
    assert model.eval()(image).shape == (2, CLASSES[data_name(config)])


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_a_data_config_loads(path: Path) -> None:
    config = parse(PrepareConfig, ["--config", str(path)])
    assert (config.output.train, config.output.val) == (f"data/{path.stem}/train.beton", f"data/{path.stem}/val.beton")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_config_only_measures_and_says_where_its_numbers_come_from(path: Path) -> None:
    assert load(path).heads.weight == 0.0
    files = [path]
    while extends := yaml.safe_load(files[-1].read_text(encoding="utf-8")).get("extends"):
        files.append(files[-1].parent / extends)
    comments = "".join(file.read_text(encoding="utf-8").lower() for file in files)
    assert "our choice" in comments
    assert path.stem == "digits_cnn" or "arxiv" in comments


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_resolved_config_asks_for_the_same_run(path: Path, tmp_path: Path) -> None:
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(load(path)), encoding="utf-8")
    assert load(written) == load(path)
