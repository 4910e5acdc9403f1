"""All measures of a run, each kept beside the run once it has been found, and joined into one table of samples."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
import hashlib
import json
from pathlib import Path
import time
from typing import Any

import numpy as np

from rlp.errors import UserError
from rlp.files import write_atomically
from rlp.measure.baselines import MEASURES, load_measure
from rlp.measure.baselines.interface import Finding, Findings, SampleScore, Subject
from rlp.measure.estimate import Estimate
from rlp.measure.run import Run, open_run

FOLDER = Path("measure") / "baselines"
"""In a run's folder: ``NAME.json`` for each measure."""


@dataclass(frozen=True)
class Found:
    """What a measure found, and the seconds it took."""

    findings: Findings
    seconds: float


@dataclass(frozen=True)
class Collected:
    """Every measure of one run.

    Attributes:
        name: of the run, unlike that of any other it is compared with.
        subject: the run and its samples.
        found: by measure.
        left_out: by measure why it could not be taken.
    """

    name: str
    subject: Subject
    found: dict[str, Found]
    left_out: dict[str, str]

    @property
    def run(self) -> Run:
        """The run."""
        return self.subject.run

    def scores(self, group: str) -> dict[str, np.ndarray]:
        """Columns of scores, float64 ``[N]``, of the samples of a group in the order of their ids."""
        every = [score for found in self.found.values() for score in found.findings.scores]
        return {score.name: score.values for score in every if score.group == group}


def collect(
    run_dir: str | Path,
    names: Sequence[str] | None = None,
    *,
    taps: Sequence[str] | None = None,
    samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    say: Any = None,
) -> Collected:
    """Take measures of a finished run, or what was found before with the same code and settings.

    Args:
        run_dir: the run's folder.
        names: of the measures, each once; keys of ``MEASURES``. None for every one that can be taken of this run: not
            each network has a ReLU, nor each class ten samples.
        taps: patterns; by default the run's own.
        samples: members, and as many non-members, at most.
        seed: of everything that a measure draws.
        device: ``auto``, ``cpu`` or ``cuda``.
        say: told each measure's name before it is taken, if given.

    Raises:
        UserError: the run cannot be opened, or a measure is unknown, or cannot be taken of it (which says why).
    """
    if names is not None and (not names or len(set(names)) < len(names)):
        raise UserError(f"--measures is {' '.join(names)!r}; expected some of {', '.join(MEASURES)}, each once")
    run = open_run(run_dir, device=device)
    subject = Subject.of(run, taps=taps, samples=samples, seed=seed)
    settings = {
        "checkpoint": run.sha256,
        "taps": list(subject.members.features),
        "samples": len(subject.members),
        "seed": seed,
    }
    found: dict[str, Found] = {}
    left_out: dict[str, str] = {}
    for name in MEASURES if names is None else names:
        try:
            found[name] = _taken(name, subject, settings, say)
        except UserError as error:
            if names is not None:
                raise
            left_out[name] = str(error)
    return Collected(run.name, subject, found, left_out)


def _taken(name: str, subject: Subject, settings: dict[str, Any], say: Any) -> Found:
    taken = load_measure(name)
    key = {**settings, "code": _code()}
    path = subject.run.dir / FOLDER / f"{name}.json"
    if (found := _kept(path, key)) is not None:
        return found
    if say is not None:
        say(name)
    began = time.monotonic()
    findings = taken(subject)
    found = Found(findings, time.monotonic() - began)
    content = {"schema": 1, "key": key, "seconds": found.seconds, **_as_json(findings)}
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))
    return found


@cache
def _code(package: Path = Path(__file__).parents[2]) -> str:
    """Hash of all modules of the package: what an older version found is not taken for this one's."""
    files = sorted(package.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _kept(path: Path, key: dict[str, Any]) -> Found | None:
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["key"] != key:
            return None
        return Found(_from_json(content), content["seconds"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: taken anew
        return None


def _as_json(findings: Findings) -> dict[str, Any]:
    return {
        "rows": [asdict(row) for row in findings.rows],
        "scores": [
            {
                "name": score.name,
                "group": score.group,
                "ids": score.ids.tolist(),
                "values": [value if np.isfinite(value) else None for value in score.values.tolist()],
            }
            for score in findings.scores
        ],
    }


def _from_json(content: dict[str, Any]) -> Findings:
    scores = [
        SampleScore(
            name=score["name"],
            group=score["group"],
            ids=np.array(score["ids"], np.int64),
            values=np.array([np.nan if value is None else value for value in score["values"]], np.float64),
        )
        for score in content["scores"]
    ]
    rows = [
        Finding(**{**row, **{name: row[name] and Estimate(**row[name]) for name in ("value", "non_members")}})
        for row in content["rows"]
    ]
    return Findings(scores=tuple(scores), rows=tuple(rows))
