"""Two-layer heads trained to a plateau: their loss is not convex, so that convergence is a rule, stated here."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlp.measure.budget import Batches
from rlp.measure.heads import TwoLayerHeads, read_heads
from rlp.measure.lbfgs import Found
from rlp.seeding import named_seed

LEARNING_RATE, BATCH_SIZE = 1e-3, 512
IMPROVEMENT = 0.01
"""An epoch counts as better if the mean loss is this share below that of the last better one."""
PATIENCE_EPOCHS, PATIENCE_STEPS = 5, 200
"""A plateau is as many epochs, and as many steps of the optimiser, without a better epoch."""
CUTS, CUT = 3, 0.2
"""At each of the first plateaus the learning rate is multiplied by CUT; the one after them ends the training."""
SURE = 0.9


def train_two_layer(
    x: Tensor,
    target: Tensor,
    n: int,
    hidden: int,
    max_epochs: int,
    seed: int,
    progress: Callable[[str], None] | None = None,
) -> tuple[TwoLayerHeads, Found]:
    """Train H heads ``D -> hidden -> ReLU -> n`` on features ``[N, D]`` and random labels ``[N, H]``.

    AdamW without weight decay on minibatches of 512, learning rate 1e-3; all heads share the batches and the learning
    rate, and are judged by the mean of their losses, as draws of one condition may be. When neither 5 epochs nor 200
    steps have brought an epoch's loss 1% below the last such epoch's, the learning rate falls to a fifth; at the fourth
    such plateau training ends, with the reason ``loss``. It ends before, with ``separated``, when every head gives
    every sample's label a probability of 0.9, and after `max_epochs` with ``steps``.

    Returns:
        The heads, and losses ``[H]`` over all samples, reasons and epochs (``point`` is empty).
    """
    random = torch.Generator().manual_seed(named_seed(seed, "measure.two-layer"))
    heads = TwoLayerHeads.random(target.shape[1], n, x.shape[1], hidden, random, x.device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    batches = Batches(len(x), BATCH_SIZE, random, x.device)
    best, waited, cuts, reason, epoch = torch.inf, 0, 0, "steps", 0
    for epoch in range(1, max_epochs + 1):
        loss = _epoch(heads, optimizer, batches, x, target)
        better = loss < (1 - IMPROVEMENT) * best
        best, waited = (loss, 0) if better else (best, waited + 1)
        if progress is not None:
            progress(f"epoch {epoch}, loss {loss:.4f}, learning rate {optimizer.param_groups[0]['lr']:.1g}")
        if loss < 1 - SURE and bool(_sure(heads, x, target).all()):
            break
        if waited >= PATIENCE_EPOCHS and waited * batches.per_epoch >= PATIENCE_STEPS:
            if cuts == CUTS:
                reason = "loss"
                break
            cuts, waited = cuts + 1, 0
            optimizer.param_groups[0]["lr"] *= CUT
    losses = -read_heads(heads, x, target, None)[1].double().mean(0)
    sure = _sure(heads, x, target).tolist()
    return heads, Found(
        point=x.new_zeros(0),
        loss=losses,
        reason=["separated" if one else reason for one in sure],
        passes=epoch,
    )


def _epoch(
    heads: TwoLayerHeads, optimizer: torch.optim.Optimizer, batches: Batches, x: Tensor, target: Tensor
) -> float:
    """Mean loss over the epoch's batches and the heads."""
    total = x.new_zeros((), dtype=torch.float64)
    for _ in range(batches.per_epoch):
        rows = batches.next()
        fit = heads.loss(x[rows], target[rows], None).fit
        optimizer.zero_grad()
        fit.sum().backward()
        optimizer.step()
        total += fit.detach().mean() * len(rows)
    return float(total) / len(x)


def _sure(heads: TwoLayerHeads, x: Tensor, target: Tensor) -> Tensor:
    """Bool ``[H]``."""
    return read_heads(heads, x, target, None)[1].exp().amin(0) >= SURE
