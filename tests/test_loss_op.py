"""The random-label loss as an operator: autograd, compilation, precisions, memory, choice of path, wrong arguments."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rlp.errors import UserError
from rlp.kernels import loss as loss_module
from rlp.kernels import ops, whole
from rlp.kernels.loss import random_label_loss
from rlp.kernels.problem import Problem, Upstream, sort_by_class
from rlp.losses import forget_penalty, uniform_penalty
from tests.loss_cases import Case, Outcome, assert_same, by_path, by_reference, random_case

EAGER = ("whole", "by_rows", "by_columns", "by_class")


def case_for(path: str, seed: int = 0, **options: Any) -> Case:
    """A small ragged problem that the path serves."""
    return random_case(seed, 7, 3, 11, 5, classes=4 if path == "by_class" else None, **options)


def arguments(case: Case, path: str, budget: int = 500) -> tuple[Any, ...]:
    """Of the operator, with leaves that ask for gradients."""
    x, weight, bias = (
        None if part is None else part.clone().requires_grad_() for part in (case.x, case.weight, case.bias)
    )
    order = [] if case.classes is None else list(sort_by_class(case.classes, case.weight.shape[1]))
    return x, weight, bias, case.target, order, path, False, case.x.dtype, case.entropy, True, True, budget, False


@pytest.mark.parametrize("path", EAGER)
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(path: str, entropy: bool) -> None:
    """PyTorch's own test of schema, fake tensors, autograd registration and compilation."""
    if path == "by_rows" and entropy:
        pytest.skip("served by by_columns")
    torch.library.opcheck(ops.random_label_loss_op, arguments(case_for(path, entropy=entropy), path))


@pytest.mark.parametrize("path", EAGER)
@pytest.mark.parametrize("own_features", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_fake_outputs_have_the_strides_of_real_ones(
    path: str, own_features: bool, transposed: bool, heads: int
) -> None:
    """Compiled code relies on them; in any layout of the inputs."""
    case = random_case(
        0, 7, heads, 11, 8, classes=4 if path == "by_class" else None, own_features=own_features
    ).to(torch.float32)  # fmt: skip
    if transposed:
        target = case.target.T.contiguous().T
        case = replace(case, x=case.x.mT.contiguous().mT, weight=case.weight.mT.contiguous().mT, target=target)
    x, weight, bias, target, order, path, _, *options = arguments(case, path)
    outputs = ops.random_label_loss_op(x, weight, bias, target, order, path, False, *options)
    pull = torch.ones(7, heads)
    upstream = (pull[0], pull, pull, pull, None)
    found = [*outputs, *ops.random_label_loss_backward_op(*upstream, outputs, x, weight, bias, target, order, path,
                                                          *options)]  # fmt: skip
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(part) for part in (x, weight, bias, target)]
        orders = [mode.from_tensor(part) for part in order]
        fakes = ops.random_label_loss_op(*inputs, orders, path, False, *options)
        arriving = [None if part is None else mode.from_tensor(part) for part in upstream]
        fakes = [*fakes, *ops.random_label_loss_backward_op(*arriving, fakes, *inputs, orders, path, *options)]
    for real, fake in zip(found, fakes, strict=True):
        assert real.shape == fake.shape
        assert [s for s, n in zip(real.stride(), real.shape, strict=True) if n > 1] == [
            s for s, n in zip(fake.stride(), fake.shape, strict=True) if n > 1
        ]


@pytest.mark.parametrize("path", EAGER)
def test_gradients_are_those_of_finite_differences(path: str) -> None:
    """Along each route with the other closed; a routed loss has no gradient that differences could see as a whole."""
    x, weight, bias, *rest = arguments(case_for(path), path)

    def fit(weight: Tensor, bias: Tensor) -> Tensor:
        return ops.random_label_loss(x.detach(), weight, bias, *rest)[0]

    def statistics(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.random_label_loss(x, weight.detach(), bias.detach(), *rest)[1][:3])

    assert torch.autograd.gradcheck(fit, (weight, bias))
    assert torch.autograd.gradcheck(statistics, (x,))


def total(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, classes: Tensor | None = None, **options: Any
) -> Tensor:
    """A training loss: fit and penalties."""
    fit, stats = random_label_loss(x, weight, bias, target, classes, **options)
    return fit.sum() + forget_penalty(stats).mean() + 0.3 * uniform_penalty(stats).mean()


def leaves(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    assert case.bias is not None
    return case.x.clone().requires_grad_(), case.weight.clone().requires_grad_(), case.bias.clone().requires_grad_()


@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(classes: int | None, dynamic: bool) -> None:
    torch._dynamo.reset()
    case = random_case(1, 9, 3, 11, 5, classes=classes)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found = []
    for function in (total, compiled):
        inputs = leaves(case)
        function(*inputs, case.target, case.classes).backward()
        found.append([part.grad for part in inputs])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("path", EAGER)
def test_two_backward_passes_through_one_forward(path: str) -> None:
    """``retain_graph`` and accumulation: what is kept stays as it was."""
    inputs = arguments(case_for(path), path)
    fit, stats = ops.random_label_loss(*inputs)
    loss = fit.sum() + stats.z_t.sum() + stats.lse_rest.sum() + stats.z_mean.sum()
    loss.backward(retain_graph=True)
    once = [part.grad.clone() for part in inputs[:3]]
    loss.backward()
    for first, part in zip(once, inputs[:3], strict=True):
        torch.testing.assert_close(part.grad, 2 * first, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_the_entropy_and_of_an_ordinary_loss(compiled: bool) -> None:
    """Routes that the training loss has not; once as a function of its own, once as a compiled operator."""
    torch._dynamo.reset()
    case = case_for("whole")

    def ordinary(x: Tensor, weight: Tensor, bias: Tensor, implementation: str) -> Tensor:
        fit, stats = random_label_loss(
            x, weight, bias, case.target, entropy=True, fit_to_features=True, impl=implementation
        )
        assert stats.entropy_rest is not None
        return fit.sum() + (stats.entropy_rest * case.pull[1]).sum()

    function = torch.compile(ordinary, fullgraph=True, backend="aot_eager") if compiled else ordinary
    found, expected = leaves(case), leaves(case)
    function(*found, "eager").backward()
    ordinary(*expected, "reference").backward()
    torch.testing.assert_close([part.grad for part in found], [part.grad for part in expected])


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("classes", [None, 4])
def test_an_empty_batch_has_gradients_of_zero(impl: str, classes: int | None) -> None:
    """As in plain PyTorch: the last batch of a rank may hold no sample, and its NaN must not reach the weights."""
    if impl == "triton":
        pytest.importorskip("triton")
    case = random_case(0, 0, 2, 5, 3, classes=classes)
    x, weight, bias = leaves(case)
    fit, stats = random_label_loss(x, weight, bias, case.target, case.classes, impl=impl)
    (fit.sum() + forget_penalty(stats).sum()).backward()
    assert fit.isnan().all()
    for part in (x, weight, bias):
        assert part.grad is not None
        assert torch.equal(part.grad, torch.zeros_like(part))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_second_derivatives_are_refused(impl: str) -> None:
    """Also where the arriving gradient is a constant, as that of a sum: there PyTorch would leave them out unsaid."""
    if impl == "triton":
        pytest.importorskip("triton")
    case = case_for("whole")
    x, weight, bias = leaves(case)
    fit, stats = random_label_loss(x, weight, bias, case.target, impl=impl)
    loss = fit.sum() + stats.z_t.sum()
    (plain,) = torch.autograd.grad(loss, weight, retain_graph=True)
    slope, steep = torch.autograd.grad(loss, (weight, x), create_graph=True)
    torch.testing.assert_close(slope, plain, rtol=0, atol=0)
    for part in (slope, steep):
        with pytest.raises(UserError, match="the random-label loss has no second derivatives"):
            (loss + part.square().sum()).backward(retain_graph=True)


@pytest.mark.parametrize("changed", ["x", "weight", "bias", "target"])
def test_what_changed_before_the_backward_pass_is_noticed(changed: str) -> None:
    case = case_for("whole")
    inputs: dict[str, Any] = {"target": case.target.clone()}
    inputs |= zip(("x", "weight", "bias"), leaves(case), strict=True)
    fit, stats = random_label_loss(**inputs)
    with torch.no_grad():
        inputs[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (fit.sum() + stats.z_t.sum()).backward()


@pytest.mark.parametrize("asked", ["x", "weight", "bias"])
def test_a_single_input_that_asks_for_a_gradient(asked: str) -> None:
    """Frozen weights, or nothing but the bias to be trained."""
    case = case_for("whole")
    found = []
    for impl in ("eager", "reference"):
        inputs = {"x": case.x, "weight": case.weight, "bias": case.bias}
        inputs[asked] = leaf = cast(Tensor, inputs[asked]).clone().requires_grad_()
        fit, stats = random_label_loss(**cast(dict[str, Any], inputs), target=case.target, impl=impl)
        (stats.lse_rest if asked == "x" else fit).sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(("asked", "routes"), [("fit", (True, False)), ("stats", (False, True))])
def test_a_route_without_a_gradient_costs_no_pass(asked: str, routes: tuple[bool, bool], monkeypatch) -> None:
    """Though both were open in the forward pass."""
    case, seen = case_for("whole"), []
    backward = whole.backward
    monkeypatch.setattr(
        whole, "backward", lambda p, *a: seen.append((p.need_weight, p.need_features)) or backward(p, *a)
    )
    fit, stats = random_label_loss(*leaves(case), case.target)
    (fit if asked == "fit" else stats.z_t).sum().backward()
    assert seen == [routes]


@pytest.mark.parametrize("path", EAGER)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(path: str, value: float) -> None:
    """In the loss, the weights' gradient and its own row's, and in no other row."""
    case = case_for(path)
    case.x[2, 1] = value
    found = by_path(case, path, False, 500)
    assert found.dx is not None
    assert found.dweight is not None
    assert not found.fit.isfinite().any()
    assert not found.dx[2].isfinite().any()
    assert not found.dweight.isfinite().all()
    others = [row for row in range(7) if row != 2]
    assert found.dx[others].isfinite().all()
    assert found.stats.z_t[others].isfinite().all()


def test_autocast_ends_in_the_types_of_the_inputs() -> None:
    case = case_for("whole").to(torch.float32)
    exact = by_reference(case_for("whole"))
    x, weight, bias = leaves(case)
    with torch.autocast("cpu", torch.bfloat16):
        fit, stats = random_label_loss(x.bfloat16(), weight, bias, case.target)
        (fit.sum() + forget_penalty(stats).sum()).backward()
    assert {fit.dtype, stats.z_t.dtype, *(part.grad.dtype for part in (x, weight, bias) if part.grad is not None)} == {
        torch.float32
    }
    torch.testing.assert_close(fit.double(), exact.fit, rtol=0.03, atol=0.03)


def error(found: Outcome, exact: Outcome) -> dict[str, float]:
    """Of each output, relative to the size of the exact one."""
    theirs = exact.named()
    return {
        name: float((part.double() - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-30))
        for name, part in found.named().items()
    }


@pytest.mark.parametrize("path", EAGER)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_low_precision_is_as_good_as_plain(path: str, dtype: torch.dtype, scale: float) -> None:
    """Contract 4; with logits nearly uniform and with saturated ones."""
    exact_case = random_case(5, 33, 2, 101, 24, classes=3 if path == "by_class" else None, scale=scale)
    low = exact_case.to(dtype)
    exact = by_reference(low.to(torch.float64))  # of the rounded inputs
    plain = error(by_reference(replace(low, pull=low.pull.float())), exact)
    ours = error(by_path(replace(low, pull=low.pull.float()), path, False, budget=4000), exact)
    for name, value in ours.items():
        assert value <= 2 * plain[name] + 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("path", ["whole", "by_columns"])
@pytest.mark.parametrize("size", [1.0, 1e-8])
def test_small_gradients_live_in_float16(path: str, size: float) -> None:
    """Those of a mean over a large batch would be 0 among float16's products, of which a CPU makes none by itself."""
    low = case_for(path).to(torch.float16).to(torch.float32)
    exact = by_reference(replace(low.to(torch.float64), pull=low.pull.double() * size))
    x, weight, bias = leaves(low)
    fit, stats = ops.random_label_loss(
        x, weight, bias, low.target, [], path, False, torch.float16, False, True, True, 500, False
    )
    pairs = zip(stats[:3], low.pull[1:4] * size, strict=True)
    found = torch.autograd.grad(sum(((part * pull).sum() for part, pull in pairs), start=fit.new_zeros(())), x)
    assert exact.dx is not None
    torch.testing.assert_close(found[0].double(), exact.dx, rtol=1e-2, atol=1e-2 * size)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made, in bytes, of more than two dimensions or any."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(part, Tensor) and part._base is None and part.shape[:1] == (BATCH,):
                self.bytes = max(self.bytes, part.untyped_storage().nbytes())
        return result


BATCH = 12


@pytest.mark.parametrize(("path", "n"), [("by_rows", 5000), ("by_columns", 5000), ("by_columns", 50)])
def test_temporary_matrices_stay_within_the_budget(path: str, n: int) -> None:
    """No tensor with a row for each sample is larger, though all logits would be; gradients have other shapes."""
    heads, budget = (1, 20 * n) if path == "by_rows" else (40, 240 * 50)
    case = random_case(2, BATCH, heads, n, 3).to(torch.float32)
    problem = Problem(
        case.x, case.weight, case.bias, case.target, None, torch.float32, False, True, True, budget, triton=False
    )
    module = ops.path_named(path)
    with Largest() as largest:
        stats, kept = module.forward(problem)
        module.backward(problem, stats, kept, Upstream(case.pull[0, 0], case.pull[1], case.pull[1], case.pull[1], None))
    assert largest.bytes <= budget < BATCH * heads * n * 4


def test_the_path_follows_from_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(loss_module.ops, "random_label_loss", lambda *a: taken.append(a[5]) or (None, None))
    monkeypatch.setattr(loss_module, "check_range", lambda *a: None)  # of values, which there are none

    def path(batch: int, heads: int, n: int, dim: int = 4, classes: int | None = None, **options: Any) -> str:
        shape = (heads, n, dim) if classes is None else (heads, classes, n, dim)
        x, weight = torch.empty(batch, dim, requires_grad=True), torch.empty(shape)
        target = torch.empty(batch, heads, dtype=torch.int64)
        given = None if classes is None else torch.zeros(batch, dtype=torch.int64)
        random_label_loss(x, weight, None, target, given, **options)
        return taken.pop()

    with FakeTensorMode():
        _check_paths(path)


def _check_paths(path: Callable[..., str]) -> None:
    assert path(0, 8, 10) == "whole"
    assert path(512, 8, 10) == "whole"
    assert path(512, 8, 10, impl="triton") == "tiny"
    assert path(512, 8, 65, impl="triton") == "whole"
    assert path(4096, 64, 100, 512, impl="triton") == "whole"
    assert path(4096, 1, 10_000, 768) == "by_rows"
    assert path(4096, 1, 100_000, 768) == "by_columns"  # float32: 671 rows
    assert path(4096, 1, 100_000, 768, memory_budget=2**29) == "by_rows"
    assert path(4096, 1, 100_000, 768, memory_budget=2**29, entropy=True) == "by_columns"
    assert path(4096, 1000, 100) == "by_columns"
    assert path(1024, 1, 1000, 768, classes=1000) == "by_class"
    assert path(1024, 1, 10, 256, classes=100, impl="triton") == "tiny"
    assert path(1024, 1, 1000, 768, classes=1000, impl="triton") == "grouped"


def test_without_gradients_nothing_is_kept() -> None:
    case = case_for("whole")
    with torch.no_grad():
        outputs = ops.random_label_loss_op(*arguments(case, "whole")[:9], False, False, 500, False)
    assert len(outputs) == 6


@pytest.mark.parametrize("path", EAGER)
def test_every_bit_again(path: str) -> None:
    case = case_for(path).to(torch.float32)
    first = by_path(case, path, False, 600)
    for _ in range(5):
        again = by_path(case, path, False, 600)
        assert all(torch.equal(part, again.named()[name]) for name, part in first.named().items())


def test_any_strides() -> None:
    case = case_for("whole")
    expected = by_reference(case)

    def strided(tensor: Tensor) -> Tensor:
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
        view = wide[..., ::2]
        return view.copy_(tensor).mT.contiguous().mT if tensor.dim() > 1 else view

    wide_target = case.target.repeat_interleave(2, 1)[:, ::2]
    moved = replace(case, x=strided(case.x), weight=strided(case.weight), target=wide_target)
    for path in ("whole", "by_rows", "by_columns"):
        assert_same(by_path(moved, path, False, 500), expected)


GOOD = {
    "x": torch.zeros(4, 3),
    "weight": torch.zeros(2, 5, 3),
    "bias": torch.zeros(2, 5),
    "target": torch.zeros(4, 2, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"x": torch.zeros(4, 7)}, r"x has the shape \[4, 7\]; expected \[B, 3\] or \[B, 2, 3\]"),
        ({"weight": torch.zeros(5, 3)}, r"weight has the shape \[5, 3\]; expected \[H, n, D\]"),
        ({"weight": torch.zeros(2, 1, 3)}, "weight has 1 random label for a head; expected at least 2"),
        ({"bias": torch.zeros(5)}, r"bias has the shape \[5\]; expected \[2, 5\]"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, r"target has the shape \[4\]; expected \[4, 2\]"),
        ({"target": torch.zeros(4, 2)}, "target is torch.float32; expected int64"),
        ({"target": torch.zeros(4, 2, dtype=torch.int32)}, "target is torch.int32; expected int64"),
        ({"x": torch.zeros(())}, r"x has the shape \[\]; expected \[B, 3\]"),
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, "x is torch.int64; expected one of torch.float16"),
        ({"classes": torch.zeros(4, dtype=torch.int64)}, r"weight has the shape \[2, 5, 3\]; expected \[H, C, n, D\]"),
        ({"weight": torch.zeros(2, 5, 3, device="meta")}, "weight is on meta, x on cpu"),
        ({"impl": "fast"}, "impl is 'fast'; expected one of auto, reference, eager, triton"),
        ({"memory_budget": 0}, "memory_budget is 0; expected a number of bytes above 0"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        random_label_loss(**cast(dict[str, Any], GOOD | changed))


@pytest.mark.parametrize("impl", ["reference", "eager", "triton"])
@pytest.mark.parametrize("budget", [1, 2**28])
@pytest.mark.parametrize("wrong", [-1, 5])
def test_labels_and_classes_out_of_range_are_named_on_a_cpu(impl: str, budget: int, wrong: int) -> None:
    if impl == "triton":
        pytest.importorskip("triton")
    target = GOOD["target"].index_fill(0, torch.tensor(2), wrong)
    with pytest.raises(UserError, match=rf"target holds {wrong}; expected random labels in \[0, 5\)"):
        random_label_loss(**cast(dict[str, Any], GOOD | {"target": target}), memory_budget=budget, impl=impl)
    case = random_case(0, 4, 2, 3, 3, classes=5)
    classes = torch.tensor([0, 4, wrong, 2])
    for given in (classes, sort_by_class(classes, 5)):
        with pytest.raises(UserError, match=rf"classes holds {wrong}; expected class ids in \[0, 5\)"):
            random_label_loss(case.x, case.weight, case.bias, case.target, given, memory_budget=budget, impl=impl)
