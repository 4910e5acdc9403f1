"""The table of samples: columns, ranks, files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlp.errors import UserError
from rlp.measure.features import FeatureSet
from rlp.measure.reading import Condition
from rlp.measure.scores import COLUMNS, SampleScores, load_scores, ranks, save_scores, scores_table

pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")

CLASSES = ("cat", "dog")


def samples(count: int, group: str = "members") -> FeatureSet:
    given = np.arange(count) % 2
    return FeatureSet(
        group=group,
        split="train",
        ids=10 + np.arange(count),
        given=given,
        true=np.where(np.arange(count) == 1, 1 - given, given),
        planted=np.where(np.arange(count) == 2, "noise", ""),
        words=np.zeros((count, 1), np.int64),
        logits=torch.zeros(count, 2),
        features={},
    )


def scored(count: int = 4, group: str = "members", log_p: list[float] | None = None) -> SampleScores:
    condition = Condition(
        protocol="converged", tap="block1", depth=0, dim=8, num_labels=10, head="linear", features="raw", mode="eval",
        images="clean", group=group,
    )  # fmt: skip
    values = np.array(log_p if log_p is not None else -np.arange(1.0, count + 1))
    return SampleScores(
        condition=condition,
        samples=samples(count, group),
        places=np.arange(count),
        draws=3,
        log_p=values,
        margin=values / 2,
        correct=np.linspace(1, 0, count),
    )


def test_a_table_comes_back_with_every_column(tmp_path: Path) -> None:
    parts = [scored(), scored(3, "non-members")]
    for path in save_scores(tmp_path, scores_table(parts, CLASSES)):
        assert path.stat().st_size > 0
    frame: Any = load_scores(tmp_path)
    assert list(frame.columns) == list(COLUMNS)
    assert frame["index"].tolist() == [10, 11, 12, 13, 10, 11, 12]
    assert frame["class"].tolist()[:4] == ["cat", "dog", "cat", "dog"]
    assert frame["noisy"].tolist()[:4] == [False, True, False, False]
    assert frame["planted"].tolist()[:4] == ["", "", "noise", ""]
    assert frame["rank"].tolist() == [1, 2, 3, 4, 1, 2, 3]
    assert frame["N"].tolist() == [4] * 4 + [3] * 3
    assert frame["log_p"].tolist()[:2] == [-1.0, -2.0]
    text = pd.read_csv(tmp_path / "scores.csv", keep_default_na=False)
    assert list(text.columns) == list(COLUMNS)
    assert text["index"].tolist() == frame["index"].tolist()


def test_a_part_of_the_samples_keeps_their_labels(tmp_path: Path) -> None:
    part = scored(2)
    part = SampleScores(**{**vars(part), "samples": samples(5), "places": np.array([1, 4])})
    save_scores(tmp_path, scores_table([part], CLASSES))
    frame: Any = load_scores(tmp_path)
    assert frame["index"].tolist() == [11, 14]
    assert frame["given"].tolist() == [1, 0]


def test_what_a_protocol_lacks_is_null_and_ranks_go_by_correct(tmp_path: Path) -> None:
    save_scores(tmp_path, scores_table([scored(log_p=[np.nan] * 4)], CLASSES))
    frame: Any = load_scores(tmp_path)
    assert frame["log_p"].isna().all()
    assert frame["rank"].tolist() == [1, 2, 3, 4]


def test_equal_samples_rank_in_the_order_of_ids() -> None:
    assert ranks(np.array([-2.0, -1, -1, -3]), np.zeros(4)).tolist() == [3, 1, 2, 4]
    assert ranks(np.array([np.nan, np.nan]), np.array([0.1, 0.4])).tolist() == [2, 1]


def test_nothing_scored_is_an_empty_table(tmp_path: Path) -> None:
    save_scores(tmp_path, scores_table([], CLASSES))
    frame: Any = load_scores(tmp_path)
    assert len(frame) == 0
    assert list(frame.columns) == list(COLUMNS)


def test_it_is_found_in_the_folder_of_a_run(tmp_path: Path) -> None:
    save_scores(tmp_path / "measure", scores_table([scored()], CLASSES))
    assert len(load_scores(tmp_path)) == len(load_scores(tmp_path / "measure" / "scores.parquet")) == 4


def test_missing_and_damaged_files_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is missing; write it with `python -m rlp.measure probe"):
        load_scores(tmp_path)
    (tmp_path / "scores.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="is no table of samples"):
        load_scores(tmp_path)
