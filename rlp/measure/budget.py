"""What heads read after a fixed budget: the curve of accuracy against steps of a plain optimiser.

At convergence a linear head does not see the features' spectrum (`rlp.measure.fit`); on the way there it does, for
gradient descent learns directions of large variance first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from rlp.errors import UserError
from rlp.measure.heads import (
    HeadSpec,
    LinearHeads,
    TrainableHeads,
    TwoLayerHeads,
    check_problem,
    full_precision,
    read_heads,
)
from rlp.seeding import named_seed

LEARNING_RATE, BATCH_SIZE = 1e-3, 512


@dataclass(frozen=True)
class BudgetCurve:
    """Which samples heads got right after so many steps.

    Attributes:
        steps: of the optimiser, int64 ``[S]``, ascending, above 0.
        correct: bool ``[S, H, N]``, every sample, whether its batch came yet or not; a tie is wrong.
    """

    steps: np.ndarray
    correct: np.ndarray

    def kappa(self, n: int) -> np.ndarray:
        """``(n · accuracy - 1) / (n - 1)`` after each number of steps, float64 ``[S, H]``."""
        return (n * self.correct.mean(axis=2) - 1) / (n - 1)

    def area(self, n: int) -> np.ndarray:
        """Mean κ over ``log2(steps)``, first to last, by trapezoids, float64 ``[H]``; of one point its κ."""
        kappa, place = self.kappa(n), np.log2(self.steps)
        if len(place) == 1:
            return kappa[0]
        return np.trapezoid(kappa, place, axis=0) / (place[-1] - place[0])


class Batches:
    """Rows of batches, sample by sample in an order that is drawn anew for each epoch."""

    def __init__(self, samples: int, batch_size: int, random: torch.Generator, device: torch.device) -> None:
        self.samples, self.size, self.random, self.device = samples, min(samples, batch_size), random, device
        self.per_epoch = -(-samples // self.size)
        self._coming: list[Tensor] = []

    def next(self) -> Tensor:
        """Int64 ``[B]`` on the device; the last batch of an epoch may be smaller."""
        if not self._coming:
            order = torch.randperm(self.samples, generator=self.random).to(self.device)
            self._coming = list(order.split(self.size))[::-1]
        return self._coming.pop()


def fit_budget(
    x: Tensor,
    target: Tensor,
    n: int,
    spec: HeadSpec,
    *,
    steps: Sequence[int],
    lr: float = LEARNING_RATE,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    classes: Tensor | None = None,
    num_classes: int = 0,
    held_out: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> BudgetCurve:
    """Train H heads on the features as they are, and read all samples after each of `steps`.

    AdamW with a constant learning rate and no weight decay, minibatches without replacement within an epoch, the same
    for all heads. Linear heads and heads per class begin at zero. Nothing is whitened or centred, so that the scale and
    spectrum of the features decide how fast heads learn. Equal seeds give equal curves; no global random state is
    touched.

    Args:
        x: features ``[N, D]``.
        target: random labels int64 ``[N, H]`` in [0, n).
        n: number of random labels.
        spec: the kind of head.
        steps: at which to read, ascending, above 0; log-spaced for `BudgetCurve.area`.
        lr: learning rate.
        batch_size: samples in a batch; all of them where there are fewer.
        seed: of the batches' order and of two-layer heads.
        classes: class of each sample, int64 ``[N]``, for heads per class.
        num_classes: C, 0 for the largest class plus one.
        held_out: features, random labels and classes of other samples, which are read instead of those trained on.

    Raises:
        UserError: an argument is out of range or does not fit, or features are not finite.
    """
    if not steps or min(steps) < 1 or any(a >= b for a, b in pairwise(steps)):
        raise UserError(f"steps is {list(steps)}; expected ascending numbers of steps, the first at least 1")
    if batch_size < 1 or not lr > 0:
        raise UserError(f"batch_size is {batch_size}, lr {lr}; expected at least 1, and a number above 0")
    count = check_problem(x, target, n, spec, classes, num_classes)
    random = torch.Generator().manual_seed(named_seed(seed, "measure.budget"))
    x, given = x.detach().float(), classes if count else None
    heads: TrainableHeads
    if spec.kind == "two-layer":
        heads = TwoLayerHeads.random(target.shape[1], n, x.shape[1], spec.hidden, random, x.device)
    else:
        heads = LinearHeads.zeros(target.shape[1], n, x.shape[1], count or None, x.device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=lr, weight_decay=0.0)
    seen = (x, target, given) if held_out is None else held_out
    batches = Batches(len(x), batch_size, random, x.device)
    correct, done = [], 0
    with torch.enable_grad(), full_precision(x.device):
        for stop in steps:
            for _ in range(stop - done):
                rows = batches.next()
                optimizer.zero_grad()
                loss = heads.loss(x[rows], target[rows], None if given is None else given[rows])
                loss.fit.sum().backward()
                optimizer.step()
            done = stop
            correct.append(read_heads(heads, *seen)[0].T.numpy())
    return BudgetCurve(np.asarray(steps, np.int64), np.stack(correct))
