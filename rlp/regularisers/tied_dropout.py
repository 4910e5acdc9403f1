"""Example-tied dropout: channels that are there for few samples each, and are left out in evaluation.

Of the channels at a tap a share memorises. A training sample's pass keeps all the others and, of these, those that are
its own: each with probability ``per_sample``, a function of (seed, tap, channel, sample id) that never changes. What is
particular to a sample can settle in its own channels, since hardly another one disturbs them; evaluation leaves all of
them out (Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, arXiv 2307.09542).

Our choices, for want of the paper's: which channels memorise (the last ones; before training they are all alike), and
that nothing is scaled, so the generalising channels mean the same in training and evaluation.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rlp.data.batch import Batch
from rlp.errors import UserError
from rlp.models.taps import layout_of, tap_tensor
from rlp.philox import random_bits
from rlp.progress import Progress
from rlp.regularisers.class_loss import ClassStep, Forward, Plain
from rlp.regularisers.taps import check_rows, modules_at, not_called
from rlp.schema import TrainingConfig

_ATTRIBUTE = "tied_dropout"


class TiedDropout:
    """The masks of one network's taps.

    Attributes:
        index: sample ids int64 ``[B]`` of the training batch to come; needed in train mode alone.
        waiting: taps that no pass has come to yet.
    """

    def __init__(self, share: float, per_sample: float, seed: int, channels_last_maps: bool = False) -> None:
        self.share, self.per_sample, self.seed, self.channels_last_maps = share, per_sample, seed, channels_last_maps
        self.index: Tensor | None = None
        self.waiting: set[str] = set()

    def mask(self, tap: str, channels: int, index: Tensor) -> Tensor:
        """Which channels the samples keep in training, bool ``[B, channels]``."""
        kept = torch.ones(len(index), channels, dtype=torch.bool, device=index.device)
        first = self.generalising(channels)
        words = random_bits(self.seed, f"tied.{tap}", index, channels - first)
        kept[:, first:] = words < round(self.per_sample * 2**32)
        return kept

    def generalising(self, channels: int) -> int:
        """How many of a tap's channels every sample has, at least one."""
        return max(1, channels - round(self.share * channels))

    def apply(self, tap: str, output: Tensor, training: bool) -> Tensor:
        """A tap's output ``[B, C]``, ``[B, C, H, W]``, ``[B, T, C]`` or, by the model's layout, ``[B, H, W, C]``."""
        self.waiting.discard(tap)
        dim = -1 if output.dim() == 3 or (output.dim() == 4 and self.channels_last_maps) else 1
        channels = output.shape[dim]
        if self.generalising(channels) == channels:
            raise UserError(
                f"train.tied_dropout is {self.share}, which leaves none of the {channels} channels at '{tap}' to "
                "memorise; expected a larger share, or other train.tied_taps"
            )
        if not training:
            kept = torch.arange(channels, device=output.device) < self.generalising(channels)
        elif self.index is None:
            raise UserError(
                f"example-tied dropout at '{tap}' has no sample ids of the batch; expected them in training"
            )
        else:
            check_rows(tap, output, len(self.index), "train.tied_taps")
            kept = self.mask(tap, channels, self.index)
        shape = [len(kept) if training else 1] + [1] * (output.dim() - 1)
        shape[dim] = channels
        return output * kept.view(shape)


class _Hook:
    def __init__(self, tap: str, dropout: TiedDropout) -> None:
        self.tap, self.dropout = tap, dropout

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Tensor:
        return self.dropout.apply(self.tap, tap_tensor(self.tap, output), module.training)


def hang_tied_dropout(model: nn.Module, train: TrainingConfig, seed: int) -> None:
    """Hang ``train.tied_dropout`` at ``train.tied_taps`` of a network; nothing where it is 0.

    Before heads are attached, so that they read what the network goes on with. The network keeps it in evaluation, also
    when it is loaded again, for without the generalising channels alone it is another function.

    Raises:
        UserError: a tap does not exist.
    """
    if not train.tied_dropout:
        return
    maps = layout_of(model).channels_last_maps
    dropout = TiedDropout(train.tied_dropout, train.tied_per_sample, seed, maps)
    for tap, module in modules_at(model, train.tied_taps, "train.tied_taps").items():
        module.register_forward_hook(_Hook(tap, dropout))
        dropout.waiting.add(tap)
    setattr(model, _ATTRIBUTE, dropout)


def tied_dropout_of(model: nn.Module) -> TiedDropout | None:
    """What :func:`hang_tied_dropout` hung."""
    return getattr(model, _ATTRIBUTE, None)


def tell_samples(model: nn.Module, index: Tensor) -> None:
    """Before a pass in train mode: whose batch it is, sample ids int64 ``[B]``, if the network has such dropout."""
    if (dropout := tied_dropout_of(model)) is not None:
        dropout.index = index


class Tied(Plain):
    """Plain cross-entropy of a network with example-tied dropout, which is told the batch's samples."""

    def __init__(self, dropout: TiedDropout, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        self.dropout = dropout

    def step(self, forward: Forward, image: Tensor, batch: Batch, progress: Progress) -> ClassStep:
        """One pass."""
        self.dropout.index = batch.index
        found = super().step(forward, image, batch, progress)
        for tap in self.dropout.waiting:
            raise not_called(tap, "train.tied_taps")
        return found
