"""Random-label heads at the taps of a network: captured features in, routed loss and honest readings out."""

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any

import torch
from torch import Tensor, nn
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

from rlp.distributed import reduce_sum
from rlp.errors import UserError
from rlp.intervals import draw_interval
from rlp.kernels.reference import Statistics, statistics_from_logits
from rlp.labels import random_labels, random_words
from rlp.losses import correct, fit_loss, kappa, penalty_named
from rlp.models.taps import Pool, Tap, tap_tensor
from rlp.seeding import named_seed


class HeadBank(nn.Module):
    """The H heads of one tap, one for each draw: linear, or with one hidden ReLU layer.

    ``weight`` is ``[H, n, D]`` (``[H, n, M]`` behind a hidden layer of M units, whose weight is ``[H, M, D]``). Each
    head is initialised like ``nn.Linear``, from ``generator`` alone.
    """

    decayed_parameters = ("weight", "hidden_weight")

    def __init__(self, dim: int, draws: int, num_labels: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.dim, self.draws, self.num_labels = dim, draws, num_labels

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:
            bound = 1 / math.sqrt(fan_in)
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))

        width = hidden or dim
        if hidden:
            self.hidden_weight = uniform(draws, hidden, dim, fan_in=dim)
            self.hidden_bias = uniform(draws, hidden, fan_in=dim)
        self.hidden = hidden
        self.weight = uniform(draws, num_labels, width, fan_in=width)
        self.bias = uniform(draws, num_labels, fan_in=width)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """Logits ``[B, H, n]`` of features ``[B, D]``; ``frozen`` keeps gradients from the heads' parameters."""

        def parameter(name: str) -> Tensor:
            value = getattr(self, name)
            return value.detach() if frozen else value

        if not self.hidden:
            logits = F.linear(x, parameter("weight").flatten(0, 1), parameter("bias").flatten())
            return logits.unflatten(1, (self.draws, self.num_labels))
        units = F.linear(x, parameter("hidden_weight").flatten(0, 1), parameter("hidden_bias").flatten()).relu()
        units = units.unflatten(1, (self.draws, self.hidden)).transpose(0, 1)  # [H, B, M]
        logits = torch.baddbmm(parameter("bias").unsqueeze(1), units, parameter("weight").transpose(1, 2))
        return logits.transpose(0, 1)


@dataclass(frozen=True)
class TapMetrics:
    """Reading of one head: tap, its place in depth (0 is the shallowest), draw, and means over ``count`` samples."""

    tap: str
    depth: int
    draw: int
    loss: float
    accuracy: float
    kappa: float
    chance: float
    count: int
    num_labels: int
    dim: int


class RandomLabelHeads(nn.Module):
    """Heads for every tap and draw; made by :func:`rlp.attach`.

    Call the network, then :meth:`loss` (or :meth:`evaluate`) once for the features that the call left at the taps. The
    network is not part of this module: its parameters appear neither in ``parameters()`` nor in ``state_dict()``.

    Attributes:
        last_fit: fit loss at each tap in the latest :meth:`loss`, mean over draws and batch, ``[L]`` on the device.
        last_penalty: penalty in the latest :meth:`loss`, sum over taps, 0-dim on the device.
    """

    def __init__(
        self,
        taps: Sequence[Tap],
        dims: Sequence[int],
        store: dict[str, Any],
        handles: Sequence[RemovableHandle],
        pool: Pool,
        num_labels: int,
        draws: int,
        seed: int,
        hidden: int,
        split: str,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.tap_names = [tap.name for tap in taps]
        self.num_labels, self.draws, self.seed, self.split = num_labels, draws, seed, split
        banks = [
            # Every tap has a seed of its own: another tap more or less changes nothing here.
            HeadBank(dim, draws, num_labels, hidden, torch.Generator().manual_seed(named_seed(seed, f"heads.{name}")))
            for name, dim in zip(self.tap_names, dims, strict=True)
        ]
        self.dims = list(dims)
        self.banks = nn.ModuleList(banks).to(device)
        self._store, self._handles, self._pool = store, list(handles), pool
        shape = (len(taps), draws, 3)  # sums of loss, of correct, and number of samples
        self._sums = {mode: torch.zeros(shape, dtype=torch.float64, device=device) for mode in ("online", "eval")}
        self.last_fit = torch.zeros(len(taps), device=device)
        self.last_penalty = torch.zeros((), device=device)

    # -- losses ----------------------------------------------------------------------------------------------

    def loss(
        self, index: Tensor | None = None, *, words: Tensor | None = None, lam: float = 0.0, penalty: str = "forget"
    ) -> Tensor:
        """Fit loss of all heads plus ``lam`` times the penalty, each with its own route for gradients.

        ``Σ_taps Σ_draws mean_batch(-log p)`` trains the heads alone (each as if it were the only one), and
        ``lam · Σ_taps mean_draws mean_batch(-log(1 - p))`` the network alone. With ``lam=0`` features are detached and
        the network's gradient is untouched to the bit.

        Args:
            index: int64 ``[B]`` sample ids of the batch, from which the random words follow; or
            words: int64 ``[B, draws]`` the words themselves, in [0, 2^32), as a .beton has them.
            lam: weight λ >= 0 of the penalty.
            penalty: ``forget`` or ``uniform`` (:data:`rlp.losses.PENALTIES`).

        Returns:
            A scalar.

        Raises:
            UserError: the network has not run since the last call, or batch sizes differ.
        """
        features = self._take_features()
        target = self._targets(index, words, features)
        fits, penalties = [], []
        for place, (bank, x) in enumerate(zip(self.banks, features, strict=True)):
            stats = statistics_from_logits(bank(x.detach()), target)
            fit = fit_loss(stats)
            self._add("online", place, stats, fit)
            fits.append(fit.mean(0))
            if lam:
                routed = statistics_from_logits(bank(x, frozen=True), target)
                penalties.append(penalty_named(penalty)(routed).mean())
        fit_by_tap = torch.stack([fit.sum() for fit in fits])
        self.last_fit = fit_by_tap.detach() / self.draws
        if not lam:
            return fit_by_tap.sum()
        total = torch.stack(penalties).sum()
        self.last_penalty = total.detach()
        return fit_by_tap.sum() + lam * total

    @torch.no_grad()
    def evaluate(self, index: Tensor | None = None, *, words: Tensor | None = None) -> None:
        """Add the batch to the sums of mode ``eval``; arguments as for :meth:`loss`."""
        features = self._take_features()
        target = self._targets(index, words, features)
        for place, (bank, x) in enumerate(zip(self.banks, features, strict=True)):
            stats = statistics_from_logits(bank(x), target)
            self._add("eval", place, stats, fit_loss(stats))

    def _take_features(self) -> list[Tensor]:
        """Pooled features ``[B, D]`` of every tap from the latest forward pass, which are then used up."""
        missing = [name for name in self.tap_names if name not in self._store]
        if missing:
            raise UserError(
                f"no features at tap '{missing[0]}'; call the network first, and the heads once after each call"
            )
        features = [self._pool(tap_tensor(name, self._store[name]), name) for name in self.tap_names]
        self._store.clear()
        for name, dim, x in zip(self.tap_names, self.dims, features, strict=True):
            if x.shape[1] != dim:
                raise UserError(f"tap '{name}' gives {x.shape[1]} features; its heads were made for {dim}")
        return features

    def _targets(self, index: Tensor | None, words: Tensor | None, features: list[Tensor]) -> Tensor:
        """Random labels int64 ``[B, H]``."""
        if (index is None) == (words is None):
            raise UserError("give either the sample ids (index) or their random words (words), not both or neither")
        device, batch = features[0].device, len(features[0])
        if words is None:
            assert index is not None
            words = random_words(self.seed, index.to(device, non_blocking=True), self.draws, self.split)
        if tuple(words.shape) != (batch, self.draws):
            given = f"{[*words.shape]} words" if index is None else f"{words.shape[0]} sample ids"
            raise UserError(f"the network saw {batch} images, but the heads got {given}; expected one row an image")
        return random_labels(words.to(device, non_blocking=True), self.num_labels)

    # -- readings --------------------------------------------------------------------------------------------

    def _add(self, mode: str, place: int, stats: Statistics, fit: Tensor) -> None:
        right = correct(stats).detach()
        rows = [
            fit.detach().double().sum(0),
            right.double().sum(0),
            torch.full_like(right[0], len(right), dtype=torch.double),
        ]
        self._sums[mode][place] += torch.stack(rows, dim=-1)

    def metrics(self, mode: str = "online", reset: bool = True) -> list[TapMetrics]:
        """Readings of every tap and draw over the samples since the last reset, over all ranks. A host sync.

        ``online``: from :meth:`loss`, while heads and network moved. ``eval``: from :meth:`evaluate`. Empty if no
        sample was seen.
        """
        sums = reduce_sum(self._sums[mode]).tolist()
        if reset:
            self._sums[mode].zero_()
        n = self.num_labels
        return [
            TapMetrics(
                tap=name, depth=depth, draw=draw, loss=loss / count, accuracy=right / count,
                kappa=kappa(right / count, n), chance=1 / n, count=int(count), num_labels=n, dim=dim,
            )
            for depth, (name, dim, rows) in enumerate(zip(self.tap_names, self.dims, sums, strict=True))
            for draw, (loss, right, count) in enumerate(rows)
            if count
        ]  # fmt: skip

    def running_state(self) -> dict[str, Tensor]:
        """The online sums over all ranks, for a checkpoint in mid-epoch."""
        return {"online": reduce_sum(self._sums["online"]).clone()}

    def load_running_state(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`running_state` returned (on one rank, for it holds all ranks' share)."""
        self._sums["online"].copy_(state["online"])

    def summary(self) -> str:
        """Text table of κ per tap: mean and 95% interval over draws, beside chance; from ``eval`` if it has samples."""
        rows = self.metrics("eval", reset=False) or self.metrics("online", reset=False)
        if not rows:
            return "no samples yet: call heads.loss or heads.evaluate first"
        width = max(len("tap"), *(len(name) for name in self.tap_names))
        lines = [f"{'tap':<{width}}     D  accuracy  chance       κ  95% over draws"]
        for name in self.tap_names:
            mine = [row for row in rows if row.tap == name]
            interval = draw_interval([row.kappa for row in mine])
            spread = "-" if interval.low is None else f"{interval.low:+.3f} .. {interval.high:+.3f}"
            accuracy = sum(row.accuracy for row in mine) / len(mine)
            lines.append(
                f"{name:<{width}} {mine[0].dim:>5}  {accuracy:>8.4f}  {1 / self.num_labels:>6.4f}  "
                f"{interval.mean:>+6.3f}  {spread}"
            )
        lines.append(f"n = {self.num_labels} labels, {self.draws} draws, N = {rows[0].count} samples")
        return "\n".join(lines)

    def detach_hooks(self) -> None:
        """Take the hooks off the network; the heads can no longer be used with it."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._store.clear()
