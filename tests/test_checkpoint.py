"""Checkpoints and the folder of a run: whole or refused, the right ones kept, nothing foreign removed."""

import pytest
import torch
from torch import nn

from rlp.checkpoint import list_checkpoints, load_checkpoint, load_model_weights, save_checkpoint
from rlp.errors import UserError
from rlp.runfolder import check_same_run, find_resume_point, prepare_run_folder


def state(step: int) -> dict:
    return {
        "model": nn.Linear(40, 30).state_dict(),
        "heads": {},
        "optimizers": [],
        "scaler": {},
        "progress": {"epoch": 0, "batch": step, "step": step, "best": 0.5, "best_step": 0, "seconds": 1.0},
        "random_states": [{"torch": torch.get_rng_state()}],
        "running": {},
        "config": {"train": {"lr": 0.1, "epochs": 3}, "run": {"seed": 0, "dir": "a"}},
        "data": {"train": "abc"},
    }


def test_the_last_k_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 10, 11):
        save_checkpoint(tmp_path, state(step), keep_last=2, best=step == 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000010.pt", "step-000000011.pt"]
    assert load_checkpoint(tmp_path / "best.pt")["progress"]["step"] == 2


def test_any_damage_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, state(3), keep_last=1, best=False)
    content = path.read_bytes()
    accepted = []
    for position in range(0, len(content), len(content) // 60):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        try:
            loaded = load_checkpoint(path)
        except UserError:
            pass
        else:  # a flip in padding or in a date stamp is harmless only when every tensor is intact
            path.write_bytes(content)
            accepted.append(same(loaded, load_checkpoint(path)))
        path.write_bytes(content[:position])
        with pytest.raises(UserError, match="cannot be read"):
            load_checkpoint(path)
    assert all(accepted)
    assert len(accepted) < 20


def same(a: dict, b: dict) -> bool:
    weights = zip(a["model"].values(), b["model"].values(), strict=True)
    return a["progress"] == b["progress"] and all(torch.equal(x, y) for x, y in weights)


def test_what_is_no_checkpoint_is_named(tmp_path):
    torch.save({"model": {}}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="not a checkpoint of a run"):
        load_checkpoint(tmp_path / "weights.pt")
    with pytest.raises(UserError, match="there is no checkpoint at"):
        load_checkpoint(tmp_path / "absent.pt")
    torch.save({**state(1), "schema": 99}, tmp_path / "future.pt")
    with pytest.raises(UserError, match="schema 99"):
        load_checkpoint(tmp_path / "future.pt")


def test_weights_start_a_model(tmp_path):
    path = save_checkpoint(tmp_path, state(1), keep_last=1, best=False)
    model = nn.Linear(40, 30)
    load_model_weights(model, path)
    assert torch.equal(model.weight, load_checkpoint(path)["model"]["weight"])
    with pytest.raises(UserError, match="does not fit the model"):
        load_model_weights(nn.Linear(40, 31), path)


def test_a_folder_in_use_is_refused(tmp_path):
    assert find_resume_point(tmp_path / "new", None, overwrite=False) is None
    (tmp_path / "config.yaml").write_text("x")
    with pytest.raises(UserError, match=r"holds 'config\.yaml', which no run wrote"):
        find_resume_point(tmp_path, None, overwrite=True)
    (tmp_path / "environment.json").write_text("{}")
    with pytest.raises(UserError, match=r"run\.resume auto.*run\.overwrite true"):
        find_resume_point(tmp_path, None, overwrite=False)
    with pytest.raises(UserError, match="exclude each other"):
        find_resume_point(tmp_path, "auto", overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        find_resume_point(tmp_path / "config.yaml", None, overwrite=False)


def test_auto_takes_the_newest_and_starts_afresh_without_one(tmp_path):
    assert find_resume_point(tmp_path, "auto", overwrite=False) is None
    (tmp_path / "environment.json").write_text("{}")
    for step in (4, 12):
        save_checkpoint(tmp_path / "checkpoints", state(step), keep_last=3, best=False)
    found = find_resume_point(tmp_path, "auto", overwrite=False)
    assert found is not None
    assert found["progress"]["step"] == 12


def test_overwriting_removes_a_run_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    save_checkpoint(run / "checkpoints", state(1), keep_last=1, best=True)
    (run / "environment.json").write_text("{}")
    (run / "metrics.jsonl").write_text("{}\n")
    (run / ".summary.json.x.tmp").write_text("torn")
    (run / ".mine.tmp").write_text("not ours")
    prepare_run_folder(run, step=1)
    assert list_checkpoints(run / "checkpoints")
    assert [path.name for path in run.glob(".*.tmp")] == [".mine.tmp"]
    with pytest.raises(UserError, match=r"\.mine\.tmp"):
        find_resume_point(run, None, overwrite=True)
    (run / ".mine.tmp").unlink()
    assert find_resume_point(run, None, overwrite=True) is None
    prepare_run_folder(run, step=None)
    assert {entry.name for entry in run.iterdir()} == {"checkpoints", "environment.json"}
    assert not list_checkpoints(run / "checkpoints")


def test_a_folder_that_is_no_runs_is_left_alone(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "thesis.pdf").write_text("years of work")
    for resume, overwrite in (("auto", False), (None, True), (None, False)):
        with pytest.raises(UserError, match="holds 'figures', which no run wrote"):
            find_resume_point(tmp_path, resume, overwrite)


def test_a_linked_checkpoint_folder_is_emptied_and_stays(tmp_path):
    save_checkpoint(tmp_path / "large_disk", state(1), keep_last=1, best=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "large_disk")
    prepare_run_folder(tmp_path / "run", step=None)
    assert (tmp_path / "run" / "checkpoints").is_symlink()
    assert not list_checkpoints(tmp_path / "large_disk")


def test_a_run_older_than_a_key_goes_on_with_its_default():
    saved = state(1)
    newer = {**saved["config"], "heads": {"kind": "shared", "lam_taps": {}, "target_kappa": None, "steps": 1}}
    assert check_same_run(saved, newer, {"train": "abc"}) == []
    with pytest.raises(UserError, match=r"heads\.kind is 'copied', but the run to resume has 'shared'"):
        check_same_run(saved, {**newer, "heads": {"kind": "copied"}}, {"train": "abc"})


def test_log_windows_of_another_length_are_said_where_lambda_follows_them():
    saved = state(1)
    saved["config"] |= {"heads": {"target_kappa": 0.1}, "run": {"seed": 0, "log_every": 50}}
    later = {**saved["config"], "run": {"seed": 0, "log_every": 10}}
    (remark,) = check_same_run(saved, later, {"train": "abc"})
    assert "run.log_every was 50 and is 10" in remark
    saved["config"]["heads"] = later["heads"] = {"target_kappa": None}
    assert check_same_run(saved, later, {"train": "abc"}) == []


def test_another_experiment_is_not_gone_on_with():
    saved = state(1)
    longer = {"train": {"lr": 0.1, "epochs": 9}, "run": {"seed": 0, "dir": "b"}}
    assert check_same_run(saved, {**longer, "train": {"lr": 0.1, "epochs": 3}}, {"train": "abc"}) == []
    assert "train.epochs was 3 and is 9" in check_same_run(saved, longer, {"train": "abc"})[0]
    with pytest.raises(UserError, match=r"train\.lr is 0\.2.*has 0\.1"):
        check_same_run(saved, {**longer, "train": {"lr": 0.2}}, {"train": "abc"})
    with pytest.raises(UserError, match=r"run\.seed"):
        check_same_run(saved, {**longer, "run": {"seed": 1}}, {"train": "abc"})
    with pytest.raises(UserError, match=r"data\.train is not the file"):
        check_same_run(saved, longer, {"train": "other"})
