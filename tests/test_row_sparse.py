"""Row-sparse training of per-class heads: its loss, and optimisers that move the classes of the batch alone."""

from datetime import timedelta
import io
import os
from pathlib import Path
import socket
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import torch
from torch import Tensor, nn
import torch.distributed as dist
import torch.multiprocessing as mp

from rlp.distributed import prompt_exit
from rlp.errors import UserError
from rlp.kernels.problem import sort_by_class
from rlp.kernels.reference import RandomLabelLoss, Statistics, random_label_loss
from rlp.kernels.row_sparse import Factors, row_sparse_random_label_loss
from rlp.kernels.row_sparse_optim import RowSparseAdamW, RowSparseOptimizer, RowSparseSGD
from tests.loss_cases import Case, Outcome, assert_same, by_reference, random_case

OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6}
DECAY = 0.1
RANKS, STEPS = 2, 3


def random_parameters(heads: int, classes: int, n: int, dim: int, has_bias: bool = True) -> list[nn.Parameter]:
    """Weight and bias in float64."""
    generator = torch.Generator().manual_seed(heads + 10 * n)
    shapes = [(heads, classes, n, dim), (heads, classes, n)][: 1 + has_bias]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def random_factors(seed: int, weight: Tensor, rows: int, own_features: bool = False, every: bool = False) -> Factors:
    """Factors of a gradient in float64; with `every` class among the first rows."""
    generator = torch.Generator().manual_seed(seed)
    heads, classes, n, dim = weight.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    drawn = torch.randint(classes, (rows,), generator=generator)
    if every:
        drawn[:classes] = torch.arange(classes)
    return Factors(normal(rows, heads, n), normal(rows, heads, dim) if own_features else normal(rows, dim), drawn)


def dense(factors: list[Factors], weight: Tensor) -> list[Tensor]:
    """The gradients of weight and bias that the factors stand for."""
    heads, classes, n, dim = weight.shape
    total = [torch.zeros(classes, heads, n, dim, dtype=torch.float64), torch.zeros(classes, heads, n).double()]
    for dz, x, given_classes in factors:
        x = x if x.dim() == 3 else x.unsqueeze(1).expand(-1, heads, -1)
        total[0].index_add_(0, given_classes, torch.einsum("bhn,bhd->bhnd", dz.double(), x.double()))
        total[1].index_add_(0, given_classes, dz.double())
    return [part.transpose(0, 1) for part in total]


def cast(factors: Factors, dtype: torch.dtype) -> Factors:
    """In another type."""
    return factors._replace(dz=factors.dz.to(dtype), x=factors.x.to(dtype))


def adamw(parameters: list[Tensor]) -> torch.optim.AdamW:
    """The dense optimiser of weight and bias."""
    groups = [{"params": [p], "weight_decay": DECAY * (place == 0)} for place, p in enumerate(parameters)]
    return torch.optim.AdamW(groups, **OPTIONS)


def by_dense_adamw(parameters: list[nn.Parameter], steps: list[list[Factors]]) -> list[Tensor]:
    """What the dense optimiser makes of the parameters."""
    mine = [parameter.detach().clone() for parameter in parameters]
    optimizer = adamw(mine)
    for factors in steps:
        for parameter, grad in zip(mine, dense(factors, parameters[0]), strict=False):
            parameter.grad = grad.contiguous()
        optimizer.step()
    return mine


def class_by_class(parameters: list[nn.Parameter], steps: list[list[Factors]]) -> list[Tensor]:
    """With a dense optimiser for each class, which makes a step where the class has a row."""
    mine = [[part.clone() for part in parameter.detach().unbind(1)] for parameter in parameters]
    optimizers = [adamw(list(parts)) for parts in zip(*mine, strict=True)]
    for factors in steps:
        present = set(torch.cat([part.classes for part in factors]).tolist())
        for parts, grads in zip(mine, dense(factors, parameters[0]), strict=False):
            for part, grad in zip(parts, grads.unbind(1), strict=True):
                part.grad = grad.contiguous()
        for c in present:
            optimizers[c].step()
    return [torch.stack(parts, 1) for parts in mine]


def row_sparse(parameters: list[nn.Parameter], impl: str = "eager", **options: Any) -> RowSparseAdamW:
    """The optimiser under test."""
    weight, bias = (*parameters, None)[:2]
    assert weight is not None
    return RowSparseAdamW(weight, bias, **OPTIONS, weight_decay=DECAY, impl=impl, **options)


def train(optimizer: RowSparseOptimizer, steps: list[list[Factors]]) -> list[Tensor]:
    """What the optimiser under test makes of its parameters."""
    for factors in steps:
        optimizer.zero_grad()
        optimizer.factors.extend(factors)
        optimizer.step()
    return [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("own_features", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_with_every_class_it_is_dense_adamw(impl, own_features, dtype, tolerance) -> None:
    """Two backward passes a step."""
    if impl == "triton" and dtype == torch.float64:
        tolerance = 1e-6  # numbers reach a kernel in float32
    parameters = random_parameters(2, 3, 5, 7)
    steps = [[random_factors(10 * s + i, parameters[0], 9, own_features, True) for i in (0, 1)] for s in range(STEPS)]
    expected = by_dense_adamw(parameters, steps)
    mine = [nn.Parameter(parameter.detach().to(dtype)) for parameter in parameters]
    found = train(row_sparse(mine, impl), [[cast(part, dtype) for part in factors] for factors in steps])
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part.double(), other, rtol=tolerance, atol=tolerance)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    heads=st.integers(1, 3),
    classes=st.integers(1, 12),
    n=st.integers(2, 9),
    dim=st.integers(1, 9),
    own_features=st.booleans(),
    has_bias=st.booleans(),
)
def test_only_the_classes_of_the_batch_move(seed, rows, heads, classes, n, dim, own_features, has_bias) -> None:
    parameters = random_parameters(heads, classes, n, dim, has_bias)
    steps = [[random_factors(seed + s, parameters[0], rows, own_features)] for s in range(STEPS)]
    expected = class_by_class(parameters, steps)
    for part, other in zip(train(row_sparse(parameters), steps), expected, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "classes", "n", "dim", "rows"),
    [(1, 5, 37, 130, 2), (2, 9, 3, 5, 7), (1, 3, 300, 2, 50), (3, 1, 2, 1, 70), (2, 4, 33, 17, 3)],
)
def test_the_kernel_does_what_eager_code_does(dtype, heads, classes, n, dim, rows) -> None:
    """On several tiles, which fit nowhere; both kinds of optimiser."""
    for kind in (RowSparseAdamW, RowSparseSGD):
        parameters = random_parameters(heads, classes, n, dim)
        steps = [[cast(random_factors(s, parameters[0], rows, bool(heads % 2)), dtype)] for s in range(2)]
        found = {}
        for impl in ("eager", "triton"):
            weight, bias = (nn.Parameter(parameter.detach().float()) for parameter in parameters)
            found[impl] = train(kind(weight, bias, lr=0.02, weight_decay=DECAY, impl=impl), steps)
        absent = sort_by_class(torch.cat([factors.classes for (factors,) in steps]), classes).offsets.diff() == 0
        for mine, theirs, parameter in zip(found["triton"], found["eager"], parameters, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
            assert torch.equal(mine[:, absent], parameter[:, absent].float())
            assert not torch.isclose(mine[:, ~absent], parameter[:, ~absent].float(), atol=0).all()


def test_sgd_without_decay_is_dense_sgd() -> None:
    parameters = random_parameters(2, 6, 5, 4)
    steps = [[random_factors(s, parameters[0], 4)] for s in range(STEPS)]
    dense_ones = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.SGD(dense_ones, lr=0.3)
    for factors in steps:
        for parameter, grad in zip(dense_ones, dense(factors, parameters[0]), strict=True):
            parameter.grad = grad
        optimizer.step()
    found = train(RowSparseSGD(parameters[0], parameters[1], lr=0.3, impl="eager"), steps)
    for part, other in zip(found, dense_ones, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_saved_state_goes_on_to_the_bit(dtype) -> None:
    """Also the float32 moments of bfloat16 weights, and a learning rate that has changed."""
    first = [nn.Parameter(parameter.detach().to(dtype)) for parameter in random_parameters(2, 6, 5, 4)]
    steps = [[cast(random_factors(s, first[0], 4), dtype)] for s in range(2 * STEPS)]
    optimizer = row_sparse(first)
    train(optimizer, steps[:STEPS])
    optimizer.param_groups[0]["lr"] = 0.5
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "parameters": first}, file)
    undisturbed = train(optimizer, steps[STEPS:])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = row_sparse(saved["parameters"])
    again.load_state_dict(saved["optimizer"])
    assert again.state[again.weight]["step"].dtype == torch.int64
    again.state[again.weight]["step"] += 1
    again.load_state_dict(saved["optimizer"])  # of which the first one has left nothing changed
    for part, other in zip(train(again, steps[STEPS:]), undisturbed, strict=True):
        assert torch.equal(part, other)


def test_zero_grad_forgets_and_no_backward_is_no_step() -> None:
    parameters = random_parameters(1, 3, 4, 5)
    optimizer = row_sparse(parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.factors.append(random_factors(0, parameters[0], 5))
    optimizer.zero_grad()
    assert optimizer.step(lambda: 3) == 3
    for parameter, other in zip(parameters, before, strict=True):
        assert torch.equal(parameter, other)
    assert not optimizer.state


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_parameter_does_not_move(frozen: str) -> None:
    case = random_case(0, 6, 2, 5, 4, classes=3)
    assert case.bias is not None
    assert case.classes is not None
    weight, bias = nn.Parameter(case.weight.clone()), nn.Parameter(case.bias.clone())
    optimizer = RowSparseAdamW(weight, bias)
    (weight if frozen == "weight" else bias).requires_grad_(False)
    optimizer.loss(case.x, case.target, case.classes).fit.sum().backward()
    optimizer.step()
    assert torch.equal(weight, case.weight) == (frozen == "weight")
    assert torch.equal(bias, case.bias) == (frozen == "bias")


def test_changed_weights_are_noticed_by_autograd() -> None:
    parameters = random_parameters(1, 2, 3, 4)
    for impl in ("eager", "triton"):
        optimizer = row_sparse(parameters, impl)
        product = (parameters[0] * parameters[0]).sum()
        train(optimizer, [[random_factors(0, parameters[0], 5)]])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


# -- loss --------------------------------------------------------------------------------------------------------


def by_factors(case: Case, impl: str, routes: str = "wx") -> Outcome:
    """Outcome of the loss, the weights' gradients from its factors."""
    x = case.x.clone().requires_grad_("x" in routes)
    weight = case.weight.clone().requires_grad_("w" in routes)
    bias = None if case.bias is None else case.bias.clone().requires_grad_("w" in routes)
    sink: list[Factors] = []
    assert case.classes is not None
    fit, stats = row_sparse_random_label_loss(
        x, weight, bias, case.target, case.classes, sink, entropy=case.entropy, impl=impl
    )
    terms = [(fit * case.pull[0].mean(0)).sum()] if "w" in routes else []
    if "x" in routes:
        pairs = zip(stats, case.pull[1:], strict=True)
        terms += [(part * pull).sum() for part, pull in pairs if part is not None and part.requires_grad]
    torch.stack(terms).sum().backward()
    assert weight.grad is None
    assert bias is None or bias.grad is None
    assert len(sink) == ("w" in routes)
    grads = [None if not sink else grad for grad in dense(sink, weight)]
    stats = Statistics(*(None if part is None else part.detach() for part in stats))  # pyright: ignore
    return Outcome(fit.detach(), stats, x.grad, grads[0], None if bias is None else grads[1])


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 13),
    heads=st.integers(1, 3),
    n=st.integers(2, 17),
    dim=st.integers(1, 9),
    classes=st.integers(1, 6),
    own_features=st.booleans(),
    has_bias=st.booleans(),
    entropy=st.booleans(),
    routes=st.sampled_from(["wx", "w", "x"]),
)
def test_the_loss_leaves_the_factors_of_the_gradient(seed, batch, heads, n, dim, classes, routes, **options) -> None:
    case = random_case(seed, batch, heads, n, dim, classes, **options)
    assert_same(by_factors(case, "eager", routes), by_reference(case, routes))


@pytest.mark.parametrize("options", [{"entropy": True}, {"own_features": True, "has_bias": False}])
def test_the_loss_with_triton(options) -> None:
    case = random_case(2, 9, 2, 17, 5, 3, **options)
    assert_same(by_factors(case, "triton"), by_reference(case))


def test_half_precision() -> None:
    """On the CPU the products are float32, and so are the factors."""
    case = random_case(1, 7, 2, 9, 4, classes=3).to(torch.float16)
    assert_same(by_factors(case, "eager"), by_reference(case.to(torch.float64)), 1e-2, 1e-2)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_a_step_of_loss_and_optimiser_is_that_of_dense_adamw(impl) -> None:
    case = random_case(3, 12, 2, 5, 4, classes=3)
    classes = torch.arange(12) % 3
    theirs = random_parameters(2, 3, 5, 4)
    mine = [nn.Parameter(parameter.detach().float()) for parameter in theirs]
    optimizer, other = row_sparse(mine, impl), adamw([*theirs])
    for _ in range(2):
        optimizer.zero_grad()
        other.zero_grad()
        found: RandomLabelLoss = optimizer.loss(case.x.float(), case.target, classes)
        found.fit.sum().backward()
        random_label_loss(case.x, theirs[0], theirs[1], case.target, classes).fit.sum().backward()
        optimizer.step()
        other.step()
    for part, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(part.double(), expected, rtol=1e-4, atol=1e-4)


# -- ranks -------------------------------------------------------------------------------------------------------


def work(rank: int, port: int, folder: str) -> None:
    """One rank: some rows of each step, then a step to which it alone comes with a gradient."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with prompt_exit():
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        parameters = random_parameters(2, 6, 5, 4)
        optimizer = row_sparse(parameters)
        result: dict[str, Any] = {"weights": train(optimizer, [[step[rank]] for step in steps_of_ranks(parameters[0])])}
        optimizer.zero_grad()
        optimizer.step()
        if rank == 0:
            optimizer.factors.append(random_factors(0, parameters[0], 3))
        try:
            optimizer.step()
        except UserError as error:
            result["error"] = str(error)
        result["after"] = [parameter.detach() for parameter in parameters]
        torch.save(result, Path(folder) / f"{rank}.pt")
        dist.destroy_process_group()


def steps_of_ranks(weight: Tensor) -> list[list[Factors]]:
    """For each step the factors of each rank; one has no rows."""
    rows = [(3, 2), (4, 0), (1, 5)]
    return [[random_factors(10 * s + r, weight, rows[s][r]) for r in range(RANKS)] for s in range(STEPS)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=RANKS)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_ranks_make_the_step_of_their_mean_gradient(results: list[dict[str, Any]]) -> None:
    parameters = random_parameters(2, 6, 5, 4)
    steps = [[part._replace(dz=part.dz / RANKS) for part in step] for step in steps_of_ranks(parameters[0])]
    expected = train(row_sparse(parameters), steps)
    for first, second, other in zip(*(result["weights"] for result in results), expected, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, other, rtol=1e-12, atol=1e-12)


def test_a_rank_without_backward_is_named_and_nothing_moves(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["error"] == "rank 1 has called no backward; expected one on every rank before step"
        assert all(map(torch.equal, result["weights"], result["after"]))


# -- mistakes ----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named() -> None:
    weight, bias = random_parameters(2, 3, 5, 4)
    with pytest.raises(UserError, match=r"expected \[H, C, n, D\]"):
        RowSparseSGD(bias, None, lr=0.1)
    with pytest.raises(UserError, match=r"expected \[H, C, n, D\] and \[H, C, n\]"):
        RowSparseSGD(weight, weight, lr=0.1)
    with pytest.raises(UserError, match="not contiguous"):
        RowSparseSGD(nn.Parameter(weight.detach().mT), None, lr=0.1)
    with pytest.raises(UserError, match="lr"):
        RowSparseSGD(weight, bias, lr=-1.0)
    with pytest.raises(UserError, match="betas"):
        RowSparseAdamW(weight, bias, betas=(1.0, 0.9))
    with pytest.raises(UserError, match="impl is 'fast'"):
        RowSparseAdamW(weight, bias, impl="fast")
    with pytest.raises(UserError, match="no factors"):
        RowSparseAdamW(weight, bias, impl="reference")
    other = row_sparse(random_parameters(2, 4, 5, 4))
    train(other, [[random_factors(0, other.weight, 3)]])
    with pytest.raises(UserError, match="state's exp_avg has the shape"):
        row_sparse([weight, bias]).load_state_dict(other.state_dict())
    with pytest.raises(UserError, match="target has the shape"):
        row_sparse([weight, bias]).loss(torch.zeros(3, 4), torch.zeros(3, 1).long(), torch.zeros(3).long())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype) -> None:
    """Against eager code on the CPU, at a size that fills the device."""
    parameters = random_parameters(2, 50, 300, 200)
    steps = [[cast(random_factors(s, parameters[0], 64), dtype)] for s in range(2)]
    expected = train(row_sparse([nn.Parameter(p.detach().double()) for p in parameters]), steps)
    on_gpu = [[Factors(*(part.cuda() for part in factors)) for factors in step] for step in steps]
    found = train(row_sparse([nn.Parameter(p.detach().float().cuda()) for p in parameters], "triton"), on_gpu)
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part.double().cpu(), other, rtol=1e-4, atol=1e-4)
