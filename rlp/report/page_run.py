"""What a page is made of: a run's folder, read whole; what is missing is left out, what is damaged is an error."""

from collections.abc import Sequence
from dataclasses import dataclass
import json
from pathlib import Path
import shlex
from typing import Any

from rlp.errors import UserError
from rlp.runlog import METRICS, SUMMARY, Row, read_rows, read_summary

PROBE = Path("measure/probe.json")
SCORES = Path("measure/scores.parquet")
COMPARED = Path("measure/baselines/rows.json")
ROW_KEYS = (
    "protocol", "tap", "depth", "D", "n", "N", "draws", "head", "features", "mode", "images", "chance",
    "members", "non_members", "delta",
)  # fmt: skip
"""Keys without which a row of probe.json cannot be shown; the others may be missing or null."""


@dataclass(frozen=True)
class ReportRun:
    """One run, read.

    Attributes:
        dir: its folder.
        name: unlike that of every other run on the page.
        epochs: the epoch rows of metrics.jsonl, at least one.
        summary: summary.json; empty when the run has not ended.
        config: the settings, ``{section: {key: value}}``; empty when neither file has them.
        environment: what it ran on; may be empty.
        probe: probe.json; None when the run was not probed.
        compared: what `compare` found in the run; empty when it was not compared.
    """

    dir: Path
    name: str
    epochs: list[Row]
    summary: Row
    config: Row
    environment: Row
    probe: Row | None
    compared: Row

    @property
    def rows(self) -> list[Row]:
        """The rows of probe.json, none without it."""
        return self.probe["rows"] if self.probe else []

    @property
    def taps(self) -> list[str]:
        """Every tap that was read in training or by the probe, from input to output."""
        heads = [row for epoch in self.epochs[-1:] for row in epoch.get("heads") or []]
        depth = {row["tap"]: row["depth"] for row in [*heads, *self.rows]}
        return sorted(depth, key=lambda tap: depth[tap])

    def setting(self, section: str, key: str) -> Any:
        """A setting; None when it is not known."""
        found = self.config.get(section)
        return found.get(key) if isinstance(found, dict) else None

    @property
    def seed(self) -> Any:
        return self.summary.get("seed", self.setting("run", "seed"))

    @property
    def lam(self) -> Any:
        return self.summary.get("lam", self.setting("heads", "lam"))

    @property
    def heads(self) -> Row:
        return (self.summary.get("config") or {}).get("heads") or {}

    @property
    def model(self) -> str:
        return str(self.setting("model", "name") or "unknown model")


def read_runs(folders: Sequence[Path]) -> list[ReportRun]:
    """Read every folder.

    Raises:
        UserError: a folder is missing or named twice, is no run, holds no finished epoch, or a file in it is damaged.
    """
    resolved = [folder.resolve() for folder in folders]
    for place, folder in enumerate(folders):
        if resolved[place] in resolved[:place]:
            raise UserError(f"{folder} is named twice; expected every run once")
    return [_read(folder, name) for folder, name in zip(folders, _names(resolved), strict=True)]


def _read(folder: Path, name: str) -> ReportRun:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected the folder of a run")
    epochs = [row for row in read_rows(folder / METRICS) if row["kind"] == "epoch"]
    if not epochs:
        raise UserError(f"{folder / METRICS} holds no finished epoch; expected at least one to report")
    summary = read_summary(folder) if (folder / SUMMARY).exists() else {}
    return ReportRun(
        dir=folder,
        name=name,
        epochs=epochs,
        summary=summary,
        config=summary.get("config") or _yaml(folder / "config.yaml"),
        environment=summary.get("environment") or _json(folder / "environment.json") or {},
        probe=_probe(folder / PROBE),
        compared=_json(folder / COMPARED) or {},
    )


def _names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _yaml(path: Path) -> Row:
    """The settings of a run that has not ended; none where PyYAML is not installed."""
    try:
        import yaml
    except ImportError:
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return content if isinstance(content, dict) else {}


def _probe(path: Path) -> Row | None:
    content = _json(path)
    if content is None:
        return None
    if not isinstance(content, dict) or content.get("schema") != 1 or not isinstance(content.get("rows"), list):
        raise UserError(f"{path} is no table of schema 1; expected what `python -m rlp.measure probe` writes")
    for number, row in enumerate(content["rows"]):
        missing = [key for key in ROW_KEYS if not isinstance(row, dict) or key not in row]
        if missing:
            raise UserError(f"{path}, row {number}, has no '{missing[0]}'; write it again with `{probe_command(path)}`")
    return content


def probe_command(path: Path) -> str:
    """The command that makes the file ``RUN/measure/...``."""
    return f"python -m rlp.measure probe --run {shlex.quote(str(path.parent.parent))}"
