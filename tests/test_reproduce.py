"""Findings: files read strictly, contrasts judged on planted readings, one small finding from command to verdict."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import tiny_settings, write_tiny_sets
import yaml

from rlp.errors import UserError
from rlp.measure.estimate import Estimate
from rlp.reproduce import finding as findings
from rlp.reproduce import verdict
from rlp.reproduce.__main__ import main
from rlp.reproduce.finding import Contrast, Finding, Selection, Size, finding_names, load_finding, load_size, size_names
from rlp.reproduce.readings import FRESH, TRAINING, Point, Values
from rlp.reproduce.study import Study
from rlp.reproduce.table import as_json, as_markdown, summary_lines
from rlp.runlog import environment

pytest.importorskip("fastargs")

PROMISED = {
    "depth", "time", "dropout", "weight_decay", "label_smoothing", "lambda_chance", "label_noise", "data_size",
    "head_labels", "last_layer_penalty", "per_class_heads", "copied_heads",
}  # fmt: skip


# -- the files -------------------------------------------------------------------------------------------------


def test_every_promised_finding_and_size_has_a_file() -> None:
    assert set(finding_names()) >= PROMISED
    assert size_names() == ["digits", "cifar10-subset", "cifar10"]


@pytest.mark.parametrize("size", size_names())
@pytest.mark.parametrize("name", finding_names())
def test_every_variant_of_a_finding_is_a_whole_configuration(name: str, size: str, tmp_path: Path) -> None:
    study = Study(load_finding(name), load_size(size), (0, 1, 2), 5, tmp_path, {})
    assert study.finding.claim.endswith(".")
    assert "arXiv" in study.finding.source
    configs = {variant: study.config(variant, 1) for variant in study.variants}
    for variant, config in configs.items():
        assert (config.run.seed, config.heads.draws, config.run.dir) == (1, 5, str(tmp_path / f"{variant}-seed1"))
        assert config.data.member_fraction < 1  # so that there are non-members of the same kind
    assert len({repr((c.data, c.model, c.heads, c.train)) for c in configs.values()}) == len(configs)


def test_a_number_a_list_and_a_mapping_reach_the_configuration(tmp_path: Path) -> None:
    settings = {"train.lr": 0.03, "heads.taps": ["layer2", "layer4"], "model.args": {"width": 8, "depth": 4}}
    finding = a_finding(variants={"a": settings})
    config = Study(finding, load_size("digits"), (0,), 2, tmp_path, {}).config("a", 0)
    assert config.train.lr == 0.03
    assert config.heads.taps == ("layer2", "layer4")
    assert config.model.args == {"width": 8, "depth": 4}


GOOD: dict[str, Any] = {
    "claim": "A claim.",
    "source": "arXiv 1",
    "variants": {"a": {}, "b": {"train.lr": 0.1}},
    "contrasts": [{"what": "b against a", "over": ["a", "b"], "expected": "rises"}],
}
A_CONTRAST = GOOD["contrasts"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clam": "x"}, "unknown key 'clam'; did you mean claim?"),
        ({"claim": None}, "claim is None; expected text"),
        ({"variants": {}}, "variants is empty"),
        ({"variants": {"a/b": {}}}, "'a/b' cannot name a folder"),
        ({"variants": {"a": {"lr": 1}, "b": {}}}, "expected 'section.key: value' lines"),
        ({"contrasts": []}, "contrasts is empty"),
        ({"contrasts": ["a"]}, "expected keys what, over and expected"),
        ({"contrasts": [A_CONTRAST | {"expected": "rise"}]}, "expected is 'rise'; did you mean rises?"),
        ({"contrasts": [A_CONTRAST | {"over": ["a", "c"]}]}, r"over\[1\].variant is 'c'; expected one of a, b"),
        ({"contrasts": [A_CONTRAST | {"over": ["a"]}]}, "over has 1 entries; expected two or more"),
        ({"contrasts": [A_CONTRAST | {"expected": "chance"}]}, "over has 2 entries; expected one"),
        ({"contrasts": [A_CONTRAST | {"over": [{"trained": 0}, "b"]}]}, "trained is 0.0; expected above 0"),
        ({"contrasts": [A_CONTRAST | {"matched": 1}]}, "matched is 1; expected true or false"),
        ({"sizes": {"digit": {}}}, "size is 'digit'; did you mean digits?"),
    ],
)
def test_a_mistake_in_a_finding_is_one_sentence(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(yaml.safe_dump(GOOD | change))
    with pytest.raises(UserError, match=words):
        findings.read_finding(path)


def test_the_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    assert findings.read_finding(path).contrasts[0].over == (Selection(variant="a"), Selection(variant="b"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dephts"], "finding is 'dephts'; did you mean depth?"),
        ([], "no finding is named; expected one of"),
        (["depth", "--data.train", "x.beton"], "--data.val is missing"),
        (["depth", "--seeds", "0", "1", "0"], "--seeds is '0 1 0'; expected each seed once"),
        (["depth", "--size", "cifar10"], "needs --data.train FILE and --data.val FILE"),
    ],
)
def test_a_mistake_on_the_command_line_ends_with_status_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_the_list_names_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == finding_names()


# -- verdicts --------------------------------------------------------------------------------------------------


def an_estimate(low: float | None, high: float | None) -> Estimate:
    middle = 0.0 if low is None or high is None else (low + high) / 2
    return Estimate(
        mean=middle, low=low, high=high, sd_seed=None, sd_draw=None, sd_sample=None, seeds=3, draws=5, samples=9
    )


def a_contrast(expected: str, places: int = 2, **changes: Any) -> Contrast:
    over = tuple(Selection(variant=letter) for letter in "abcd"[:places])
    return Contrast(what="what", over=over, expected=expected, **changes)


def a_finding(variants: dict[str, dict[str, Any]], contrasts: tuple[Contrast, ...] = ()) -> Finding:
    return Finding(
        name="f", claim="A claim.", source="arXiv 1", variants=variants, contrasts=contrasts, settings={}, sizes={}
    )


@pytest.mark.parametrize(
    ("expected", "low", "high", "says"),
    [
        ("rises", 0.1, 0.2, verdict.REPRODUCED),
        ("rises", -0.2, -0.1, verdict.OPPOSITE),
        ("rises", -0.1, 0.2, verdict.UNDECIDED),
        ("rises", 0.0, 0.2, verdict.UNDECIDED),
        ("rises", None, None, verdict.UNDECIDED),
        ("falls", -0.2, -0.1, verdict.REPRODUCED),
        ("falls", 0.1, 0.2, verdict.OPPOSITE),
        ("falls", 0.0, 0.0, verdict.UNDECIDED),
        ("chance", -0.01, 0.04, verdict.REPRODUCED),
        ("chance", 0.06, 0.08, verdict.OPPOSITE),
        ("chance", 0.04, 0.08, verdict.UNDECIDED),
        ("open", 0.1, 0.2, "rises (no sign claimed)"),
        ("open", -0.1, 0.2, verdict.UNDECIDED),
    ],
)
def test_the_interval_decides(expected: str, low: float | None, high: float | None, says: str) -> None:
    contrast = a_contrast(expected, 1 if expected == "chance" else 2)
    assert verdict.decide(contrast, an_estimate(low, high)) == says


def test_two_readings_make_a_difference_and_more_the_rise_of_the_fitted_line() -> None:
    assert verdict.weights(1).tolist() == [1]
    assert verdict.weights(2).tolist() == [-1, 1]
    values = np.array([0.3, 0.1, 0.9, 0.2])
    slope = np.polyfit(np.linspace(0, 1, 4), values, 1)[0]
    assert verdict.weights(4) @ values == pytest.approx(slope)


LEVELS = {"a": 0.2, "b": 0.6}


def planted(monkeypatch: pytest.MonkeyPatch, members: dict[str, float], others: dict[str, float], samples: Any) -> None:
    """Readings in which a share of answers is right, by variant, with a common part of samples and draws."""

    def correct(share: float, seed: int, count: int, group: int) -> np.ndarray:
        random = np.random.default_rng(100 * seed + group)  # the same in every variant: paired
        return ((10 * (random.random((5, count)) < share) - 1) / 9).astype(np.float32)

    def fresh(study: Study, selection: Selection, seed: int, point: Point, protocol: str) -> Values:
        count = samples(selection.variant)
        ids = (np.arange(count), np.arange(count))
        facts = dict.fromkeys(("n", "N", "D", "chance", "class_only", "untrained", "noise", "leak"), 1.0) | {"tap": "t"}
        shares = (members[selection.variant], others[selection.variant])
        return Values(correct(shares[0], seed, count, 0), correct(shares[1], seed, count, 1), ids, facts)

    def training(study: Study, selection: Selection, seed: int, point: Point, mode: str) -> Values:
        found = fresh(study, selection, seed, point, "converged")
        return Values(found.members.mean(axis=1, keepdims=True), None, None, found.facts)

    monkeypatch.setattr(verdict, "fresh_values", fresh)
    monkeypatch.setattr(verdict, "training_values", training)


def a_study(contrast: Contrast, seeds: tuple[int, ...] = (0, 1, 2), draws: int = 5) -> Study:
    size = Size(name="tiny", base=Path("b"), data=None, settings={}, threads=1, fresh={}, about="Tiny.")
    finding = a_finding({selection.variant: {} for selection in contrast.over}, (contrast,))
    return Study(finding, size, seeds, draws, Path("out"), {})


def judged_by(study: Study) -> dict[tuple[str, str], verdict.Judged]:
    contrast = study.finding.contrasts[0]
    places = {(selection, seed): Point("t", 1, None) for selection in contrast.over for seed in study.seeds}
    return {(each.reading, each.quantity): each for each in verdict.judge(study, contrast, places)}


def test_both_readings_are_judged_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """κ of members and non-members rises alike: reproduced by κ, and undecided by Δ."""
    planted(monkeypatch, LEVELS, LEVELS, lambda variant: 400)
    found = judged_by(a_study(a_contrast("rises")))
    assert set(found) == {(r, "κ") for r in (*TRAINING, *FRESH)} | {(r, "Δ") for r in FRESH}
    for (_, quantity), each in found.items():
        if quantity == "κ":
            assert each.estimate.mean == pytest.approx(0.4 / 0.9, abs=0.05)
            assert each.verdict == verdict.REPRODUCED
        else:
            assert abs(each.estimate.mean) < 0.05
            assert each.verdict == verdict.UNDECIDED
    assert [shown.estimate.mean for shown in found[FRESH[0], "κ"].points] == pytest.approx([0.11, 0.56], abs=0.05)


def test_a_rise_of_members_alone_is_a_rise_of_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, LEVELS, {"a": 0.2, "b": 0.2}, lambda variant: 400)
    found = judged_by(a_study(a_contrast("falls")))
    assert found[FRESH[0], "Δ"].estimate.mean == pytest.approx(0.4 / 0.9, abs=0.06)
    assert {each.verdict for each in found.values()} == {verdict.OPPOSITE}


def test_one_draw_of_one_network_has_no_interval_and_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, LEVELS, LEVELS, lambda variant: 400)
    whole = verdict.fresh_values

    def one_draw(*arguments: Any, **named: Any) -> Values:
        values = whole(*arguments, **named)
        return dataclasses.replace(values, members=values.members[:1], others=values.others[:1])  # type: ignore[index]

    monkeypatch.setattr(verdict, "fresh_values", one_draw)
    found = judged_by(a_study(a_contrast("rises"), seeds=(0,), draws=1))
    for quantity in ("κ", "Δ"):
        assert found[FRESH[0], quantity].estimate.low is None
        assert found[FRESH[0], quantity].verdict == verdict.UNDECIDED


def test_a_claim_about_chance_is_not_judged_by_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, LEVELS, LEVELS, lambda variant: 400)
    found = judged_by(a_study(a_contrast("chance", 1)))
    assert set(found) == {(reading, "κ") for reading in (*TRAINING, *FRESH)}
    assert {each.verdict for each in found.values()} == {verdict.OPPOSITE}


def test_the_same_samples_are_paired_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, LEVELS, LEVELS, lambda variant: 400)
    paired = judged_by(a_study(a_contrast("rises")))[FRESH[0], "κ"]
    planted(monkeypatch, LEVELS, LEVELS, lambda variant: {"a": 400, "b": 300}[variant])
    other = judged_by(a_study(a_contrast("rises")))[FRESH[0], "κ"]
    assert paired.paired
    assert not other.paired
    assert paired.estimate.samples == 400
    assert other.estimate.samples == 1
    assert other.verdict == verdict.REPRODUCED


def test_matched_contrasts_leave_out_heads_that_were_fitted_to_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, LEVELS, LEVELS, lambda variant: 50)
    found = judged_by(a_study(a_contrast("rises", matched=True)))
    assert {reading for reading, _ in found} == set(FRESH)


def test_every_number_in_the_report_carries_what_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, LEVELS, LEVELS, lambda variant: 50)
    study = a_study(a_contrast("rises"), seeds=(0, 1))
    judged = list(judged_by(study).values())
    text = as_markdown(study, judged, environment(), "python -m rlp.reproduce f")
    header = next(line for line in text.splitlines() if line.startswith("| reading"))
    for column in ("value", "seeds", "draws", "n", "N", "D", "chance", "class-only", "untrained", "noise", "leak"):
        assert f" {column} " in header
    assert "Preliminary: 2 seeds x 5 draws" in text
    assert "the papers' own" in text
    assert "(ours)" in text
    content = as_json(study, judged, environment())
    assert len(content["verdicts"]) == len(judged) == 6
    assert all({"low", "high", "seeds", "draws"} <= set(entry["estimate"]) for entry in content["verdicts"])
    assert len(summary_lines(study, judged)) == 7


# -- from command to verdict -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a size and a finding of two epochs."""
    folder = tmp_path_factory.mktemp("reproduce")
    write_tiny_sets(folder, train=120)
    settings = tiny_settings(folder, data__flip=False, data__crop_padding=0, heads__taps=["block1", "block3"])
    settings["data"] |= {"member_fraction": 0.5}
    (folder / "base.yaml").write_text(yaml.safe_dump(settings))
    paper = folder / "paper"
    (paper / "sizes").mkdir(parents=True)
    fresh = {"converged": {"features": ["raw"]}, "budget": {"features": ["raw"]}}
    size = {"about": "Tiny.", "base": "../../base.yaml", "threads": 1, "fresh": fresh}
    (paper / "sizes" / "digits.yaml").write_text(yaml.safe_dump(size))
    places = [{"tap": "first", "trained": 0.5}, {"tap": "last"}]
    contrast = {"what": "last against first", "over": places, "expected": "rises"}
    accuracy = {"what": "test accuracy", "over": ["base", {"trained": 0.5}], "of": "test_accuracy", "expected": "open"}
    finding = GOOD | {"variants": {"base": {}}, "contrasts": [contrast, accuracy], "settings": {"run.keep_last": 2}}
    (paper / "small.yaml").write_text(yaml.safe_dump(finding))
    return folder


def reproduce(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    monkeypatch.setattr(findings, "PAPER", folder / "paper")
    data = ["--data.train", str(folder / "train.beton"), "--data.val", str(folder / "val.beton")]
    out = ["--out", str(folder / "out"), "--seeds", "0", "1", "--draws", "3"]
    assert main(["small", *data, *out, *more]) == 0
    return json.loads((folder / "out" / "verdict.json").read_text())


def test_a_finding_from_command_to_verdict(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = reproduce(small, monkeypatch)
    assert "ours: fresh heads, converged, Δ" in capsys.readouterr().out
    readings = {(entry["reading"], entry["quantity"]): entry for entry in found["verdicts"]}
    assert set(readings) == {(r, "κ") for r in (*TRAINING, *FRESH)} | {(r, "Δ") for r in FRESH} | {
        ("test accuracy", "accuracy")
    }
    entry = readings[FRESH[0], "κ"]
    first, last = entry["points"]
    assert (first["facts"]["tap"], last["facts"]["tap"]) == ("block1", "block3")
    assert entry["estimate"]["mean"] == pytest.approx(last["estimate"]["mean"] - first["estimate"]["mean"], abs=1e-6)
    assert (entry["estimate"]["seeds"], entry["estimate"]["draws"]) == (2, 3)
    assert entry["paired_samples"]
    assert first["facts"]["n"] == 4
    for name in ("verdict.md", "verdict.pdf", "configs/base-seed1.yaml"):
        assert (small / "out" / name).is_file()
    assert (small / "out" / "verdict.png").read_bytes().startswith(b"\x89PNG")


def test_called_again_it_trains_nothing_and_says_the_same(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = reproduce(small, monkeypatch)
    monkeypatch.setattr("rlp.reproduce.study.run_command", lambda *_: pytest.fail("a command was started"))
    monkeypatch.setattr("rlp.reproduce.readings.probe", lambda *_: pytest.fail("a run was probed again"))
    assert reproduce(small, monkeypatch)["verdicts"] == before["verdicts"]


def test_a_run_of_another_configuration_is_left_alone(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reproduce(small, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        reproduce(small, monkeypatch, "--draws", "2")
    assert ended.value.code == 2
    assert "holds a run with heads.draws 3, and the finding asks for 2" in capsys.readouterr().err
