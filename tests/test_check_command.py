"""``python -m rlp.measure check``: what it runs, prints and returns."""

import numpy as np
import pytest

from rlp.measure import check_command
from rlp.measure.__main__ import main
from rlp.measure.baselines.check import CheckResult
from rlp.measure.check_command import CHECKS, COLUMNS, load_check
from rlp.measure.estimate import mean_estimate


def test_every_check_that_is_named_exists() -> None:
    assert all(callable(load_check(name)) for name in CHECKS)


@pytest.mark.parametrize(("found", "status", "words"), [(0.5, 0, "as expected"), (0.7, 1, "NOT AS EXPECTED")])
def test_figures_stand_beside_what_was_expected(
    found: float, status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[list[int], bool]] = []

    def check(seeds: list[int], small: bool) -> list[CheckResult]:
        calls.append((seeds, small))
        over_seeds = mean_estimate([np.full((1, 1), found + seed / 100) for seed in seeds])
        facts = {"measure": "knn", "expected": (0.4, 0.6), "source": "by hand"}
        return [
            CheckResult(quantity="over seeds", found=over_seeds, **facts),
            CheckResult(quantity="of one", found=found, **facts),
        ]

    monkeypatch.setattr(check_command, "load_check", lambda name: check)
    assert main(["check", "knn", "--seeds", "3", "4", "--small"]) == status
    text = capsys.readouterr().out
    assert calls == [([3, 4], True)]
    assert all(column in text for column in COLUMNS)
    assert text.count(words) == 2
    assert f"{found + 0.035:.3f}  [" in text
    assert "0.4 to 0.6" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "check 'nothing' does not exist; expected some of knn"),
        (["knn", "--seeds", "1", "1"], "each once"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["check", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
