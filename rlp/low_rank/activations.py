"""Activations at a tap of a network: read whole, or replaced by others for the layers behind it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rlp.errors import UserError
from rlp.models.taps import Tap


@contextmanager
def replaced(model: nn.Module, tap: Tap, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the network go on with ``change`` of what passes at the tap.

    Raises:
        UserError: in the forward pass, where what passes is no tensor.
    """

    def tensor(value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise UserError(f"tap '{tap.name}' gives {type(value).__name__}; expected a tensor, which can be replaced")
        return change(value)

    module = model.get_submodule(tap.path)
    if tap.side == "in":
        handle = module.register_forward_pre_hook(lambda _, inputs: (tensor(inputs[0]), *inputs[1:]))
    else:
        handle = module.register_forward_hook(lambda _, inputs, output: tensor(output))
    try:
        yield
    finally:
        handle.remove()


def activations(model: nn.Module, tap: Tap, images: Tensor) -> Tensor:
    """What passes at the tap, in memory of its own: ``[B, D]``, tokens ``[B, T, D]`` or maps.

    Raises:
        UserError: that is no tensor, or the module does not run exactly once.
    """
    seen: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        seen.append(value.clone())
        return value

    with replaced(model, tap, keep):
        model(images)
    if len(seen) != 1:
        raise UserError(f"tap '{tap.name}' runs {len(seen)} times in a forward pass; expected a module that runs once")
    return seen[0]


def as_matrices(value: Tensor, batches: int, channels_last_maps: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Activations ``[b·n, …]`` as ``[b, rows, units]`` in float32, and the way back."""
    units = 1 if value.dim() == 4 and not channels_last_maps else -1
    moved = value.movedim(units, -1)
    matrices = moved.reshape(batches, -1, moved.shape[-1]).float()
    return matrices, lambda new: new.reshape(moved.shape).movedim(-1, units).to(value.dtype)
