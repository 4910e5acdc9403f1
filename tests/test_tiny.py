"""The path for launch-bound problems, through Triton's interpreter where there is no GPU."""

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import torch
from torch import Tensor
import triton  # noqa: F401  (this file is left out where it is missing)

from rlp.kernels import ops, tiny
from rlp.kernels.problem import sort_by_class
from rlp.losses import forget_penalty, uniform_penalty
from tests.loss_cases import Case, Outcome, assert_same, by_path, by_reference, poisoned, random_case


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 17),
    heads=st.integers(1, 3),
    n=st.integers(2, 64),
    dim=st.integers(1, 40),
    classes=st.sampled_from([None, 1, 2, 3, 5]),
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
    case = random_case(1, 65, 1, 40, 130, classes=2)  # a row and two features of their own blocks
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


def spread(tensor: Tensor) -> Tensor:
    """The same values with NaN between and around them, the last two dimensions exchanged in memory."""
    shape = tensor.mT.shape
    wide = torch.full([2 * size + 1 for size in shape], torch.nan, dtype=tensor.dtype)
    return wide[tuple(slice(1, None, 2) for _ in shape)].copy_(tensor.mT).mT


def results(case: Case) -> list[Tensor]:
    """Fit loss, statistics and gradients of the case's very tensors; copies would lose their strides."""
    assert case.bias is not None
    x, weight, bias = (part.detach().requires_grad_() for part in (case.x, case.weight, case.bias))
    fit, stats = ops.random_label_loss(
        x, weight, bias, case.target, order_of(case), "tiny", False, x.dtype, False, True, True, 2**28, True
    )
    loss = fit.sum() + (stats.z_t * stats.lse_rest).sum() + stats.z_mean.square().sum()
    return [fit, *stats[:4], *torch.autograd.grad(loss, (x, weight, bias))]


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("own_features", [False, True])
def test_any_strides(classes: int | None, own_features: bool) -> None:
    case = random_case(3, 6, 2, 7, 5, classes, own_features)
    assert case.bias is not None
    target = case.target.repeat_interleave(2, 0).T.contiguous().T[::2]
    moved = replace(case, x=spread(case.x), weight=spread(case.weight), bias=spread(case.bias), target=target)
    assert not any(part.is_contiguous() for part in (moved.x, moved.weight, moved.bias, target) if part is not None)
    assert all(map(torch.equal, results(moved), results(case)))


def test_expanded_inputs() -> None:
    """One row for the whole batch, one weight for all heads, one list of labels."""
    case = random_case(3, 6, 2, 7, 5)
    names = ("x", "weight", "bias", "target")
    expanded = {name: getattr(case, name)[:1].expand_as(getattr(case, name)) for name in names}
    copied = {name: part.contiguous() for name, part in expanded.items()}
    assert all(map(torch.equal, results(replace(case, **expanded)), results(replace(case, **copied))))


@pytest.mark.parametrize("classes", [None, 3])
def test_operands_are_rounded_as_under_autocast(classes: int | None) -> None:
    """Of float32 inputs, in the kernel, to the very bits that half-precision inputs hold."""
    low = random_case(12, 9, 2, 7, 5, classes).to(torch.float16)
    low = replace(low, pull=low.pull.float())
    jitter = [part * (1 + 2**-13) for part in (low.x.float(), low.weight.float())]  # less than half a step of float16
    high = replace(low, x=jitter[0], weight=jitter[1], bias=None if low.bias is None else low.bias.float())
    ours, theirs = in_type(high, torch.float16).named(), in_type(low, torch.float16).named()
    for name, part in ours.items():
        assert torch.equal(part.to(theirs[name].dtype), theirs[name]), name


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


def order_of(case: Case) -> list[Tensor]:
    return [] if case.classes is None else list(sort_by_class(case.classes, case.weight.shape[1]))


def arguments(case: Case) -> tuple[Any, ...]:
    return (
        *leaves(case),
        case.target,
        order_of(case),
        "tiny",
        False,
        case.x.dtype,
        case.entropy,
        True,
        True,
        2**28,
        True,
    )


@pytest.mark.parametrize(("classes", "entropy"), [(None, False), (2, True)])
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


@pytest.mark.parametrize("wrong", [-1, 2, 2**40])
def test_a_class_out_of_range_makes_its_row_nan_and_has_no_gradient(wrong: int) -> None:
    """Nobody looks at values on a GPU; other rows stay as they are, bit for bit."""
    case = random_case(10, 4, 1, 5, 3, classes=2)
    assert case.classes is not None
    there = torch.tensor([0, 2, 3])
    with poisoned():
        found = by_path(replace(case, classes=case.classes.index_fill(0, torch.tensor(1), wrong)), "tiny", True)
    rest = replace(case, x=case.x[there], target=case.target[there], classes=case.classes[there],
                   pull=case.pull[:, there])  # fmt: skip
    expected = by_path(rest, "tiny", True)
    for name in ("z_t", "lse_rest", "z_mean", "max_rest"):
        ours = found.named()[name]
        assert ours[1].isnan().all(), name
        assert torch.equal(ours[there], expected.named()[name]), name
    assert found.dx is not None
    assert expected.dx is not None
    assert torch.equal(found.dx[1], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(found.dx[there], expected.dx)
    assert found.dweight is not None
    assert expected.dweight is not None
    pull = case.pull[0].mean(), case.pull[0, there].mean()  # gradients of two means, over 4 rows and over 3
    torch.testing.assert_close(found.dweight * 4 / pull[0], expected.dweight * 3 / pull[1])


@pytest.mark.parametrize("wrong", [-1, 5, 40])
def test_a_label_out_of_range_shows_in_the_loss(wrong: int) -> None:
    case = random_case(10, 4, 1, 5, 3, classes=2)
    with poisoned():
        found = by_path(replace(case, target=case.target.index_fill(0, torch.tensor(2), wrong)), "tiny", True)
    assert found.fit.isinf().all()
    assert found.stats.z_t[2].isneginf().all()
    assert found.stats.z_t[[0, 1, 3]].isfinite().all()
    assert found.dx is not None
    assert found.dx.isfinite().all()


def test_programs_of_the_weight_gradient() -> None:
    """Enough for the SMs where there is that much work at all."""
    for heads, dim, least in ((8, 256, 64), (100, 256, 132), (1, 512, 16)):
        rows = tiny.launch(10, dim, heads)[1]
        assert heads * -(-dim // rows["GRADIENT_D"]) >= least
        assert 64 <= rows["ROWS"] <= 128


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
    inputs = arguments(large(classes))  # the sort of the classes is no part of the path

    def step() -> list[Tensor]:
        fit, stats = ops.random_label_loss(*inputs)
        return list(torch.autograd.grad(fit.sum() + forget_penalty(stats).mean(), inputs[:3]))

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
