"""How well scores agree: rank correlations held to slow counting, granulated τ and partial ρ to cases known by hand."""

from dataclasses import replace
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from rlp.measure import agreement
from rlp.measure.agreement import agreement_rows, kendall, over_runs, spearman
from rlp.measure.agreement_runs import RunFacts, granulated_rows, pairs_by_setting, partial_rows, partial_spearman

small = st.integers(0, 5)


def by_counting(a: np.ndarray, b: np.ndarray) -> float:
    """τ-b from its definition: pairs ordered alike minus pairs ordered otherwise, over pairs that are not tied."""
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in combinations(range(len(a)), 2)]
    first, second = sum(x != 0 for x, _ in signs), sum(y != 0 for _, y in signs)
    return sum(x * y for x, y in signs) / np.sqrt(first * second) if first and second else float("nan")


@given(st.lists(st.tuples(small, small), min_size=3, max_size=20))
def test_kendall_is_what_counting_gives(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, float).T
    assert kendall(a, b) == pytest.approx(by_counting(a, b), nan_ok=True)


def test_spearman_sees_ranks_alone() -> None:
    a = np.random.default_rng(0).normal(size=50)
    assert spearman(a, np.exp(3 * a)) == pytest.approx(1)
    assert spearman(a, -(a**3)) == pytest.approx(-1)
    assert np.isnan(spearman(a, np.ones(50)))


def test_intervals_cover_the_correlation_of_the_population() -> None:
    random = np.random.default_rng(1)
    truth, hits = 2 / np.pi * np.arcsin(0.5), 0  # Kendall's τ of normal variables of correlation 1/2
    for trial in range(40):
        a = random.normal(size=80)
        b = 0.5 * a + np.sqrt(0.75) * random.normal(size=80)
        found = over_runs(kendall, [(a, b)], trial)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
    assert hits >= 33


def test_runs_that_disagree_widen_the_interval() -> None:
    a = np.arange(200.0)
    same, apart = over_runs(kendall, [(a, a)] * 3, 0), over_runs(kendall, [(a, a), (a, -a), (a, a)], 0)
    assert same is not None
    assert apart is not None
    assert (same.low, same.high) == pytest.approx((1, 1))
    assert apart.mean == pytest.approx(1 / 3)
    assert apart.low is not None
    assert apart.high is not None
    assert apart.low < -0.3
    assert apart.high == pytest.approx(1)


@pytest.mark.parametrize("runs", [2, 3])
def test_intervals_of_few_runs_cover_the_mean_over_runs(runs: int) -> None:
    """Runs whose correlation differs, 30 times; percentiles over resampled runs held the mean 23 and 22 times."""
    random = np.random.default_rng(4)
    hits = 0
    for trial in range(30):
        pairs = []
        for rho in 0.3 + 0.3 * random.uniform(-1.7, 1.7, runs):
            a = random.normal(size=150)
            pairs.append((a, rho * a + np.sqrt(1 - rho**2) * random.normal(size=150)))
        found = over_runs(spearman, pairs, trial)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.29 <= found.high
    assert hits >= 25


def test_scores_that_a_run_lacks_or_that_are_constant_have_no_correlation() -> None:
    a = np.arange(30.0)
    holes = np.where(a % 3 == 0, np.nan, a)
    rows = agreement_rows([{"a": a, "b": holes, "c": a * 0, "d": a}, {"a": a, "b": a, "c": a}])
    assert [(row["a"], row["b"]) for row in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert rows[0]["kendall"]["mean"] == 1
    assert rows[0]["N"] == 20
    assert rows[0]["runs"] == 2
    assert rows[1]["kendall"] is None
    assert rows[1]["spearman"] is None


def test_large_runs_are_sampled_the_same_way_for_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "MOST", 50)
    a = np.random.default_rng(0).normal(size=500)
    rows = agreement_rows([{"a": a, "b": a, "c": -a}])
    assert [row["kendall"]["mean"] for row in rows] == [1, -1, -1]
    assert rows[0]["N"] == 50


def run(seed: int, gap: float, good: float, bad: float, train: float = 1.0, **settings: object) -> RunFacts:
    known = {"model.name": "mlp", "model.args": {}, "train.lr": 0.1, "data.noise": 0.0}
    merged = known | {key.replace("_", ".", 1): value for key, value in settings.items()}
    return RunFacts(f"run{seed}", seed, merged, train, gap, {"good": good, "bad": bad})


def grid() -> list[RunFacts]:
    """Over noise both measures follow the gap; over the rate `bad` runs against it."""
    return [
        run(seed, gap, good, bad, data_noise=noise, train_lr=lr)
        for seed in (0, 1)
        for noise, lr, gap, good, bad in ((0.0, 0.1, 1, 1, 5), (0.4, 0.1, 3, 3, 6), (0.0, 0.2, 2, 2, 4))
    ]


def test_pairs_differ_in_one_setting_of_one_seed_and_model() -> None:
    runs = [*grid(), run(0, 9, 9, 9, model_args={"width": 9}), run(0, 8, 8, 8, data_noise=0.4, train_lr=0.3)]
    found = pairs_by_setting(runs)
    assert set(found) == {"data.noise", "train.lr"}
    assert all(a.seed == b.seed and a.model == b.model for pairs in found.values() for a, b in pairs)
    assert len(found["data.noise"]) == 2
    assert len(found["train.lr"]) == 3


def test_granulated_agreement_names_the_setting_where_a_measure_fails() -> None:
    rows = {row["measure"]: row for row in granulated_rows(grid())}
    assert rows["good"]["granulated"] == 1
    assert rows["good"]["interval"] is None, "two seeds that agree say nothing of the third"
    assert rows["bad"]["granulated"] == 0
    assert (rows["bad"]["worst"], rows["bad"]["worst_tau"]) == ("train.lr", -1)
    assert rows["bad"]["pairs"] == 4
    assert granulated_rows(grid()[:3])[0]["interval"] is None, "one seed tells nothing of others"
    assert granulated_rows([run(0, 1, 1, 1), run(1, 2, 2, 2)]) == []


def test_seeds_that_disagree_leave_all_open() -> None:
    """Two seeds, of which one orders the runs of a setting alike and the other the other way round."""
    runs = [run(seed, gap, sign * gap, 0, data_noise=gap) for seed, sign in ((0, 1), (1, -1)) for gap in (0.0, 1.0)]
    runs += [run(2, 5, 5, 5)]  # a seed without a pair
    (good, _) = granulated_rows(runs)
    assert (good["granulated"], good["interval"], good["seeds"]) == (0, [-1, 1], 2)


def test_measures_that_a_run_lacks_are_left_out() -> None:
    """Without wrong labels there is no AUROC of them, and other taps have other scores."""
    more = [replace(each, values={"noise": 1.0, "nan": float("nan"), **each.values}) for each in grid()]
    assert {row["measure"] for row in granulated_rows([*more[:-1], grid()[-1]])} == {"good", "bad"}
    seeds = [replace(each, seed=number, gap=number) for number, each in enumerate(more)]
    assert {row["measure"] for row in partial_rows([*seeds[:-1], replace(grid()[0], seed=9)])} <= {"good", "bad"}
    assert partial_rows([*seeds[:-1], replace(grid()[0], seed=9)])


def test_partial_correlation_takes_off_what_train_accuracy_explains() -> None:
    random = np.random.default_rng(0)
    train, own = random.normal(size=(2, 300))
    assert spearman(train + 0.1 * own, train) > 0.9
    assert abs(partial_spearman(train + 0.1 * own, train + 0.1 * random.normal(size=300), train)) < 0.15
    assert partial_spearman(own + train, own, train) > 0.8
    assert np.isnan(partial_spearman(train, own, train))


def test_partial_rows_need_five_runs_of_one_model() -> None:
    random = np.random.default_rng(0)
    runs = [run(seed, gap, gap, -gap, train) for seed, (gap, train) in enumerate(random.normal(size=(8, 2)))]
    other = [run(9, 0, 0, 0, model_args={"width": 2})]
    rows = {row["measure"]: row for row in partial_rows([*other, *runs])}
    assert rows["good"]["partial"]["mean"] == pytest.approx(1)
    assert rows["bad"]["partial"]["mean"] == pytest.approx(-1)
    assert rows["good"]["runs"] == 8
    assert partial_rows(runs[:4]) == []
    (few, _) = partial_rows(runs[:5])
    assert few["partial"]["mean"] == pytest.approx(1)
    assert few["partial"]["low"] is None, "resamples of five runs that agree would give an interval without width"
