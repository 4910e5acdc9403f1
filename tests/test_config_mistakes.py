"""Mistakes in the configuration: each is refused with one sentence that names the key, the file and its line."""

from pathlib import Path
from typing import Any

import pytest

from rlp.config import from_dict, parse
from rlp.errors import UserError
from rlp.schema import TrainConfig
from tests.command_lines import REQUIRED_KEYS, train_config, write

pytest.importorskip("fastargs")


BAD_OPTIONS = [
    ("--data.flip=1", "data.flip is '1'; expected true or false"),
    ("--data.flip=yes", "data.flip is 'yes'; expected true or false"),
    ("--data.flip", "--data.flip needs a value"),
    ("--heads.draws=2.9", "heads.draws is '2.9'; expected an integer, at least 1"),
    ("--heads.draws=3.0", "heads.draws is '3.0'"),
    ("--heads.draws=0", "heads.draws is 0; expected an integer, at least 1"),
    ("--heads.draws=1_0", "heads.draws is '1_0'"),
    ("--heads.draws=null", "heads.draws is 'null'"),
    ("--run.seed=" + "9" * 5000, "run.seed is "),
    ("--train.lr=nan", "train.lr is 'nan'; expected a number, at least 0"),
    ("--train.lr=inf", "train.lr is 'inf'"),
    ("--train.lr=1e999", "train.lr is inf"),
    ("--train.lr=-1", "train.lr is -1.0"),
    ("--train.lr=fast", "train.lr is 'fast'"),
    ("--train.optimizer=adam", "train.optimizer is 'adam'; expected sgd or adamw"),
    ("--train.betas=0.9", "train.betas is [0.9]; expected a list of 2 numbers"),
    ("--train.betas=0.9,1", "train.betas is [0.9, 1.0]"),
    ("--train.step_epochs=3,2", "increasing"),
    ("--train.step_epochs=[1", "train.step_epochs is ['[1']"),
    ("--data.label_noise=1.5", "data.label_noise is 1.5; expected a number, from 0 to 1"),
    ("--data.member_fraction=0", "data.member_fraction is 0.0; expected a number, above 0, at most 1"),
    ("--data.std=1,0,1", "data.std is [1.0, 0.0, 1.0]; expected a list of 3 numbers, each above 0, or null"),
    ("--run.dir=", "run.dir is ''; expected text, not empty"),
    ("--heads.taps=[*.conv]", "--heads.taps is '[*.conv]', which is not valid YAML"),
    ("--model.args=depth", "model.args is 'depth'; expected a mapping"),
    ("--model.args={1: 2}", "the key 1 is not text"),
    ("--model.args={a: 1, a: 2}", "the key 'a' is there twice"),
    ("--model.args={a: .nan}", "model.args is {'a': nan}"),
    ("--model.args.a=[1", "--model.args.a is '[1', which is not valid YAML"),
    ("--heads.lamda=1", "unknown key --heads.lamda; did you mean --heads.lam?"),
    ("--epochs=3", "unknown key --epochs; did you mean --train.epochs?"),
    ("--batchSize=3", "unknown key --batchSize; did you mean --data.batch_size?"),
    ("--data.epochs=3", "unknown key --data.epochs; did you mean --train.epochs?"),
    ("--train.lr.x=3", "unknown key --train.lr.x"),
    ("--conf=a.yaml", "unknown key --conf; did you mean --config?"),
    ("--train=3", "unknown key --train"),
    ("--quux=3", "unknown key --quux; expected one of the keys that --help lists"),
    ("--=3", "unknown key --"),
    ("digits.yaml", "unexpected argument 'digits.yaml'; expected --config FILE or --section.key VALUE"),
    ("-v", "unexpected argument '-v'"),
    ("--", "unexpected argument '--'"),
    ("--config=missing.yaml", "missing.yaml does not exist"),
    ("--train.schedule=step", "train.schedule is step, but train.step_epochs is empty"),
    ("--train.warmup_epochs=11", "train.warmup_epochs is 11.0, longer than train.epochs, which is 10"),
    ("--data.crop_scale=1,0.5", "data.crop_scale is [1.0, 0.5]; expected the smaller share first"),
]


@pytest.mark.parametrize(("option", "message"), BAD_OPTIONS, ids=[option[:40] for option, _ in BAD_OPTIONS])
def test_bad_option_is_one_sentence(option: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        train_config(option)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_FILES = [
    ("train:\n  lr: 0.1\n  epochs: 2.9\n", "train.epochs is 2.9; expected an integer, at least 1 (FILE, line 3)"),
    ("train:\n  epochs: true\n", "train.epochs is True"),
    ("train:\n  lr: .inf\n", "train.lr is inf"),
    ("train:\n  lr: '0.1'\n", "train.lr is '0.1'"),
    ("train:\n  amp: null\n", "train.amp is null; expected none, bf16 or fp16 (FILE, line 2)"),
    ("data:\n  flip: yes\n", "data.flip is 'yes'; expected true or false (FILE, line 2)"),
    ("data:\n  flip: 1\n", "data.flip is 1"),
    ("run:\n  dir: 3\n", "run.dir is 3; expected text, not empty (FILE, line 2)"),
    ("heads:\n  taps: layer1\n", "heads.taps is 'layer1'; expected a list of texts"),
    ("heads:\n  taps: [1]\n", "heads.taps is [1]"),
    ("heads:\n  taps: [*.conv]\n", "FILE is not valid YAML: while scanning an alias"),
    ("heads:\n  taps: [*conv]\n", "quote text that begins with * (line 2, column 10)"),
    ("heads:\n  lamda: 1\n", "unknown key heads.lamda; did you mean heads.lam? (FILE, line 2)"),
    ("heads:\n  zzz: 1\n", "unknown key heads.zzz; expected one of the keys that --help lists (FILE, line 2)"),
    ("data:\n  epochs: 1\n", "unknown key data.epochs; did you mean train.epochs? (FILE, line 2)"),
    ("head:\n  draws: 1\n", "unknown section 'head'; did you mean heads? (FILE, line 2)"),
    ("epochs: 3\n", "epochs holds no keys; expected 'key: value' lines below it (FILE, line 1)"),
    ("train:\n", "train holds no keys"),
    ("run:\n  seed: 1\n  seed: 2\n", "FILE is not valid YAML: the key 'seed' is there twice (line 3, column 3)"),
    ("run: {seed: 1}\nrun: {log_every: 1}\n", "the key 'run' is there twice (line 2, column 1)"),
    ("model:\n  args:\n    a: 1\n    a: 1\n", "the key 'a' is there twice (line 4, column 5)"),
    ("model:\n  args: {1: 2}\n", "the key 1 is not text; quote it (line 2"),
    ("model:\n  args: {a: !!python/object:os.system x}\n", "could not determine a constructor"),
    ("model:\n  args: {a: !!set {b}}\n", "model.args is {'a': {'b'}}; expected a mapping"),
    ("1: {a: 2}\n", "the key 1 is not text"),
    ("run: {seed: 1\n", "FILE is not valid YAML: while parsing a flow mapping"),
    ("run:\n\tseed: 1\n", "FILE is not valid YAML: while scanning for the next token"),
    ("run:\n  seed: 1\n---\nrun:\n  seed: 2\n", "FILE is not valid YAML: expected a single document"),
    ("run:\n  seed: " + "9" * 5000 + "\n", "FILE is not valid YAML: Exceeds the limit"),
    ("model:\n  args: {a: " + "[" * 5000 + "\n", "FILE is not valid YAML: nested too deeply"),
    ("", "FILE holds no sections"),
    ("# nothing\n", "FILE holds no sections"),
    ("[1, 2]\n", "FILE holds no sections"),
    ("just text\n", "FILE holds no sections"),
    ("extends: 3\n", "extends is 3; expected the name of a file or a list of names (FILE, line 1)"),
    ("extends: [a.yaml, 3]\n", "extends is ['a.yaml', 3]"),
    ("extends: nowhere.yaml\n", "nowhere.yaml does not exist"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=[repr(text[:30]) for text, _ in BAD_FILES])
def test_bad_file_is_one_sentence_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        train_config("--config", write(tmp_path / "a.yaml", text))
    assert message.replace("FILE", str(tmp_path / "a.yaml")) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_option_does_not_take_the_next_for_its_value() -> None:
    with pytest.raises(UserError, match=r"^--data\.flip needs a value"):
        train_config("--data.flip", "--train.epochs", "3")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        train_config("--config", str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"run: {dir: \xe9}\n")
    with pytest.raises(UserError, match=r"latin\.yaml is not UTF-8 text"):
        train_config("--config", str(tmp_path / "latin.yaml"))
    (tmp_path / "digits.yaml").write_text("run: {seed: 1}")
    with pytest.raises(UserError, match=r"digit\.yaml does not exist; did you mean .*digits\.yaml\?"):
        train_config("--config", str(tmp_path / "digit.yaml"))


@pytest.mark.parametrize("missing", REQUIRED_KEYS)
def test_missing_required_key_is_named(missing: str) -> None:
    name = missing[2:].partition("=")[0]
    with pytest.raises(UserError, match=f"^{name} is missing; expected in a --config file"):
        parse(TrainConfig, [option for option in REQUIRED_KEYS if option != missing])


def test_a_mistake_that_is_overridden_is_still_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.lr is 'high'; expected a number, at least 0 \(.*a\.yaml, line 1\)"):
        train_config("--config", write(tmp_path / "a.yaml", "train: {lr: high}\n"), "--train.lr=0.1")
    with pytest.raises(UserError, match=r"train\.lr is 'high'"):
        train_config("--train.lr=high", "--train.lr=0.1")


def test_all_missing_keys_are_named_together() -> None:
    with pytest.raises(UserError, match=r"^run\.dir, data\.train, data\.val and model\.name are missing"):
        parse(TrainConfig, [])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "run.dir, data.train, data.val and model.name are missing"),
        ({"train": 3}, "train is 3; expected a mapping of keys"),
        ({"tarin": {}}, "unknown section 'tarin'; did you mean train?"),
        ({3: {}}, "unknown section '3'; expected one of run, data, model, heads, train"),
        ({"train": {"epoch": 3}}, "unknown key train.epoch; did you mean train.epochs?"),
        ({"model": {"args": {"a": object()}}}, "model.args is "),
        ({"model": {"args": {1: 2}}}, "model.args is {1: 2}"),
        ({"run": {"dir": "a\0b"}}, "run.dir is 'a\\x00b'"),
        ({"train": {"lr": 10**400}}, "train.lr is 1000"),
    ],
)
def test_from_dict_is_as_strict(data: dict[Any, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(TrainConfig, data)
    assert str(caught.value).startswith(message)
