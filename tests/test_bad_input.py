"""Forty kinds of bad input: each one clear sentence, exit status non-zero, nothing half-written.

Every case names a script, how the input is spoilt, and what the sentence must contain. The scripts run in this
process, as their ``__main__`` would run them.
"""

from collections.abc import Callable
from pathlib import Path
import shutil
from typing import Any

import numpy as np
from PIL import Image
import pytest
from small_sets import change_card, write_set
from tiny_run import CLASSES, tiny_settings, write_tiny_sets
import torch
import yaml

from data_prep import write_datasets
from rlp.errors import exit_on_user_error
import train_rlp

Spoil = Callable[[Path], list[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_sets(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_settings(tmp_path, train__epochs=1)))
    return tmp_path


def finished_run(folder: Path) -> Path:
    """A run to resume; returns its newest checkpoint."""
    train_rlp.main(["--config", str(folder / "config.yaml")])
    return max((folder / "run" / "checkpoints").glob("step-*.pt"))


def edit_card(folder: Path, **changes: Any) -> list[str]:
    change_card(folder / "train.beton", **changes)
    return []


def edit_file(name: str, change: Callable[[bytearray], Any]) -> Spoil:
    def spoil(folder: Path) -> list[str]:
        content = bytearray((folder / name).read_bytes())
        change(content)
        (folder / name).write_bytes(content)
        return []

    return spoil


def write_config(text: str) -> Spoil:
    def spoil(folder: Path) -> list[str]:
        (folder / "more.yaml").write_text(text)
        return ["--config", str(folder / "more.yaml")]

    return spoil


def remove(name: str) -> Spoil:
    def spoil(folder: Path) -> list[str]:
        (folder / name).unlink()
        return []

    return spoil


def add(*arguments: str) -> Spoil:
    return lambda folder: [argument.format(folder=folder) for argument in arguments]


def damaged_checkpoint(folder: Path) -> list[str]:
    path = finished_run(folder)
    path.write_bytes(path.read_bytes()[:-2000])
    return ["--run.resume", "auto"]


def resumed_with(*arguments: str) -> Spoil:
    def spoil(folder: Path) -> list[str]:
        finished_run(folder)
        return ["--run.resume", "auto", *arguments]

    return spoil


def other_data(folder: Path) -> list[str]:
    finished_run(folder)
    write_tiny_sets(folder, train=60)
    return ["--run.resume", "auto"]


def sizes_that_differ(folder: Path) -> list[str]:
    images = [np.full((16 + i % 2, 16, 3), i, np.uint8) for i in range(100)]
    write_set(folder / "train.beton", images, CLASSES)
    return []


def other_classes(folder: Path) -> list[str]:
    change_card(folder / "val.beton", classes=["a", "b", "c", "d"])
    return []


def folder_of_thesis(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("years of work")
    return ["--run.overwrite", "true"]


def weights_of_another_model(folder: Path) -> list[str]:
    torch.save({"conv.weight": torch.zeros(1)}, folder / "w.pt")
    return ["--model.weights", str(folder / "w.pt")]


TRAIN: dict[str, tuple[Spoil, str]] = {
    # configuration
    "unknown key": (add("--train.ephocs", "3"), r"train\.ephocs.*epochs"),
    "unknown section": (add("--trian.epochs", "3"), r"trian.*train"),
    "abbreviated key": (add("--train.epoch", "3"), r"train\.epoch\b"),
    "no integer": (add("--train.epochs", "2.9"), r"train\.epochs.*2\.9"),
    "no number": (add("--train.lr", "fast"), r"train\.lr.*fast"),
    "not a number": (add("--train.lr", "nan"), r"train\.lr"),
    "no boolean": (add("--data.flip", "perhaps"), r"data\.flip.*perhaps"),
    "out of range": (add("--data.label_noise", "1.5"), r"data\.label_noise.*1\.5"),
    "no such choice": (add("--train.optimizer", "adam"), r"train\.optimizer.*adam"),
    "value missing": (add("--train.lr"), r"train\.lr"),
    "two ways to give lambda": (add("--heads.lam", "1", "--heads.lam_over_n", "1"), r"heads\.lam_over_n"),
    "config file missing": (add("--config", "{folder}/absent.yaml"), r"absent\.yaml"),
    "ill-formed YAML": (write_config("train: {epochs: 3"), r"more\.yaml.*line"),
    "key twice in YAML": (write_config("train: {lr: 1}\ntrain: {lr: 2}\n"), r"more\.yaml.*train"),
    "extends itself": (write_config("extends: more.yaml\n"), r"more\.yaml"),
    "section is no mapping": (write_config("train: 3\n"), r"train"),
    # data and cards
    "data missing": (remove("train.beton"), r"train\.beton does not exist"),
    "card missing": (remove("train.json"), r"train\.json is missing"),
    "card is no JSON": (edit_file("train.json", lambda c: c.extend(b"}")), r"train\.json is not a card"),
    "card of the future": (lambda f: edit_card(f, schema=3), r"schema 3"),
    "card without a key": (edit_file("train.json", lambda c: c.__setitem__(slice(8, 9), b"X")), r"train\.json"),
    "card lies about the count": (lambda f: edit_card(f, num_samples=7), r"num_samples"),
    "file cut short": (edit_file("train.beton", lambda c: c.__delitem__(slice(-100, None))), r"train\.beton has"),
    "header damaged": (edit_file("train.beton", lambda c: c.__setitem__(2, 99)), r"train\.beton"),
    "pixel damaged": (edit_file("train.beton", lambda c: c.__setitem__(-20_000, c[-20_000] ^ 1)), r"damaged"),
    "other file's card": (lambda f: [str(shutil.copy(f / "val.json", f / "train.json"))][:0], r"train\.beton"),
    "sizes differ": (sizes_that_differ, r"data\.train .*up to 16x17 px.*data\.image_size"),
    "classes differ": (other_classes, r"data\.val .* other classes than data\.train"),
    "batch larger than the set": (add("--data.batch_size", "101"), r"data\.batch_size is 101"),
    "no member left": (add("--data.member_fraction", "0.0001"), r"data\.(member_fraction|batch_size)"),
    "draws not in the file": (add("--heads.draws", "4"), r"heads\.draws is 4.* holds 3 draws"),
    # model and heads
    "unknown model": (add("--model.name", "smal_cnn"), r"smal_cnn.*small_cnn"),
    "unknown model argument": (add("--model.args.droput", "0.1"), r"model\.args.*droput"),
    "classes in the model's arguments": (add("--model.args.num_classes", "7"), r"model\.args has 'num_classes'"),
    "unknown tap": (add("--heads.taps", "blocks1"), r"blocks1.*block1"),
    "unknown pooling": (add("--heads.pool", "median"), r"median"),
    "weights of another model": (weights_of_another_model, r"model\.weights.*w\.pt"),
    "no CUDA device": (add("--run.device", "cuda"), r"run\.device is 'cuda'"),
    "fp16 on the CPU": (add("--train.amp", "fp16"), r"train\.amp"),
    # run folder and checkpoints
    "folder in use": (lambda f: [str(finished_run(f))][:0], r"run\.resume auto"),
    "folder of somebody": (folder_of_thesis, r"thesis\.tex"),
    "resume and overwrite": (add("--run.resume", "auto", "--run.overwrite", "true"), r"exclude each other"),
    "no such checkpoint": (add("--run.resume", "{folder}/step-1.pt"), r"no checkpoint at .*step-1\.pt"),
    "checkpoint is a config": (add("--run.resume", "{folder}/config.yaml"), r"config\.yaml cannot be read"),
    "checkpoint cut short": (damaged_checkpoint, r"step-000000005\.pt cannot be read"),
    "resumed with another rate": (resumed_with("--train.lr", "0.7"), r"train\.lr is 0\.7"),
    "resumed with other data": (other_data, r"data\.train is not the file"),
}


@pytest.mark.parametrize("case", TRAIN)
def test_training_refuses(folder, case, capsys):
    if case == "no CUDA device" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    spoil, expected = TRAIN[case]
    arguments = ["--config", str(folder / "config.yaml"), *spoil(folder)]
    before = snapshot(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        train_rlp.main(arguments)
    check_refusal(stop.value.code, capsys.readouterr().err, expected)
    assert snapshot(folder) == before, "something was written"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_refusal(status: Any, stderr: str, expected: str) -> None:
    assert status == 2
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in stderr
    import re

    assert re.search(expected, lines[0]), lines[0]


def image_folder(folder: Path) -> Path:
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{number}.png")
    return folder / "images"


def spoilt_image(content: bytes) -> Spoil:
    def spoil(folder: Path) -> list[str]:
        (folder / "images" / "train" / "dog" / "1.png").write_bytes(content)
        return []

    return spoil


def grey_image(folder: Path) -> list[str]:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "images" / "train" / "dog" / "1.png")
    return []


def missing_class(folder: Path) -> list[str]:
    shutil.rmtree(folder / "images" / "val" / "dog")
    return []


def empty_class(folder: Path) -> list[str]:
    for path in (folder / "images" / "train" / "dog").iterdir():
        path.unlink()
    return []


def stray_file(folder: Path) -> list[str]:
    (folder / "images" / "train" / "dog" / "notes.docx").write_text("x")
    return []


def output_in_use(folder: Path) -> list[str]:
    shutil.copy(folder / "train.beton", folder / "out.beton")
    shutil.copy(folder / "train.json", folder / "out.json")
    return ["--output.train", str(folder / "out.beton")]


def bad_arrays(**arrays: np.ndarray) -> Spoil:
    def spoil(folder: Path) -> list[str]:
        np.savez(folder / "a.npz", **arrays)  # type: ignore[arg-type]
        return ["--source.kind", "npz", "--source.path", str(folder / "a.npz")]

    return spoil


PREPARE: dict[str, tuple[Spoil, str]] = {
    "no such folder": (add("--source.path", "{folder}/absent"), r"absent"),
    "text named png": (spoilt_image(b"not an image"), r"dog/1\.png"),
    "truncated png": (spoilt_image(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"), r"dog/1\.png"),
    "empty file": (spoilt_image(b""), r"dog/1\.png"),
    "grey image": (grey_image, r"dog/1\.png.*source\.convert_rgb"),
    "class missing in one split": (missing_class, r"dog"),
    "class without images": (empty_class, r"dog"),
    "stray file": (stray_file, r"notes\.docx"),
    "output in use": (output_in_use, r"output\.overwrite true"),
    "outputs are one file": (add("--output.val", "{folder}/o-train.beton"), r"output\.val"),
    "output without ending": (add("--output.val", "{folder}/o"), r"output\.val.*\.beton"),
    "labels are floats": (bad_arrays(x=np.zeros((9, 8, 8, 3), np.uint8), y=np.zeros(9)), r"a\.npz"),
    "images are floats": (bad_arrays(x=np.zeros((9, 8, 8, 3)), y=np.zeros(9, np.int64)), r"a\.npz"),
    "fewer labels than images": (bad_arrays(x=np.zeros((9, 8, 8, 3), np.uint8), y=np.zeros(8, np.int64)), r"a\.npz"),
    "smart without a threshold": (add("--image.mode", "smart"), r"image\.smart_threshold"),
    "unknown source": (add("--source.kind", "flickr"), r"source\.kind.*flickr"),
}


@pytest.mark.parametrize("case", PREPARE)
def test_preparation_refuses(folder, case, capsys):
    source = image_folder(folder)
    spoil, expected = PREPARE[case]
    arguments = ["--source.kind", "folder", "--source.path", str(source), "--output.workers", "1"]
    arguments += ["--output.train", str(folder / "o-train.beton"), "--output.val", str(folder / "o-val.beton")]
    arguments += spoil(folder)
    before = snapshot(folder)
    status = write_datasets.main(arguments)
    stderr = capsys.readouterr().err
    errors = [line for line in stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    check_refusal(status, "\n".join(errors), expected)
    assert snapshot(folder) == before, "something was written"
