"""Small sources in the published formats, made of a few images whose bytes the tests know; and the script's answer."""

from collections.abc import Mapping, Sequence
import io
import json
from pathlib import Path
import signal
import tarfile
from typing import Any

import numpy as np
from PIL import Image

from data_prep import write_datasets
from data_prep.encode import Sample, _read
from data_prep.samples import Samples
from data_prep.schema import SourceConfig
from data_prep.sources import Source, open_source


def encoded(seed: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """An image file of 10 x 12 pixels of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def contents(samples: Samples) -> list[bytes]:
    """What a worker reads of every sample."""
    return [file_bytes(sample) for sample in samples.rows(0, len(samples))]


def file_bytes(sample: Sample) -> bytes:
    found = _read(sample)
    assert isinstance(found, bytes)
    return found


def opened(kind: str, path: Path | str, **options: Any) -> Source:
    return open_source(SourceConfig(kind=kind, path=str(path), **options))  # type: ignore[arg-type]


def write_pair(kind: str, path: Path | str, out: Path, *more: str) -> int:
    """Write a source to train.beton and val.beton in a folder; returns the exit status."""
    paths = ["--output.train", str(out / "train.beton"), "--output.val", str(out / "val.beton")]
    return run_here("--source.kind", kind, "--source.path", str(path), *paths, *more)


def run_here(*options: str) -> int:
    """The script's exit status; it runs in this process, whose handler of SIGTERM it leaves as it was."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return write_datasets.main(options)
    finally:
        signal.signal(signal.SIGTERM, handler)


def refusal(capsys: Any, kind: str, path: Path | str, out: Path, *more: str) -> str:
    """The one sentence in which the script ends with status 2, having written nothing."""
    assert write_pair(kind, path, out, *more) == 2
    assert not out.exists() or not list(out.iterdir())
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    return errors[0]


# WebDataset


def make_tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> Path:
    """A tar of these members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def samples_of(seeds: Sequence[int], classes: int = 2, extension: str = "cls") -> dict[str, bytes]:
    """Members of one JPEG and one label a sample; sample ``i`` is of class ``i % classes``."""
    members = {}
    for seed in seeds:
        members[f"{seed:06d}.jpg"] = encoded(seed)
        label = json.dumps({"label": seed % classes}) if extension == "json" else str(seed % classes)
        members[f"{seed:06d}.{extension}"] = label.encode()
    return members


# Parquet


def make_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None],
    names: Sequence[str] | None = None,
    columns: tuple[str, str] = ("image", "label"),
    plain: bool = False,
    **options: Any,
) -> Path:
    """A file as Hugging Face writes it: bytes and path in a struct (or plain binary), labels, their names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = list(images) if plain else [{"bytes": x, "path": f"{i}.jpg"} for i, x in enumerate(images)]
    image = pa.array(values, pa.binary() if plain else struct)
    table = pa.table({columns[0]: image, columns[1]: pa.array(labels, pa.int64())})
    if names is not None:
        label = {"names": list(names), "_type": "ClassLabel"}
        features = {columns[0]: {"_type": "Image"}, columns[1]: label}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


# Tiny ImageNet

TINY_TRAIN = {"n02": [10, 9, 2], "n01": [1, 5]}
TINY_VAL = [("val_10.JPEG", "n01"), ("val_9.JPEG", "n02"), ("val_0.JPEG", "n02")]


def tiny_imagenet_files() -> dict[str, bytes]:
    """The published layout: two classes, five training and three validation images, boxes, unlabelled test images."""
    boxes = "\t0\t0\t5\t5"
    files = {
        "wnids.txt": b"n02\nn01\n",
        "words.txt": b"n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tEuropean fire salamander\n",
        "val/val_annotations.txt": "".join(f"{name}\t{wnid}{boxes}\n" for name, wnid in TINY_VAL).encode(),
        "test/images/test_0.JPEG": encoded(99),
    }
    for wnid, numbers in TINY_TRAIN.items():
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"boxes"
        files |= {f"train/{wnid}/images/{wnid}_{i}.JPEG": encoded(i) for i in numbers}
    return files | {f"val/images/{name}": encoded(100 + i) for i, (name, _) in enumerate(TINY_VAL)}


def make_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root
