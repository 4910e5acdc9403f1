"""What is written is read back, by file and by command line, and no input whatever breaks the reader."""

import json
from pathlib import Path
import re
from typing import Any, Literal, get_args, get_origin

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
import pytest
import yaml

from rlp.config import from_dict, keys_by_path, parse, to_yaml
from rlp.config_keys import Key, inner_type
from rlp.errors import UserError
from rlp.schema import TrainConfig
from tests.command_lines import REQUIRED_KEYS, train_config, write

pytest.importorskip("fastargs")

in_tmp_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_categories=["C"]), max_size=12)
ANY_TEXT = st.text(st.characters(exclude_characters="\0"), max_size=12)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | FLOATS | PRINTABLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PRINTABLE, inner, max_size=3),
    max_leaves=6,
)


def values_of(annotation: Any, text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Values of a key's type, in the plain form in which files hold them."""
    inner, optional = inner_type(annotation)
    arguments = get_args(inner)
    if get_origin(inner) is Literal:
        values: st.SearchStrategy[Any] = st.sampled_from(arguments)
    elif get_origin(inner) is tuple and arguments[-1] is Ellipsis:
        values = st.lists(values_of(arguments[0], text), max_size=4)
    elif get_origin(inner) is tuple:
        values = st.tuples(*(values_of(argument, text) for argument in arguments)).map(list)
    elif get_origin(inner) is dict:
        values = st.dictionaries(PRINTABLE, PLAIN, max_size=3)
    else:
        numbers = st.floats(0, 1) | FLOATS
        values = {bool: st.booleans(), int: st.integers(0, 2**64), float: numbers, str: text}[inner]
    return st.none() | values if optional else values


def valid(entry: Key, value: Any) -> bool:
    try:
        entry.convert(value)
    except UserError:
        return False
    return True


def settings_strategy(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Some keys with valid values, by ``section.key``."""
    keys = keys_by_path(TrainConfig)

    def value(path: str) -> st.SearchStrategy[tuple[str, Any]]:
        entry = keys[path]
        found = values_of(entry.annotation, text).filter(lambda value: valid(entry, value))
        return st.tuples(st.just(path), found)

    return st.lists(st.sampled_from(list(keys)).flatmap(value), max_size=8).map(dict)


def nested(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The required keys and ``flat`` as sections."""
    data: dict[str, dict[str, Any]] = {}
    for path, value in (dict(option[2:].split("=") for option in REQUIRED_KEYS) | flat).items():
        section, name = path.split(".")
        data.setdefault(section, {})[name] = value
    return data


@in_tmp_path
@given(settings_strategy(ANY_TEXT))
@example({"run.dir": "\x85", "run.resume": " a\u2028 ", "model.args": {"\u2029": "\x85b"}})
@example({"run.dir": "1e-4", "run.resume": "null", "heads.taps": ["yes", "010", "*", " a", "1:30", "<<", "="]})
@example({"train.lr": 1e-300, "train.weight_decay": 1e22, "model.args": {"no": "no", "": None, "x": 1e16}})
def test_what_is_written_is_read_back(tmp_path: Path, flat: dict[str, Any]) -> None:
    try:
        config = from_dict(TrainConfig, nested(flat))
    except UserError as error:  # the only rules left are those between keys
        rules = r"crop_scale|lam_over_n|lam_taps|target_kappa|fresh_draws|heads.steps|warmup_epochs|step_epochs"
        regularisers = r"train\.(mixup|manifold_mixup|bilevel|tied_dropout)"
        assert re.search(rf"{rules}|{regularisers}|heads.taps is empty", str(error))  # noqa: PT017
        return
    path = write(tmp_path / "config.yaml", to_yaml(config))
    assert parse(TrainConfig, ["--config", path]) == config
    assert to_yaml(parse(TrainConfig, ["--config", path])) == to_yaml(config)
    assert from_dict(TrainConfig, yaml.safe_load(to_yaml(config))) == config  # other readers of YAML agree


@settings(deadline=None, max_examples=150)
@given(settings_strategy(PRINTABLE.filter(lambda text: text != "null")))
def test_the_command_line_says_the_same_as_a_mapping(flat: dict[str, Any]) -> None:
    argv = [
        f"--{path}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for path, value in flat.items()
    ]
    try:
        config = from_dict(TrainConfig, nested(flat))
    except UserError as error:
        with pytest.raises(UserError, match=re.escape(str(error))):
            parse(TrainConfig, [*REQUIRED_KEYS, *argv])
        return
    assert parse(TrainConfig, [*REQUIRED_KEYS, *argv]) == config


@in_tmp_path
@given(st.binary(max_size=80) | st.text(":{}[]-*&!|>'\"#?,~ \n\tax1.é", max_size=60).map(str.encode))
def test_any_file_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "any.yaml").write_bytes(content)
    try:
        train_config("--config", str(tmp_path / "any.yaml"))
    except UserError as error:
        assert str(error)  # noqa: PT017


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.text(max_size=10) | st.sampled_from(["--heads.", "--model.args.a", "--model.args", "--train.betas"]))
)
def test_any_command_line_is_read_or_refused(argv: list[str]) -> None:
    try:
        train_config(*(word for word in argv if word not in ("-h", "--help")))
    except UserError as error:
        assert str(error)  # noqa: PT017
