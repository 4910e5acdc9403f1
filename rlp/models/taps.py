"""Taps: named modules whose output (or input) feeds heads, and how it becomes one vector a sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import difflib
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

from rlp.errors import UserError

POOLS = ("auto", "avg", "cls", "mean", "flatten", "adaptive:K")


@dataclass(frozen=True)
class Tap:
    """One side of one module: ``layer3.1`` (output) or ``layer3.1:in``."""

    path: str
    side: str = "out"

    @property
    def name(self) -> str:
        """The tap as a user writes it."""
        return self.path if self.side == "out" else f"{self.path}:in"


def resolve_taps(model: nn.Module, patterns: Sequence[str]) -> list[Tap]:
    """Taps that the patterns name, in the order of ``model.named_modules()``, each once.

    Args:
        model: the backbone.
        patterns: module paths or globs (``blocks.*``; ``*`` does not cross a dot), with ``:in`` or ``:out`` at the end.

    Raises:
        UserError: a pattern matches no module; near names are listed.
    """
    paths = [name for name, _ in model.named_modules() if name]
    order = {path: place for place, path in enumerate(paths)}
    found: set[Tap] = set()
    for pattern in patterns:
        glob, _, side = pattern.partition(":")
        if side not in ("", "in", "out"):
            raise UserError(f"tap '{pattern}' ends in ':{side}'; expected ':in' or ':out'")
        matches = [path for path in paths if _matches(path, glob)]
        if not matches:
            raise UserError(f"tap '{pattern}' names no module of the model; near names: {_near(glob, paths)}")
        found |= {Tap(path, side or "out") for path in matches}
    return sorted(found, key=lambda tap: (order[tap.path], tap.side))


def _matches(path: str, glob: str) -> bool:
    parts, globs = path.split("."), glob.split(".")
    return len(parts) == len(globs) and all(map(fnmatchcase, parts, globs))


def _near(glob: str, paths: list[str]) -> str:
    return ", ".join(difflib.get_close_matches(glob, paths, n=5, cutoff=0.3) or paths[:8])


def hook_taps(model: nn.Module, taps: Sequence[Tap], store: dict[str, Any]) -> list[RemovableHandle]:
    """Let every forward pass put the taps' tensors into ``store`` under the taps' names.

    Hooks see the module's tensors and change nothing. A module that runs twice in a pass leaves its last tensor.
    """
    modules = dict(model.named_modules())
    handles = []
    for tap in taps:
        module = modules[tap.path]
        if tap.side == "in":
            handles.append(module.register_forward_pre_hook(_keep_input(tap.name, store)))
        else:
            handles.append(module.register_forward_hook(_keep_output(tap.name, store)))
    return handles


def _keep_input(name: str, store: dict[str, Any]) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: Any) -> None:
        store[name] = inputs

    return hook


def _keep_output(name: str, store: dict[str, Any]) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        store[name] = output

    return hook


def tap_tensor(name: str, value: Any) -> Tensor:
    """The tensor at a tap; of a tuple or list the first one."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    if not isinstance(value, Tensor) or value.dim() < 2:
        kind = f"a tensor of {value.dim()} dimension(s)" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"tap '{name}' gives {kind}; expected a tensor of at least 2 dimensions, the batch first")
    return value


@dataclass(frozen=True)
class Pool:
    """How a tap's tensor becomes features ``[B, D]``.

    ``auto`` takes the global average of maps ``[B, C, H, W]`` (``[B, H, W, C]`` when ``channels_last_maps``), the class
    token of tokens ``[B, T, D]`` where the model has ``prefix_tokens``, otherwise their mean, and vectors as they are.
    ``adaptive:K`` averages maps to a K x K grid and flattens it.
    """

    kind: str = "auto"
    prefix_tokens: int = 0
    channels_last_maps: bool = False

    def __post_init__(self) -> None:
        grid = self.kind.removeprefix("adaptive:")
        if self.kind not in POOLS[:-1] and not (self.kind.startswith("adaptive:") and grid.isdigit() and int(grid)):
            raise UserError(f"pool is '{self.kind}'; expected one of {', '.join(POOLS)}")

    def __call__(self, value: Tensor, name: str) -> Tensor:
        """Features ``[B, D]`` of the tap ``name``."""
        kind = self._kind(value)
        if kind == "flatten" or value.dim() == 2:
            return value.flatten(1)
        if kind == "cls" and value.dim() == 3:
            return value[:, 0]
        if kind == "mean" and value.dim() == 3:
            return value[:, self.prefix_tokens :].mean(1)
        if value.dim() == 4 and kind in ("avg", "mean"):
            return value.mean((1, 2) if self.channels_last_maps else (2, 3))
        if value.dim() == 4 and kind.startswith("adaptive:"):
            maps = value.permute(0, 3, 1, 2) if self.channels_last_maps else value
            return F.adaptive_avg_pool2d(maps, int(kind.removeprefix("adaptive:"))).flatten(1)
        raise UserError(f"pool '{self.kind}' does not fit tap '{name}', which gives a tensor of shape {[*value.shape]}")

    def _kind(self, value: Tensor) -> str:
        if self.kind == "auto":
            return {3: "cls" if self.prefix_tokens else "mean", 4: "avg"}.get(value.dim(), "flatten")
        return "mean" if self.kind == "avg" and value.dim() == 3 else self.kind


def pool_for(model: nn.Module, kind: str) -> Pool:
    """The pooling for a model: timm models say how many prefix tokens they have and how they lay out maps."""
    prefix = getattr(model, "num_prefix_tokens", 0)
    layout = getattr(model, "output_fmt", None)
    return Pool(kind, prefix if isinstance(prefix, int) else 0, str(layout).endswith("NHWC"))


@torch.no_grad()
def probe(model: nn.Module, example: Tensor) -> None:
    """Run ``model`` once in eval mode so that hooks fire, leaving its modes, statistics and the random state alone."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [example.device] if example.device.type == "cuda" else []
    try:
        model.eval()
        with torch.random.fork_rng(devices=devices):
            model(example)
    finally:
        for module, training in modes:
            module.training = training
