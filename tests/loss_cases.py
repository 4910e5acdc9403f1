"""Random problems of the random-label loss, and its outputs and gradients by any path, for comparison."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor

from rlp.kernels import ops, reference
from rlp.kernels.loss import MEMORY_BUDGET, product_dtype
from rlp.kernels.problem import sort_by_class
from rlp.kernels.reference import RandomLabelLoss, Statistics


@dataclass(frozen=True)
class Case:
    """Inputs of the loss, and the weights with which its outputs are summed up to one number."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    classes: Tensor | None
    entropy: bool
    fit_to_features: bool
    pull: Tensor  # [6, B, H]: row 0 for the fit loss, the others for the statistics

    def to(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Self:
        """The same problem in another type or on another device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)

        return replace(self, **{name: move(part) for name, part in vars(self).items() if isinstance(part, Tensor)})


def random_case(
    seed: int,
    batch: int,
    heads: int,
    n: int,
    dim: int,
    classes: int | None = None,
    own_features: bool = False,
    has_bias: bool = True,
    entropy: bool = False,
    fit_to_features: bool = False,
    scale: float = 1.0,
) -> Case:
    """A problem in float64; logits have a spread of about `scale`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    own = (heads,) if classes is None else (heads, classes)
    return Case(
        x=normal(batch, heads, dim) if own_features else normal(batch, dim),
        weight=normal(*own, n, dim) * scale / dim**0.5,
        bias=normal(*own, n) if has_bias else None,
        target=torch.randint(n, (batch, heads), generator=generator),
        classes=None if classes is None else torch.randint(classes, (batch,), generator=generator),
        entropy=entropy,
        fit_to_features=fit_to_features,
        pull=normal(6, batch, heads),
    )


@dataclass(frozen=True)
class Outcome:
    """Fit loss, statistics and gradients."""

    fit: Tensor
    stats: Statistics
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None

    def named(self) -> dict[str, Tensor]:
        """What there is, by name."""
        parts = {"fit": self.fit, **self.stats._asdict(), "dx": self.dx, "dweight": self.dweight, "dbias": self.dbias}
        return {name: part for name, part in parts.items() if part is not None}


def by_reference(case: Case, routes: str = "wx") -> Outcome:
    """The oracle's, in the case's own type."""

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> RandomLabelLoss:
        return reference.random_label_loss(
            x, weight, bias, case.target, case.classes, case.entropy, case.fit_to_features
        )

    return _outcome(case, call, routes)


def by_path(case: Case, path: str, triton: bool, budget: int = MEMORY_BUDGET, routes: str = "wx") -> Outcome:
    """Of one path, called past the choice of paths; `routes` holds "w" for the weights', "x" for the features'."""

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> RandomLabelLoss:
        order = [] if case.classes is None else list(sort_by_class(case.classes, weight.shape[1]))
        return RandomLabelLoss(
            *ops.random_label_loss(
                x, weight, bias, case.target, order, path, case.fit_to_features, product_dtype(x, weight), case.entropy,
                "w" in routes, "x" in routes, budget, triton,
            )
        )  # fmt: skip

    return _outcome(case, call, routes)


def _outcome(case: Case, call: Callable[[Tensor, Tensor, Tensor | None], RandomLabelLoss], routes: str) -> Outcome:
    def leaf(tensor: Tensor, route: str) -> Tensor:
        return tensor.detach().clone().requires_grad_(route in routes)

    x, weight = leaf(case.x, "x"), leaf(case.weight, "w")
    bias = None if case.bias is None else leaf(case.bias, "w")
    fit, stats = call(x, weight, bias)
    if routes:
        terms = [(fit * case.pull[0].mean(0)).sum()] if "w" in routes or case.fit_to_features else []
        if "x" in routes:
            pairs = zip(stats, case.pull[1:], strict=True)
            terms += [(part * pull).sum() for part, pull in pairs if part is not None and part.requires_grad]
        torch.stack(terms).sum().backward()
    return Outcome(
        fit.detach(),
        stats.map(Tensor.detach),
        x.grad,
        weight.grad,
        None if bias is None else bias.grad,
    )


def assert_same(found: Outcome, expected: Outcome, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    """Every output and gradient close to the expected one, with the same ones there."""
    mine, theirs = found.named(), expected.named()
    assert mine.keys() == theirs.keys()
    for name, part in mine.items():
        torch.testing.assert_close(
            part.double().cpu(),
            theirs[name].double().cpu(),
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is handed out unwritten holds NaN, so that what nobody writes is seen."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **options: Any) -> Tensor:
            tensor = make(*args, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    with (
        patch.object(torch, "empty", poison(torch.empty)),
        patch.object(torch, "empty_like", poison(torch.empty_like)),
        patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield


def ragged_cases(path: str) -> Iterator[tuple[Case, int, str]]:
    """A few problems that the path serves, with budget and routes: no size is a multiple of a block's."""
    numbers_of_classes = {"by_class": [4], "grouped": [4], "tiny": [None, 4]}.get(path, [None])
    shapes = [(7, 3, 11, 5), (5, 2, 2, 19), (18, 1, 37, 33)]
    if path in ("whole", "by_rows", "by_columns"):
        shapes.append((2, 1, 8201, 3))  # more labels than a kernel's block
    if path == "tiny":
        shapes[2] = (6, 1, 37, 130)  # more features than a tile of a row
    if path in ("by_class", "grouped"):
        shapes.append((70, 1, 67, 9))  # more rows in a class than a kernel's block, and more labels
    for seed, (batch, heads, n, dim) in enumerate(shapes):
        for classes in numbers_of_classes:
            flags = {"own_features": seed == 1, "has_bias": seed != 2, "fit_to_features": seed == 0}
            flags["entropy"] = path != "by_rows" and (seed in (0, 2) or (seed == 3 and classes is None))
            case = random_case(seed, batch, heads, n, dim, classes, **flags)
            if seed == 3 and classes is None:  # the maximum moves with the last block
                case = replace(
                    case, bias=torch.zeros(heads, n, dtype=torch.float64).index_fill(1, torch.tensor(n - 3), 8.0)
                )
            yield case, 3 * 8 * batch * max(1, n // 3), ("wx", "wx", "w", "x" if classes is None else "wx")[seed]


def check_path(path: str, triton: bool, device: str = "cpu", dtype: torch.dtype = torch.float64) -> None:
    """Compare a path with the oracle on its ragged cases, in poisoned memory."""
    tolerance = 1e-9 if dtype == torch.float64 else 32 * torch.finfo(dtype).eps
    for case, budget, routes in ragged_cases(path):
        low = case.to(dtype)
        expected = by_reference(low.to(torch.float64), routes)
        with poisoned():
            moved = replace(low.to(dtype, device), pull=case.pull.to(device, torch.promote_types(dtype, torch.float32)))
            found = by_path(moved, path, triton, budget, routes)
        assert_same(found, expected, rtol=tolerance, atol=tolerance)


@contextmanager
def full_float32() -> Iterator[None]:
    """The vendor's products without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
