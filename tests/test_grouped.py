"""The path for large heads of their own for each class, through Triton's interpreter where there is no GPU."""

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import torch
from torch import Tensor
import triton.language as tl

from rlp.kernels import grouped, ops
from rlp.kernels.problem import Problem, sort_by_class
from rlp.losses import forget_penalty, uniform_penalty
from tests.loss_cases import Case, Outcome, assert_same, by_path, by_reference, poisoned, random_case


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 40),
    heads=st.integers(1, 2),
    n=st.integers(2, 70),
    dim=st.integers(1, 40),
    classes=st.integers(1, 6),
    own_features=st.booleans(),
    has_bias=st.booleans(),
    entropy=st.booleans(),
    fit_to_features=st.booleans(),
    routes=st.sampled_from(["wx", "w", "x", ""]),
)
def test_against_the_oracle(seed, batch, heads, n, dim, classes, routes, **options) -> None:
    case = random_case(seed, batch, heads, n, dim, classes, **options)
    if case.fit_to_features and routes == "x":
        routes = "wx"
    with poisoned():
        found = by_path(case, "grouped", True, routes=routes)
    assert_same(found, by_reference(case, routes))


@pytest.mark.parametrize("entropy", [False, True], ids=["sums kept", "weight read again"])
@pytest.mark.parametrize("chosen", [[2] * 35, [0, 3, 3, 0, 3, 0, 0, 3, 0] * 4], ids=["one class", "two of four"])
def test_absent_classes_get_a_gradient_of_zero(chosen: list[int], entropy: bool) -> None:
    case = random_case(2, len(chosen), 1, 37, 9, classes=4, entropy=entropy)
    case = replace(case, classes=torch.tensor(chosen))
    with poisoned():
        found = by_path(case, "grouped", True)
    assert_same(found, by_reference(case))
    assert found.dweight is not None
    absent = sorted({0, 1, 2, 3} - set(chosen))
    assert torch.equal(found.dweight[:, absent], torch.zeros_like(found.dweight[:, absent]))


def test_sums_that_do_not_fit_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(3, 20, 2, 19, 21, classes=3)
    monkeypatch.setattr(grouped, "MOST_BYTES", 100)
    with poisoned():
        found = by_path(case, "grouped", True)
    assert_same(found, by_reference(case))
    monkeypatch.setattr(grouped, "MOST_BYTES", 2**28)
    monkeypatch.setattr(grouped, "MOST_FEATURES", 16)
    with poisoned():
        found = by_path(case, "grouped", True)
    assert_same(found, by_reference(case))


def test_any_strides() -> None:
    case = random_case(4, 9, 2, 7, 5, classes=3)

    def spread(tensor: Tensor) -> Tensor:
        wide = torch.full((*tensor.shape, 2), torch.nan, dtype=tensor.dtype)
        wide[..., 0] = tensor
        return wide[..., 0].mT.contiguous().mT if tensor.dim() > 2 else wide[..., 0]

    expected = by_reference(case)
    order = list(sort_by_class(case.classes, 3)) if case.classes is not None else []
    x, weight = spread(case.x).requires_grad_(), spread(case.weight).requires_grad_()
    assert weight.stride() != case.weight.stride()
    fit, stats = ops.random_label_loss(
        x, weight, case.bias, case.target.T.contiguous().T, order, "grouped", False, torch.float64, False, True, True,
        2**28, True,
    )  # fmt: skip
    torch.testing.assert_close(fit, expected.fit)
    torch.testing.assert_close(stats[:4], expected.stats[:4])
    terms = [(fit * case.pull[0].mean(0)).sum()]
    terms += [(part * pull).sum() for part, pull in zip(stats[:3], case.pull[1:4], strict=True) if part is not None]
    dx, dweight = torch.autograd.grad(torch.stack(terms).sum(), (x, weight))
    torch.testing.assert_close(dx, expected.dx)
    torch.testing.assert_close(dweight, expected.dweight)


def relative_errors(found: Outcome, exact: Outcome) -> dict[str, float]:
    theirs = exact.named()
    return {
        name: float((part.double() - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-30))
        for name, part in found.named().items()
    }


def in_type(case: Case, dtype: torch.dtype) -> Outcome:
    """As on a GPU, where the products are computed in the inputs' type."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.loss_cases.product_dtype", lambda *_: dtype)
        return by_path(case, "grouped", True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("entropy", [False, True], ids=["sums kept", "weight read again"])
def test_low_precision_is_as_good_as_plain(dtype: torch.dtype, scale: float, entropy: bool) -> None:
    low = random_case(5, 23, 1, 101, 24, 3, scale=scale, entropy=entropy).to(dtype)
    low = replace(low, pull=low.pull.float())
    exact = by_reference(low.to(torch.float64))
    plain, ours = relative_errors(by_reference(low), exact), relative_errors(in_type(low, dtype), exact)
    for name, value in ours.items():
        assert value <= 2 * plain[name] + 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_uniform_penalty_survives_near_the_uniform_distribution(dtype: torch.dtype) -> None:
    """Its gradient is a small difference of sums over all labels; half precision alone would lose it."""
    case = random_case(6, 12, 1, 300, 24, 2, has_bias=False, scale=0.02).to(dtype)
    gradients = []
    for kind in (dtype, torch.float64):
        order = list(sort_by_class(case.classes, 2)) if case.classes is not None else []
        x = case.x.to(kind).requires_grad_()
        outputs = ops.random_label_loss(
            x, case.weight.to(kind), None, case.target, order, "grouped", False, kind, False, False, True, 2**28, True
        )
        gradients.append(torch.autograd.grad(uniform_penalty(outputs[1]).sum(), x)[0].double())
    found, exact = gradients
    assert (found - exact).norm() <= 0.02 * exact.norm()


def arguments(case: Case) -> tuple[Any, ...]:
    order = [] if case.classes is None else list(sort_by_class(case.classes, case.weight.shape[1]))
    leaves = (None if part is None else part.clone().requires_grad_() for part in (case.x, case.weight, case.bias))
    return *leaves, case.target, order, "grouped", False, case.x.dtype, case.entropy, True, True, 2**28, True


@pytest.mark.parametrize("entropy", [False, True], ids=["sums kept", "weight read again"])
def test_gradients_are_those_of_finite_differences(entropy: bool) -> None:
    x, weight, bias, *rest = arguments(random_case(7, 3, 1, 3, 2, 2, entropy=entropy))

    def fit(weight: Tensor, bias: Tensor) -> Tensor:
        return ops.random_label_loss(x.detach(), weight, bias, *rest)[0]

    def statistics(x: Tensor) -> tuple[Tensor, ...]:
        stats = ops.random_label_loss(x, weight.detach(), bias.detach(), *rest)[1]
        return tuple(part for part in stats if part is not None and part is not stats.max_rest)

    assert torch.autograd.gradcheck(fit, (weight, bias))
    assert torch.autograd.gradcheck(statistics, (x,))


@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(entropy: bool) -> None:
    torch.library.opcheck(ops.random_label_loss_op, arguments(random_case(8, 4, 2, 5, 3, 2, entropy=entropy)))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    case = random_case(9, 37, 1, 9, 6, classes=2).to(torch.float32)
    assert case.classes is not None
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    moved = replace(
        case, x=case.x[order], target=case.target[order], classes=case.classes[order], pull=case.pull[:, order]
    )
    ours, theirs = by_path(case, "grouped", True).named(), by_path(moved, "grouped", True).named()
    for name in ("z_t", "lse_rest", "z_mean", "max_rest", "dx"):
        assert torch.equal(ours[name][order], theirs[name]), name


def test_the_fit_losss_gradient_sums_to_zero_over_labels() -> None:
    found = by_path(random_case(10, 29, 1, 40, 5, classes=3), "grouped", True)
    assert found.dweight is not None
    torch.testing.assert_close(found.dweight.sum(-2), torch.zeros(1, 3, 5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_two_backward_passes_through_one_forward() -> None:
    inputs = arguments(random_case(11, 9, 2, 7, 5, 3))
    fit, stats = ops.random_label_loss(*inputs)
    loss = fit.sum() + forget_penalty(stats).sum() + uniform_penalty(stats).sum()
    loss.backward(retain_graph=True)
    once = [part.grad.clone() for part in inputs[:3]]
    loss.backward()
    assert all(torch.equal(part.grad, 2 * first) for first, part in zip(once, inputs[:3], strict=True))


@pytest.mark.parametrize("wrong", [-3, 2, 77])
def test_a_class_out_of_range_makes_its_row_nan_and_has_no_gradient(wrong: int) -> None:
    """Nobody looks at values on a GPU; nothing else may be touched."""
    case = random_case(12, 8, 1, 5, 3, classes=2)
    assert case.classes is not None
    classes = case.classes.clone()
    classes[5] = wrong
    others = [0, 1, 2, 3, 4, 6, 7]
    rest = replace(
        case, x=case.x[others], target=case.target[others], classes=classes[others], pull=case.pull[:, others]
    )
    expected = by_reference(rest)
    with poisoned():
        found = by_path(replace(case, classes=classes), "grouped", True)
    for mine, theirs in zip(found.stats[:4], expected.stats[:4], strict=True):
        assert mine is not None
        assert theirs is not None
        assert mine[5].isnan().all()
        torch.testing.assert_close(mine[others], theirs)
    assert found.dx is not None
    assert found.dweight is not None
    assert expected.dweight is not None
    assert not found.dx[5].any()
    torch.testing.assert_close(found.dx[others], expected.dx)
    share = 7 / 8 * case.pull[0].mean() / rest.pull[0].mean()  # of a mean over eight rows instead of seven
    torch.testing.assert_close(found.dweight, expected.dweight * share)


def test_places_past_two_to_the_31() -> None:
    """With the features outermost, a tile of the weight can reach that far; the memory between is never touched."""
    case = random_case(14, 5, 1, 3, 20, classes=2)
    problem = Problem(case.x, case.weight, None, case.target, None, torch.float64, False, True, True, 2**28, True)
    assert grouped._index(problem) == tl.int32
    far = torch.empty_strided((1, 2, 3, 20), (6, 3, 1, 2**27), dtype=torch.float64, device="meta")
    assert grouped._index(replace(problem, weight=far)) == tl.int64
    with pytest.MonkeyPatch.context() as patch, poisoned():
        patch.setattr(grouped, "_index", lambda _: tl.int64)
        assert_same(by_path(case, "grouped", True), by_reference(case))
        case = replace(case, entropy=True)
        assert_same(by_path(case, "grouped", True), by_reference(case))


# -- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_every_bit_again() -> None:
    case = random_case(13, 1024, 1, 100, 256, 100).to(torch.bfloat16, "cuda")
    first = by_path(case, "grouped", True).named()
    for _ in range(20):
        again = by_path(case, "grouped", True).named()
        assert all(torch.equal(part, again[name]) for name, part in first.items())


@pytest.mark.gpu
def test_a_weight_past_two_to_the_31_elements() -> None:
    """Of the last classes, against their own heads alone."""
    classes, n, dim, batch = 1000, 2900, 768, 64
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(1, classes, n, dim, device="cuda", dtype=torch.bfloat16, generator=generator)
    x = torch.randn(batch, dim, device="cuda", dtype=torch.bfloat16, generator=generator)
    target = torch.randint(n, (batch, 1), device="cuda", generator=generator)
    chosen = torch.randint(classes - 5, classes, (batch,), device="cuda", generator=generator)
    found = []
    for heads, ids in ((weight, chosen), (weight[:, -5:].clone(), chosen - (classes - 5))):
        features, parameter = x.clone().requires_grad_(), heads.requires_grad_()
        order = list(sort_by_class(ids, heads.shape[1]))
        fit, stats = ops.random_label_loss(
            features, parameter, None, target, order, "grouped", False, torch.bfloat16, False, True, True, 2**28, True
        )
        loss = fit.sum() + forget_penalty(stats).mean()
        dx, dw = torch.autograd.grad(loss, (features, parameter))
        found.append((stats.lse_rest, dx, dw[:, -5:].clone()))
        del dw
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
