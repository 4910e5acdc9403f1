"""What heads read, sample by sample: the material of every table, interval and score."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
import io
import json
from pathlib import Path
import zipfile
import zlib

import numpy as np

from rlp.errors import UserError
from rlp.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Everything that a random-label accuracy depends on, beside the samples and the draws.

    Attributes:
        protocol: ``converged``, ``views``, ``budget``, ``online`` or ``retrieval``.
        tap, depth: where the features were taken; 0 is the shallowest.
        dim: D, the features a head sees (after projection, if there is one).
        num_labels: n.
        head: ``linear``, ``two-layer``, ``per-class`` ...
        features: ``raw``, ``standardised``, ``normalised`` or ``projected``.
        mode: ``eval`` or ``train``, the network's mode when the features were taken.
        images: ``clean`` or ``augmented``.
        group: whose features the heads were fitted to and scored on: ``members``, ``non-members``, or a control:
            ``untrained``, ``noise``, ``leak``.
        steps: steps of the head's optimiser, 0 where there is none.
        converged: share of the heads that passed the convergence test; 1 where there is none.
    """

    protocol: str
    tap: str
    depth: int
    dim: int
    num_labels: int
    head: str
    features: str
    mode: str
    images: str
    group: str
    steps: int = 0
    converged: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One condition, sample by sample.

    Attributes:
        condition: under which it was read.
        ids: sample ids, int64 ``[N]``.
        correct: whether the head of draw k got sample i's random label right, bool ``[K, N]``; in the budget the
            share of its steps at which it did (by log2 of the steps), float32 ``[K, N]``.
        log_p: log-probability of the random label, float32 ``[K, N]``.
        margin: ``z_t`` minus the largest other logit, float32 ``[K, N]``.
    """

    condition: Condition
    ids: np.ndarray
    correct: np.ndarray
    log_p: np.ndarray
    margin: np.ndarray

    def __post_init__(self) -> None:
        draws_by_samples = (self.correct.shape[0], len(self.ids))
        for name in ("correct", "log_p", "margin"):
            if getattr(self, name).shape != draws_by_samples:
                raise ValueError(
                    f"{name} is {getattr(self, name).shape}; expected {draws_by_samples}, draws by samples"
                )

    @property
    def accuracy(self) -> np.ndarray:
        """Random-label accuracy of each draw, float64 ``[K]``."""
        return self.correct.mean(axis=1)

    @property
    def kappa(self) -> np.ndarray:
        """``(n · accuracy - 1) / (n - 1)`` of each draw, float64 ``[K]``."""
        n = self.condition.num_labels
        return (n * self.accuracy - 1) / (n - 1)


def save_readings(path: Path, readings: Sequence[Reading]) -> Path:
    """Write readings as one ``.npz``, whole or not at all."""
    arrays: dict[str, np.ndarray] = {}
    conditions = [asdict(reading.condition) for reading in readings]
    arrays["conditions"] = np.frombuffer(json.dumps(conditions).encode(), np.uint8)
    for number, reading in enumerate(readings):
        arrays |= {f"{number}.{name}": getattr(reading, name) for name in ("ids", "log_p", "margin")}
        correct = reading.correct
        arrays[f"{number}.correct"] = np.packbits(correct, axis=1) if correct.dtype == bool else correct
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return write_atomically(path, buffer.getvalue())


def load_readings(path: Path) -> list[Reading]:
    """The readings of a ``.npz``.

    Raises:
        UserError: the file is missing or damaged, or holds no readings.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return _readings(arrays)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; expected the readings that `python -m rlp.measure probe` writes") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} holds no readings of this version: {error}") from error


def _readings(arrays: "np.lib.npyio.NpzFile") -> list[Reading]:
    conditions = json.loads(arrays["conditions"].tobytes())
    names = {field.name for field in fields(Condition)}
    if any(set(condition) != names for condition in conditions):
        raise ValueError("its conditions have other fields")
    found = []
    for number, condition in enumerate(conditions):
        ids = arrays[f"{number}.ids"]
        correct = arrays[f"{number}.correct"]
        if correct.dtype == np.uint8:
            correct = np.unpackbits(correct, axis=1, count=len(ids)).astype(bool)
        parts = {name: arrays[f"{number}.{name}"] for name in ("log_p", "margin")}
        found.append(Reading(condition=Condition(**condition), ids=ids, correct=correct, **parts))
    return found
