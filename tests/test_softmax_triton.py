"""Triton's kernels on rows of logits, against those in PyTorch and against autograd through other formulas."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
import pytest
import torch
from torch import Tensor
import torch.nn.functional as F
import triton

from rlp.kernels import ops, softmax_eager, softmax_triton
from rlp.kernels.by_columns import merge
from rlp.kernels.problem import Upstream
from rlp.kernels.reference import Statistics, statistics_from_logits
from rlp.kernels.softmax_triton import Launch
from tests.loss_cases import assert_same, by_path, by_reference, random_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_UPSTREAM = Upstream(None, None, None, None, None)


@pytest.fixture(scope="module", autouse=True)
def _poison() -> Iterator[None]:
    """Memory that nobody has written yet is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def labels(seed: int, rows: int, heads: int, n: int) -> Tensor:
    return torch.randint(n, (rows, heads), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def laid_out(logits: Tensor, layout: str) -> Tensor:
    """A copy with other strides, in the midst of NaN."""
    rows, heads, n = logits.shape
    if layout == "heads first":
        return logits.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
    if layout == "padded":
        wide = logits.new_full((rows, heads * n + 3), torch.nan)
        return wide[:, 1:-2].unflatten(1, (heads, n)).copy_(logits)
    if layout == "every other row":
        return logits.new_full((2 * rows, heads, n), torch.nan)[::2].copy_(logits)
    return logits.clone(memory_format=torch.contiguous_format)


LAYOUTS = ("dense", "heads first", "padded", "every other row")


def upstream_of(seed: int, rows: int, heads: int, parts: str = "tlmh", dtype: torch.dtype = torch.float64) -> Upstream:
    """Gradients of z_t, lse_rest, z_mean and entropy_rest, where named; the first expanded, as that of a sum is."""
    pull = normal(seed, 4, rows, heads, dtype=dtype)
    spread = [pull[0, 0, 0].expand(rows, heads), *pull[1:]]
    return Upstream(None, *(part if name in parts else None for name, part in zip("tlmh", spread, strict=True)))


def eager_statistics(logits: Tensor, target: Tensor, entropy: bool) -> Statistics:
    """PyTorch's, which uses its logits up."""
    return softmax_eager.statistics(logits.clone(), target, entropy, keep=False)


def eager_gradients(
    logits: Tensor, target: Tensor, stats: Statistics, *rest: Any
) -> tuple[Tensor | None, Tensor | None]:
    """PyTorch's, of the logits of whole heads."""
    kept = logits.clone()
    softmax_eager.statistics(kept, target, entropy=False, keep=True)
    return softmax_eager.gradients(kept, target, stats, *rest)


def close(found: Tensor | None, expected: Tensor | None, tolerance: float = 1e-10) -> None:
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def all_close(found: Statistics, expected: Statistics, tolerance: float = 1e-10) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs, tolerance)
        assert mine is None or mine.is_contiguous()


def check_all(logits: Tensor, target: Tensor, upstream: Upstream, tolerance: float = 1e-10) -> None:
    """Each function against PyTorch's."""
    stats = eager_statistics(logits, target, entropy=True)
    all_close(softmax_triton.statistics(logits, target, entropy=True), stats, tolerance)
    all_close(softmax_triton.statistics(logits, target, entropy=False), stats._replace(entropy_rest=None), tolerance)
    arguments = (logits, target, stats, upstream, logits.shape[-1], True, True)
    for mine, theirs in zip(softmax_triton.gradients(*arguments), eager_gradients(*arguments), strict=True):
        close(mine, theirs, tolerance)
    mine, theirs = laid_out(logits, "dense"), laid_out(logits, "dense")
    stats = softmax_eager.replace_by_residual(theirs, target)
    all_close(softmax_triton.replace_by_residual(mine, target), stats, tolerance)
    close(mine, theirs, tolerance)


@settings(max_examples=25, phases=(Phase.explicit, Phase.generate))  # to shrink an example takes minutes here
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    heads=st.integers(1, 3),
    n=st.integers(2, 37),
    layout=st.sampled_from(LAYOUTS),
    tile=st.sampled_from([(1, 1, 8), (2, 2, 2), (4, 4, 1), (2, 1, 8), (1, 4, 16), (4, 2, 16)]),
)
def test_small_blocks(seed: int, rows: int, heads: int, n: int, layout: str, tile: tuple[int, int, int]) -> None:
    """Ragged shapes in all layouts, with so small blocks that most segments have several."""
    target = labels(seed, rows, heads, n)
    logits = laid_out(5 * normal(seed, rows, heads, n), layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax_triton, "launch", lambda n, wide: Launch(*tile, warps=4, stages=2))
        check_all(logits, target, upstream_of(seed, rows, heads))
        _check_in_place(logits, target, layout)


def _check_in_place(logits: Tensor, target: Tensor, layout: str) -> None:
    """The residual lands where the logits were, and nothing beside them."""
    mine, theirs = laid_out(logits, layout), laid_out(logits, "dense")
    around = mine if mine._base is None else mine._base
    beside = around.isnan()
    softmax_triton.replace_by_residual(mine, target)
    softmax_eager.replace_by_residual(theirs, target)
    close(mine, theirs)
    assert torch.equal(around.isnan(), beside)


@pytest.mark.parametrize("n", [2, 3, 10, 16, 17, 100, 511, 512, 1000, 1025, 2050, 8191, 8192, 8193, 8200, 20_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_blocks_in_use(n: int, dtype: torch.dtype) -> None:
    rows, heads = (130, 2) if n < 100 else (3, 2)
    logits = normal(n, rows, heads, n, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    check_all(logits, labels(n, rows, heads, n), upstream_of(n, rows, heads, dtype=dtype), tolerance)


def test_every_launch_covers_its_segment() -> None:
    for n, wide in product((*range(2, 70), 100, 1000, 1024, 5000, 8192, 8193, 10**6), (1, 2, 4, 8)):
        shape = softmax_triton.launch(n, wide)
        block = shape.depth * shape.width
        assert block == (triton.next_power_of_2(n) if n <= 8192 else 4096)
        assert 1 <= block * shape.rows / shape.warps / 32 <= 32
        assert shape.width % wide == 0 or shape.width == block


@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_other_formulas(layout: str) -> None:
    """Autograd through the oracle, and through the cross-entropy, in which the label is not left out of the sum."""
    rows, heads, n = 7, 3, 23
    logits, target = laid_out(3 * normal(1, rows, heads, n), layout), labels(1, rows, heads, n)
    upstream = upstream_of(2, rows, heads)
    leaf = logits.clone().requires_grad_()
    expected = statistics_from_logits(leaf, target, entropy=True)
    stats = softmax_triton.statistics(logits, target, entropy=True)
    all_close(stats, Statistics(*(part.detach() for part in expected if part is not None)))

    fit = F.cross_entropy(leaf.flatten(0, 1), target.flatten(), reduction="sum")
    close(F.softplus(stats.lse_rest - stats.z_t).sum(), fit.detach())
    terms = [(part * pull).sum() for part, pull in zip((*expected[:3], expected[4]), upstream[1:], strict=True)]  # pyright: ignore
    to_weight, to_features = softmax_triton.gradients(logits, target, stats, upstream, n, True, True)
    close(to_weight, torch.autograd.grad(fit, leaf)[0])
    close(to_features, torch.autograd.grad(torch.stack(terms).sum(), leaf)[0])
    assert to_weight is not None
    assert to_weight.stride() == torch.empty_like(logits).stride()


@pytest.mark.parametrize("parts", ["".join(some) for some in product(*(("", name) for name in "tlmh"))])
@pytest.mark.parametrize(("need_weight", "need_features"), [(True, True), (False, True), (True, False)])
def test_absent_gradients(parts: str, need_weight: bool, need_features: bool) -> None:
    rows, heads, n = 3, 2, 11
    logits, target = normal(3, rows, heads, n), labels(3, rows, heads, n)
    stats = eager_statistics(logits, target, entropy="h" in parts)
    arguments = (logits, target, stats, upstream_of(4, rows, heads, parts), n, need_weight, need_features)
    for mine, theirs in zip(softmax_triton.gradients(*arguments), eager_gradients(*arguments), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("kind", ["some heads", "heads first", "unlike"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_statistics(kind: str, layout: str) -> None:
    """Slices of the statistics of more heads, as of a piece, are read where they are."""
    rows, heads, n = 5, 3, 7
    logits, target = laid_out(normal(19, rows, heads, n), layout), labels(19, rows, heads, n)
    stats, upstream = softmax_triton.statistics(logits, target, entropy=True), upstream_of(20, rows, heads)
    expected = softmax_triton.gradients(logits, target, stats, upstream, n, True, True)

    def moved(part: Tensor, place: int) -> Tensor:
        if kind == "heads first" or (kind == "unlike" and place % 2):
            return part.T.contiguous().T
        return part.new_full((rows, heads + 3), torch.nan)[:, 1:-2].copy_(part)

    stats = Statistics(*(moved(part, place) for place, part in enumerate(stats) if part is not None))
    upstream = Upstream(None, *(moved(part, place) for place, part in enumerate(upstream[1:]) if part is not None))
    wide_target = target.repeat_interleave(2, 1)[:, ::2]
    found = softmax_triton.gradients(logits, wide_target, stats, upstream, n, True, True)
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("cuts", [(4, 9), (1, 2), (12,), (1, 12)])
@pytest.mark.parametrize("layout", ["dense", "heads first"])
def test_pieces(cuts: tuple[int, ...], layout: str) -> None:
    """Statistics of pieces merge into those of the whole, and their gradients put together are the whole's."""
    rows, heads, n = 13, 2, 13
    logits = normal(5, rows, heads, n)
    target = torch.stack([torch.arange(rows), torch.arange(rows).flip(0)], 1).to(DEVICE)  # each label is somewhere
    upstream = upstream_of(6, rows, heads)
    whole = softmax_triton.statistics(logits, target, entropy=True)
    both = softmax_triton.gradients(logits, target, whole, upstream, n, True, True)
    bounds = [0, *cuts, n]
    parts, found = [], []
    for first, last in pairwise(bounds):
        piece, inside = laid_out(logits[..., first:last], layout), target - first
        parts.append(softmax_triton.statistics(piece, inside, entropy=True))
        all_close(parts[-1], eager_statistics(piece, inside, entropy=True))
        found.append(softmax_triton.gradients(piece, inside, whole, upstream, n, True, True))
    all_close(merge(parts, [last - first for first, last in pairwise(bounds)]), whole)
    for mine, theirs in zip(zip(*found, strict=True), both, strict=True):
        close(torch.cat(mine, -1), theirs)


def extreme(name: str) -> Tensor:
    """Two samples of one head with 21 labels, of which 5 is the target."""
    logits, others = normal(7, 2, 1, 21), torch.arange(21, device=DEVICE) != 5
    changes: dict[str, Callable[[], Tensor]] = {
        "large": lambda: logits.mul_(1e4),
        "all large": lambda: logits.add_(1e4),
        "all small": lambda: logits.sub_(1e4),
        "equal": lambda: logits.fill_(-1234.5),
        "dominant": lambda: logits[..., 17].fill_(1e4),
        "rising": lambda: logits.copy_(torch.linspace(-1e4, 1e4, 21)),
        "label dominant": lambda: logits[..., 5].fill_(1e4),
        "first block minus infinity": lambda: logits[..., :9].fill_(-torch.inf),
        "last block minus infinity": lambda: logits[..., 15:].fill_(-torch.inf),
        "others minus infinity": lambda: logits.masked_fill_(others, -torch.inf),
        "NaN": lambda: logits[1, ..., 3].fill_(torch.nan),
        "NaN at the end": lambda: logits[1, ..., 20].fill_(torch.nan),
        "NaN at the label": lambda: logits[1, ..., 5].fill_(torch.nan),
        "infinity": lambda: logits[1, ..., 12].fill_(torch.inf),
    }
    changes[name]()
    return logits


FINITE = ("large", "all large", "all small", "equal", "dominant", "rising", "label dominant")
MINUS_INFINITY = ("first block minus infinity", "last block minus infinity", "others minus infinity")


@pytest.fixture(params=[(2, 1, 4), (4, 2, 8)], ids=["three blocks", "one block"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_triton, "launch", lambda n, wide: Launch(*request.param, warps=1, stages=1))


FIVE = torch.full((2, 1), 5, device=DEVICE)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("name", FINITE + MINUS_INFINITY)
def test_extreme_logits(name: str) -> None:
    check_all(extreme(name), FIVE, upstream_of(8, 2, 1))


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("name", FINITE)
def test_extreme_logits_in_float32(name: str) -> None:
    """To some units in the last place of the logits."""
    logits = extreme(name).float()
    exact = eager_statistics(logits.double(), FIVE, entropy=True)
    tolerance = 4 * torch.finfo(torch.float32).eps * float(logits.abs().max())
    for mine, theirs in zip(softmax_triton.statistics(logits, FIVE, entropy=True), exact, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("name", ["NaN", "NaN at the end", "NaN at the label", "infinity"])
def test_what_is_not_finite_shows(name: str) -> None:
    """As after an overflow in float16: in the loss and both gradients of its row, and in no other row."""
    logits = extreme(name)
    stats = softmax_triton.statistics(logits, FIVE, entropy=True)
    expected = eager_statistics(logits, FIVE, entropy=True)
    for mine, theirs in zip(stats, expected, strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine.isfinite(), theirs.isfinite())
        close(mine[:1], theirs[:1])
    assert not F.softplus(stats.lse_rest - stats.z_t)[1].isfinite().any()
    if "NaN" in name:
        close(stats.max_rest, expected.max_rest)
    residual = logits.clone()
    softmax_triton.replace_by_residual(residual, FIVE)
    if name != "NaN at the label":
        assert not residual[1].isfinite().all()
    to_weight, to_features = softmax_triton.gradients(logits, FIVE, stats, upstream_of(8, 2, 1), 21, True, True)
    assert to_weight is not None
    assert to_features is not None
    assert to_weight[0].isfinite().all()
    assert to_features[0].isfinite().all()
    if name != "infinity":
        assert to_weight[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [10, 100, 1000, 9001])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 10.0])
def test_low_precision_is_as_good_as_in_pytorch(dtype: torch.dtype, n: int, scale: float) -> None:
    rows, heads = 2 if n > 1000 else 6, 2
    logits, target = (scale * normal(9, rows, heads, n)).to(dtype), labels(9, rows, heads, n)
    upstream = upstream_of(10, rows, heads, dtype=torch.float32)

    rough = eager_statistics(logits.float(), target, True)
    residual = logits.clone()
    mine = [
        *softmax_triton.statistics(logits, target, True),
        *softmax_triton.gradients(logits, target, rough, upstream, n, True, True),
    ]
    softmax_triton.replace_by_residual(residual, target)

    def eager(kind: torch.dtype) -> list[Tensor]:
        """Of the same logits in another type; what is written to memory rounded to theirs, from float32."""
        given = Upstream(*(None if part is None else part.to(kind) for part in upstream))
        stats, shifted = eager_statistics(logits.to(kind), target, True), logits.to(kind, copy=True)
        matrices = [*eager_gradients(shifted, target, stats, given, n, True, True), shifted]
        softmax_eager.replace_by_residual(shifted, target)
        if kind == torch.float32:
            matrices = [None if part is None else part.to(dtype) for part in matrices]
        return [part.double() for part in (*stats, *matrices) if part is not None]

    exact, theirs = eager(torch.float64), eager(torch.float32)
    mine = [part.double() for part in (*mine, residual) if part is not None]
    tiny = torch.finfo(torch.float32).eps * (2 + float(logits.abs().max()))  # of z - lse_rest in the exponent
    for place, right in enumerate(exact):
        if dtype == torch.bfloat16 and DEVICE == "cpu":  # Triton's interpreter cuts off where a GPU rounds
            assert ((mine[place] - right).abs() <= (2**-7 + tiny) * right.abs() + tiny).all(), place
        else:
            bound = 2 * (theirs[place] - right).norm() + tiny * right.norm()
            assert (mine[place] - right).norm() <= bound, place


def test_the_mean_of_a_million() -> None:
    n = 1_000_000
    logits = 5 + normal(11, 1, 1, n, dtype=torch.float32)
    stats = softmax_triton.statistics(logits, labels(11, 1, 1, n), entropy=True)
    exact = eager_statistics(logits.double(), labels(11, 1, 1, n), entropy=True)
    for mine, theirs in zip(stats, exact, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine.double(), theirs, rtol=4e-7, atol=0)


@pytest.mark.parametrize("n", [10, 1000])
def test_a_row_does_not_depend_on_its_batch(n: int) -> None:
    logits, target = normal(12, 9, 2, n, dtype=torch.float32), labels(12, 9, 2, n)
    stats = softmax_triton.statistics(logits, target, entropy=True)
    alone = softmax_triton.statistics(logits[3:4].clone(), target[3:4], entropy=True)
    order = torch.arange(8, -1, -1)
    turned = softmax_triton.statistics(logits[order], target[order], entropy=True)
    for part, single, other in zip(stats, alone, turned, strict=True):
        assert part is not None
        assert single is not None
        assert other is not None
        assert torch.equal(part[3:4], single)
        assert torch.equal(part[order], other)


def test_nothing_of_nothing() -> None:
    logits, target = normal(13, 0, 2, 5), labels(13, 0, 2, 5)
    stats = softmax_triton.statistics(logits, target, entropy=True)
    assert stats.z_t.shape == (0, 2)
    to_weight, to_features = softmax_triton.gradients(logits, target, stats, NO_UPSTREAM, 5, True, False)
    assert to_weight is not None
    assert to_weight.shape == (0, 2, 5)
    assert to_features is None


PATHS = ("whole", "by_rows", "by_columns")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("budget", [300, 2**28])
@settings(max_examples=4)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 9),
    heads=st.integers(1, 3),
    n=st.integers(2, 19),
    dim=st.integers(1, 7),
    own_features=st.booleans(),
    has_bias=st.booleans(),
    entropy=st.booleans(),
    routes=st.sampled_from(["wx", "w", "x", ""]),
)
def test_whole_paths(path, seed, batch, heads, n, dim, budget, routes, **options) -> None:
    options["entropy"] = options["entropy"] and path != "by_rows"
    case = random_case(seed, batch, heads, n, dim, **options)
    assert_same(by_path(case.to(torch.float64, DEVICE), path, True, budget, routes), by_reference(case, routes))


@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_those_of_finite_differences(path: str) -> None:
    case = random_case(14, 2, 2, 3, 2, entropy=path != "by_rows").to(torch.float64, DEVICE)
    case = replace(case, bias=None)
    options = (case.target, [], path, False, torch.float64, case.entropy, True, True, 60, True)

    def fit(weight: Tensor) -> Tensor:
        return ops.random_label_loss(case.x, weight, None, *options)[0]

    def statistics(x: Tensor) -> tuple[Tensor, ...]:
        stats = ops.random_label_loss(x, case.weight, None, *options)[1]
        return tuple(part for part in (*stats[:3], stats.entropy_rest) if part is not None)

    assert torch.autograd.gradcheck(fit, (case.weight.clone().requires_grad_(),))
    assert torch.autograd.gradcheck(statistics, (case.x.clone().requires_grad_(),))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [10, 1000, 100_000])
def test_every_bit_again(n: int) -> None:
    logits, target = normal(15, 300, 2, n, dtype=torch.bfloat16), labels(15, 300, 2, n)
    upstream = upstream_of(16, 300, 2, dtype=torch.float32)

    def outputs() -> list[Tensor]:
        residual = logits.clone()
        stats = softmax_triton.statistics(logits, target, entropy=True)
        found = softmax_triton.gradients(logits, target, stats, upstream, n, True, True)
        return [part for part in (*stats, *softmax_triton.replace_by_residual(residual, target), *found, residual)
                if part is not None]  # fmt: skip

    first = outputs()
    for _ in range(20):
        assert all(torch.equal(again, once) for again, once in zip(outputs(), first, strict=True))


@pytest.mark.gpu
def test_past_the_range_of_int32() -> None:
    """3 * 10^9 logits, 6 GB; the last rows lie past 2^31."""
    rows, n = 3000, 1_000_003
    logits = torch.randn((rows, 1, n), device="cuda", dtype=torch.bfloat16)
    target = labels(17, rows, 1, n)
    upstream = upstream_of(18, rows, 1, "tlm", dtype=torch.float32)
    stats = softmax_triton.statistics(logits, target, entropy=False)
    some = torch.tensor([0, 1, 2146, 2147, 2148, rows - 1], device="cuda")

    def of_some(parts: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        return [None if part is None else part[some] for part in parts]

    few = logits[some]
    exact = eager_statistics(few.double(), target[some], entropy=False)
    for mine, theirs in zip(of_some(stats), exact, strict=True):
        close(None if mine is None else mine.double(), theirs, 1e-6)
    found = softmax_triton.gradients(logits, target, stats, upstream, n, True, True)
    expected = eager_gradients(
        few.float(), target[some], Statistics(*of_some(stats)), Upstream(*of_some(upstream)), n, True, True  # pyright: ignore
    )  # fmt: skip
    for mine, theirs in zip(of_some(found), expected, strict=True):
        assert mine is not None
        close(mine.float(), theirs, 1e-2)
    del found
    softmax_triton.replace_by_residual(logits, target)
    few = few.float()
    softmax_eager.replace_by_residual(few, target[some])
    close(logits[some].float(), few, 1e-2)
