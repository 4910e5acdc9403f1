"""Checks of the measures that retrain copies, on digits: 4 x 256 ReLU units, 800 samples, 20% of wrong labels.

The network of ``configs/digits_mlp.yaml``, trained by the scripts of a checkout into a temporary folder.
"""

from collections.abc import Sequence
from functools import cache
import os
from pathlib import Path
import subprocess
import sys
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import rlp
from rlp.errors import UserError
from rlp.measure.baselines import dynamics, feldman_zhang, lira
from rlp.measure.baselines.check import CheckResult
from rlp.measure.baselines.interface import Findings, Subject
from rlp.measure.estimate import Estimate, mean_estimate
from rlp.measure.run import open_run

ROOT = Path(rlp.__file__).resolve().parent.parent

_CARD = "card: 8 px digits, 4 x 256 ReLU MLP, 800 samples, 20% of wrong labels"


def check_feldman_zhang(seeds: Sequence[int] = (0, 1, 2), small: bool = False) -> list[CheckResult]:
    """AUROC on wrong labels, about .988, and split-half ρ, .84, from 60 models; from 16 shorter ones if ``small``."""
    options: dict[str, Any] = {"copies": 16, "epochs": 40} if small else {}
    found = [feldman_zhang.measure(_subject(seed), **options) for seed in seeds]
    bounds = ((0.85, 1.0), (0.3, 0.95)) if small else ((0.97, 1.0), (0.78, 0.92))
    return [
        _result(found, "feldman_zhang", "feldman_zhang: AUROC(wrong label)", bounds[0], f"{_CARD}: .988"),
        _result(found, "feldman_zhang", "split-half Spearman", bounds[1], f"{_CARD}: .84"),
    ]


def check_el2n(seeds: Sequence[int] = (0, 1, 2), small: bool = False) -> list[CheckResult]:
    """AUROC of EL2N on wrong labels, .86 on the card, which names no epoch; 3 copies of fewer epochs where ``small``.

    After epoch 1, 2, 5, 10, 20, 30, 40, 50 of 100 it was .73, .83, .99, .996, .98, .93, .86, .82 (one run, 3 copies).
    """
    options: dict[str, Any] = {"copies": 3, "early": 10, "epochs": 12} if small else {}
    found = [dynamics.measure(_subject(seed), **options) for seed in seeds]
    return [
        _result(found, "dynamics", "el2n: AUROC(wrong label)", (0.75, 1.0), f"{_CARD}: .86, epoch not told; .998 here")
    ]


def check_lira(seeds: Sequence[int] = (0, 1, 2), small: bool = False) -> list[CheckResult]:
    """AUC of 16 shadows above chance, as published for ResNet-18 on CIFAR (.655); 4 shadows where ``small``."""
    options: dict[str, Any] = {"shadows": 4, "epochs": 30} if small else {}
    found = [lira.measure(_subject(seed), **options) for seed in seeds]
    return [_result(found, "lira", "AUC", (0.55, 1.0), "above chance, .5; published for ResNet-18: .655")]


@cache
def _subject(seed: int) -> Subject:
    """Members and non-members of a run of this seed, which all checks of a process share."""
    return Subject.of(open_run(_trained(seed), device="cpu"), seed=seed)


def _trained(seed: int) -> Path:
    folder = _data()
    run = folder / f"seed{seed}"
    data = [f"--data.{split}={folder / split}.beton" for split in ("train", "val")]
    noisy = ["--data.label_noise=0.2", "--heads.taps=[]", "--run.eval_every=100", f"--run.seed={seed}"]
    _script("train_rlp.py", "configs/digits_mlp.yaml", *data, *noisy, f"--run.dir={run}")
    return run


@cache
def _data() -> Path:
    """A folder with the digits as .beton, which lives as long as the process."""
    folder = Path(_scratch().name)
    outputs = [f"--output.{split}={folder / split}.beton" for split in ("train", "val")]
    _script("data_prep/write_datasets.py", "configs/data/digits8.yaml", "--output.workers=1", *outputs)
    return folder


@cache
def _scratch() -> Any:
    return TemporaryDirectory(prefix="rlp-check-")


def _script(name: str, config: str, *options: str) -> None:
    """Run a script of the checkout, quietly.

    Raises:
        UserError: there is no checkout, or the script failed.
    """
    if not (ROOT / name).is_file():
        raise UserError(f"{ROOT / name} is missing; expected a checkout of the repository, whose scripts checks use")
    command = [sys.executable, str(ROOT / name), "--config", str(ROOT / config), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if finished.returncode:
        last = (finished.stderr or finished.stdout).strip().splitlines()[-1:]
        raise UserError(f"{name} ended with status {finished.returncode}: {' '.join(last)}; expected it to succeed")


def _result(
    found: Sequence[Findings], measure: str, quantity: str, expected: tuple[float, float], source: str
) -> CheckResult:
    """One quantity over the seeds; of one seed with the interval that the measure gives."""
    estimates = [row.value for findings in found for row in findings.rows if row.quantity == quantity]
    estimate = estimates[0] if len(estimates) == 1 else over_seeds(estimates)
    return CheckResult(measure=measure, quantity=quantity, found=estimate, expected=expected, source=source)


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over networks, with Student's interval between them alone."""
    return mean_estimate([np.array([[estimate.mean]]) for estimate in estimates])
