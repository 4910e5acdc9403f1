"""A sweep for people: retrained networks, every trial, winners and losers alike, and how it was done; in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlp.config import show
from rlp.measure.estimate import Estimate
from rlp.sweep.plan import Sweep
from rlp.sweep.readings import BINS
from rlp.sweep.result import Result, numbers_of, remarks

COLUMNS = {
    "test_accuracy": "test accuracy",
    "gain": "− plain",
    "noisy_given": "noisy points, given label",
    "noisy_true": "noisy points, true label",
    "ece": "ECE",
    "kappa": "κ",
    "delta": "Δ",
}
KAPPAS = {
    "members": "κ",
    "non_members": "κ of non-members",
    "class_only": "class-only",
    "untrained": "untrained",
    "noise": "noise",
    "leak": "leak",
}
"""Of the probe's rows."""


def as_markdown(sweep: Sweep, results: Sequence[Result], selection: int, facts: Mapping[str, Any]) -> str:
    """All tables, what limits them, and how they were made; ``selection`` is the number of validation samples."""
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
    head = ["regulariser", "chosen", "validation: chosen, median trial", *COLUMNS.values()]
    rows = [_line(head), _line(["---"] * len(head))]
    for result in results:
        numbers = numbers_of(result, results)
        validation = f"{result.chosen.accuracy or 0:.3f}, {result.median_trial:.3f}"
        cells = [result.regulariser.name, settings_text(result.chosen.training.params), validation]
        rows.append(_line([*cells, *(_number(numbers[name]) for name in COLUMNS)]))
    return rows


def _samples(results: Sequence[Result]) -> str:
    finals = [final for result in results for final in result.finals]
    counts = finals[0].counts if finals else dict.fromkeys(("test", "members", "noisy"), 0)
    return (
        f"Accuracy and ECE ({BINS} bins) on {counts['test']} test samples that no choice was made on, and accuracy on "
        f"the {counts['noisy']} of {counts['members']} members whose given label is wrong: by that label "
        "(memorised) and by the true one. κ and Δ of fresh heads on the frozen features. Intervals are 95%: over "
        "seeds, for κ and Δ over seed, draw and sample. The median trial says how much hangs on the search."
    )


def _heads_table(results: Sequence[Result]) -> list[str]:
    head = ["regulariser", "tap", "n", "N", "D", "chance", *KAPPAS.values()]
    rows = [_line(head), _line(["---"] * len(head))]
    for result in results:
        if not result.finals:
            continue
        first = result.finals[0].row
        cells = [result.regulariser.name, *(str(first[name]) for name in ("tap", "n", "N", "D"))]
        kappas = (_mean_of([final.row[name] for final in result.finals]) for name in KAPPAS)
        rows.append(_line([*cells, f"{first['chance']:.3g}", *kappas]))
    return rows


def _mean_of(values: Sequence[Any]) -> str:
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
