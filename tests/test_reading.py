"""Readings sample by sample: written and read back whole, and refused in one sentence."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlp.errors import UserError
from rlp.measure.reading import Condition, Reading, load_readings, save_readings

CONDITION = Condition(
    protocol="converged", tap="layer1", depth=0, dim=5, num_labels=4, head="linear", features="raw", mode="eval",
    images="clean", group="members", steps=12, converged=0.5,
)  # fmt: skip


def made(draws: int, samples: int, n: int = 4) -> Reading:
    random = np.random.default_rng(draws * 100 + samples)
    log_p, margin = random.standard_normal((2, draws, samples)).astype(np.float32)
    condition = replace(CONDITION, num_labels=n)
    return Reading(condition=condition, ids=np.arange(samples), correct=margin > 0, log_p=log_p, margin=margin)


def test_accuracy_and_kappa_are_per_draw() -> None:
    reading = made(3, 7)
    for draw in range(3):
        share = sum(bool(right) for right in reading.correct[draw]) / 7
        assert reading.accuracy[draw] == pytest.approx(share)
        assert reading.kappa[draw] == pytest.approx((4 * share - 1) / 3)


@pytest.mark.parametrize(("draws", "samples"), [(1, 1), (3, 7), (2, 8), (5, 9)])
def test_readings_come_back_whole(tmp_path: Path, draws: int, samples: int) -> None:
    path = save_readings(tmp_path / "readings.npz", [made(draws, samples), made(1, 3, n=2)])
    found = load_readings(path)
    assert [reading.condition.num_labels for reading in found] == [4, 2]
    for name in ("ids", "correct", "log_p", "margin"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(made(draws, samples), name))


def test_shares_of_a_budget_come_back_as_they_are(tmp_path: Path) -> None:
    share = np.random.default_rng(0).random((2, 5), dtype=np.float32)
    found = load_readings(save_readings(tmp_path / "readings.npz", [replace(made(2, 5), correct=share)]))
    np.testing.assert_array_equal(found[0].correct, share)
    assert found[0].accuracy == pytest.approx(share.mean(axis=1))


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="draws by samples"):
        replace(made(2, 5), ids=np.arange(4))


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-200], lambda b: b.replace(b"\x93NUMPY", b"\x93NUMPX", 2)]
)
def test_damaged_readings_are_a_sentence(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = save_readings(tmp_path / "readings.npz", [made(2, 5)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="holds no readings"):
        load_readings(path)


def test_no_readings_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        load_readings(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("words")
    with pytest.raises(UserError, match="holds no readings"):
        load_readings(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="holds no readings"):
        load_readings(tmp_path / "other.npz")
