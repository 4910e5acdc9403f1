"""Deep Bilevel Learning: the step is the one that helps on samples which the step has not seen.

A batch is cut into splits with equal class lists; split 0 is for validation. With the gradients g_i of the splits'
losses, the network goes along ``Σ_{i≥1} ω_i g_i`` where

    ω_i = g_0 · g_i / (|g_i|² + μ), then divided by Σ |ω_i|

so a split whose step would raise the validation loss is even taken back (Jenni and Favaro, "Deep Bilevel Learning",
ECCV 2018, arXiv 1809.01465). Gradients are of the class loss in the network's parameters: heads have no part in ω, and
a penalty's gradient and the optimiser's weight decay are added after it. Batch norm sees one split at a time.

The splits 1 and on may be mixed (the paper's best rows are "with mixup"; how, could not be read). *Ours*: each within
itself, with a draw of its own, and the validation split as it is.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rlp.data.batch import Batch
from rlp.progress import Progress
from rlp.regularisers.class_loss import ClassLoss, ClassStep, Forward, Plain

_SMALLEST = 1e-30


class Bilevel:
    """A :class:`rlp.regularisers.class_loss.ClassLoss` of batches from ``open_loader(splits=...)``, on one process.

    Costs as many passes over samples as plain training, split by split, and the memory of two gradients for each split.

    Args:
        parameters: of the network, those that train.
        splits: how many, at least 2.
        mu: μ >= 0, against small gradients.
        validation: the loss of split 0.
        training: that of the others, which are numbered on over batches; by default the same.
    """

    clean = False

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        splits: int,
        mu: float = 0.01,
        validation: ClassLoss | None = None,
        training: ClassLoss | None = None,
    ) -> None:
        self.parameters, self.splits, self.mu = parameters, splits, mu
        self.validation = validation or Plain()
        self.training = training or self.validation

    def step(self, forward: Forward, image: Tensor, batch: Batch, progress: Progress) -> ClassStep:
        """One pass for each split. The loss is the splits' mean, and its gradient the weighted one."""
        values, rights, gradients = [], [], []
        parts = zip(*(tensor.chunk(self.splits) for tensor in (image, *batch)), strict=True)
        for number, (shown, *part) in enumerate(parts):
            place = replace(progress, batch=progress.batch * self.splits + number)
            loss, correct = (self.training if number else self.validation).step(forward, shown, Batch(*part), place)
            gradients.append(self._gradient(loss))
            values.append(loss.detach())
            rights.append(correct)
        with torch.autocast(image.device.type, enabled=False):  # it would round ω and the direction
            direction = weighted_direction(torch.stack(gradients), self.mu)
            # A sum that is zero, and whose gradient in the parameters is the direction.
            along = flat(self.parameters) @ direction
        return ClassStep(torch.stack(values).mean() + (along - along.detach()), torch.stack(rights).sum())

    def _gradient(self, loss: Tensor) -> Tensor:
        with torch.autocast(loss.device.type, enabled=False):
            return flat(torch.autograd.grad(loss, self.parameters, materialize_grads=True))


def weighted_direction(gradients: Tensor, mu: float) -> Tensor:
    """``Σ ω_i g_i`` ``[P]`` of gradients ``[splits, P]``, of which the first is the validation split's."""
    validation, rest = gradients[0], gradients[1:]
    weights = (rest @ validation) / (rest.square().sum(1) + mu)
    return (weights / weights.abs().sum().clamp_min(_SMALLEST)) @ rest


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All values in one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
