"""What `benchmarks.overhead` times: a training step as `rlp.trainer` takes it, with which heads."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
import torch.nn.functional as F

from rlp.models import RandomLabelHeads, attach, build_model
from rlp.optim import build_optimizer, parameter_groups
from rlp.schema import HeadsConfig, TrainingConfig

CLASSES = 10
LAM = 1.0
LEARNING_RATE = 1e-3  # small: the numbers stay finite however long the benchmark runs
TAPS = {
    "none": (),
    "last tap": ("norm",),
    "group3.0": ("group3.0",),  # two convolutions before the end: copied heads have something to copy
    "all depths": ("stem", "group1.*", "group2.*", "group3.*", "norm"),
}
"""Where heads are: name -> taps of a wide residual network."""
DRAWS, LABELS, MOST_LABELS = (1, 8, 64), (2, 10, 100, 1000), 100_000


@dataclass(frozen=True)
class Case:
    """What is attached: where, how many draws and random labels, the weight λ of the penalty, the kind of head."""

    where: str = "none"
    draws: int = 0
    num_labels: int = 0
    lam: float = 0.0
    kind: str = "shared"

    @property
    def title(self) -> str:
        """The row's name in a table."""
        if self.where == "none":
            return "no heads"
        kind = "" if self.kind == "shared" else f", {self.kind}"
        return f"{self.where} x {self.draws}, n={self.num_labels:,}, λ={self.lam:g}{kind}"


NO_HEADS = Case()


@dataclass(frozen=True)
class Network:
    """The network and its batch."""

    name: str = "wrn_16_4"
    image_size: int = 32
    batch_size: int = 256


@dataclass(frozen=True)
class Group:
    """Cases that are in memory together and take turns; the first has no heads."""

    title: str
    cases: tuple[Case, ...]


def all_groups(is_cuda: bool, quick: bool = False) -> list[Group]:
    """What a device is asked. The CPU is spared copies of the whole network, and most of λ = 0."""
    draws, labels = ((1, 8), (10, 1000)) if quick else (DRAWS, LABELS)

    def grid(where: str) -> Iterator[Case]:
        for lam, number, n in product((0.0, LAM), draws, labels):
            if lam or is_cuda or (number == 8 and n in (10, 1000)) or (number == 1 and n == 10):
                yield Case(where, number, n, lam)

    def both(where: str, number: int, n: int, kind: str = "shared") -> list[Case]:
        return [Case(where, number, n, lam, kind) for lam in (0.0, LAM)]

    kinds = [*both("group3.0", 8, 10), *both("group3.0", 8, 10, "per_class"), *both("group3.0", 1, 10, "copied")]
    if is_cuda and not quick:
        kinds += [*both("group3.0", 8, 10, "copied"), *both("all depths", 8, 10, "per_class")]
        kinds += both("all depths", 1, 10, "copied")
    groups = [Group(where, (NO_HEADS, *grid(where))) for where in ("last tap", "all depths")]
    if not quick:
        groups.append(Group(f"{MOST_LABELS:,} labels", (NO_HEADS, *both("last tap", 1, MOST_LABELS))))
    return [*groups, Group("kinds of heads", (NO_HEADS, *kinds))]


class Step:
    """One training step with a network, heads, optimisers and batch of its own, all from one seed.

    Forward pass, class loss, the heads' loss, backward pass, both optimisers, with the settings that a configuration
    has where it says nothing. What else the trainer does (loading, augmentation, sums for the log) is left out, for it
    would only make the heads' share look smaller.

    Attributes:
        model, heads: the network, and its heads or None.
        optimizers: of the network and, where there are heads, of the heads.
        image, label, words: the batch; float32 ``[B, 3, S, S]``, int64 ``[B]`` and int64 ``[B, draws]``.
    """

    def __init__(self, case: Case, network: Network, device: torch.device) -> None:
        torch.manual_seed(0)
        size, batch = network.image_size, network.batch_size
        self.case, self.device = case, device
        model = build_model(network.name, CLASSES, size, {}).to(device)
        self.model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.image = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
        self.label = torch.randint(CLASSES, (batch,), device=device)
        self.words = torch.randint(2**32, (batch, max(1, case.draws)), device=device)
        self.heads = self._attach()
        train, heads = TrainingConfig(), HeadsConfig()
        shared = {"momentum": train.momentum, "nesterov": train.nesterov, "betas": train.betas}
        groups = parameter_groups(self.model, train.weight_decay)
        self.optimizers = [build_optimizer(train.optimizer, groups, LEARNING_RATE, **shared)]
        if self.heads is not None:
            groups = parameter_groups(self.heads, heads.weight_decay)
            self.optimizers.append(build_optimizer(heads.optimizer, groups, LEARNING_RATE, **shared))
        self.model.train()

    def _attach(self) -> RandomLabelHeads | None:
        case = self.case
        if case.where == "none":
            return None
        return attach(
            self.model, TAPS[case.where], case.num_labels, case.draws, example=self.image[:2], kind=case.kind,
            num_classes=CLASSES, memory_budget=HeadsConfig().memory_mb * 2**20,
        )  # fmt: skip

    def __call__(self) -> None:
        """Take the step."""
        self.loss().backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def loss(self) -> Tensor:
        """Class loss plus the heads' loss; bfloat16 autocast on CUDA."""
        with self._autocast():
            loss = F.cross_entropy(self.model(self.image).float(), self.label)
        if self.heads is None:
            return loss
        with self._autocast():
            return loss + self.heads.loss(words=self.words, classes=self.label, lam=self.case.lam)

    def is_finite(self) -> bool:
        """Whether all weights still are: arithmetic on NaN may take another time."""
        modules = [self.model, *([self.heads] if self.heads else [])]
        return all(bool(one.isfinite().all()) for module in modules for one in module.parameters())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
