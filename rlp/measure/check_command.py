"""The subcommand ``check`` of ``python -m rlp.measure``: measures and regularisers held to figures that are known."""

import argparse
from collections.abc import Sequence
from importlib import import_module
import time
from typing import Any

from rlp.errors import UserError
from rlp.measure.baselines.check import Check, CheckResult
from rlp.measure.estimate import Estimate
from rlp.measure.table import aligned

CHECKS = {
    "knn": "checks_features",
    "nmf": "checks_features",
    "permutation": "checks_features",
    "feldman_zhang": "checks_retrained",
    "el2n": "checks_retrained",
    "lira": "checks_retrained",
    "disagreement": "checks_retrained",
    "random_labels": "checks_retrained",
    "mixup": "checks_training",
    "bilevel": "checks_training",
}
"""Module of ``rlp.measure.baselines`` that holds each, as ``check_NAME``."""
COLUMNS = ("measure", "quantity", "seeds", "found", "95%", "expected", "", "where the expectation comes from")


def load_check(name: str) -> Check:
    """The function of a check; its module is imported only now."""
    return getattr(import_module(f"rlp.measure.baselines.{CHECKS[name]}"), f"check_{name}")


def check_table(results: Sequence[CheckResult]) -> str:
    """What was found beside what was expected."""
    return "\n".join(aligned([list(COLUMNS), *(_cells(result) for result in results)]))


def _cells(result: CheckResult) -> list[str]:
    found = result.found if isinstance(result.found, Estimate) else None
    interval = f"[{found.low:.3f}, {found.high:.3f}]" if found and found.low is not None else "-"
    low, high = result.expected
    seeds = str(found.seeds) if found else "-"
    told = "as expected" if result.passed else "NOT AS EXPECTED"
    facts = [result.measure, result.quantity, seeds, f"{result.mean:.3f}", interval]
    return [*facts, f"{low:g} to {high:g}", told, result.source]


def add_check(commands: Any) -> None:
    """Add the subcommand."""
    about = "train small networks on digits and hold measures and regularisers to the figures that are known of them"
    part = commands.add_parser("check", help=about, description=f"{about}. Exit status 1 if one is not met.")
    part.set_defaults(call=_check)
    part.add_argument(
        "names", nargs="*", metavar="NAME", help=f"some of {', '.join(CHECKS)} (default: all, half an hour on a CPU)"
    )
    part.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    part.add_argument("--small", action="store_true", help="fewer networks and epochs, as in the tests")


def _check(arguments: argparse.Namespace) -> int:
    names = arguments.names or list(CHECKS)
    if unknown := [name for name in names if name not in CHECKS]:
        raise UserError(f"check '{unknown[0]}' does not exist; expected some of {', '.join(CHECKS)}")
    if len(set(arguments.seeds)) < len(arguments.seeds) or min(arguments.seeds) < 0:
        raise UserError(f"--seeds is {arguments.seeds}; expected numbers of at least 0, each once")
    results: list[CheckResult] = []
    for name in names:
        began = time.monotonic()
        results += load_check(name)(arguments.seeds, arguments.small)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    print("\n" + check_table(results))
    return 0 if all(result.passed for result in results) else 1
