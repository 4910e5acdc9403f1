"""Fitting heads: the optimum of scikit-learn in float64, whatever the shapes; what heads can and cannot see."""

from typing import Any
import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
import torch
from torch import Tensor
import torch.nn.functional as F

from benchmarks import probe
from rlp.errors import UserError
from rlp.measure import linear
from rlp.measure.fit import BudgetCurve, HeadFit, HeadSpec, fit_budget, fit_converged
from rlp.measure.preprocess import Preprocess

PER_CLASS, TWO_LAYER = HeadSpec(kind="per-class"), HeadSpec(kind="two-layer", hidden=32)


def random_problem(samples: int, dim: int, heads: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian features ``[N, D]`` and random labels ``[N, H]``."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, dim, generator=random)
    return x, torch.randint(n, (samples, heads), generator=random)


def ill_conditioned(x: Tensor, condition: float) -> Tensor:
    """Features with deviations from 1 down to 1 / condition, in directions that are none of the axes."""
    deviations = torch.logspace(0, -np.log10(condition), x.shape[1], dtype=torch.float64)
    random = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=random, dtype=torch.float64))[0]
    return ((x.double() * deviations) @ turn).float()


def best_head(x: Tensor, target: Tensor) -> tuple[float, int]:
    """Loss and correct samples of scikit-learn's optimum, float64; the features made orthonormal by QR."""
    centred = x.double().numpy() - x.double().numpy().mean(0)
    centred = centred[:, np.abs(centred).max(0) > 0]
    basis = np.linalg.qr(centred)[0] * len(x) ** 0.5
    model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=5000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(basis, target.numpy())
        log_p = model.predict_log_proba(basis)
    columns = np.searchsorted(model.classes_, target.numpy())
    return -log_p[np.arange(len(x)), columns].mean(), int(np.sum(model.predict(basis) == target.numpy()))


def kappa(fit: HeadFit, x: Tensor, target: Tensor, n: int, classes: Tensor | None = None) -> np.ndarray:
    """Of each head."""
    return (n * fit.read(x, target, classes)[0].double().mean(0).numpy() - 1) / (n - 1)


@pytest.mark.parametrize(
    ("samples", "dim", "heads", "n"),
    [(1999, 23, 5, 10), (501, 101, 3, 2), (301, 90, 2, 3), (997, 31, 2, 30), (3001, 7, 2, 100), (40, 1, 3, 2)],
)
def test_the_optimum_is_scikit_learns(samples: int, dim: int, heads: int, n: int) -> None:
    x, target = random_problem(samples, dim, heads, n)
    fit = fit_converged(x, target, n)
    assert fit.converged.all()
    correct, log_p, _ = fit.read(x, target)
    for head in range(heads):
        loss, right = best_head(x, target[:, head])
        assert fit.loss[head].item() == pytest.approx(loss, abs=1e-4)
        assert -log_p[:, head].mean().item() == pytest.approx(loss, abs=1e-4)
        assert abs(int(correct[:, head].sum()) - right) <= 2


def test_rare_labels_drive_weights_to_infinity_and_the_reading_still_arrives() -> None:
    """Some 6 samples of a label in 20 dimensions: weights grow without end, and the loss creeps towards its infimum."""
    x, target = random_problem(240, 20, 1, 40)
    fit = fit_converged(x, target, 40)
    loss, right = best_head(x, target[:, 0])
    assert fit.reason == ["loss"]
    assert fit.loss.item() == pytest.approx(loss, abs=1e-3)
    assert abs(int(fit.read(x, target)[0].sum()) - right) <= 2


def test_a_condition_number_of_a_million() -> None:
    x, target = random_problem(701, 37, 2, 5)
    x = ill_conditioned(x, 1e6) + 100  # and far from the origin
    fit = fit_converged(x, target, 5)
    for head in range(2):
        loss, right = best_head(x, target[:, head])
        assert fit.loss[head].item() == pytest.approx(loss, abs=1e-4)
        assert abs(int(fit.read(x, target)[0][:, head].sum()) - right) <= 2


def test_constant_and_repeated_features_change_nothing() -> None:
    x, target = random_problem(300, 11, 2, 3)
    plain = fit_converged(x, target, 3)
    more = torch.cat([x, torch.full((300, 2), 1e4), x[:, :3] * 7, torch.zeros(300, 1)], dim=1)
    assert fit_converged(more, target, 3).loss.tolist() == pytest.approx(plain.loss.tolist(), abs=1e-5)


@pytest.mark.parametrize(("samples", "dim", "n"), [(60, 100, 7), (1, 5, 2), (2, 1, 2), (50, 49, 100)])
def test_separable_samples_are_all_right(samples: int, dim: int, n: int) -> None:
    x, target = random_problem(samples, dim, 3, n)
    fit = fit_converged(x, target, n)
    correct, log_p, margin = fit.read(x, target)
    assert fit.reason == ["separated"] * 3
    assert correct.all()
    assert (margin > 0).all()
    assert log_p.exp().min() >= 0.9 - 1e-3


def test_features_that_do_not_vary_read_the_commonest_label() -> None:
    target = torch.tensor([[0], [1], [1], [1], [2]])
    fit = fit_converged(torch.full((5, 4), 3.5), target, 3)
    assert fit.read(torch.full((5, 4), 3.5), target)[0][:, 0].tolist() == [False, True, True, True, False]
    assert fit.loss.item() == pytest.approx(-(0.4 * np.log(0.2) + 0.6 * np.log(0.6)), abs=1e-4)


def test_equal_samples_with_different_labels_cap_the_reading() -> None:
    x, _ = random_problem(20, 30, 1, 2)
    fit = fit_converged(x.repeat(2, 1), torch.arange(2).repeat_interleave(20)[:, None], 2)
    assert fit.loss.item() == pytest.approx(np.log(2), abs=1e-6)


def test_heads_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    x, target = random_problem(400, 15, 5, 4)
    together = fit_converged(x, target, 4)
    for head in range(5):
        alone = fit_converged(x, target[:, head : head + 1], 4)
        assert alone.loss.item() == pytest.approx(together.loss[head].item(), abs=1e-6)
    monkeypatch.setattr(linear, "STATE_BYTES", 40_000)  # heads in groups, few pairs
    monkeypatch.setattr(linear, "LOGITS_BYTES", {"cpu": 1})  # samples in pieces
    assert fit_converged(x, target, 4).loss.tolist() == pytest.approx(together.loss.tolist(), abs=1e-5)


def test_raw_standardised_and_turned_features_read_the_same_at_convergence() -> None:
    """The insight of the module's docstring; after a small budget they differ widely."""
    x, target = random_problem(600, 40, 3, 4)
    x = x * torch.logspace(0, -3, 40) + 2
    kinds = [Preprocess.fit(x, "raw"), Preprocess.fit(x, "standardised"), Preprocess.fit(x, "projected", width=60)]
    fits = [fit_converged(kind(x), target, 4) for kind in kinds]
    for kind, fit in zip(kinds[1:], fits[1:], strict=True):
        assert fit.loss.tolist() == pytest.approx(fits[0].loss.tolist(), abs=1e-4)
        other, first = fit.read(kind(x), target)[0], fits[0].read(x, target)[0]
        assert (other != first).float().mean() < 0.005
    budgets = [fit_budget(kind(x), target, 4, HeadSpec(), steps=[200]).kappa(4).mean() for kind in kinds]
    assert budgets[1] > budgets[0] + 0.05
    few = Preprocess.fit(x, "projected", width=10)
    assert kappa(fit_converged(few(x), target, 4), few(x), target, 4).mean() < kappa(fits[0], x, target, 4).mean() - 0.1


def test_planted_labels_are_found_and_noise_reads_the_same_for_all() -> None:
    n = 10
    x, target = random_problem(6000, 16, 4, n)
    planted = x.clone()
    planted[:3000, :n] += 50 * F.one_hot(target[:3000, 0], n)
    fit = fit_converged(planted[:3000], target[:3000, :1], n)
    assert kappa(fit, planted[:3000], target[:3000, :1], n).item() > 0.99
    readings = []
    for rows in (slice(0, 3000), slice(3000, 6000)):  # nothing was planted in either
        noise = fit_converged(x[rows], target[rows], n)
        assert noise.loss.mean() == pytest.approx(np.log(n) - (n - 1) * 16 / (2 * 3000), abs=0.004)  # Wilks
        readings.append(kappa(noise, x[rows], target[rows], n).mean())
    assert 0.02 < min(readings) < max(readings) < 0.08
    assert abs(readings[0] - readings[1]) < 0.02
    fresh = fit_converged(x[:3000], target[:3000], n)
    assert abs(kappa(fresh, x[3000:], target[3000:], n).mean()) < 0.02  # samples that heads never saw


def test_heads_per_class_are_heads_of_each_class() -> None:
    x, target = random_problem(300, 6, 2, 3)
    classes = torch.arange(300) % 3 + (torch.arange(300) % 7 == 0) * 2  # 0 to 4, uneven
    fit = fit_converged(x, target, 3, PER_CLASS, classes=classes, num_classes=7)
    correct, log_p, margin = fit.read(x, target, classes)
    for c in classes.unique().tolist():
        mine = classes == c
        own = fit_converged(x[mine], target[mine], 3)
        for part, other in zip((correct, log_p, margin), own.read(x[mine], target[mine]), strict=True):
            assert torch.allclose(part[mine].float(), other.float(), atol=1e-5)
    assert fit.loss.tolist() == pytest.approx(-log_p.double().mean(0).numpy(), abs=1e-5)
    absent = fit.read(x[:4], target[:4], torch.full((4,), 6))
    assert not absent[0].any()
    assert absent[1].exp().flatten().tolist() == pytest.approx([1 / 3] * 8)


def test_few_samples_of_a_class_are_separated_by_counting_alone() -> None:
    x, target = random_problem(300, 40, 2, 10)
    classes = torch.arange(300) % 10
    per_class, shared = fit_converged(x, target, 10, PER_CLASS, classes=classes), fit_converged(x, target, 10)
    assert per_class.reason == ["separated"] * 2
    assert shared.reason == ["gradient"] * 2
    assert kappa(shared, x, target, 10).max() < 0.95


def test_two_layers_learn_what_one_cannot() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).repeat(20, 1)
    target = (x[:, :1] != x[:, 1:]).long().repeat(1, 2)
    target[:, 1] = 1 - target[:, 1]
    two = fit_converged(x, target, 2, TWO_LAYER)
    assert two.reason == ["separated"] * 2
    assert two.read(x, target)[0].all()
    assert fit_converged(x, target, 2).loss.tolist() == pytest.approx([np.log(2)] * 2, abs=1e-5)


def test_two_layers_stop_at_a_plateau_or_out_of_steps() -> None:
    x, target = random_problem(20, 3, 2, 3)
    x, target = x.repeat(4, 1), torch.cat([target, (target + 1) % 3, target, target])
    spec = HeadSpec(kind="two-layer", hidden=16)
    lines: list[str] = []
    fit = fit_converged(x, target, 3, spec, max_steps=5000, progress=lines.append)
    assert fit.reason == ["loss"] * 2
    assert fit.converged.all()
    assert lines
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))  # equal samples have two labels, 3 to 1
    assert entropy < fit.loss.min() < fit.loss.max() < 1.0
    short = fit_converged(x, target, 3, spec, max_steps=2)
    assert short.steps == 2
    assert not short.converged.any()


def test_too_few_steps_are_said() -> None:
    x, target = random_problem(500, 30, 2, 4)
    fit = fit_converged(x, target, 4, max_steps=2)
    assert fit.steps == 2
    assert fit.reason == ["steps"] * 2
    assert not fit.converged.any()


@pytest.fixture(params=["linear", "two-layer", "per-class"])
def spec(request: pytest.FixtureRequest) -> HeadSpec:
    return HeadSpec(kind=request.param, hidden=8)


def test_equal_seeds_give_equal_results_and_no_global_state_moves(spec: HeadSpec) -> None:
    x, target = random_problem(90, 5, 2, 3)
    classes = torch.arange(90) % 2
    states = torch.get_rng_state(), np.random.get_state(), torch.get_float32_matmul_precision()
    with torch.no_grad():
        fits = [fit_converged(x, target, 3, spec, classes=classes, max_steps=30, seed=1) for _ in range(2)]
        curves = [
            fit_budget(x, target, 3, spec, steps=[1, 5], batch_size=32, seed=s, classes=classes) for s in (1, 1, 2)
        ]
    assert torch.equal(fits[0].loss, fits[1].loss)
    assert torch.equal(fits[0].read(x, target, classes)[2], fits[1].read(x, target, classes)[2])
    assert np.array_equal(curves[0].correct, curves[1].correct)
    assert not np.array_equal(curves[0].correct, curves[2].correct)
    assert torch.equal(states[0], torch.get_rng_state())
    assert str(states[1]) == str(np.random.get_state())
    assert states[2] == torch.get_float32_matmul_precision()


def test_half_precision_and_huge_features_are_fitted_too() -> None:
    x, target = random_problem(200, 8, 1, 3)
    plain = fit_converged(x, target, 3).loss.item()
    assert fit_converged(x * 1e30, target, 3).loss.item() == pytest.approx(plain, abs=1e-5)
    double = x.double() + 1e5  # float32 would round it to hundredths
    fit = fit_converged(double, target, 3)
    assert -fit.read(double, target)[1].mean().item() == pytest.approx(plain, abs=1e-5)
    assert fit_converged(x.bfloat16(), target, 3).loss.item() == pytest.approx(plain, abs=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert fit_converged(x, target, 3).loss.item() == plain


def test_a_budget_grows_and_its_area_is_the_mean_over_doublings(spec: HeadSpec) -> None:
    x, target = random_problem(60, 50, 3, 4)
    classes = torch.arange(60) % 2
    curve = fit_budget(x, target, 4, spec, steps=[1, 8, 64, 256], lr=0.01, batch_size=16, classes=classes)
    assert curve.correct.shape == (4, 3, 60)
    assert curve.correct.dtype == bool
    accuracy = curve.correct.mean((1, 2))
    assert (np.diff(accuracy) >= 0).all()
    assert accuracy[0] < 0.6
    assert curve.kappa(4)[-1].min() > 0.9


def test_area_of_a_known_curve() -> None:
    correct = np.zeros((3, 1, 4), bool)
    correct[1, 0, :2], correct[2] = True, True
    curve = BudgetCurve(np.array([1, 2, 8]), correct)  # accuracies 0, 1/2, 1 after 0, 1 and 3 doublings
    assert curve.area(2).tolist() == pytest.approx([(1 * (-1 + 0) / 2 + 2 * (0 + 1) / 2) / 3])
    assert BudgetCurve(np.array([4]), correct[1:2]).area(2).tolist() == [0.0]


def test_a_budget_goes_on_where_it_was() -> None:
    x, target = random_problem(50, 6, 2, 3)
    one = fit_budget(x, target, 3, HeadSpec(), steps=[20], batch_size=16).correct
    many = fit_budget(x, target, 3, HeadSpec(), steps=[1, 7, 20], batch_size=16).correct
    assert np.array_equal(one[0], many[2])


X, TARGET = random_problem(6, 3, 2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[:0]}, r"features have the shape \[0, 3\]"),
        ({"x": X[0]}, "features have the shape"),
        ({"x": X.masked_fill(torch.arange(6)[:, None] == 4, torch.nan)}, "sample 4 hold NaN"),
        ({"x": X.long()}, "floating-point"),
        ({"target": TARGET[:5]}, r"target has the shape \[5, 2\]"),
        ({"target": TARGET[:, 0]}, "target has the shape"),
        ({"target": TARGET.int()}, "target is torch.int32"),
        ({"target": TARGET + 1}, "target holds 3; expected random labels"),
        ({"n": 1}, "n is 1"),
        ({"spec": PER_CLASS}, "need classes"),
        ({"spec": PER_CLASS, "classes": torch.arange(6), "num_classes": 3}, "classes holds 5"),
        ({"spec": HeadSpec(kind="two-layer", hidden=0)}, "hidden is 0"),
        ({"spec": HeadSpec(kind="cubic")}, "'cubic'; expected linear"),  # type: ignore[arg-type]
        ({"max_steps": 0}, "max_steps is 0"),
    ],
)
def test_mistakes_are_one_sentence(change: dict, message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "target": TARGET, "n": 3} | change
    with pytest.raises(UserError, match=message):
        fit_converged(**arguments)
    if "max_steps" not in change:
        with pytest.raises(UserError, match=message):
            fit_budget(**{"spec": HeadSpec(), "steps": [1]} | arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": []}, "steps is"), ({"steps": [0, 1]}, "steps is"), ({"steps": [2, 2]}, "steps is"),
     ({"steps": [1], "lr": 0.0}, "lr 0.0"), ({"steps": [1], "batch_size": 0}, "batch_size is 0")],
)  # fmt: skip
def test_a_budget_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_budget(X, TARGET, 3, HeadSpec(), **options)


def test_readings_of_what_does_not_fit_are_refused() -> None:
    fit = fit_converged(X, TARGET, 3)
    with pytest.raises(UserError, match="target holds 3"):
        fit.read(X, TARGET + 1)
    with pytest.raises(UserError, match=r"expected \[N, 3\]"):
        fit.read(X[:, :2], TARGET)
    with pytest.raises(UserError, match=r"target has the shape \[6, 1\]; expected \[6, 2\]"):
        fit.read(X, TARGET[:, :1])
    per_class = fit_converged(X, TARGET, 3, PER_CLASS, classes=torch.arange(6) % 2)
    with pytest.raises(UserError, match="need classes"):
        per_class.read(X, TARGET)
    with pytest.raises(UserError, match="classes holds 5"):
        per_class.read(X, TARGET, torch.arange(6))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["linear", "two-layer", "per-class"])
def test_a_gpu_finds_the_same(kind: str) -> None:
    x, target = random_problem(500, 20, 3, 5)
    classes, spec = torch.arange(500) % 2, HeadSpec(kind=kind, hidden=16)  # type: ignore[arg-type]
    here, there = (
        fit_converged(x.to(d), target.to(d), 5, spec, classes=classes.to(d), max_steps=100) for d in ("cpu", "cuda")
    )
    assert there.loss.tolist() == pytest.approx(here.loss.tolist(), abs=1e-4 if kind != "two-layer" else 0.05)
    correct, log_p, margin = there.read(x.cuda(), target.cuda(), classes.cuda())
    assert correct.device.type == log_p.device.type == margin.device.type == "cpu"
    curve = fit_budget(x.cuda(), target.cuda(), 5, spec, steps=[1, 10], classes=classes.cuda())
    assert curve.correct.shape == (2, 3, 500)


def test_the_benchmark_measures_what_it_says() -> None:
    sizes = probe.Sizes(samples=300, dim=8, taps=2, draws=3, others=((2, 2),), one_by_one=2, rounds=1)
    rows = probe.measure(sizes, torch.device("cpu"))
    assert [row["case"] for row in rows] == [
        "all draws at once", "scikit-learn, head by head", "all draws at once", "one pass",
    ]  # fmt: skip
    assert rows[0]["loss"]["low"] <= rows[1]["loss"]["median"] + 1e-4  # the same optimum
    assert rows[1]["loss"]["median"] == pytest.approx(rows[0]["loss"]["median"], abs=0.05)
    assert "extrapolated" in probe.page(rows)
