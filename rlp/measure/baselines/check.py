"""What a right implementation of a measure shows: figures found beside figures expected, on digits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import os
from pathlib import Path
import subprocess
import sys

import rlp
from rlp.errors import UserError
from rlp.measure.estimate import Estimate

ROOT = Path(rlp.__file__).resolve().parent.parent
LINES = 12
"""Last lines of a failed command that are shown."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One figure of a check.

    Attributes:
        measure, quantity: such as ``knn`` and ``k-NN accuracy at layer1``.
        found: our figure; with an interval where several networks were trained.
        expected: the ends between which it should lie.
        source: where the expectation comes from, and what is ours in it.
    """

    measure: str
    quantity: str
    found: Estimate | float
    expected: tuple[float, float]
    source: str

    @property
    def mean(self) -> float:
        """The figure without its interval."""
        return self.found.mean if isinstance(self.found, Estimate) else self.found

    @property
    def passed(self) -> bool:
        """Whether it lies between the ends."""
        return self.expected[0] <= self.mean <= self.expected[1]


Check = Callable[[Sequence[int], bool], list[CheckResult]]
"""``check(seeds, small)``: networks of these seeds; ``small`` is what a test can afford."""


def write_digits(folder: Path) -> dict[str, Path]:
    """scikit-learn's digits at 8 px, as configs/data/digits8.yaml has them: the files by split."""
    files = {split: folder / f"{split}.beton" for split in ("train", "val")}
    settings = ["--config", str(ROOT / "configs" / "data" / "digits8.yaml"), "--output.workers", "1"]
    _run("data_prep/write_datasets.py", [*settings, *(f"--output.{split}={file}" for split, file in files.items())])
    return files


def train_digits(files: dict[str, Path], folder: Path, seed: int, **settings: object) -> Path:
    """Train configs/digits_mlp.yaml without heads on half of the digits; returns the run's folder.

    Args:
        files: of :func:`write_digits`.
        folder: of the run, not there yet.
        seed: of the network.
        settings: ``section__key=value`` changes one key.
    """
    changes = {"heads.taps": "[]", "run.seed": seed, "run.dir": folder, "run.eval_every": 10**6, "run.device": "cpu"}
    changes |= {f"data.{split}": file for split, file in files.items()}
    changes |= {name.replace("__", "."): value for name, value in settings.items()}
    base = ["--config", str(ROOT / "configs" / "digits_mlp.yaml")]
    _run("train_rlp.py", [*base, *(f"--{name}={value}" for name, value in changes.items())])
    return folder


def _run(script: str, arguments: Sequence[str]) -> None:
    """One of the repository's scripts, in a process of its own: what was trained before changes nothing."""
    if not (ROOT / script).is_file():
        raise UserError(f"{ROOT / script} is missing; expected a checkout of the repository, whose scripts are used")
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).splitlines()[-LINES:])
        raise UserError(f"{script} ended with status {done.returncode}; expected 0; its last lines were:\n{last}")
