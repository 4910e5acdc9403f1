"""Images in parquet files, as Hugging Face's data sets keep them: a column of encoded images, a column of labels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
import json
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.samples import OnDemand, Samples
from data_prep.split_files import find_split_files
from rlp.errors import UserError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target")
"""Where a column is not named: the first of these that is there."""
_BATCH = 64  # rows in memory at a time
_BUFFER = 1 << 20  # bytes read at a time; without it a whole row group is read at once, which may be the whole file


@dataclass(frozen=True)
class _Table:
    """One file.

    Attributes:
        path: of the file.
        labels: int64 [N].
        class_names: from the file's metadata, None if they are not there.
        image: the column of encoded images as parquet calls it: ``image``, or ``image.bytes`` of a struct.
        group_rows: rows of each row group.
    """

    path: Path
    labels: np.ndarray
    class_names: list[str] | None
    image: str
    group_rows: list[int]


def read_parquet(
    path: Path, image_column: str | None, label_column: str | None
) -> tuple[list[str] | None, Samples, Samples | None, list[Path]]:
    """Class names, training samples, validation samples (None where there are none) and all files.

    Labels are read now, images one batch of rows at a time when they are written. Names come from the metadata of
    Hugging Face's ``ClassLabel``; None where there is none.

    Args:
        path: a file, a pattern or a folder, see :func:`~data_prep.split_files.find_split_files`.
        image_column: encoded images, binary or a struct with a binary field ``bytes``; None for IMAGE_COLUMNS.
        label_column: integers from 0; None for LABEL_COLUMNS.

    Raises:
        UserError: pyarrow or a file is missing, a file is damaged, or a column is missing or of another type.
    """
    _pyarrow()
    train, val = (
        [_read_table(file, image_column, label_column) for file in files]
        for files in find_split_files(path, ".parquet")
    )
    tables = [*train, *val]
    first = tables[0]
    if odd := [table for table in tables if table.class_names != first.class_names]:
        raise UserError(f"{odd[0].path} and {first.path} name the classes differently; expected one list in all files")
    return first.class_names, _samples(train), _samples(val) if val else None, [table.path for table in tables]


def _read_table(path: Path, image_column: str | None, label_column: str | None) -> _Table:
    pa, parquet = _pyarrow()
    with _explained(path), parquet.ParquetFile(path) as file:
        schema, metadata = file.schema_arrow, file.metadata  # of metadata no column: pyarrow aborts if it is damaged
        label = _column(path, schema.names, "label", label_column, LABEL_COLUMNS)
        image = _binary_column(path, schema.field(_column(path, schema.names, "image", image_column, IMAGE_COLUMNS)))
        if not pa.types.is_integer(schema.field(label).type):
            raise UserError(f"{path}: column '{label}' is {schema.field(label).type}; expected integers from 0")
        labels = file.read(columns=[label]).column(label)
    if labels.null_count:
        raise UserError(f"{path}: column '{label}' has {labels.null_count} rows without a label; expected one in each")
    group_rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if not len(labels) == sum(group_rows) == metadata.num_rows:
        raise UserError(
            f"{path} is damaged: it counts {metadata.num_rows} rows, {sum(group_rows)} in groups, {len(labels)} labels"
        )
    return _Table(path, labels.to_numpy().astype(np.int64), _class_names(path, schema, label), image, group_rows)


def _column(path: Path, names: list[str], what: str, asked: str | None, usual: Sequence[str]) -> str:
    found = next((name for name in ([asked] if asked else usual) if name in names), None)
    if found is None:
        expected = f"'{asked}'" if asked else " or ".join(usual)
        raise UserError(
            f"{path} has no column {expected} (source.{what}_column); its columns are {', '.join(names) or 'none'}"
        )
    if names.count(found) > 1:
        raise UserError(f"{path} has the column '{found}' twice; expected every name once")
    return found


def _binary_column(path: Path, field: Any) -> str:
    types = _pyarrow()[0].types
    binary = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    if any(is_binary(field.type) for is_binary in binary):
        return field.name
    inner = field.type.get_field_index("bytes") if types.is_struct(field.type) else -1
    if inner >= 0 and any(is_binary(field.type.field(inner).type) for is_binary in binary):
        return f"{field.name}.bytes"
    raise UserError(
        f"{path}: column '{field.name}' is {field.type}; expected images, binary or a struct with binary 'bytes'"
    )


def _class_names(path: Path, schema: Any, label: str) -> list[str] | None:
    """Names that Hugging Face's metadata gives the labels; None when it gives none."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        names = json.loads(text)["info"]["features"].get(label, {}).get("names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: its metadata 'huggingface' is not that of a data set with features") from None
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{path}: the names of column '{label}' in its metadata are not a list of texts")
    return names


def _samples(tables: list[_Table]) -> Samples:
    names = [f"{table.path.name}[{row}]" for table in tables for row in range(len(table.labels))]
    labels = np.concatenate([table.labels for table in tables])
    return Samples(names, labels, OnDemand(_Reader(tables, names), np.arange(len(labels))))


class _Reader:
    """Reads images by row of all files. Going forward it reads each page once; a page and a batch of rows are in memory
    (pages are of 1 MB, or of 1024 rows if these are larger, where the writer of the file chose nothing else)."""

    def __init__(self, tables: list[_Table], names: list[str]) -> None:
        self._names = names
        self._groups = [(table, group) for table in tables for group in range(len(table.group_rows))]
        self._starts = np.cumsum([0, *(rows for table in tables for rows in table.group_rows)])
        self._group = -1
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = ()
        self._first = 0  # row of the first image in the batch

    def __call__(self, row: int) -> bytes:
        group = int(np.searchsorted(self._starts, row, "right")) - 1
        table, number = self._groups[group]
        if group != self._group or row < self._first:
            self._group, self._batches = group, _batches(table, number)
            self._batch, self._first = (), int(self._starts[group])
        while row >= self._first + len(self._batch):
            self._first += len(self._batch)
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise UserError(f"{self._names[row]} cannot be read: its file has fewer images than it counts rows")
        content = self._batch[row - self._first].as_py()
        if content is None:
            raise UserError(
                f"{self._names[row]} is without bytes in '{table.image}'; expected encoded images, not paths or nothing"
            )
        return content


def _batches(table: _Table, group: int) -> Iterator[Any]:
    """The images of a row group, arrays of pyarrow of some rows each."""
    pa, parquet = _pyarrow()
    with (
        _explained(table.path),
        parquet.ParquetFile(table.path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True) as file,
    ):
        for batch in file.iter_batches(_BATCH, [group], [table.image], use_threads=False):
            column = batch.column(0)
            yield column.field("bytes") if pa.types.is_struct(column.type) else column


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("source.kind parquet needs pyarrow; pip install pyarrow") from None
    return pyarrow, pyarrow.parquet


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises on a damaged file into a sentence."""
    try:
        yield
    except (OSError, ValueError, _pyarrow()[0].ArrowException) as error:  # ValueError: names that are no UTF-8
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as a parquet file: {reason}") from None
