"""What is read of the retrained networks: classes on the test split and on noisy points, calibration, fresh heads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
import json
from pathlib import Path
from typing import Any

import numpy as np

from rlp.data.beton import Beton
from rlp.data.view import View
from rlp.errors import UserError
from rlp.measure.estimate import Estimate, delta_estimate, kappa_estimate, mean_estimate
from rlp.measure.features import FeatureSet, extract
from rlp.measure.probe import ProbeOptions, probe
from rlp.measure.reading import Reading, load_readings
from rlp.measure.run import Group, Run, open_run
from rlp.reproduce.readings import is_probed
from rlp.sweep.plan import Sweep, Training
from rlp.sweep.trials import Outcome
from rlp.sweep.validation import PROBE_SEED, non_members, reserved

BINS = 15
"""Of the calibration error."""
MEANS = ("test_accuracy", "noisy_given", "noisy_true", "ece", "train_given")
"""Numbers of one network; κ and Δ come with draws and samples too."""


@dataclass(frozen=True)
class Final:
    """One retrained network.

    Attributes:
        outcome: its training.
        numbers: by the names of :data:`MEANS`; None where there are no such samples.
        counts: samples behind them: ``test``, ``members``, ``noisy``.
        members, others: fresh heads' readings.
        row: the probe's own row, with its controls.
    """

    outcome: Outcome
    numbers: dict[str, float | None]
    counts: dict[str, int]
    members: Reading
    others: Reading
    row: dict[str, Any]


def calibration_error(logits: np.ndarray, label: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: Σ_b n_b/N · |accuracy_b − confidence_b| over ``bins`` equal widths of confidence,
    the largest class probability (Guo et al., arXiv 1706.04599, equation 3).

    Args:
        logits: float [N, C].
        label: true classes, int64 [N].
        bins: bin b holds confidences in (b/bins, (b + 1)/bins].
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    confidence = 1 / np.exp(shifted).sum(axis=1)  # of the largest logit, which is 0 now
    gap = (logits.argmax(axis=1) == label) - confidence
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(place, gap, bins)).sum() / len(label))


def probe_options(sweep: Sweep, training: Training) -> ProbeOptions:
    """Fresh heads on members and on as many of those non-members that took no part in the selection."""
    fresh = sweep.space.fresh
    return ProbeOptions(
        taps=(fresh.tap,),
        n=(fresh.n,),
        draws=fresh.draws,
        protocols=(fresh.protocol,),
        features=(fresh.features,),
        width=fresh.width,
        samples=reserved(non_members(sweep.base.data), sweep.space.selection),
        seed=PROBE_SEED,
        checkpoint=training.regulariser.checkpoint,
        out=str(training.folder / "measure" / "sweep"),
    )


def probe_tasks(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[tuple[str, Callable[[], None]]]:
    """What has to be probed and was not yet."""
    tasks = []
    for outcome in outcomes:
        training = outcome.training
        options = probe_options(sweep, training)
        if outcome.accuracy is not None and not is_probed(Path(options.out or ""), options):
            tasks.append((training.name, _prober(training.folder, options)))
    return tasks


def _prober(folder: Path, options: ProbeOptions) -> Callable[[], None]:
    def call() -> None:
        probe(folder, options)

    return call


def read_final(sweep: Sweep, outcome: Outcome) -> Final:
    """Everything about one retrained network, once it is probed. The test split is read here and nowhere else.

    Raises:
        UserError: the run or the test split cannot be opened.
    """
    training = outcome.training
    run = open_run(training.folder, checkpoint=training.regulariser.checkpoint)
    tap = [sweep.space.fresh.tap]
    test, members = extract(run, test_group(sweep, run), taps=tap), extract(run, "members", taps=tap)
    noisy = members.given != members.true
    numbers = {
        "test_accuracy": _share(test, test.true),
        "noisy_given": _share(members, members.given, noisy),
        "noisy_true": _share(members, members.true, noisy),
        "ece": calibration_error(test.logits.cpu().numpy(), test.true),
        "train_given": _share(members, members.given),
    }
    folder = Path(probe_options(sweep, training).out or "")
    readings = {reading.condition.group: reading for reading in load_readings(folder / "readings.npz")}
    [row] = json.loads((folder / "probe.json").read_text(encoding="utf-8"))["rows"]
    counts = {"test": len(test), "members": len(members), "noisy": int(noisy.sum())}
    return Final(outcome, numbers, counts, readings["members"], readings["non-members"], row)


def test_group(sweep: Sweep, run: Run) -> Group:
    """The test split with its true labels, for a network of the sweep."""
    path = sweep.base.data.val
    beton = Beton.open(path)
    if beton.card.classes != run.card.classes:
        raise UserError(f"data.val {path} has other classes than data.train; expected the test split of the same data")
    return Group("test", "test images, true labels", beton, View(np.arange(beton.num_samples), beton.label))


def _share(samples: FeatureSet, label: np.ndarray, chosen: np.ndarray | None = None) -> float | None:
    """Share of the (chosen) samples that the network gives these labels; None of none."""
    right = samples.logits.argmax(dim=1).cpu().numpy() == label
    right = right if chosen is None else right[chosen]
    return float(right.mean()) if len(right) else None


def estimates(finals: Sequence[Final]) -> dict[str, Estimate | None]:
    """Each number over the seeds of one regulariser: means over seeds, κ and Δ over seed, draw and sample."""
    if not finals:
        return dict.fromkeys((*MEANS, "kappa", "delta"))
    n = finals[0].members.condition.num_labels
    members, others = [f.members.correct for f in finals], [f.others.correct for f in finals]
    found = {name: _within(_over_seeds([final.numbers[name] for final in finals])) for name in MEANS}
    return found | {"kappa": kappa_estimate(members, n), "delta": delta_estimate(members, others, n)}


def gain(finals: Sequence[Final], plain: Sequence[Final]) -> Estimate | None:
    """Test accuracy less that of plain training with the same seed."""
    known = {final.outcome.training.number: final.numbers["test_accuracy"] for final in plain}
    pairs = [(final.numbers["test_accuracy"], known.get(final.outcome.training.number)) for final in finals]
    return _over_seeds([a - b for a, b in pairs if a is not None and b is not None])


def _over_seeds(values: Sequence[float | None]) -> Estimate | None:
    present = [np.array([[value]], np.float64) for value in values if value is not None]
    return mean_estimate(present) if present else None


def _within(estimate: Estimate | None) -> Estimate | None:
    """A share's interval without what is below 0 or above 1."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return estimate
    return replace(estimate, low=max(0.0, estimate.low), high=min(1.0, estimate.high))
