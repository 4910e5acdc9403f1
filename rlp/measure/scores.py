"""The table of samples: how well fresh heads knew the random labels of each; Parquet and CSV."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlp.errors import UserError
from rlp.files import write_atomically
from rlp.measure.features import FeatureSet
from rlp.measure.reading import Condition

if TYPE_CHECKING:
    import pandas as pd

SCORES = "scores.parquet"
COLUMNS = {
    "index": "sample id: the row of the .beton, which joins the table to images",
    "split": "split of the file that the sample lies in",
    "group": "members or non-members",
    "class": "name of the given class",
    "given": "given label",
    "true": "true label",
    "noisy": "whether they differ",
    "planted": "kind of planted truth, empty for none",
    "tap": "where features were taken",
    "depth": "of the tap, 0 is the shallowest",
    "n": "random labels",
    "N": "samples that heads were fitted to",
    "draws": "draws that the means are over",
    "protocol": "converged, views, budget or retrieval",
    "head": "kind of head, none for retrieval",
    "features": "what heads were given of the features, one of rlp.measure.preprocess.FEATURES",
    "mode": "the network's mode",
    "images": "clean or augmented",
    "log_p": "log-probability of the random label, mean over draws; null where the protocol has none",
    "margin": "its logit minus the largest other one, mean over draws; null likewise",
    "correct": "share of draws whose random label was right (of views or steps too, where the protocol has several)",
    "rank": "1 for the sample best known: by log_p, else by correct, within group and condition",
}
"""Names of the columns, and what they hold."""


@dataclass(frozen=True, kw_only=True)
class SampleScores:
    """Means over draws of one condition: ``log_p`` and ``margin`` float ``[N]`` (NaN for none), ``correct`` [N]."""

    condition: Condition
    samples: FeatureSet
    places: np.ndarray
    draws: int
    log_p: np.ndarray
    margin: np.ndarray
    correct: np.ndarray


def ranks(log_p: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """1 for the best known sample, int64 ``[N]``; equal samples rank in the order of their ids."""
    score = correct if np.isnan(log_p).any() else log_p
    rank = np.empty(len(score), np.int64)
    rank[np.argsort(-score, kind="stable")] = np.arange(1, len(score) + 1)
    return rank


def scores_table(parts: Sequence[SampleScores], classes: Sequence[str]) -> Any:
    """The parts one below the other as a ``pyarrow.Table`` with the columns :data:`COLUMNS`."""
    import pyarrow as pa

    names = np.array(classes, dtype=object)
    tables = [pa.table(_columns(part, names)) for part in parts]
    return pa.concat_tables(tables).combine_chunks() if tables else pa.table({name: [] for name in COLUMNS})


def _columns(part: SampleScores, names: np.ndarray) -> dict[str, Any]:
    import pyarrow as pa

    samples, where, condition = part.samples, part.places, part.condition
    count = len(where)

    def same(value: Any) -> Any:
        return pa.repeat(pa.scalar(value), count)

    given, true = samples.given[where], samples.true[where]
    columns = {
        "index": samples.ids[where],
        "split": same(samples.split),
        "group": same(samples.group),
        "class": pa.array(names[given].tolist(), pa.string()),
        "given": given,
        "true": true,
        "noisy": given != true,
        "planted": pa.array(samples.planted[where].tolist(), pa.string()),
        "tap": same(condition.tap),
        "depth": same(condition.depth),
        "n": same(condition.num_labels),
        "N": same(count),
        "draws": same(part.draws),
        "protocol": same(condition.protocol),
        "head": same(condition.head),
        "features": same(condition.features),
        "mode": same(condition.mode),
        "images": same(condition.images),
        "log_p": pa.array(part.log_p.astype(np.float32), from_pandas=True),  # NaN becomes null
        "margin": pa.array(part.margin.astype(np.float32), from_pandas=True),
        "correct": part.correct.astype(np.float32),
        "rank": ranks(part.log_p, part.correct),
    }
    assert list(columns) == list(COLUMNS)
    return columns


def samples_table(groups: Sequence[tuple[FeatureSet, Mapping[str, np.ndarray]]], classes: Sequence[str]) -> Any:
    """One row a sample, one column a score, as a ``pyarrow.Table``: what is known of samples, then the scores.

    Args:
        groups: samples, and scores of them by name, float ``[N]``; a score that a group lacks is null there, and so is
            one that is NaN.
        classes: names of the classes.
    """
    import pyarrow as pa

    names = np.array(classes, dtype=object)
    scores = list(dict.fromkeys(name for _, columns in groups for name in columns))
    tables = []
    for samples, columns in groups:
        missing = np.full(len(samples), np.nan)
        known = {
            "index": samples.ids,
            "split": pa.array([samples.split] * len(samples), pa.string()),
            "group": pa.array([samples.group] * len(samples), pa.string()),
            "class": pa.array(names[samples.given].tolist(), pa.string()),
            "given": samples.given,
            "true": samples.true,
            "noisy": samples.given != samples.true,
            "planted": pa.array(samples.planted.tolist(), pa.string()),
        }
        found = {name: pa.array(columns.get(name, missing).astype(np.float64), from_pandas=True) for name in scores}
        tables.append(pa.table(known | found))
    return pa.concat_tables(tables).combine_chunks()


def save_scores(folder: Path, table: Any) -> list[Path]:
    """Write ``scores.parquet`` and ``scores.csv``, each whole or not at all."""
    from pyarrow import csv, parquet

    packed, text = io.BytesIO(), io.BytesIO()
    parquet.write_table(table, packed)
    csv.write_csv(table, text)
    found = [(folder / SCORES, packed), (folder / "scores.csv", text)]
    return [write_atomically(path, buffer.getvalue()) for path, buffer in found]


def load_scores(run: str | Path) -> "pd.DataFrame":
    """The table of samples of a probed run as a pandas data frame, one row a sample and condition.

    The columns are :data:`COLUMNS`; ``frame.merge(other, on=["split", "index"])`` joins it to anything else that is
    known of the samples. Without pandas, ``pyarrow.parquet.read_table`` reads the same file.

    Args:
        run: the run's folder, the folder that the probe wrote to, or the Parquet file.

    Raises:
        UserError: the run has not been probed, the file is damaged, or pandas is not installed.
    """
    path = Path(run)
    if path.is_dir():
        path = path / SCORES if (path / SCORES).exists() else path / "measure" / SCORES
    try:
        import pandas as pd
    except ImportError:
        raise UserError(f"load_scores needs pandas; install it, or read {path} with pyarrow") from None
    if not path.is_file():
        raise UserError(f"{path} is missing; write it with `python -m rlp.measure probe --run {run}`")
    try:
        return pd.read_parquet(path)
    except Exception as error:  # pyarrow raises many kinds on damaged input
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no table of samples: {reason}") from None
