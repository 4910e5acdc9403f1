"""How a batch becomes the class loss: the one thing that every regulariser here changes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from rlp.data.batch import Batch
from rlp.progress import Progress

Forward = Callable[[Tensor], Tensor]
"""The network: augmented images float ``[B, 3, H, W]`` to class logits ``[B, C]``."""


class ClassStep(NamedTuple):
    """``loss`` to go backward from, a mean over the batch, and how many samples were ``correct``; 0-dim."""

    loss: Tensor
    correct: Tensor


class ClassLoss(Protocol):
    """One pass of the network on a batch, or several, and the class loss.

    ``clean`` says whether the last pass showed the network the batch as it is: if not, heads need a pass of their own
    (:func:`pass_for_heads`).
    """

    clean: bool

    def step(self, forward: Forward, image: Tensor, batch: Batch, progress: Progress) -> ClassStep:
        """The loss of ``image``, the batch's augmented images; ``progress`` names epoch and batch."""
        ...


class Plain:
    """Cross-entropy on the given labels."""

    clean = True

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def step(self, forward: Forward, image: Tensor, batch: Batch, progress: Progress) -> ClassStep:
        """One pass."""
        logits = forward(image).float()
        loss = F.cross_entropy(logits, batch.label, label_smoothing=self.label_smoothing)
        return ClassStep(loss, count_correct(logits, batch.label))


def count_correct(logits: Tensor, label: Tensor) -> Tensor:
    """How many of ``[B, C]`` logits are largest at the label ``[B]``; 0-dim."""
    return (logits.detach().argmax(dim=1) == label).sum()


def pass_for_heads(model: nn.Module, image: Tensor, gradient: bool) -> None:
    """Show ``model`` the images once more, only for what the pass leaves at the heads' taps.

    In train mode, so that heads read, and a penalty reaches, what they do in training without a regulariser: batch
    statistics, dropout. Nothing else is left behind: running statistics of batch norms stay as they are, and so does
    the global random state, whatever dropout draws. Without ``gradient`` no graph is built either, so that with λ = 0
    the network trains as if there were no heads, to the bit.
    """
    devices = [image.device] if image.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _running_statistics_kept(model), torch.set_grad_enabled(gradient):
        model(image)


@contextmanager
def _running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Norm layers take the batch's statistics without adding them to the running ones."""
    norms = [module for module in model.modules() if getattr(module, "track_running_stats", False) and module.training]
    try:
        for norm in norms:
            norm.track_running_stats = False  # type: ignore[assignment]
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True  # type: ignore[assignment]
