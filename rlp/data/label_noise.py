"""Given labels that are not the true ones: by chance in several ways, or from a file such as CIFAR-N's."""

import csv
from pathlib import Path
import re
from typing import Any, Literal

import numpy as np

from rlp.data.beton import Beton
from rlp.errors import UserError
from rlp.labels import WORD_RANGE, named_word, noisy_labels

NoiseKind = Literal["symmetric", "pair", "asymmetric"]

CIFAR10_MAP = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
"""Classes that are mistaken for one another (Patrini et al., "Making Deep Neural Networks Robust to Label Noise",
CVPR 2017); the others stay."""

CIFAR100_SUPERCLASSES = """
beaver dolphin otter seal whale; aquarium_fish flatfish ray shark trout; orchid poppy rose sunflower tulip;
bottle bowl can cup plate; apple mushroom orange pear sweet_pepper; clock keyboard lamp telephone television;
bed chair couch table wardrobe; bee beetle butterfly caterpillar cockroach; bear leopard lion tiger wolf;
bridge castle house road skyscraper; cloud forest mountain plain sea; camel cattle chimpanzee elephant kangaroo;
fox porcupine possum raccoon skunk; crab lobster snail spider worm; baby boy girl man woman;
crocodile dinosaur lizard snake turtle; hamster mouse rabbit shrew squirrel;
maple_tree oak_tree palm_tree pine_tree willow_tree; bicycle bus motorcycle pickup_truck train;
lawn_mower rocket streetcar tank tractor
"""
"""CIFAR-100's twenty groups of five; under asymmetric noise each class is mistaken for the next of its group."""


def given_labels(beton: Beton, rate: float, kind: NoiseKind) -> np.ndarray:
    """Labels of all rows, wrong with probability ``rate`` by the named words of the set; int64 [N].

    ``symmetric``: any other class, all equally likely. ``pair``: class c becomes c + 1 (the last one the first).
    ``asymmetric``: similar classes of CIFAR-10 or CIFAR-100, known by the names of the classes; a class that resembles
    none keeps its label, so that fewer than ``rate`` of all labels are wrong.
    """
    card, classes = beton.card, len(beton.card.classes)
    if classes < 2:
        raise UserError(f"data.label_noise is {rate}, but {beton.path} has one class; expected at least two")
    # The stored words are these; computing them spares reading every sample's page of a large file.
    noise = named_word(card.words_seed, beton.index, "noise", card.split)
    if kind == "symmetric":
        noise_class = named_word(card.words_seed, beton.index, "noise_class", card.split)
        return noisy_labels(beton.label, noise, noise_class, rate, classes)
    target = np.roll(np.arange(classes), -1) if kind == "pair" else _asymmetric_targets(beton)
    return np.where(noise < round(rate * WORD_RANGE), target[beton.label], beton.label)


def _asymmetric_targets(beton: Beton) -> np.ndarray:
    # "cra" is how Hugging Face's CIFAR-100 spells it.
    names = ["crab" if name == "cra" else name for name in beton.card.classes]
    mistaken = dict(CIFAR10_MAP)
    if "airplane" not in names:
        groups = [group.split() for group in CIFAR100_SUPERCLASSES.split(";")]
        mistaken = {name: group[(i + 1) % 5] for group in groups for i, name in enumerate(group)}
    if not set(mistaken) | set(mistaken.values()) <= set(names):
        raise UserError(
            "data.noise_kind is asymmetric, which is known for the classes of CIFAR-10 and CIFAR-100; "
            f"{beton.path} has {len(names)} classes ({', '.join(names[:3])}, ...)"
        )
    return np.array([names.index(mistaken.get(name, name)) for name in names])


def labels_from_file(beton: Beton, path: str | Path, key: str | None) -> tuple[np.ndarray, str]:
    """Given labels of all rows, int64 [N], and what to call them.

    The file holds one integer in [0, C) for every sample of the set, in the order of the sample ids: ``.npy``; ``.npz``
    or ``.pt`` with several arrays by name, as CIFAR-10N and CIFAR-100N are published (Wei et al., arXiv 2110.12088);
    ``.csv`` or ``.txt`` with one column, or with a header. ``key`` names the array or column where there are several.
    An array ``clean_label`` beside it must equal the true labels: else the labels belong to another order of samples.

    Raises:
        UserError: the file cannot be read, or does not fit the set.
    """
    path = Path(path)
    columns = _read_columns(path)
    if key is None and len(columns) > 1:
        raise UserError(f"data.label_key is null, but {path} holds {', '.join(columns)}; expected one of them")
    key = key if key is not None else next(iter(columns))
    if key not in columns:
        raise UserError(f"data.label_key is '{key}', but {path} holds {', '.join(columns)}; expected one of them")
    label = _checked(beton, columns[key], f"{path}: {key}")
    if "clean_label" in columns:
        clean = _checked(beton, columns["clean_label"], f"{path}: clean_label")
        differs = np.flatnonzero(clean != beton.label)
        if len(differs):
            raise UserError(
                f"{path}: clean_label is {clean[differs[0]]} for sample {beton.index[differs[0]]}, whose class in "
                f"{beton.path} is {beton.label[differs[0]]}; expected labels in the order of this set"
            )
    return label, f"data.label_file {path.name}" + (f" ({key})" if len(columns) > 1 else "")


def _checked(beton: Beton, values: np.ndarray, where: str) -> np.ndarray:
    ids, classes = beton.index, len(beton.card.classes)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise UserError(f"{where} is {values.dtype} of shape {values.shape}; expected one integer for each sample")
    is_shard = re.search(r"-\d{5}-of-\d{5}$", beton.path.stem) is not None  # of a set whose size it does not know
    if len(values) <= ids.max() or (len(values) != len(ids) and not is_shard):
        raise UserError(f"{where} has {len(values)} labels; expected one for each of the {ids.max() + 1} samples")
    values = values[ids]
    if values.min() < 0 or values.max() >= classes:
        wrong = np.flatnonzero((values < 0) | (values >= classes))[0]
        raise UserError(f"{where} is {values[wrong]} for sample {ids[wrong]}; expected a class from 0 to {classes - 1}")
    return values.astype(np.int64)


def _read_columns(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name; the only one of a file without names is called ``labels``."""
    readers = {".npy": _npy, ".npz": _npz, ".pt": _pt, ".csv": _csv, ".txt": _csv}
    if path.suffix not in readers:
        raise UserError(f"data.label_file is '{path}'; expected a file ending in {', '.join(readers)}")
    try:
        columns = readers[path.suffix](path)
    except FileNotFoundError:
        raise UserError(f"data.label_file '{path}' does not exist") from None
    except Exception as error:  # damaged archives raise many kinds; each is an unreadable file to the user
        raise UserError(f"data.label_file '{path}' cannot be read: {error}") from None
    if not columns:
        raise UserError(f"data.label_file '{path}' holds no labels")
    return columns


def _npy(path: Path) -> dict[str, np.ndarray]:
    return {"labels": np.load(path, allow_pickle=False)}


def _npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def _pt(path: Path) -> dict[str, np.ndarray]:
    """CIFAR-N's files are dictionaries of pickled NumPy arrays; nothing else is unpickled."""
    import torch

    kinds: list[Any] = [np.ndarray, np.dtype, np.empty(0).__reduce__()[0], type(np.dtype(np.int64))]
    kinds += [type(np.dtype(np.int32)), type(np.dtype(np.uint8)), np.float64(0).__reduce__()[0]]
    names = [(kinds[2], "numpy.core.multiarray._reconstruct"), (kinds[-1], "numpy.core.multiarray.scalar")]
    with torch.serialization.safe_globals([*kinds, *names]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        content = {"labels": content}
    arrays = {str(name): np.asarray(value) for name, value in content.items()}
    return {name: array for name, array in arrays.items() if array.ndim == 1}


def _csv(path: Path) -> dict[str, np.ndarray]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = [line for line in csv.reader(file) if line]
    if not lines:
        return {}
    has_header = _integers(lines[0]).dtype.kind != "i"
    names = [name.strip() for name in lines[0]] if has_header else ["labels"]
    if len(set(names)) < len(names):
        raise ValueError(f"two columns of the header have one name: {', '.join(names)}")
    rows = lines[1:] if has_header else lines
    if odd := [number for number, row in enumerate(rows, 1 + has_header) if len(row) != len(names)]:
        raise ValueError(f"line {odd[0]} does not have {len(names)} values")
    return {name: _integers([row[column] for row in rows]) for column, name in enumerate(names)}


def _integers(texts: list[str]) -> np.ndarray:
    """Integers where all are; a column of anything else stays text, and is refused only when it is asked for."""
    try:
        return np.array([int(text) for text in texts], np.int64)
    except ValueError:
        return np.array(texts)
