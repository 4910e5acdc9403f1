"""The torchrun environment: who am I, on which device, and the few collectives the project uses."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
import os
import sys

import torch
from torch import Tensor, nn
import torch.distributed as dist

from rlp.errors import UserError


@dataclass(frozen=True)
class World:
    """The ranks of this run: ``rank`` of ``size``, ``local_rank`` on this machine, and the rank's ``device``."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto`` (CUDA when there is one), ``cpu`` or ``cuda``, as the device of ``local_rank``."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"run.device is '{name}'; expected auto, cpu or cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("run.device is 'cuda', but this PyTorch sees no CUDA device")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no CUDA device of its own: this machine has {torch.cuda.device_count()}"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def connect(device: str = "auto") -> Iterator[World]:
    """Join the process group that torchrun describes (gloo on the CPU, NCCL on CUDA); alone without torchrun.

    The group is torn down at the end, so that every rank exits.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    where = choose_device(device, local_rank)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    world = World(rank, size, local_rank, where)
    if size == 1:
        yield world
        return
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield world
    finally:
        dist.destroy_process_group()


@contextmanager
def prompt_exit() -> Iterator[None]:
    """Around a script: with several ranks, end the process without the interpreter's shutdown.

    Gloo's threads outlive ``destroy_process_group`` where DDP was used, and now and then abort the shutdown of a rank
    that has done all its work, which torchrun takes for a failure.
    """
    try:
        yield
    except SystemExit as stop:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    else:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return
        status = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def group_size() -> int:
    """Ranks in the process group, 1 when there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if group_size() > 1:
        dist.barrier()


def reduce_sum(value: Tensor) -> Tensor:
    """Sum of ``value`` over all ranks, on every rank (a new tensor; the value itself without a process group)."""
    if group_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank when ``flag`` is true on one of them: the ranks then act together."""
    if group_size() == 1:
        return flag
    return bool(reduce_sum(torch.tensor([int(flag)], device=device)).item())


def from_main(value: float, device: torch.device) -> float:
    """The main rank's value on every rank."""
    if group_size() == 1:
        return value
    shared = torch.tensor(value, device=device, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank the buffers (batch-norm statistics) of rank 0, which are the ones that checkpoints hold."""
    if group_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def average_gradients(module: nn.Module) -> None:
    """Average the gradients of ``module``'s parameters over the ranks, as DDP does for the module it wraps.

    Each gradient is averaged as soon as backward has accumulated it. With accumulation over several backward passes
    the part that is already averaged is equal on all ranks, so averaging it again changes nothing. Heads use this
    instead of DDP, because their loss is called from the training loop and not through a module's forward.
    """
    if group_size() == 1:
        return

    def average(parameter: Tensor) -> None:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= group_size()

    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)
