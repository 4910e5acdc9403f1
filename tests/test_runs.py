"""The script as a user runs it: torchrun on two ranks, kill -9 at random moments, SIGTERM, and exit statuses.

``RLP_KILLS=20`` repeats the killing that often (4 by default, to keep the suite short).
"""

from contextlib import nullcontext
import json
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny_run import assert_same_tensors, final_state, tiny_config, tiny_settings, write_tiny_sets
import yaml

from rlp.build import build_data, build_network
from rlp.distributed import World
from rlp.evaluate import evaluate
from rlp.runlog import RunLog

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("RLP_KILLS", "4"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_sets(tmp_path)
    return tmp_path


def command(folder: Path, ranks: int = 1, **changes) -> list[str]:
    """Command line of a run whose settings lie in ``folder/config.yaml``."""
    (folder / "config.yaml").write_text(yaml.safe_dump(tiny_settings(folder, **changes)))
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, str(ROOT / "train_rlp.py"), "--config", str(folder / "config.yaml")]


def run(arguments: list[str], cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def test_two_ranks_count_and_learn_as_one(folder):
    """Contracts 6 and 7 through torchrun: equal counts, and the same training up to rounding; both ranks end."""
    changes = {"model__args": {"dropout": 0.0}, "heads__lam": 0.5, "data__eval_batch_size": 8}
    for ranks in (1, 2):
        result = run(command(folder, ranks, run__dir=str(folder / f"ranks{ranks}"), **changes), folder)
        assert result.returncode == 0, result.stderr
    one, two = summary(folder / "ranks1"), summary(folder / "ranks2")
    assert (one["ranks"], two["ranks"]) == (1, 2)
    for key in ("train", "train_eval", "val"):
        assert one["final"][key]["count"] == two["final"][key]["count"]
    counts = [[head["count"] for head in s["final"]["heads"]] for s in (one, two)]
    assert counts[0] == counts[1]
    assert one["steps"] == two["steps"]


def test_two_ranks_evaluate_the_network_that_they_save(folder):
    """Batch norm's statistics differ between ranks after a step: read and saved are those of rank 0."""
    result = run(command(folder, 2, run__dir=str(folder / "two")), folder)
    assert result.returncode == 0, result.stderr
    saved = final_state(folder / "two")
    config = tiny_config(folder)
    data = build_data(config, World())
    model, heads = build_network(config, data.train.card, World().device)
    model.load_state_dict(saved["model"])
    assert heads is not None
    heads.load_state_dict(saved["heads"])
    log = RunLog(folder / "log")
    loader = data.evaluation["val"]
    metrics, _ = evaluate(model, heads, loader, data.augment, World(), nullcontext, log, "val")
    assert metrics["loss"] == pytest.approx(summary(folder / "two")["final"]["val"]["loss"], rel=1e-5)


def test_two_ranks_resumed_end_as_undisturbed(folder):
    """Each rank gets its own random state back: dropout goes on as if nothing had happened, to the bit."""
    changes = {"run__checkpoint_every": 1, "run__keep_last": 99, "train__epochs": 3, "model__args": {"dropout": 0.5}}
    whole = run(command(folder, 2, run__dir=str(folder / "whole"), **changes), folder)
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(folder / "whole", folder / "cut")
    for path in (folder / "cut" / "checkpoints").glob("*.pt"):
        if path.name > "step-000000003.pt" or path.name == "best.pt":
            path.unlink()
    resumed = run([*command(folder, 2, run__dir=str(folder / "cut"), **changes), "--run.resume", "auto"], folder)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 3" in resumed.stderr
    assert_ended_alike(folder / "whole", folder / "cut")


def test_one_step_is_the_same_on_two_ranks(folder):
    """Contract 7, and the heads' gradients are averaged like the backbone's.

    The first batch's class loss comes before any batch-norm statistics of one rank could differ from those of two.
    """
    rows = []
    for ranks in (1, 2):
        changes = {"run__dir": str(folder / f"ranks{ranks}"), "run__log_every": 1, "train__epochs": 1}
        result = run(command(folder, ranks, model__args={"norm": False}, heads__lam=0.5, **changes), folder)
        assert result.returncode == 0, result.stderr
        lines = (folder / f"ranks{ranks}" / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line) for line in lines])
    for one, two in zip(*rows, strict=True):
        if one["kind"] == "step":
            for key in ("class_loss", "fit_loss", "penalty", "accuracy"):
                assert one[key] == pytest.approx(two[key], rel=1e-3), (key, one["step"])


def test_kill_nine_at_random_moments(folder):
    """Whatever the moment, what lies on the disk is whole; resumed, the run ends with the undisturbed weights."""
    changes = {"run__checkpoint_every": 2, "train__epochs": 3}
    started = time.monotonic()
    whole = run(command(folder, run__dir=str(folder / "whole"), **changes), folder)
    assert whole.returncode == 0, whole.stderr
    duration = time.monotonic() - started
    arguments = [*command(folder, run__dir=str(folder / "killed"), **changes), "--run.resume", "auto"]
    moments, kills = random.Random(os.environ.get("RLP_KILL_SEED", "0")), 0  # imports take the first part of a run
    for _ in range(20 * KILLS):
        process = subprocess.Popen(arguments, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        try:
            _, stderr = process.communicate(timeout=moments.uniform(0.3 * duration, duration))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            if kills < KILLS:
                continue
            last = run(arguments, folder)
            assert last.returncode == 0, last.stderr
        else:
            assert process.returncode == 0, stderr
        assert_ended_alike(folder / "whole", folder / "killed")
        if kills >= KILLS:
            return
        subprocess.run(["rm", "-r", str(folder / "killed")], check=True)
    pytest.fail(f"only {kills} kills happened")


def assert_ended_alike(whole: Path, killed: Path) -> None:
    a, b = final_state(whole), final_state(killed)
    for key in ("model", "heads", "optimizers"):
        assert_same_tensors(a[key], b[key], key)
    heads = [summary(run_dir)["final"]["heads"] for run_dir in (whole, killed)]
    assert heads[0] == heads[1]
    assert not list(killed.glob("**/.*.tmp"))


def test_sigterm_ends_with_its_own_status_and_resumes(folder):
    changes = {"run__dir": str(folder / "run"), "train__epochs": 400, "run__log_every": 1}
    process = subprocess.Popen(
        command(folder, **changes), cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 2"):
            break
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 75, rest
    assert "--run.resume auto" in rest
    step = final_state(folder / "run")["progress"]["step"]
    again = run([*command(folder, **changes), "--run.resume", "auto", "--train.epochs", "3"], folder)
    assert f"resumed at step {step}" in again.stderr
