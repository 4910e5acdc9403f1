"""What becomes of heads over a run: λ at every tap and step, λ that follows κ, restarts with fresh draws."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlp.data.batch import Batch
from rlp.data.beton import Card
from rlp.distributed import reduce_sum
from rlp.errors import UserError
from rlp.labels import draw_words
from rlp.models import RandomLabelHeads
from rlp.progress import Progress
from rlp.schema import HeadsConfig

GAIN = 4.0
"""One log window moves log λ by so many times the distance of κ from its target..."""
LARGEST_MOVE = math.log(2)
"""...and by no more than this."""
MEMORY = 0.5
"""Weight of the past in the running mean of κ over log windows."""
RANGE = 1e4
"""How far λ may go from where it started, as a factor to either side."""


def tap_factors(patterns: Mapping[str, float], taps: list[str]) -> list[float]:
    """The factor of λ at every tap.

    Args:
        patterns: tap names, or globs in which ``*`` stands for anything, to factors; the last one that fits counts,
            and a tap that none fits gets 0. Empty: 1 everywhere.
        taps: names of the heads' taps.

    Raises:
        UserError: a pattern fits no tap.
    """
    factors = [0.0 if patterns else 1.0] * len(taps)
    for pattern, factor in patterns.items():
        fitting = [place for place, tap in enumerate(taps) if tap == pattern or fnmatchcase(tap, pattern)]
        if not fitting:
            raise UserError(f"heads.lam_taps names '{pattern}', which fits no tap; the taps are {', '.join(taps)}")
        for place in fitting:
            factors[place] = float(factor)
    return factors


def words_of(batch: Batch, card: Card, heads: RandomLabelHeads) -> Tensor:
    """The random words of the heads' present draws, int64 ``[B, draws]``; see :meth:`RandomLabelHeads.restart`."""
    return draw_words(batch.words, card.words_seed, batch.index, heads.draws, card.split, heads.first_draw)


class KappaController:
    """λ at every tap, moved so that the heads' online κ (mean over draws) comes to a target.

    Proportional control of log λ: ``log λ += clip(GAIN · (κ̄ - target), ±LARGEST_MOVE)`` once a log window, where κ̄ is
    the running mean of the windows' κ, each from counts over all ranks, so that every rank computes the same λ. All of
    it stays on the device.

    Args:
        heads: whose online readings are followed.
        start: λ to begin with.
        target: κ to hold, in [0, 1].
        rises: whether a larger λ raises κ, as in joint mode.
    """

    def __init__(self, heads: RandomLabelHeads, start: float, target: float, rises: bool) -> None:
        self.heads, self.start, self.target, self.sign = heads, math.log(start), target, -1 if rises else 1
        taps, device = len(heads.tap_names), heads.steps.device
        self.log_lam = torch.full((taps,), self.start, dtype=torch.float64, device=device)
        self.kappa = torch.full((taps,), math.nan, dtype=torch.float64, device=device)
        self.before = torch.zeros(taps, 2, dtype=torch.float64, device=device)  # counts at the last update

    def update(self) -> None:
        """Close a window: with several ranks every one must call it. No host sync."""
        counts = reduce_sum(self.heads.online_counts())
        right, seen = (counts - self.before).unbind(1)
        self.before = counts.clone()
        n = self.heads.num_labels
        now = (n * right / seen - 1) / (n - 1)
        now = torch.where(seen > 0, now, self.kappa)  # nothing was seen: nothing is learnt
        self.kappa = torch.where(self.kappa.isnan(), now, MEMORY * self.kappa + (1 - MEMORY) * now)
        move = (self.sign * GAIN * (self.kappa - self.target)).clamp(-LARGEST_MOVE, LARGEST_MOVE).nan_to_num(0.0)
        reach = math.log(RANGE)
        self.log_lam = (self.log_lam + move).clamp(self.start - reach, self.start + reach)

    def start_epoch(self) -> None:
        """The heads' readings were set to zero."""
        self.before.zero_()

    def state(self) -> dict[str, Tensor]:
        """Equal on all ranks."""
        return {"log_lam": self.log_lam, "kappa": self.kappa, "before": self.before}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        for name, value in state.items():
            setattr(self, name, value.to(self.log_lam.device, copy=True))


class HeadPlan:
    """λ and restarts of one run's heads, functions of its :class:`rlp.progress.Progress` but for adaptive λ.

    Args:
        config: the section ``heads``.
        heads: the run's heads.
        updates: optimiser steps of the network an epoch.
        accumulate: batches for each of them.

    Raises:
        UserError: ``heads.lam_taps`` does not fit the taps.
    """

    def __init__(self, config: HeadsConfig, heads: RandomLabelHeads, updates: int, accumulate: int = 1) -> None:
        self.config, self.heads, self.updates, self.accumulate = config, heads, updates, accumulate
        self.factors = tap_factors(config.lam_taps, heads.tap_names)
        self.controller = None
        if config.target_kappa is not None:
            self.controller = KappaController(heads, config.weight, config.target_kappa, config.penalty == "joint")

    def lam(self, progress: Progress) -> dict[str, float | Tensor]:
        """λ of the batch to come, for every tap that has a penalty; tensors on the device where λ is adaptive."""
        update = progress.epoch * self.updates + progress.batch // self.accumulate
        warmup = round(self.config.warmup_epochs * self.updates)
        share = min(1.0, (update + 1) / warmup) if warmup else 1.0
        if self.controller is not None:
            adapted = (self.controller.log_lam.exp() * share).float().unbind()
            pairs = zip(self.heads.tap_names, self.factors, adapted, strict=True)
            return {tap: factor * lam for tap, factor, lam in pairs if factor}
        lam = self.config.weight * share
        return {tap: factor * lam for tap, factor in zip(self.heads.tap_names, self.factors, strict=True) if factor}

    def row(self, progress: Progress) -> dict[str, dict[str, float]]:
        """``{"lam": {tap: λ}}`` of the last batch done, for a row of metrics; empty where λ is 0. A host sync."""
        if not self.config.weight:
            return {}
        last = Progress(epoch=progress.epoch, batch=max(0, progress.batch - 1))
        return {"lam": {tap: float(lam) for tap, lam in self.lam(last).items()}}

    def close_window(self) -> None:
        """Adapt λ, where metrics are logged; with several ranks every one must call it."""
        if self.controller is not None:
            self.controller.update()

    def start_epoch(self, epoch: int, optimizer: Optimizer) -> bool:
        """Before the first batch of an epoch: restart the heads where one is due; whether one was.

        Their optimiser forgets what it knew of the old weights.
        """
        if self.controller is not None:
            self.controller.start_epoch()
        every = self.config.restart_every
        if not every or not epoch or epoch % every:
            return False
        self.heads.restart(epoch // every, self.config.fresh_draws)
        optimizer.state.clear()
        return True

    def generation(self, progress: Progress) -> int:
        """How many restarts the heads have seen: a checkpoint at an epoch's end lies before the next one."""
        epoch = progress.epoch if progress.batch else max(0, progress.epoch - 1)
        return epoch // self.config.restart_every if self.config.restart_every else 0

    def describe(self, progress: Progress) -> dict[str, Any]:
        """What a row of a head's reading must say beside it: after which restart; empty without restarts."""
        return {"restart": self.generation(progress)} if self.config.restart_every else {}

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return self.controller.state() if self.controller is not None else {}

    def load_state(self, state: Mapping[str, Tensor], progress: Progress) -> None:
        """Go on from a checkpoint taken at ``progress``."""
        if self.controller is not None:
            self.controller.load_state(state)
        if self.config.fresh_draws:
            self.heads.first_draw = self.generation(progress) * self.heads.draws
