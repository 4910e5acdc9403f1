"""What a sweep found of each regulariser, as numbers and as JSON, and what limits the comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlp.measure.estimate import Estimate
from rlp.sweep.plan import Sweep
from rlp.sweep.readings import BINS, Final, estimates, gain
from rlp.sweep.space import Regulariser, Searched
from rlp.sweep.trials import Outcome

SCHEMA = 1
ENOUGH = 3
"""Seeds that a comparison asks for."""
PLAIN = "plain"
"""The regulariser, if it takes part, that others are set against."""


@dataclass(frozen=True)
class Result:
    """One regulariser, from its trials to its retrained networks.

    Attributes:
        regulariser: which.
        trials: all of them, in order.
        chosen: the one with the best validation accuracy.
        retrained: with fresh seeds; without accuracy where a loss was not finite.
        finals: readings of those that were finite.
    """

    regulariser: Regulariser
    trials: Sequence[Outcome]
    chosen: Outcome
    retrained: Sequence[Outcome]
    finals: Sequence[Final]

    @property
    def median_trial(self) -> float:
        """Validation accuracy of the trial in the middle: of no search; 0 is a trial whose loss was not finite."""
        return float(np.median([trial.accuracy or 0.0 for trial in self.trials]))


def numbers_of(result: Result, results: Sequence[Result]) -> dict[str, Estimate | None]:
    """Every number of a row of the table."""
    plain = next((each for each in results if each.regulariser.name == PLAIN), None)
    found = estimates(result.finals)
    found["gain"] = None if plain in (None, result) else gain(result.finals, plain.finals)
    return found


def as_json(sweep: Sweep, results: Sequence[Result], selection: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All of it, as plain data; ``selection`` is the number of validation samples."""
    return {
        "schema": SCHEMA,
        "sweep": sweep.space.name,
        "about": sweep.space.about,
        "trials": sweep.trials,
        "seeds": list(sweep.seeds),
        "trial_seed": sweep.space.seed,
        "overrides": list(sweep.overrides),
        "validation_samples": selection,
        "bins": BINS,
        "remarks": remarks(sweep, results),
        "regularisers": [_entry(result, results) for result in results],
        **facts,
    }


def _entry(result: Result, results: Sequence[Result]) -> dict[str, Any]:
    numbers = numbers_of(result, results)
    return {
        "name": result.regulariser.name,
        "settings": result.regulariser.settings,
        "search": [str(each) for each in result.regulariser.search],
        "checkpoint": result.regulariser.checkpoint,
        "trials": [_trial(outcome) for outcome in result.trials],
        "chosen": result.chosen.training.number,
        "median_trial": result.median_trial,
        "estimates": {name: None if value is None else value.as_dict() for name, value in numbers.items()},
        "networks": [_trial(outcome) | _network(outcome, result.finals) for outcome in result.retrained],
    }


def _trial(outcome: Outcome) -> dict[str, Any]:
    training = outcome.training
    return {
        "run": training.name,
        "seed": training.config.run.seed,
        "params": training.params,
        "validation_accuracy": outcome.accuracy,
        "epoch": outcome.epoch,
        "seconds": outcome.seconds,
    }


def _network(outcome: Outcome, finals: Sequence[Final]) -> dict[str, Any]:
    final = next((each for each in finals if each.outcome is outcome), None)
    return {} if final is None else {**final.numbers, "counts": final.counts, "fresh_heads": final.row}


def remarks(sweep: Sweep, results: Sequence[Result]) -> list[str]:
    """What limits the comparison, a sentence each."""
    found = []
    if len(sweep.seeds) < ENOUGH:
        found.append(f"Preliminary: {len(sweep.seeds)} seeds; a comparison asks for at least {ENOUGH}.")
    for result in results:
        lost = len(result.retrained) - len(result.finals)
        if lost:
            found.append(f"{result.regulariser.name}: {lost} of {len(result.retrained)} retrained networks had a loss")
            found[-1] += " that became NaN or infinite; its numbers are of the others."
        ends = [each.key for each in result.regulariser.search if _at_end(result.chosen.training.params, each)]
        if ends:
            found.append(
                f"{result.regulariser.name}: the chosen {', '.join(ends)} lies at an end of its range; a better one "
                "may lie outside."
            )
    return found


def _at_end(params: Mapping[str, Any], searched: Searched) -> bool:
    """Within a twentieth of the range from an end that is no bound of the quantity itself."""
    if searched.distribution == "choice":
        return False
    low, high, value = (float(each) for each in (searched.low, searched.high, params[searched.key]))
    if searched.distribution.startswith("log_"):
        low, high, value = (float(np.log(each)) for each in (low, high, value))
    place = (value - low) / (high - low)
    return place > 0.95 or (place < 0.05 and searched.low != 0)
