"""The path for launch-bound problems, through Triton's interpreter where there is no GPU."""

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import torch
from torch import Tensor
import triton  # noqa: F401  (this file is left out where it is missing)

from rlp.kernels import ops
from rlp.kernels.loss import random_label_loss
from rlp.kernels.problem import sort_by_class
from rlp.losses import forget_penalty, uniform_penalty
from tests.loss_cases import Case, Outcome, assert_same, by_path, by_reference, poisoned, random_case


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 13),
    heads=st.integers(1, 3),
    n=st.integers(2, 64),
    dim=st.integers(1, 40),
    classes=st.sampled_from([None, 1, 2, 5]),
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
        found = by_path(case, "tiny", True, routes=routes)
    assert_same(found, by_reference(case, routes))


def test_more_features_and_rows_than_a_tile() -> None:
    case = random_case(1, 70, 1, 40, 130, classes=2)
    with poisoned():
        found = by_path(case, "tiny", True)
    assert_same(found, by_reference(case))


@pytest.mark.parametrize("classes", [torch.tensor([2] * 9), torch.tensor([0, 3, 3, 0, 3, 0, 0, 3, 0])])
def test_absent_classes_get_a_gradient_of_zero(classes: Tensor) -> None:
    case = replace(random_case(2, 9, 2, 7, 5, classes=4), classes=classes)
    with poisoned():
        found = by_path(case, "tiny", True)
    assert_same(found, by_reference(case))
    assert found.dweight is not None
    absent = [c for c in range(4) if c not in classes]
    assert torch.equal(found.dweight[:, absent], torch.zeros_like(found.dweight[:, absent]))


def test_any_strides() -> None:
    case = random_case(3, 6, 2, 7, 5, classes=3)

    def strided(tensor: Tensor) -> Tensor:
        wide = torch.full((*tensor.shape, 2), torch.nan, dtype=tensor.dtype)
        wide[..., 0] = tensor
        return wide[..., 0].mT.contiguous().mT if tensor.dim() > 2 else wide[..., 0]

    target = case.target.T.contiguous().T
    moved = replace(case, x=strided(case.x), weight=strided(case.weight), target=target)
    assert_same(by_path(moved, "tiny", True), by_reference(case))
    shared = replace(case, x=case.x[:1].expand(6, 5))
    assert_same(by_path(shared, "tiny", True), by_reference(replace(case, x=case.x[:1].repeat(6, 1))))


def relative_errors(found: Outcome, exact: Outcome) -> dict[str, float]:
    theirs = exact.named()
    return {
        name: float((part.double() - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-30))
        for name, part in found.named().items()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("classes", [None, 3])
def test_low_precision_is_as_good_as_plain(dtype: torch.dtype, scale: float, classes: int | None) -> None:
    """Of operands rounded to the type; a CPU would compute in float32, so the operator is told the type."""
    low = random_case(4, 17, 2, 33, 24, classes, scale=scale).to(dtype)
    low = replace(low, pull=low.pull.float())
    exact = by_reference(low.to(torch.float64))
    plain, ours = relative_errors(by_reference(low), exact), relative_errors(in_type(low, dtype), exact)
    for name, value in ours.items():
        assert value <= 2 * plain[name] + 4 * torch.finfo(dtype).eps, name


def in_type(case: Case, dtype: torch.dtype) -> Outcome:
    """As on a GPU, where the products are computed in the inputs' type."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.loss_cases.product_dtype", lambda *_: dtype)
        return by_path(case, "tiny", True)


def leaves(case: Case) -> tuple[Any, ...]:
    parts = (case.x, case.weight, case.bias)
    return tuple(None if part is None else part.clone().requires_grad_() for part in parts)


def arguments(case: Case) -> tuple[Any, ...]:
    order = [] if case.classes is None else list(sort_by_class(case.classes, case.weight.shape[1]))
    return *leaves(case), case.target, order, "tiny", False, case.x.dtype, case.entropy, True, True, 2**28, True


@pytest.mark.parametrize("classes", [None, 2])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradients_are_those_of_finite_differences(classes: int | None, entropy: bool) -> None:
    x, weight, bias, *rest = arguments(random_case(5, 2, 2, 3, 2, classes, entropy=entropy))

    def fit(weight: Tensor, bias: Tensor) -> Tensor:
        return ops.random_label_loss(x.detach(), weight, bias, *rest)[0]

    def statistics(x: Tensor) -> tuple[Tensor, ...]:
        stats = ops.random_label_loss(x, weight.detach(), bias.detach(), *rest)[1]
        return tuple(part for part in stats if part is not None and part is not stats.max_rest)

    assert torch.autograd.gradcheck(fit, (weight, bias))
    assert torch.autograd.gradcheck(statistics, (x,))


@pytest.mark.parametrize("classes", [None, 2])
def test_opcheck(classes: int | None) -> None:
    torch.library.opcheck(ops.random_label_loss_op, arguments(random_case(6, 4, 2, 5, 3, classes)))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    case = random_case(7, 11, 2, 9, 6, classes=3).to(torch.float32)
    assert case.classes is not None
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    moved = replace(
        case, x=case.x[order], target=case.target[order], classes=case.classes[order], pull=case.pull[:, order]
    )
    ours, theirs = by_path(case, "tiny", True).named(), by_path(moved, "tiny", True).named()
    for name in ("z_t", "lse_rest", "z_mean", "max_rest", "dx"):
        assert torch.equal(ours[name][order], theirs[name]), name


def test_the_fit_losss_gradient_sums_to_zero_over_labels() -> None:
    found = by_path(random_case(8, 9, 2, 7, 5, classes=3), "tiny", True)
    assert found.dweight is not None
    torch.testing.assert_close(found.dweight.sum(-2), torch.zeros(2, 3, 5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_two_backward_passes_through_one_forward() -> None:
    inputs = arguments(random_case(9, 5, 2, 7, 5))
    fit, stats = ops.random_label_loss(*inputs)
    loss = fit.sum() + forget_penalty(stats).sum() + uniform_penalty(stats).sum()
    loss.backward(retain_graph=True)
    once = [part.grad.clone() for part in inputs[:3]]
    loss.backward()
    assert all(torch.equal(part.grad, 2 * first) for first, part in zip(once, inputs[:3], strict=True))


def test_classes_and_labels_out_of_range_show_in_the_loss() -> None:
    """And touch nothing else: nobody looks at values on a GPU."""
    case = random_case(10, 4, 1, 5, 3, classes=2)
    assert case.classes is not None
    classes = case.classes.clone()
    classes[1] = 7
    with poisoned():
        found = by_path(replace(case, classes=classes), "tiny", True)
    assert found.stats.z_t[1].isnan().all()
    assert found.stats.z_t[[0, 2, 3]].isfinite().all()
    target = case.target.clone()
    target[2] = 5
    fit, stats = random_label_loss(case.x, case.weight, case.bias, target, case.classes, impl="triton")
    assert fit.isinf().all()
    assert stats.z_t[[0, 1, 3]].isfinite().all()


# -- on a GPU ----------------------------------------------------------------------------------------------------


def large(classes: int | None) -> Case:
    return random_case(11, 1024, 1 if classes else 8, 10, 256, classes).to(torch.float32, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [None, 100])
def test_the_benchmarks_shape(classes: int | None) -> None:
    case = large(classes)
    assert_same(by_path(case, "tiny", True), by_reference(case.to(torch.float64)), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [None, 100])
def test_every_bit_again(classes: int | None) -> None:
    case = large(classes)
    first = by_path(case, "tiny", True).named()
    for _ in range(20):
        again = by_path(case, "tiny", True).named()
        assert all(torch.equal(part, again[name]) for name, part in first.items())


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [None, 100])
def test_in_a_cuda_graph(classes: int | None) -> None:
    case = large(classes)
    x, weight, bias = leaves(case)

    def step() -> list[Tensor]:
        fit, stats = random_label_loss(x, weight, bias, case.target, case.classes, impl="triton")
        return list(torch.autograd.grad(fit.sum() + forget_penalty(stats).mean(), (x, weight, bias)))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [part.clone() for part in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for part in found:
        part.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
