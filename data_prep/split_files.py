"""Files that hold many images each (parquet, tar): which of them are train and which are validation, in which order."""

from glob import glob, has_magic
from pathlib import Path
import re

from data_prep.folder import natural_key
from rlp.errors import UserError

_TRAIN = "train"
_VALIDATION = ("validation", "val", "test")
"""Words for the validation split; the first that some file has in its name is taken."""
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join((_TRAIN, *_VALIDATION))})(?![a-z])", re.IGNORECASE)
_PART = re.compile(r"-(\d+)-of-(\d+)(?=[-.])")


def find_split_files(path: Path, suffix: str) -> tuple[list[Path], list[Path]]:
    """The files of the training and of the validation split, each in natural order.

    A file's split is the first of train, validation, val and test that is a word of its name (``train-00000.tar``,
    ``imagenet-val-3.tar``), or else its folder's name. Where all are of one split, or none has one, they are one set
    and the second list is empty.

    Args:
        path: a file, a pattern of files (``shards/train-*.tar``), a folder of files, or a folder of such folders.
        suffix: what the files end in.

    Raises:
        UserError: there are none, a split is unclear, or parts (``-00003-of-00008``) of a folder's are missing.
    """
    groups: dict[str | None, list[Path]] = {}
    for file in _listed(path, suffix):
        groups.setdefault(_split_of(file), []).append(file)
    if path.is_dir():
        for files in groups.values():
            _check_whole(path, files)
    if len(groups) == 1:
        return next(iter(groups.values())), []
    if None in groups:
        raise UserError(
            f"{groups[None][0]} says no split; expected train, validation, val or test in each name or none"
        )
    validation = next((groups[name] for name in _VALIDATION if name in groups), None)
    if _TRAIN not in groups or validation is None:
        raise UserError(f"{path} has {suffix} files of {' and '.join(map(str, groups))}, but none of {_TRAIN}")
    return groups[_TRAIN], validation


def _listed(path: Path, suffix: str) -> list[Path]:
    if path.is_dir():
        found = [*path.glob(f"*{suffix}")] or [*path.glob(f"*/*{suffix}")]
    elif has_magic(str(path)) and not path.exists():
        found = [Path(name) for name in glob(str(path))]
    else:
        found = [path]
    files = [file for file in found if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise UserError(f"{path} has no {suffix} file; source.path must name one, a folder or a pattern of them")
    if odd := [file for file in files if file.suffix != suffix]:
        raise UserError(f"{odd[0]} is not a {suffix} file; compressed or other files cannot be read piece by piece")
    return sorted(files, key=lambda file: natural_key(file.as_posix()))


def _split_of(file: Path) -> str | None:
    found = _SPLIT.search(file.name) or _SPLIT.fullmatch(file.absolute().parent.name)
    return found[1].lower() if found else None


def _check_whole(path: Path, files: list[Path]) -> None:
    """Shards of one set in one folder, and all of them there where their names say how many there are."""
    if other := [file for file in files if file.parent != files[0].parent]:
        raise UserError(
            f"{path} has sets in {files[0].parent} and {other[0].parent}; source.path must name one of them"
        )
    numbered = [part for file in files if (part := _PART.search(file.name))]
    if not numbered:
        return
    there, counts = sorted(int(part[1]) for part in numbered), {int(part[2]) for part in numbered}
    if len(counts) > 1 or there != list(range(max(counts))):
        missing = min(set(range(max(counts))) - set(there), default=None)
        fault = f"part {missing} is missing" if missing is not None else "some parts are there twice"
        raise UserError(f"{files[0]} is one of {max(counts)} parts, of which {len(files)} are there: {fault}")
