"""Heads of their own for each class in PyTorch: `by_class` against the oracle."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import torch
from torch import Tensor

from rlp.errors import UserError
from rlp.kernels import by_class, ops
from rlp.kernels.loss import random_label_loss
from rlp.kernels.problem import Problem, sort_by_class
from tests.loss_cases import Case, assert_same, by_path, by_reference, check_path, poisoned, random_case

SIZES = {
    "seed": st.integers(0, 2**31),
    "batch": st.integers(1, 21),
    "heads": st.integers(1, 3),
    "classes": st.integers(1, 6),
    "n": st.integers(2, 17),
    "dim": st.integers(1, 12),
    "own_features": st.booleans(),
    "has_bias": st.booleans(),
    "entropy": st.booleans(),
    "fit_to_features": st.booleans(),
    "routes": st.sampled_from(["wx", "w", "x", ""]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=60, deadline=None)
@given(**SIZES)  # pyright: ignore[reportArgumentType]
def test_ragged_problems(dtype: torch.dtype, routes: str, **options) -> None:
    """In float64 the loop over the classes, in float32 mostly `grouped_mm`."""
    case = random_case(**options).to(dtype)
    if case.fit_to_features and routes == "x":
        routes = "wx"
    with poisoned():
        found = by_path(case, "by_class", False, routes=routes)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    assert_same(found, by_reference(case.to(torch.float64), routes), tolerance, tolerance)


def _counted(case: Case, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often `grouped_mm` is called for both passes, which are checked too."""
    calls, real = [], torch.nn.functional.grouped_mm
    monkeypatch.setattr(by_class.F, "grouped_mm", lambda *args, **kw: calls.append(args) or real(*args, **kw))
    assert_same(by_path(case, "by_class", False), by_reference(case.to(torch.float64)), 2e-5, 2e-5)
    return len(calls)


@pytest.mark.skipif(not by_class._has_grouped_mm(), reason="this PyTorch has no grouped_mm for a CPU")
@pytest.mark.parametrize("n", [8, 10])
def test_grouped_mm_where_it_can(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _counted(random_case(0, 19, 2, n, 8, 5).to(torch.float32), monkeypatch) == 6


def test_a_loop_where_grouped_mm_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    by_class._has_grouped_mm()
    case = random_case(0, 19, 2, 8, 8, 5).to(torch.float32)
    storage = torch.empty(case.weight.numel() + 1)
    shifted = storage[1:].view(case.weight.shape).copy_(case.weight)  # on no multiple of 16 bytes
    for weight in (shifted, case.weight.transpose(1, 3).contiguous().transpose(1, 3)):
        calls = []
        monkeypatch.setattr(by_class.F, "grouped_mm", lambda *args, calls=calls, **_: calls.append(args))
        order = sort_by_class(torch.arange(19) % 5, 5)
        x = torch.randn(19, 8)
        found = by_class._rows_times(x[order.rows], weight[0].mT, order.offsets, torch.float32)
        expected = torch.einsum("bd,bnd->bn", x, weight[0, order.classes])[order.rows]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not calls


def test_absent_classes_have_no_gradient() -> None:
    case = replace(random_case(0, 9, 2, 8, 8, 5), classes=torch.tensor([1, 3, 3, 1, 1, 3, 3, 3, 1]))
    for dtype in (torch.float64, torch.float32):
        with poisoned():
            dweight = by_path(case.to(dtype), "by_class", False).dweight
        assert dweight is not None
        assert not dweight[:, [0, 2, 4]].any()
        torch.testing.assert_close(dweight.sum(2), torch.zeros_like(dweight.sum(2)), atol=1e-6, rtol=0)


def test_other_strides() -> None:
    case = random_case(3, 9, 2, 6, 8, 4, own_features=True)

    def strided(tensor: Tensor) -> Tensor:
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)

    moved = replace(case, x=strided(case.x), weight=strided(case.weight), target=strided(case.target))
    assert not moved.weight.is_contiguous()
    options = (torch.float64, False, True, True, 1, False)
    order = sort_by_class(torch.arange(9) % 4, 4)
    stats, found = [], []
    for one in (case, moved):
        problem = Problem(one.x, one.weight, one.bias, one.target, order, *options)
        stats.append(by_class.forward(problem)[0])
        x, weight = one.x.requires_grad_(), one.weight.requires_grad_()
        fit, other = ops.random_label_loss(x, weight, one.bias, one.target, list(order), "by_class", False, *options)
        found.append(torch.autograd.grad(fit.sum() + other.z_mean.sin().sum(), [x, weight]))
    torch.testing.assert_close(stats[0][:4], stats[1][:4])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("wrong", [-1, 5])
def test_class_ids_out_of_range(wrong: int) -> None:
    case = random_case(0, 3, 1, 4, 4, 5)
    with pytest.raises(UserError, match=rf"classes holds {wrong}; expected class ids in \[0, 5\)"):
        random_label_loss(case.x, case.weight, case.bias, case.target, torch.tensor([0, wrong, 2]), impl="eager")


def test_gradcheck() -> None:
    case = random_case(1, 4, 2, 3, 4, 3, entropy=True)
    assert case.classes is not None
    order = list(sort_by_class(case.classes, 3))
    given = [part.requires_grad_() for part in (case.x, case.weight, case.bias) if part is not None]

    def statistics(x: Tensor) -> tuple[Tensor, ...]:
        _, stats = ops.random_label_loss(
            x, given[1], given[2], case.target, order, "by_class", False, torch.float64, True, True, True, 1, False
        )
        return stats.z_t, stats.lse_rest, stats.z_mean, stats.entropy_rest  # pyright: ignore[reportReturnType]

    def fit(weight: Tensor, bias: Tensor) -> Tensor:
        options = (torch.float64, True, True, True, 1, False)
        return ops.random_label_loss(given[0], weight, bias, case.target, order, "by_class", False, *options)[0]

    assert torch.autograd.gradcheck(statistics, (given[0],))
    assert torch.autograd.gradcheck(fit, tuple(given[1:]))


def test_operator() -> None:
    case = random_case(2, 5, 2, 4, 8, 3)
    assert case.classes is not None
    order = list(sort_by_class(case.classes, 3))
    args = (case.x.requires_grad_(), case.weight.requires_grad_(), case.bias, case.target, order, "by_class", True)
    torch.library.opcheck(ops.random_label_loss_op, (*args, torch.float64, False, True, True, 1, False))


def test_backward_twice() -> None:
    case = random_case(4, 7, 1, 4, 8, 3).to(torch.float32)
    x, weight = case.x.requires_grad_(), case.weight.requires_grad_()
    fit, stats = random_label_loss(x, weight, case.bias, case.target, case.classes, impl="eager")
    total = fit.sum() + stats.lse_rest.sum()
    first, second = (torch.autograd.grad(total, [x, weight], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_planted_checks() -> None:
    check_path("by_class", False)
