"""Dataclasses, YAML and the command line: what is read, what wins, and that nothing wrong passes in silence."""

from dataclasses import dataclass, replace
import json
import math
from pathlib import Path
import re
import runpy
import subprocess
import sys
from typing import Any

import pytest

from rlp.config import from_dict, help_text, keys_by_path, parse, to_dict, to_yaml
from rlp.config_keys import REQUIRED, Section, at_least, key
from rlp.errors import UserError, exit_on_user_error
from rlp.meters import NonFiniteError
from rlp.schema import DataConfig, HeadsConfig, ModelConfig, RunConfig, TrainConfig, TrainingConfig
from tests.command_lines import REQUIRED_KEYS, train_config, write

pytest.importorskip("fastargs")

ROOT = Path(__file__).resolve().parent.parent
# What a value may look like


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--data.flip=False", False),
        ("--data.flip=TRUE", True),
        ("--data.mean=null", None),
        ("--data.mean=0.5,0.5,1", (0.5, 0.5, 1.0)),
        ("--data.mean=[0.5, 0.5, 1e-1]", (0.5, 0.5, 0.1)),
        ("--train.lr=1e-4", 1e-4),
        ("--train.lr=3", 3.0),
        ("--train.lr=.5", 0.5),
        ("--train.step_epochs=", ()),
        ("--train.step_epochs=[]", ()),
        ("--train.amp=none", "none"),
        ("--run.dir=3", "3"),
        ("--run.dir=a=b", "a=b"),
        ("--run.resume=null", None),
        ("--run.seed=010", 10),
        ("--heads.taps=layer1, blocks.*", ("layer1", "blocks.*")),
        ('--heads.taps=["*.conv"]', ("*.conv",)),
        ("--heads.taps=layer[1-3]", ("layer[1-3]",)),
        ("--model.args={depth: 16, p: 1e-1, on: yes, off: false}", {"depth": 16, "p": 0.1, "on": "yes", "off": False}),
        ("--model.args.depth=16", {"depth": 16}),
        ("--model.args.a.b=[1, x]", {"a": {"b": [1, "x"]}}),
    ],
)
def test_command_line_values(option: str, value: Any) -> None:
    section, name = option[2:].partition("=")[0].split(".")[:2]
    found = getattr(getattr(train_config(option), section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("section", "line", "value"),
    [
        ("train", "lr: 1e-4", 1e-4),
        ("train", "lr: '1e-4'", 1e-4),
        ("train", "lr: 1", 1.0),
        ("train", "step_epochs: [1, 2.5]", (1.0, 2.5)),
        ("run", "seed: 010", 10),
        ("run", "dir: yes", "yes"),
        ("run", "dir: 2020-01-01", "2020-01-01"),
        ("run", "dir: 1:30", "1:30"),
        ("data", "std: ~", None),
        ("model", "args: {a: {b: 1}, c: [no, null]}", {"a": {"b": 1}, "c": ["no", None]}),
    ],
)
def test_file_values(tmp_path: Path, section: str, line: str, value: Any) -> None:
    path = write(tmp_path / "a.yaml", f"{section}:\n  {line}\n")
    rest = [option for option in REQUIRED_KEYS if "dir" not in option or section != "run" or "dir" not in line]
    found = getattr(getattr(parse(TrainConfig, ["--config", path, *rest]), section), line.partition(":")[0])
    assert found == value
    assert type(found) is type(value)


# What wins


def test_later_wins(tmp_path: Path) -> None:
    first = write(tmp_path / "1.yaml", "train: {epochs: 1, lr: 1.0, clip_norm: 1.0}\ndata: {mean: [1, 1, 1]}\n")
    second = write(tmp_path / "2.yaml", "train: {epochs: 2, lr: 2.0}\ndata: {mean: null}\n")
    both = ["--config", first, f"--config={second}"]
    config = train_config("--train.epochs", "4", *both, "--train.epochs", "3")
    assert (config.train.epochs, config.train.lr, config.train.clip_norm) == (3, 2.0, 1.0)
    assert config.data.mean is None
    assert train_config("--config", second, "--config", first).train.epochs == 1


def test_extends_is_relative_recursive_and_in_order(tmp_path: Path) -> None:
    write(tmp_path / "base/deep/zero.yaml", "train: {epochs: 1, lr: 1.0, momentum: 0.1, clip_norm: 1.0}\n")
    write(tmp_path / "base/one.yaml", "extends: deep/zero.yaml\ntrain: {epochs: 2, lr: 2.0, momentum: 0.2}\n")
    write(tmp_path / "two.yaml", "train: {epochs: 3, lr: 3.0}\n")
    top = write(tmp_path / "top.yaml", "train: {epochs: 4}\nextends: [base/one.yaml, two.yaml]\n")
    train = train_config("--config", top).train
    assert (train.epochs, train.lr, train.momentum, train.clip_norm) == (4, 3.0, 0.2, 1.0)


def test_a_file_may_be_extended_twice_but_not_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path / "root.yaml", "run: {seed: 5}\n")
    write(tmp_path / "a.yaml", "extends: root.yaml\ntrain: {epochs: 1}\n")
    write(tmp_path / "b.yaml", "extends: root.yaml\ntrain: {lr: 1.0}\n")
    both = write(tmp_path / "both.yaml", "extends: [a.yaml, b.yaml]\nrun: {log_every: 1}\n")
    assert train_config("--config", both).run.seed == 5
    write(tmp_path / "x/c.yaml", "extends: ../d.yaml\nrun: {seed: 1}\n")
    circle = write(tmp_path / "d.yaml", "extends: x/c.yaml\nrun: {seed: 1}\n")
    with pytest.raises(UserError, match=r"extends goes round in a circle: .*d\.yaml -> .*c\.yaml -> .*d\.yaml"):
        train_config("--config", circle)


def test_a_mapping_replaces_and_a_dotted_entry_adds(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "model: {args: {depth: 16, width: 4}}\n")
    other = write(tmp_path / "other.yaml", "model: {args: {drop_rate: 0.1}}\n")
    assert train_config("--config", base, "--config", other).model.args == {"drop_rate": 0.1}
    assert train_config("--config", base, "--model.args={}").model.args == {}
    merged = train_config("--model.args.width=8", "--config", base, "--model.args.p=0.5").model.args
    assert merged == {"depth": 16, "width": 8, "p": 0.5}
    assert train_config("--model.args={a: 1}", "--model.args.b=2").model.args == {"a": 1, "b": 2}


def test_the_environment_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("train.epochs", "7")
    monkeypatch.setenv("TRAIN_EPOCHS", "7")
    assert train_config().train.epochs == 10
    assert train_config("--train.epochs=3").train.epochs == 3


# Sections, whole configurations


def test_sections_check_themselves_however_they_are_made() -> None:
    assert HeadsConfig(taps=["a"]).taps == ("a",)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"heads\.draws is 0"):
        HeadsConfig(draws=0)
    with pytest.raises(UserError, match=r"heads\.draws is 0"):
        replace(HeadsConfig(), draws=0)
    with pytest.raises(UserError, match=r"heads\.draws is True"):
        from_dict(TrainConfig, {"heads": {"draws": True}})


def test_lambda_is_given_in_one_of_two_ways() -> None:
    assert HeadsConfig().weight == 0.0
    assert HeadsConfig(lam=2.5, taps=("a",)).weight == 2.5
    assert HeadsConfig(lam_over_n=2.5, num_labels=100, taps=("a",)).weight == 250.0
    assert HeadsConfig(lam_over_n=0.0).weight == 0.0
    with pytest.raises(UserError, match=r"heads\.lam is 1\.0 and heads\.lam_over_n is 0\.5; expected only one"):
        HeadsConfig(lam=1.0, lam_over_n=0.5)


def test_a_config_does_not_share_its_mappings() -> None:
    data = {"run": {"dir": "r"}, "data": {"train": "a", "val": "b"}, "model": {"name": "m", "args": {"a": {"b": 1}}}}
    first = from_dict(TrainConfig, data)
    data["model"]["args"]["a"]["b"] = 2  # type: ignore[index]
    assert first.model.args == {"a": {"b": 1}}
    assert ModelConfig(name="m").args is not ModelConfig(name="m").args


# The machinery


@dataclass(frozen=True, kw_only=True)
class PlainSection:
    """A section without the base class.

    Attributes:
        size: how many
            of them.
        name: what it is called.
    """

    size: int = 3
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class OtherSection(Section, name="other"):
    """Another."""

    scale: float = key(REQUIRED, "how large", at_least(0))
    options: dict[str, Any] = key(dict, "more")  # noqa: RUF009


@dataclass(frozen=True)
class Root:
    """Sections of two kinds."""

    plain: PlainSection
    other: OtherSection


def test_any_dataclasses_serve_as_a_schema(tmp_path: Path) -> None:
    config = parse(Root, ["--other.scale", "2", "--plain.name", "x"])
    assert config == Root(PlainSection(name="x"), OtherSection(scale=2.0))
    assert keys_by_path(Root)["plain.size"].help == "how many of them."
    path = write(tmp_path / "a.yaml", to_yaml(config))
    assert parse(Root, ["--config", path]) == config
    with pytest.raises(UserError, match=r"plain\.size is 'many'; expected an integer"):
        parse(Root, ["--other.scale", "2", "--plain.size", "many"])


def test_fastargs_has_no_global_state() -> None:
    from fastargs import get_current_config

    before = dict(get_current_config().entries)
    train_config("--train.epochs=3")
    assert get_current_config().entries == before
    assert train_config().train.epochs == 10


WITHOUT = """
import sys
for name in {missing!r}:
    sys.modules[name] = None
from rlp.config import from_dict, parse, to_yaml
from rlp.errors import exit_on_user_error
from rlp.schema import HeadsConfig, TrainConfig
sections = {{"run": {{"dir": "r"}}, "data": {{"train": "a", "val": "b"}}, "model": {{"name": "m"}}}}
config = from_dict(TrainConfig, sections)
assert HeadsConfig(draws=3).draws == 3
assert "dir: r" in to_yaml(config)
with exit_on_user_error():
    parse(TrainConfig, ["--run.dir", "r"])
"""


@pytest.mark.parametrize("missing", ["fastargs", "terminaltables"])
def test_only_the_command_line_needs_fastargs(missing: str) -> None:
    code = WITHOUT.format(missing=[missing])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: reading the command line needs the package '{missing}'")
    assert done.stderr.count("\n") == 1


def test_the_schema_alone_needs_neither_yaml_nor_fastargs() -> None:
    code = "import sys, rlp.config, rlp.schema; print([m for m in ('yaml', 'fastargs') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_mistake_ends_a_script_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        train_config("--data.flip=maybe")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: data.flip is 'maybe'; expected true or false (command line)\n"


def test_other_failures_have_their_own_status() -> None:
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        raise NonFiniteError("the loss became NaN")
    assert caught.value.code == 3


def test_help_lists_every_key_and_ends_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(TrainConfig, ["--config", "missing.yaml", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.strip() == help_text(TrainConfig).strip()
    for entry in keys_by_path(TrainConfig).values():
        assert f"--{entry.path}  {entry.expected} (" in printed
        assert entry.help
        assert entry.help in printed
    assert "--train.lr  a number, at least 0 (default 0.1)" in printed
    assert "--run.dir  text, not empty (required)" in printed


def test_defaults_pass_their_own_checks() -> None:
    for entry in keys_by_path(TrainConfig).values():
        if not entry.required:
            assert entry.convert(entry.default) == entry.default
            assert type(entry.convert(entry.default)) is type(entry.default)


def test_values_are_plain() -> None:
    """A checkpoint holds them and is read back with weights_only, so nothing but built-in types may be in it."""
    config = TrainConfig(
        run=RunConfig(dir="r"), data=DataConfig(train="a", val="b"), model=ModelConfig(name="m", args={"a": (1, 2)})
    )
    assert config.train == TrainingConfig()
    text = json.dumps(to_dict(config), allow_nan=False)
    assert math.isclose(json.loads(text)["train"]["lr"], 0.1)
    assert json.loads(text) == to_dict(config)


# The documentation

PAGE = ROOT / "docs" / "configuration.md"


def test_the_page_of_all_keys_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "update_configuration_docs.py"))
    text = PAGE.read_text(encoding="utf-8")
    assert script["updated"](text) == text, "run python scripts/update_configuration_docs.py"


def test_the_page_maps_the_authors_command_line() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("## From the original authors' command line")[2]
    rows = dict(re.findall(r"^\| (`--.*?) \| (.*) \|$", table, re.M))
    theirs = "subLabels regFactor epochs contin truncate model dataset labelNoise ifile ViTSize verbose batchSize"
    for option in [*theirs.split(), "logDir", "logSubDir"]:
        assert sum(f"`--{option}" in names for names in rows) == 1, option
    ours = {name for row in rows.values() for name in re.findall(r"`--([a-z_.]+)", row)}
    assert ours - {"config"} <= set(keys_by_path(TrainConfig))
    assert len(ours) > 12
