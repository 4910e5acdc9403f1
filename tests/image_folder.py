"""A small folder of images, requests to write it, and the script as a process."""

import os
from pathlib import Path
import subprocess
import sys

from PIL import Image
from small_sets import random_images

from data_prep.schema import ImageConfig, OutputConfig, PrepareConfig, SourceConfig, WordsConfig
from rlp.data.beton import Beton
from rlp.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PAIR = ["train.beton", "train.json", "val.beton", "val.json"]


def make_source(tmp_path: Path) -> Path:
    """Two classes, 20 training and 6 validation images of 12 x 10 pixels, as JPEG and PNG files."""
    pixels = iter(random_images(26, 10, 12))
    for split, count in (("train", 10), ("val", 3)):
        for name in ("ant", "bee"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(next(pixels)).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    return tmp_path / "images"


def request(
    source: Path,
    out: Path,
    image: dict[str, object] | None = None,
    words: dict[str, object] | None = None,
    **output: object,
) -> PrepareConfig:
    return PrepareConfig(
        output=OutputConfig(train=str(out / "train.beton"), val=str(out / "val.beton"), **output),  # type: ignore[arg-type]
        source=SourceConfig(kind="folder", path=str(source)),
        image=ImageConfig(**(image or {})),  # type: ignore[arg-type]
        words=WordsConfig(**{"draws": 3, **(words or {})}),  # type: ignore[arg-type]
    )


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def seed_of(beton: Path) -> int | None:
    """Seed of the words in a .beton that opens, None for one that is refused."""
    try:
        return Beton.open(beton, full_hash=True).card.words_seed
    except UserError:
        return None


def run_script(*options: str, **popen: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "data_prep" / "write_datasets.py"), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, **popen)  # type: ignore[call-overload]


def options_of(source: Path, out: Path, *more: str) -> list[str]:
    paths = ["--output.train", str(out / "train.beton"), "--output.val", str(out / "val.beton")]
    return ["--source.kind", "folder", "--source.path", str(source), *paths, *more]
