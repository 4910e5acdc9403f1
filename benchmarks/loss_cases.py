"""What `benchmarks.loss` measures: shapes, random inputs, and the least work that each kind of pass must do."""

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

MODES = {
    "forward": "forward",
    "fit": "fit, λ=0",
    "both": "fit + penalty",
    "adamw": "fit + penalty + AdamW",
}
"""What is asked for: losses without gradients; the gradient of W; the gradients of W and x; and a step of AdamW."""
SPREAD = 2.0
"""Standard deviation of the logits: far from uniform, far from certain."""


@dataclass(frozen=True)
class Case:
    """One problem: features ``[B, D]`` shared by H heads of n labels, or by one head for each of C classes."""

    key: str
    title: str
    batch: int
    dim: int
    num_labels: int
    heads: int = 1
    classes: int | None = None
    dtype: torch.dtype = torch.bfloat16
    launch_bound: bool = False
    is_sweep: bool = False

    @property
    def shape(self) -> str:
        """The sizes, for people."""
        own = f"H={self.heads}" if self.classes is None else f"C={self.classes}"
        return f"B={self.batch}, D={self.dim}, {own}, n={self.num_labels:,}"

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return self.dtype.itemsize

    def reduced(self) -> Self:
        """The same kind of problem, small enough for the float64 oracle; sizes stay as ragged as products allow."""
        return replace(
            self,
            batch=min(self.batch, 72),
            dim=min(self.dim, 80),
            num_labels=min(self.num_labels, 200),
            heads=min(self.heads, 3),
            classes=None if self.classes is None else min(self.classes, 5),
        )


class Inputs(NamedTuple):
    """Tensors of a case: ``x [B, D]``, ``weight [H, n, D]`` or ``[1, C, n, D]``, ``bias``, ``target``, ``classes``."""

    case: Case
    x: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    classes: Tensor | None

    @property
    def touched(self) -> int:
        """How many of the classes occur in the batch (1 where heads are shared)."""
        return 1 if self.classes is None else len(self.classes.unique())

    @property
    def nbytes(self) -> int:
        """Bytes of all but the bias, which most contenders do without."""
        return sum(part.nbytes for part in (self.x, self.weight, self.target, self.classes) if part is not None)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Random inputs, the same every time; x, weight and bias are leaves that require gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device, dtype=case.dtype)
        return drawn.mul_(scale).requires_grad_()

    own = (case.heads,) if case.classes is None else (case.heads, case.classes)
    shape = (case.batch, case.heads)
    return Inputs(
        case,
        x=normal(case.batch, case.dim),
        weight=normal(*own, case.num_labels, case.dim, scale=SPREAD / case.dim**0.5),
        bias=normal(*own, case.num_labels),
        target=torch.randint(case.num_labels, shape, generator=generator, device=device),
        classes=None
        if case.classes is None
        else torch.randint(case.classes, (case.batch,), generator=generator, device=device),
    )


class Work(NamedTuple):
    """Multiplications and additions, and bytes moved."""

    operations: float
    bytes: float

    def seconds(self, operations_per_s: float, bytes_per_s: float) -> float:
        """The floor: no version runs faster than the slower of the two."""
        return max(self.operations / operations_per_s, self.bytes / bytes_per_s)


def least_work(case: Case, mode: str, touched: int) -> Work:
    """The least work of a mode: every input read once, every output written once, no product done twice.

    Of the weights of C classes only the `touched` are read; their gradient is dense. AdamW reads weight, gradient and
    two moments and writes three of them, all in the case's type.
    """
    heads = case.heads * case.num_labels * case.dim
    x, weight = case.batch * case.dim * case.itemsize, (case.classes or 1) * heads * case.itemsize
    labels = 8 * case.batch * (case.heads + (case.classes is not None))
    outputs = 4 * case.heads * (1 + 4 * case.batch)  # fit loss and four statistics in float32
    moved = x + touched * heads * case.itemsize + labels + outputs
    products = 1
    if mode != "forward":
        products, moved = 2, moved + weight
    if mode in ("both", "adamw"):
        products, moved = 3, moved + x
    if mode == "adamw":
        moved += 7 * weight
    return Work(products * 2.0 * case.batch * heads, float(moved))


def all_cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases and sweeps for the kind of device; on a CPU small stand-ins, of A the full size."""
    if device.type == "cuda":
        return _quickened(_CASES + _sweeps((4096, 512), (1024, 256, 100, 100_000), torch.bfloat16), quick)
    return _quickened(_CPU_CASES + _sweeps((128, 64), (128, 64, 10, 10_000), torch.float32), quick)


def _quickened(cases: list[Case], quick: bool) -> list[Case]:
    """Without the large points of the sweeps, if quick."""
    return [case for case in cases if not (quick and case.is_sweep and (case.num_labels > 1000 or case.heads > 64))]


_TITLES = {
    "A": "tiny, per class",
    "B": "per class",
    "C": "one huge head",
    "D": "per class, large",
    "E": "many draws",
}


def _case(key: str, batch: int, dim: int, num_labels: int, **options) -> Case:
    return Case(key, _TITLES[key], batch, dim, num_labels, **options)


_CASES = [
    _case("A", 1024, 256, 10, classes=100, launch_bound=True),
    _case("B", 1024, 512, 1000, classes=100),
    _case("C", 4096, 768, 100_000),
    _case("D", 1024, 768, 1000, classes=1000),
    _case("E", 4096, 512, 100, heads=64),
]
_CPU_CASES = [
    _case("A", 1024, 256, 10, classes=100, dtype=torch.float32),
    _case("B", 256, 128, 200, classes=20, dtype=torch.float32),
    _case("C", 512, 128, 10_000, dtype=torch.float32),
    _case("D", 256, 192, 200, classes=100, dtype=torch.float32),
    _case("E", 512, 128, 100, heads=32, dtype=torch.float32),
]

SWEEPS = {
    "n": "one shared head, against n",
    "n-class": "one head per class, against n",
    "H10": "draws of n=10, against H",
    "H100": "draws of n=100, against H",
}


def _sweeps(shared: tuple[int, int], per_class: tuple[int, int, int, int], dtype: torch.dtype) -> list[Case]:
    """The sweeps, for (B, D) of shared heads and (B, D, C, largest n) of heads per class.

    The largest n is what memory holds: the composition gathers ``[B, n, D]``, several times.
    """
    (batch, dim), (class_batch, class_dim, classes, largest) = shared, per_class
    numbers = (2, 10, 100, 1000, 10_000, 100_000, 1_000_000)
    draws = (1, 4, 16, 64, 256, 1024)
    one = [Case("n", SWEEPS["n"], batch, dim, n, dtype=dtype, is_sweep=True) for n in numbers]
    own = [
        Case("n-class", SWEEPS["n-class"], class_batch, class_dim, n, classes=classes, dtype=dtype, is_sweep=True)
        for n in numbers
        if n <= largest
    ]
    many = [
        Case(f"H{n}", SWEEPS[f"H{n}"], batch, dim, n, heads=heads, dtype=dtype, is_sweep=True)
        for n in (10, 100)
        for heads in draws
    ]
    return one + own + many
