"""Random-label heads at the taps of a network: captured features in, routed loss and honest readings out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import math
from statistics import fmean
from typing import Self, cast
import weakref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rlp.distributed import broadcast_buffers, reduce_sum
from rlp.errors import UserError
from rlp.intervals import draw_interval
from rlp.kernels.loss import MEMORY_BUDGET
from rlp.kernels.problem import ClassOrder, sort_by_class
from rlp.kernels.reference import RandomLabelLoss, Statistics
from rlp.labels import random_labels, random_words
from rlp.losses import DOF, NEEDS_ENTROPY, PENALTIES, RIDGE, check_penalty, correct, degrees_of_freedom, kappa
from rlp.models.banks import Bank
from rlp.models.modes import evaluating
from rlp.models.taps import FeatureStore

MODES = ("online", "eval")


@dataclass(frozen=True)
class TapMetrics:
    """Reading of one head: tap, its place in depth (0 is the shallowest), draw, and means over ``count`` samples.

    ``dim`` is the size of the head's input, ``kind`` and ``features`` what :func:`rlp.attach` was given.
    """

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
    kind: str = "shared"
    features: str = "raw"


class RandomLabelHeads(nn.Module):
    """Heads for every tap and draw; made by :func:`rlp.attach`.

    Call the network, then :meth:`loss` (or :meth:`evaluate`) once for the features that the call left at the taps. The
    network is not part of this module: its parameters appear neither in ``parameters()`` nor in ``state_dict()``.
    Optimise both: ``[*model.parameters(), *heads.parameters()]``. As a context manager it takes its hooks off at the
    end.

    Attributes:
        tap_names, dims: the L taps in the order of the forward pass, and the size D of a head's input at each.
        kind, features, num_classes: as :func:`rlp.attach` was given them (0 classes where nobody asks for them).
        steps: how many times :meth:`loss` was called, int64 on the device, part of ``state_dict()``.
        last_fit: fit loss at each tap in the latest :meth:`loss`, mean over draws and batch, ``[L]`` on the device.
        last_penalty: penalty in the latest :meth:`loss`, also where λ is 0: mean over taps, draws and batch,
            0-dim on the device.
        first_draw: column of the random words that the first draw is; 0 until :meth:`restart` takes fresh draws.
    """

    steps: Tensor

    def __init__(
        self,
        banks: Mapping[str, Bank],
        store: FeatureStore,
        handles: Sequence[RemovableHandle],
        num_labels: int,
        draws: int,
        seed: int,
        split: str,
        device: torch.device,
        impl: str = "auto",
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        super().__init__()
        self.impl, self.memory_budget = impl, memory_budget
        self.tap_names, self.dims = list(banks), [bank.dim for bank in banks.values()]
        first = next(iter(banks.values()))
        self.kind, self.features, self.num_classes = first.kind, first.features, first.num_classes
        self.num_labels, self.draws, self.seed, self.split = num_labels, draws, seed, split
        self.banks = nn.ModuleList(banks.values()).to(device)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        for mode in MODES:  # sums of loss, of correct, and number of samples
            sums = torch.zeros(len(banks), draws, 3, dtype=torch.float64, device=device)
            self.register_buffer(f"{mode}_sums", sums, persistent=False)
        random_words(seed, torch.zeros(1, dtype=torch.int64), draws, split)  # so that a compiled step knows the stream
        self._store = store
        self._detach = weakref.finalize(self, _remove, list(handles), store)
        self.last_fit = torch.zeros(len(banks), device=device)
        self.last_penalty = torch.zeros((), device=device)
        self.first_draw = 0
        self._read: weakref.ref[Tensor] | None = None  # features that are in the readings already

    # -- losses ----------------------------------------------------------------------------------------------

    def loss(
        self,
        index: Tensor | None = None,
        *,
        words: Tensor | None = None,
        classes: Tensor | None = None,
        lam: float | Mapping[str, float | Tensor] = 0.0,
        penalty: str = "forget",
        ridge: float = RIDGE,
    ) -> Tensor:
        """Fit loss of all heads plus ``lam`` times the penalty, each with its own route for gradients.

        ``Σ_taps Σ_draws mean_batch(-log p)`` trains the heads alone (each as if it were the only one), and
        ``Σ_taps lam_tap · Σ_draws mean_batch(-log(1 - p))``, or another penalty, the network alone. Where λ is 0 the
        features are detached, and the network's gradient is untouched to the bit.

        Args:
            index: int64 ``[B]`` sample ids of the batch, from which the random words follow; or
            words: int64 ``[B, draws]`` the words themselves, in [0, 2^32), as a .beton has them.
            classes: int64 ``[B]`` in [0, num_classes), each sample's given class, for heads of kind ``per_class``;
                others do not look at it.
            lam: weight λ >= 0 of the penalty: a number for all taps, or a mapping of taps to numbers, or to 0-dim
                tensors on the device that nobody looks at. Taps that the mapping leaves out have no penalty.
            penalty: one of :data:`rlp.losses.PENALTY_NAMES`. ``joint`` lets the network *descend* the fit loss;
                ``dof`` asks no head and counts once at a tap, whatever the number of draws.
            ridge: ρ of ``dof`` (:func:`rlp.losses.degrees_of_freedom`).

        Returns:
            A scalar.

        Raises:
            UserError: the network has not run since the last call, batch sizes differ, classes are missing, a λ is
                not a number >= 0 or names no tap, or it is above 0 and the features carry no gradient.
        """
        check_penalty(penalty)
        lams = self._lams(lam)
        on = [isinstance(value, Tensor) or value > 0 for value in lams]
        features = self._take_features()
        target, order = self._targets(index, words, features), self._classes(classes, features)
        reached = any(x.requires_grad for x, o in zip(features, on, strict=True) if o)
        if any(on) and torch.is_grad_enabled() and not reached:
            raise UserError(
                f"lam is {lam}, but no tap's features carry a gradient, so the penalty cannot reach the network; "
                "expected a forward pass outside torch.no_grad() of a network that is not frozen"
            )
        found = self._losses(features, target, on, order, penalty in NEEDS_ENTROPY)
        fits = torch.stack([fit for fit, _ in found])
        if penalty == DOF:
            inputs = [x if o else x.detach() for x, o in zip(features, on, strict=True)]
            penalties = [degrees_of_freedom(x, ridge) for x in inputs]
        else:
            penalties = [PENALTIES[penalty](stats).mean(0).sum() for _, stats in found]
        self._note(features, fits, found)
        self._read = None
        heads = len(fits) if penalty == DOF else fits.numel()
        self.last_penalty = torch.stack([value.detach() for value in penalties]).sum() / heads
        self.steps += 1
        weighted = [value * part for value, part, o in zip(lams, penalties, on, strict=True) if o]
        return fits.sum() + torch.stack(weighted).sum() if weighted else fits.sum()

    def fit(self, index: Tensor | None = None, *, words: Tensor | None = None, classes: Tensor | None = None) -> Tensor:
        """Fit loss alone, of features that stay at the taps: for more steps of the heads than of the network.

        Between the network's forward pass and :meth:`loss`, as often as wanted::

            logits = model(image)
            for _ in range(4):
                heads.fit(index).backward(); heads_optimizer.step(); heads_optimizer.zero_grad()
            loss = F.cross_entropy(logits, label) + heads.loss(index, lam=1.0)

        The readings (``online`` and ``last_fit``) are those of the first call on a batch, before any step on it; the
        penalty is that of heads which have taken all the others.
        """
        features = self._take_features(keep=True)
        target, order = self._targets(index, words, features), self._classes(classes, features)
        found = self._losses(features, target, [False] * len(features), order)
        fits = torch.stack([fit for fit, _ in found])
        self._note(features, fits, found)
        self._read = weakref.ref(features[0])
        return fits.sum()

    def _lams(self, lam: object) -> list[float | Tensor]:
        """λ at every tap."""
        if not isinstance(lam, Mapping):
            return [_checked_lam(lam, "lam")] * len(self.tap_names)
        unknown = [name for name in lam if name not in self.tap_names]
        if unknown:
            raise UserError(f"lam names the tap '{unknown[0]}'; expected one of {', '.join(self.tap_names)}")
        given = cast(Mapping[str, object], lam)
        return [_checked_lam(given.get(name, 0.0), f"lam of tap '{name}'", True) for name in self.tap_names]

    def _note(self, features: Sequence[Tensor], fits: Tensor, found: Sequence[RandomLabelLoss]) -> None:
        """The batch's reading, unless these very features have given one already."""
        if self._read is not None and self._read() is features[0]:
            return
        self._add("online", fits, [stats for _, stats in found])
        self.last_fit = fits.detach().mean(1)

    def restart(self, number: int, fresh_draws: bool = False) -> None:
        """Fresh weights for all heads, a function of their seed, names and ``number`` (from 1 on; 0 is the start).

        With ``fresh_draws`` they also turn to the next random labels: draw k is then column ``number * draws + k`` of
        the random words, which :meth:`loss` computes from ``index``; who gives ``words`` gives those columns. The
        optimiser is the caller's, and so is emptying its state. Nothing else is touched, no global generator either.
        """
        if number < 0:
            raise UserError(f"the restart's number is {number}; expected at least 0")
        for bank in self.banks:
            cast(Bank, bank).initialise(number)
        self.first_draw = number * self.draws if fresh_draws else 0

    @torch.no_grad()
    def evaluate(
        self, index: Tensor | None = None, *, words: Tensor | None = None, classes: Tensor | None = None
    ) -> None:
        """Add the batch to the sums of mode ``eval``; arguments as for :meth:`loss`.

        The heads themselves are in eval mode meanwhile: running statistics, no dropout. With several ranks call
        :meth:`synchronise` first, for each rank has running statistics of its own batches.
        """
        features = self._take_features()
        target, order = self._targets(index, words, features), self._classes(classes, features)
        with evaluating(self.banks):
            found = self._losses(features, target, [False] * len(features), order)
        self._add("eval", torch.stack([fit for fit, _ in found]), [stats for _, stats in found])

    def _losses(
        self,
        features: Sequence[Tensor],
        target: Tensor,
        penalised: Sequence[bool],
        classes: ClassOrder | None,
        entropy: bool = False,
    ) -> list[RandomLabelLoss]:
        """Of every tap's bank."""
        banks = [cast(Bank, bank) for bank in self.banks]
        return [
            bank.loss(x, target, on, self.impl, self.memory_budget, classes, entropy)
            for bank, x, on in zip(banks, features, penalised, strict=True)
        ]

    def _take_features(self, keep: bool = False) -> list[Tensor]:
        """Features ``[B, *shape]`` of every tap from the latest forward pass, which are then used up unless kept."""
        stored, device = self._store.features, self.steps.device
        missing = [name for name in self.tap_names if name not in stored]
        if missing:
            raise UserError(
                f"no features at tap '{missing[0]}'; call the network first, and the heads once after each call"
            )
        features = [stored[name] for name in self.tap_names]
        if not keep:
            stored.clear()
        for name, bank, x in zip(self.tap_names, self.banks, features, strict=True):
            shape = cast(Bank, bank).shape
            if tuple(x.shape[1:]) != shape:
                found, made = (" x ".join(map(str, sizes)) for sizes in (x.shape[1:], shape))
                raise UserError(f"tap '{name}' gives {found} features; its heads were made for {made}")
            if x.device != device:
                raise UserError(f"tap '{name}' is on {x.device}, its heads on {device}; expected one device")
            if len(x) != len(features[0]):
                raise UserError(
                    f"tap '{name}' gives {len(x)} rows, tap '{self.tap_names[0]}' {len(features[0])}; expected one "
                    "row an image at each"
                )
        return features

    def _targets(self, index: Tensor | None, words: Tensor | None, features: list[Tensor]) -> Tensor:
        """Random labels int64 ``[B, H]``."""
        if (index is None) == (words is None):
            raise UserError("give either the sample ids (index) or their random words (words), not both or neither")
        device, batch = features[0].device, len(features[0])
        given, shape, name = (
            (words, (batch, self.draws), "words") if index is None else (index, (batch,), "index")
        )  # fmt: skip
        if not isinstance(given, Tensor) or given.is_floating_point() or given.dtype == torch.bool:
            kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise UserError(f"{name} is {kind}; expected a tensor of whole numbers, int64")
        if tuple(given.shape) != shape:
            raise UserError(
                f"{name} has the shape {[*given.shape]}; expected {[*shape]}, for the network saw {batch} images"
            )
        given = given.to(device, torch.int64, non_blocking=True)
        if index is not None:
            given = random_words(self.seed, given, self.draws, self.split, self.first_draw)
        return random_labels(given, self.num_labels)

    def _classes(self, classes: Tensor | None, features: list[Tensor]) -> ClassOrder | None:
        """The batch's classes in order, once for all taps; None where the heads do not ask."""
        if not self.num_classes:
            return None
        batch = len(features[0])
        if not isinstance(classes, Tensor) or classes.dtype != torch.int64 or tuple(classes.shape) != (batch,):
            given = f"{classes.dtype} of shape {[*classes.shape]}" if isinstance(classes, Tensor) else f"{classes!r}"
            raise UserError(
                f"heads of kind per_class got classes = {given}; expected each sample's class, int64 [{batch}]"
            )
        return sort_by_class(classes.to(features[0].device, non_blocking=True), self.num_classes)

    def synchronise(self) -> None:
        """Give every rank the running statistics of rank 0, which are those that checkpoints hold.

        For features that are not raw and copied batch norms. With several ranks every one must call it.
        """
        broadcast_buffers(self.banks)

    # -- readings --------------------------------------------------------------------------------------------

    def _sums(self, mode: str) -> Tensor:
        if mode not in MODES:
            raise UserError(f"mode is '{mode}'; expected {' or '.join(MODES)}")
        return self.get_buffer(f"{mode}_sums")

    def _add(self, mode: str, fits: Tensor, stats: Sequence[Statistics]) -> None:
        """Adds a batch: mean fit losses ``[L, H]``, and the statistics ``[B, H]`` at each tap."""
        right = torch.stack([correct(part).sum(0) for part in stats])
        count = len(stats[0].z_t)
        if not count:  # whose mean is NaN
            return
        seen = torch.full_like(right, count)
        self._sums(mode).add_(torch.stack([fits.detach().double() * count, right, seen], dim=-1))

    def metrics(self, mode: str = "online", reset: bool = True) -> list[TapMetrics]:
        """Readings of every tap and draw over the samples since the last reset, over all ranks. A host sync.

        With several ranks every one must call it. ``online``: from :meth:`loss`, while heads and network moved.
        ``eval``: from :meth:`evaluate`. Empty if no sample was seen.
        """
        sums = self._sums(mode)
        totals = reduce_sum(sums).tolist()
        if reset:
            sums.zero_()
        n = self.num_labels
        return [
            TapMetrics(
                tap=name, depth=depth, draw=draw, loss=loss / count, accuracy=right / count,
                kappa=kappa(right / count, n), chance=1 / n, count=int(count), num_labels=n, dim=self.dims[depth],
                kind=self.kind, features=self.features,
            )
            for depth, (name, rows) in enumerate(zip(self.tap_names, totals, strict=True))
            for draw, (loss, right, count) in enumerate(rows)
            if count
        ]  # fmt: skip

    def online_counts(self) -> Tensor:
        """Right answers and answers of this rank since the last reset, float64 ``[L, 2]`` on the device."""
        return self._sums("online")[:, :, 1:].sum(1)

    def running_state(self) -> dict[str, Tensor]:
        """The online sums over all ranks, for a checkpoint in mid-epoch; with several ranks every one must call it."""
        return {"online": reduce_sum(self._sums("online")).clone()}

    def load_running_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`running_state` returned (on one rank, for it holds all ranks' share)."""
        self._sums("online").copy_(state["online"])

    def describe(self) -> list[str]:
        """What the heads are, in a line for each tap."""
        return [cast(Bank, bank).describe() for bank in self.banks]

    def summary(self, reset: bool = False) -> str:
        """Text table of κ per tap, for each mode that has samples: mean and 95% interval over draws, beside chance.

        ``online`` counts every sample as often as :meth:`loss` saw it since the last reset. With several ranks every
        one must call it. The class-only floor needs the classes: :func:`rlp.labels.class_floor`.
        """
        tables = [_table(mode, rows) for mode in MODES if (rows := self.metrics(mode, reset))]
        if not tables:
            return "no samples yet: call heads.loss or heads.evaluate first"
        facts = (
            f"{self.num_labels} random labels, {self.draws} draws, heads {self.kind}, features {self.features}, "
            f"heads trained for {int(self.steps)} batches"
        )
        return "\n\n".join([facts, *tables])

    # -- hooks -----------------------------------------------------------------------------------------------

    def detach_hooks(self) -> None:
        """Take the hooks off the network; the heads can no longer be used with it. A second call does nothing."""
        self._detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach_hooks()


def _checked_lam(lam: object, name: str, tensor: bool = False) -> float | Tensor:
    """λ, a finite number of at least 0, or a 0-dim tensor where one is allowed."""
    if tensor and isinstance(lam, Tensor) and lam.dim() == 0:
        return lam
    if isinstance(lam, bool) or not isinstance(lam, int | float) or not 0 <= lam < math.inf:
        raise UserError(f"{name} is {lam!r}; expected a finite number of at least 0")
    return float(lam)


def _remove(handles: list[RemovableHandle], store: FeatureStore) -> None:
    for handle in handles:
        handle.remove()
    store.features.clear()


def _table(mode: str, rows: Sequence[TapMetrics]) -> str:
    """One line per tap, in depth order."""
    taps = dict.fromkeys(row.tap for row in rows)
    width = max(3, *(len(tap) for tap in taps))
    how = "while training" if mode == "online" else "by evaluate"
    lines = [
        f"{mode} ({how}), N = {rows[0].count} samples",
        f"{'tap':<{width}}      D    loss  accuracy  chance       κ  95% over draws",
    ]
    for tap in taps:
        mine = [row for row in rows if row.tap == tap]
        interval = draw_interval([row.kappa for row in mine])
        spread = "one draw only" if interval.low is None else f"{interval.low:+.3f} .. {interval.high:+.3f}"
        loss, accuracy = fmean(row.loss for row in mine), fmean(row.accuracy for row in mine)
        lines.append(
            f"{tap:<{width}} {mine[0].dim:>6}  {loss:>6.3f}  {accuracy:>8.4f}  {mine[0].chance:>6.4f}  "
            f"{interval.mean:>+6.3f}  {spread}"
        )
    return "\n".join(lines)
