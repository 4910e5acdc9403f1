"""Running sums that live on the device, so that a training step never waits for the host."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlp.distributed import group_size, reduce_sum
from rlp.errors import UserError


class NonFiniteError(UserError):
    """A loss became NaN or infinite; the message names step, rank and which loss."""

    exit_status = 3


class Sums:
    """Named running sums, added to without a host sync and read (over all ranks) with one."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = list(names)
        self.values = torch.zeros(len(self.names), dtype=torch.float64, device=device)

    def add(self, *values: Tensor | float) -> None:
        """Add one number (0-dim tensor or float) per name, in order."""
        device = self.values.device
        parts = [v.detach().double() if isinstance(v, Tensor) else torch.tensor(v).double() for v in values]
        self.values += torch.stack([part.to(device, non_blocking=True) for part in parts])

    def read(self) -> dict[str, float]:
        """The sums over all ranks. A host sync."""
        return dict(zip(self.names, reduce_sum(self.values).tolist(), strict=True))

    def total(self) -> Tensor:
        """The sums over all ranks as a tensor of its own, for a checkpoint."""
        return reduce_sum(self.values).clone()

    def reset(self) -> None:
        """Back to zero."""
        self.values.zero_()


class FiniteWatch:
    """Remembers on the device the first step at which each watched loss was not finite.

    Looking costs a host sync, so the trainer looks only where it reads metrics, and always before a checkpoint: a
    state that has seen a NaN is never saved.
    """

    def __init__(self, names: Sequence[str], device: torch.device, rank: int) -> None:
        self.names, self.rank = list(names), rank
        self.first_bad = torch.full((len(self.names),), -1, dtype=torch.int64, device=device)

    def watch(self, values: Tensor, step: int) -> None:
        """Note the losses ``values`` [len(names)] of ``step``."""
        bad = ~torch.isfinite(values.detach()) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, step, self.first_bad)

    def check(self) -> None:
        """Raise on every rank, each naming the first bad step of the lowest rank that saw one."""
        shifted = self.first_bad + 1  # 0: never
        ranks = torch.zeros(group_size(), *shifted.shape, dtype=torch.int64, device=shifted.device)
        ranks[self.rank] = shifted
        steps = reduce_sum(ranks).cpu()
        if not steps.any():
            return
        rank, which = next((r, w) for r, row in enumerate(steps.tolist()) for w in _earliest_first(row))
        raise NonFiniteError(
            f"the {self.names[which]} became NaN or infinite at step {int(steps[rank, which]) - 1} on rank {rank}; "
            "expected finite numbers (start again with a lower learning rate or λ)"
        )


def _earliest_first(row: list[int]) -> list[int]:
    """Positions of the non-zero entries, smallest entry first."""
    return sorted((i for i, step in enumerate(row) if step), key=lambda i: row[i])
