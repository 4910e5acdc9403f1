"""Modules whose output a regulariser changes, by the same names as the heads' taps."""

from collections.abc import Sequence

from torch import Tensor, nn

from rlp.errors import UserError
from rlp.models.taps import resolve_taps


def modules_at(model: nn.Module, patterns: Sequence[str], key: str) -> dict[str, nn.Module]:
    """The modules that paths or globs name, by path.

    Raises:
        UserError: one names no module, or more than a module's output; ``key`` is the setting to blame.
    """
    found = resolve_taps(model, patterns)
    for tap in found:
        if tap.side != "out" or tap.pool:
            raise UserError(f"{key} has '{tap.name}'; expected a module alone, '{tap.path}', whose output is changed")
    return {tap.path: model.get_submodule(tap.path) for tap in found}


def not_called(name: str, key: str) -> UserError:
    """The error for a module that a pass of the network did not come to."""
    return UserError(f"{key} has '{name}', which takes no part in the forward pass; expected a module that is called")


def check_rows(name: str, output: Tensor, count: int, key: str) -> None:
    """Refuse an output that has not one row for each of ``count`` samples: windows or places beside one another."""
    if len(output) != count:
        raise UserError(
            f"{key} has '{name}', whose output has {len(output)} rows for {count} samples; expected a module with one "
            "row a sample"
        )
