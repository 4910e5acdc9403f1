"""``python -m rlp.measure compare``: measures of a run kept and joined, and tables without a lonely number."""

import json
from pathlib import Path
import re
import shutil
from typing import Any

import numpy as np
from probed_run import tiny_finished_run
import pyarrow.parquet as pq
import pytest

import rlp
from rlp.errors import UserError
from rlp.measure import baselines, open_run
from rlp.measure.__main__ import main
from rlp.measure.baselines import MEASURES, Finding, Findings, SampleScore, Subject, collect, load_measure
from rlp.measure.compare import _facts, _planted_rows, compare
from rlp.measure.compare_table import COLUMNS, LEGEND, comparison_table
from rlp.measure.estimate import mean_estimate
from rlp.measure.rows import class_loss

QUICK = ["random_labels", "loss"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    changes: dict[str, dict[str, Any]] = {"a": {}, "b": {"data__label_noise": 0.5}, "c": {"data__canary_noise": 0.2}}
    folder = tmp_path_factory.mktemp("compare")
    for name, change in changes.items():
        tiny_finished_run(folder, train__epochs=1, run__dir=str(folder / name), **change)
    return [folder / name for name in changes]


def test_every_measure_that_is_named_exists() -> None:
    for name in MEASURES:
        assert callable(load_measure(name)), name
    with pytest.raises(UserError, match=r"measure 'nothing' does not exist; expected one of knn, "):
        load_measure("nothing")


def test_the_command_prints_every_table_with_controls_and_intervals(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--measures", *QUICK, "--taps", "block3", "--samples", "40", "--out", str(tmp_path)]
    assert main(["compare", *map(str, runs), *options]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    found = [
        re.split(r"\s{2,}", lines[number - 1].strip())
        for number, line in enumerate(lines)
        if re.fullmatch("-{20,}", line)
    ]
    kinds = [name for columns in found for name, known in COLUMNS.items() if columns == list(known)]
    assert kinds == ["findings", "planted", "planted", "planted", "planted", "agreement", "granulated"]
    for columns in COLUMNS.values():
        assert "chance" in columns
        assert "95%" in columns
        assert {"N", "runs", "seeds"} & set(columns)
    assert LEGEND in text
    assert "a: wrong label, AUROC of each score" in text
    content = json.loads((tmp_path / "compare.json").read_text())
    assert {row["planted"] for row in content["planted"]} == {"wrong label", "noise"}
    assert all(row["chance"] == 0.5 and row["members"]["low"] is not None for row in content["planted"])
    own = json.loads((runs[2] / "measure" / "baselines" / "rows.json").read_text())
    assert own["planted"] == [row for row in content["planted"] if row["run"] == "c"]
    assert own["findings"] == [row for row in content["findings"] if row["run"] == "c"]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_samples_are_joined_by_index(runs: list[Path]) -> None:
    compare(runs[:1], QUICK, taps=["block3"], samples=40)
    frame = pq.read_table(runs[0] / "measure" / "baselines" / "scores.parquet").to_pandas()
    assert list(frame.columns[:8]) == ["index", "split", "group", "class", "given", "true", "noisy", "planted"]
    assert {"loss", "rlp_block3", "rlp_budget_block3"} <= set(frame.columns)
    subject = Subject.of(open_run(runs[0]), taps=["block3"], samples=40)
    for samples in (subject.members, subject.non_members):
        mine = frame[frame["group"] == samples.group]
        assert mine["index"].to_numpy() == pytest.approx(samples.ids)
        assert mine["loss"].to_numpy() == pytest.approx(class_loss(samples))
        assert (mine["noisy"] == (samples.given != samples.true)).all()


def test_runs_of_one_name_are_kept_apart(runs: list[Path], tmp_path: Path) -> None:
    """Every seed's folder may be called alike."""
    pair = [tmp_path / name / "run" for name in ("one", "two")]
    for source, path in zip(runs, pair, strict=False):
        shutil.copytree(source, path, ignore=shutil.ignore_patterns("measure"))
    found = compare(pair, QUICK, taps=["block3"], samples=40)
    assert [row["run"] for row in found.runs] == [str(path) for path in pair]
    for path in pair:
        (title,) = re.findall(rf"^{path}: wrong label.*(?:\n.+)+", comparison_table(found), re.MULTILINE)
        scores = [line.split()[0] for line in title.splitlines()[3:]]
        assert sorted(scores) == ["loss", "rlp_block3", "rlp_budget_block3"]


def test_samples_without_a_score_do_not_count(runs: list[Path]) -> None:
    subject = Subject.of(open_run(runs[0]), taps=["block3"], samples=40)
    samples = subject.members
    values = np.where(np.arange(40) < 25, np.nan, np.arange(40.0))
    score = SampleScore(name="odd", group="members", ids=samples.ids, values=values)
    found = {"odd": collect.Found(Findings(scores=(score,)), 0.0)}
    (row,) = _planted_rows(collect.Collected("a", subject, found, {}))
    wrong = (samples.given != samples.true)[25:]
    assert (row["N"], row["count"]) == (15, int(wrong.sum()))


def test_facts_of_a_run_are_those_of_its_deepest_tap(runs: list[Path]) -> None:
    subject = Subject.of(open_run(runs[0]), taps=["block2", "block3"], samples=40)
    at = {"measure": "m", "quantity": "q", "non_members": None, "chance": None, "count": 2}
    rows = [
        Finding(value=mean_estimate([np.full((1, 2), depth)]), tap=f"block{depth}", depth=depth, **at)
        for depth in (0, 2, 1)
    ]
    score = SampleScore(name="s", group="members", ids=subject.members.ids, values=np.arange(40.0))
    findings = {"m": collect.Found(Findings(scores=(score,), rows=tuple(rows)), 0.0)}
    facts = _facts(collect.Collected("a", subject, findings, {}))
    assert facts.values == {"s": 19.5, "m q": 2}
    right = [
        sum(int(row.argmax()) == given for row, given in zip(samples.logits, samples.given, strict=True)) / 40
        for samples in (subject.members, subject.non_members)
    ]
    assert (facts.train_accuracy, facts.gap) == pytest.approx((right[0], right[0] - right[1]))


def count_calls(monkeypatch: pytest.MonkeyPatch, broken: bool = False) -> list[Subject]:
    """A measure of our own in the place of `loss`, and the subjects that it was asked about."""
    calls: list[Subject] = []

    def measure(subject: Subject) -> Findings:
        calls.append(subject)
        if broken:
            raise UserError("the network has no ReLU")
        ids = subject.members.ids
        values = np.where(ids % 2 == 0, np.nan, ids.astype(float))
        row = Finding(
            measure="loss", quantity="q", value=mean_estimate([np.ones((1, 5))]), non_members=None, chance=None, count=5
        )
        return Findings(scores=(SampleScore(name="odd", group="members", ids=ids, values=values),), rows=(row,))

    monkeypatch.setattr(collect, "load_measure", lambda name: measure)
    return calls


def test_what_was_found_is_kept_until_something_it_depends_on_changes(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch)
    first = collect.collect(runs[1], ["loss"], taps=["block3"], samples=30)
    again = collect.collect(runs[1], ["loss"], taps=["block3"], samples=30)
    assert len(calls) == 1
    np.testing.assert_array_equal(first.scores("members")["odd"], again.scores("members")["odd"])
    assert np.isnan(again.scores("members")["odd"]).any()
    assert again.found["loss"].findings.rows == first.found["loss"].findings.rows
    for change in ({"samples": 31}, {"seed": 1}, {"taps": ["block2"]}):
        collect.collect(runs[1], ["loss"], **{"taps": ["block3"], "samples": 30, **change})  # type: ignore[arg-type]
    assert len(calls) == 4
    (runs[1] / "measure" / "baselines" / "loss.json").write_text("{")
    collect.collect(runs[1], ["loss"], taps=["block3"], samples=30)
    assert len(calls) == 5
    monkeypatch.setattr(collect, "_code", lambda: "another version")
    collect.collect(runs[1], ["loss"], taps=["block3"], samples=30)
    assert len(calls) == 6


def test_a_measure_that_cannot_be_taken_says_why(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    count_calls(monkeypatch, broken=True)
    kept = runs[2] / "measure" / "baselines" / "loss.json"
    kept.unlink(missing_ok=True)
    with pytest.raises(UserError, match="the network has no ReLU"):
        compare(runs[2:], ["loss"])
    assert not kept.exists()


def test_by_default_what_cannot_be_taken_is_left_out_and_said(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network without a ReLU has no non-negative rank, but all the rest."""

    def no_rank(subject: Subject) -> Findings:
        raise UserError("the network has no ReLU")

    monkeypatch.setattr(collect, "MEASURES", {"nmf": "", "loss": ""})
    monkeypatch.setattr(collect, "load_measure", lambda name: no_rank if name == "nmf" else load_measure(name))
    assert main(["compare", str(runs[2]), "--taps", "block3", "--samples", "30"]) == 0
    assert "left out: nmf: the network has no ReLU" in capsys.readouterr().out
    content = json.loads((runs[2] / "measure" / "compare.json").read_text())
    assert content["runs"][0]["left_out"] == {"nmf": "the network has no ReLU"}
    assert {row["measure"] for row in content["findings"]} == {"loss"}


def test_a_change_anywhere_in_the_package_is_another_version(tmp_path: Path) -> None:
    (tmp_path / "low_rank").mkdir()
    (tmp_path / "low_rank" / "curve.py").write_text("RANKS = (1, 2)")
    before = collect._code.__wrapped__(tmp_path)
    (tmp_path / "low_rank" / "curve.py").write_text("RANKS = (1, 4)")
    assert collect._code.__wrapped__(tmp_path) != before
    assert collect._code() == collect._code.__wrapped__(Path(rlp.__file__).parent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "RUN", "--out", "OUT"], "expected each once"),
        (["RUN", "OTHER"], "--out is missing"),
        (["nowhere"], "nowhere holds no run"),
        (["RUN", "--seed", "-1"], "--seed is -1"),
        (["RUN", "--taps", "layer9"], "tap 'layer9' names no module"),
        (["RUN", "--measures", "loss", "loss"], "each once"),
        (["RUN", "--samples", "0"], "--samples is 0; expected at least 10 of each"),
        (["RUN", "--samples", "-3"], "--samples is -3; expected at least 10 of each"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], message: str, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"RUN": str(runs[0]), "OTHER": str(runs[1]), "OUT": str(tmp_path)}
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *(names.get(argument, argument) for argument in arguments)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_measures_are_listed_by_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in baselines.MEASURES)
