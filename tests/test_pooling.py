"""Several probed networks as one table: estimates over seeds, runs that do not belong together, the command line."""

from dataclasses import replace
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlp.errors import UserError
from rlp.measure.__main__ import main
from rlp.measure.estimate import delta_estimate, kappa_estimate
from rlp.measure.pooled_table import COLUMNS, pooled_table
from rlp.measure.pooling import pool
from rlp.measure.reading import Condition, Reading, save_readings
from rlp.runlog import write_summary

N, DRAWS, LABELS = 40, 3, 5
CONDITION = Condition(
    protocol="converged", tap="block1", depth=0, dim=7, num_labels=LABELS, head="linear", features="raw", mode="eval",
    images="clean", group="members", steps=9,
)  # fmt: skip


def right(seed: int, group: str) -> np.ndarray:
    """Members are right more often than others."""
    random = np.random.default_rng([seed, len(group)])
    return random.random((DRAWS, N)) < (0.7 if group == "members" else 0.4) + 0.02 * seed


def probed(folder: Path, seed: int, protocol: str = "converged", **changed: Any) -> Path:
    """A run's folder as the probe leaves it."""
    condition = replace(CONDITION, protocol=protocol)
    readings = []
    for group in ("members", "non-members", "leak"):
        none = np.zeros((DRAWS, N), np.float32)
        correct = right(seed, group)[: 1 if protocol == "retrieval" else DRAWS]
        readings.append(
            Reading(
                condition=replace(condition, group=group), ids=np.arange(N), correct=correct,
                log_p=none[: len(correct)], margin=none[: len(correct)],
            )
        )  # fmt: skip
    save_readings(folder / "measure" / "readings.npz", readings)
    row = {name: getattr(CONDITION, name) for name in ("tap", "depth", "head", "features", "mode", "images", "steps")}
    row |= {"protocol": protocol, "D": 7, "n": LABELS, "N": N, "note": "", "converged": 1.0}
    row |= {"class_only": 0.1, "effective_rank": 3.0 + seed, "participation_ratio": 2.0}
    content = {"run": {"seed": seed}, "options": {"draws": DRAWS, "out": None, **changed}, "rows": [row]}
    (folder / "measure" / "probe.json").write_text(json.dumps(content))
    write_summary(folder, {"schema": 1, "config": {"run": {"seed": seed}, "train": {"lr": changed.get("lr", 0.1)}}})
    return folder


def test_estimates_are_over_all_seeds(tmp_path: Path) -> None:
    rows = pool([probed(tmp_path / str(seed), seed) for seed in (0, 1, 2)])
    assert len(rows) == 1
    members, others = ([right(seed, group) for seed in (0, 1, 2)] for group in ("members", "non-members"))
    assert rows[0]["members"] == pytest.approx(kappa_estimate(members, LABELS).as_dict())
    assert rows[0]["delta"] == pytest.approx(delta_estimate(members, others, LABELS).as_dict())
    assert rows[0]["delta"]["low"] > 0
    assert rows[0]["seeds"] == [0, 1, 2]
    assert rows[0]["effective_rank"] == 4.0
    assert rows[0]["untrained"] is None  # none was read
    header = pooled_table(rows).splitlines()[1].split("  ")
    assert [cell.strip() for cell in header if cell.strip()] == list(COLUMNS)


def test_retrieval_has_no_draws_but_networks(tmp_path: Path) -> None:
    rows = pool([probed(tmp_path / str(seed), seed, "retrieval") for seed in (0, 1, 2)])
    gains = [right(s, "members")[0].mean() - right(s, "non-members")[0].mean() for s in (0, 1, 2)]
    assert rows[0]["delta"]["mean"] == pytest.approx(np.mean(gains) * LABELS / (LABELS - 1))
    assert rows[0]["delta"]["low"] < rows[0]["delta"]["mean"] < rows[0]["delta"]["high"]


@pytest.mark.parametrize(
    ("seed", "changed", "message"),
    [
        (0, {}, "the runs have the seeds 0, 0; expected each seed once"),
        (1, {"lr": 0.2}, r"lr of the probe is 0\.2 in .*1 and None in .*0; expected runs that differ in their seed"),
        (1, {"draws": 4}, "draws of the probe is 4"),
    ],
)
def test_what_does_not_belong_together(tmp_path: Path, seed: int, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pool([probed(tmp_path / "0", 0), probed(tmp_path / "1", seed, **changed)])


def test_other_settings_of_training_are_named(tmp_path: Path) -> None:
    runs = [probed(tmp_path / str(seed), seed) for seed in (0, 1)]
    write_summary(runs[1], {"schema": 1, "config": {"run": {"seed": 1}, "train": {"lr": 0.2}}})
    with pytest.raises(UserError, match=r"train\.lr of the run is 0\.2 in .*1 and 0\.1"):
        pool(runs)


def test_a_probe_from_before_the_run_went_on_is_refused(tmp_path: Path) -> None:
    run = probed(tmp_path / "0", 0, checkpoint="last")
    write_summary(run, {"schema": 1, "config": {"run": {"seed": 0}}, "steps": 9})
    with pytest.raises(UserError, match="was probed at step None and has gone on to step 9; probe it again"):
        pool([run])


def test_a_file_that_was_written_anew_between_the_runs_is_refused(tmp_path: Path) -> None:
    runs = [probed(tmp_path / str(seed), seed) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        write_summary(run, {"schema": 1, "config": {"run": {"seed": seed}}, "data": {"train": {"sha256": f"h{seed}"}}})
    with pytest.raises(UserError, match="train file's sha256 of the run is 'h1'"):
        pool(runs)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(probed(tmp_path / str(seed), seed)) for seed in (3, 4)]
    assert main(["pool", *runs, "--out", str(tmp_path / "rows.json")]) == 0
    printed = capsys.readouterr().out
    assert "converged, linear head, raw features" in printed
    assert "sd seed" in printed
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["seeds"] == [3, 4]
    with pytest.raises(SystemExit) as ended:
        main(["pool", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert "is missing; expected what `python -m rlp.measure probe` writes" in capsys.readouterr().err
