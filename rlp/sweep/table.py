"""A sweep as Markdown and as JSON: retrained networks, every trial, winners and losers alike, and how it was done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlp.config import show
from rlp.measure.estimate import Estimate
from rlp.sweep.plan import Sweep
from rlp.sweep.readings import BINS, Final, estimates, gain
from rlp.sweep.space import Regulariser
from rlp.sweep.trials import Outcome

SCHEMA = 1
ENOUGH = 3
"""Seeds that a comparison asks for."""
PLAIN = "plain"
"""The regulariser, if it takes part, that others are set against."""
COLUMNS = {
    "test_accuracy": "test accuracy",
    "gain": "− plain",
    "noisy_given": "noisy points, given label",
    "noisy_true": "noisy points, true label",
    "ece": "ECE",
    "kappa": "κ",
    "delta": "Δ",
}
CONTROLS = ("class_only", "untrained", "noise", "leak")


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


def _at_end(params: Mapping[str, Any], searched: Any) -> bool:
    """Within a twentieth of the range from an end that is no bound of the quantity itself."""
    if searched.distribution == "choice":
        return False
    low, high, value = (float(each) for each in (searched.low, searched.high, params[searched.key]))
    if searched.distribution.startswith("log_"):
        low, high, value = (float(np.log(each)) for each in (low, high, value))
    place = (value - low) / (high - low)
    return place > 0.95 or (place < 0.05 and searched.low != 0)


def as_markdown(sweep: Sweep, results: Sequence[Result], selection: int, facts: Mapping[str, Any]) -> str:
    """The same for people."""
    about = sweep.space.about
    packages = ", ".join(f"{name} {version}" for name, version in facts["environment"]["packages"].items() if version)
    lines = [
        f"# Sweep {sweep.space.name}: regularisers at one tuning budget",
        "",
        f"{about[:1].upper()}{about[1:]} {sweep.trials} trials of each regulariser, chosen on {selection} validation "
        f"samples (non-members, true labels; seed {sweep.space.seed}); the chosen setting retrained with seeds "
        f"{', '.join(map(str, sweep.seeds))}.",
        "",
        *_main_table(results),
        "",
        _samples(results),
        *remarks(sweep, results),
        "",
        "![every trial, and the retrained networks with their intervals](sweep.png)",
        "",
        "## Fresh heads and their controls",
        "",
        *_heads_table(results),
        "",
        "## Every trial",
        "",
        *_trials_table(results),
        "",
        "## How",
        "",
        "```",
        facts["command"],
        "```",
        "",
        "The first trial takes the defaults, the others are drawn at random. Searched:",
        "",
        *(
            f"- {result.regulariser.name}: {'; '.join(map(str, result.regulariser.search)) or 'nothing'}"
            for result in results
        ),
        "",
        f"{packages}; {facts['environment']['cpu']}; Python {facts['environment']['python']}.",
        "",
    ]
    return "\n".join(lines)


def _main_table(results: Sequence[Result]) -> list[str]:
    rows = [_line(["regulariser", "chosen", *COLUMNS.values()]), _line(["---"] * (len(COLUMNS) + 2))]
    for result in results:
        numbers = numbers_of(result, results)
        cells = [result.regulariser.name, settings_text(result.chosen.training.params)]
        rows.append(_line([*cells, *(_number(numbers[name]) for name in COLUMNS)]))
    return rows


def _samples(results: Sequence[Result]) -> str:
    finals = [final for result in results for final in result.finals]
    counts = finals[0].counts if finals else dict.fromkeys(("test", "members", "noisy"), 0)
    return (
        f"Accuracy and ECE ({BINS} bins) on {counts['test']} test samples that no choice was made on, and accuracy on "
        f"the {counts['noisy']} of {counts['members']} members whose given label is wrong: by that label "
        "(memorised) and by the true one. κ and Δ of fresh heads on the frozen features. Intervals are 95%: over "
        "seeds, for κ and Δ over seed, draw and sample."
    )


def _heads_table(results: Sequence[Result]) -> list[str]:
    head = ["regulariser", "tap", "n", "N", "D", "chance", "κ", "κ of non-members", *CONTROLS]
    rows = [_line([name.replace("_", "-") for name in head]), _line(["---"] * len(head))]
    for result in results:
        if not result.finals:
            continue
        first = result.finals[0].row
        n = first["n"]
        kappa = [float(np.mean([_kappa(f, group, n) for f in result.finals])) for group in ("members", "others")]
        cells = [result.regulariser.name, first["tap"], str(n), str(first["N"]), str(first["D"])]
        controls = [_mean_control([final.row[name] for final in result.finals]) for name in CONTROLS]
        rows.append(_line([*cells, f"{first['chance']:.3g}", *map(_plain, kappa), *controls]))
    return rows


def _kappa(final: Final, group: str, n: int) -> float:
    return (n * float(getattr(final, group).correct.mean()) - 1) / (n - 1)


def _mean_control(values: Sequence[Any]) -> str:
    means = [value["mean"] if isinstance(value, dict) else value for value in values if value is not None]
    return _plain(float(np.mean(means))) if means else "–"


def _trials_table(results: Sequence[Result]) -> list[str]:
    head = ["regulariser", "trial", "setting", "validation accuracy", "epoch", "seconds"]
    rows = [_line(head), _line(["---"] * len(head))]
    for result in results:
        for outcome in result.trials:
            mark = " **chosen**" if outcome is result.chosen else ""
            accuracy = "a loss was not finite" if outcome.accuracy is None else f"{outcome.accuracy:.3f}{mark}"
            seconds = "–" if outcome.seconds is None else f"{outcome.seconds:.0f}"
            number = str(outcome.training.number)
            setting = settings_text(outcome.training.params)
            rows.append(_line([result.regulariser.name, number, setting, accuracy, str(outcome.epoch or "–"), seconds]))
    return rows


def settings_text(params: Mapping[str, Any]) -> str:
    """Values by the last part of their keys, to three digits."""
    shown = {
        key.rpartition(".")[2]: f"{value:.3g}" if isinstance(value, float) else show(value)
        for key, value in params.items()
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def summary_lines(results: Sequence[Result]) -> list[str]:
    """The comparison for the terminal."""
    lines = []
    for result in results:
        numbers = numbers_of(result, results)
        told = (
            f"{COLUMNS[name]} {_number(numbers[name])}" for name in ("test_accuracy", "noisy_given", "ece", "kappa")
        )
        chosen = settings_text(result.chosen.training.params)
        lines.append(" | ".join([f"{result.regulariser.name} ({chosen})", *told]))
    return lines


def _number(estimate: Estimate | None) -> str:
    return "–" if estimate is None else str(estimate).replace("-", "−")


def _plain(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
