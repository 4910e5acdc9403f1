"""Taps: named modules whose output (or input) feeds heads, and how it becomes one vector a sample."""

from collections.abc import Sequence
from dataclasses import dataclass, field
import difflib
from fnmatch import fnmatchcase
import re
from typing import Any

import torch
from torch import Tensor, nn
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

from rlp.errors import UserError
from rlp.models.modes import evaluating

POOLS = ("auto", "avg", "avg_last", "cls", "mean", "flatten", "adaptive:K")


@dataclass(frozen=True)
class Tap:
    """One side of one module, and its pooling where it has one of its own.

    Attributes:
        path: of the module, as in ``model.named_modules()``.
        side: ``out`` or ``in``.
        pool: one of :data:`POOLS`, or empty for that of all taps.
        required: named by its path and not found by a glob, so that it must take part in the forward pass.
    """

    path: str
    side: str = "out"
    pool: str = ""
    required: bool = field(default=True, compare=False)

    @property
    def name(self) -> str:
        """The tap as a user writes it: ``layer3.1``, ``fc:in``, ``layer4@flatten``."""
        return self.path + (":in" if self.side == "in" else "") + (f"@{self.pool}" if self.pool else "")


def resolve_taps(model: nn.Module, patterns: Sequence[str]) -> list[Tap]:
    """Taps that the patterns name, in the order of ``model.named_modules()``, each once.

    Args:
        model: the backbone.
        patterns: ``PATH[:in|:out][@POOL]``, the path with globs in its parts: ``blocks.*`` (``*`` does not cross a
            dot), ``**.conv1`` (``**`` stands for any number of parts). ``depth:d`` is the place where the network can
            be cut, d linear layers and convolutions or little more before its end (:func:`rlp.models.cut.depth_tap`).

    Raises:
        UserError: a pattern matches no module (near names are listed), or is not of that form.
    """
    paths = [name for name, _ in model.named_modules() if name]
    order = {path: place for place, path in enumerate(paths)}
    found: dict[str, Tap] = {}
    for pattern in patterns:
        deep = re.fullmatch(r"depth:(\d+)", pattern)
        for tap in [_tap_at_depth(model, int(deep[1]))] if deep else _taps_of(pattern, paths):
            if tap.required or tap.name not in found:
                found[tap.name] = tap
    return sorted(found.values(), key=lambda tap: (order[tap.path], tap.side, tap.pool))


def _tap_at_depth(model: nn.Module, depth: int) -> Tap:
    from rlp.models.cut import depth_tap  # which takes its time to import, and needs Tap

    return depth_tap(model, depth)


def _taps_of(pattern: str, paths: list[str]) -> list[Tap]:
    glob, _, pool = pattern.partition("@")
    glob, _, side = glob.partition(":")
    if side not in ("", "in", "out"):
        raise UserError(f"tap '{pattern}' has the side '{side}'; expected :in or :out")
    if "@" in pattern:
        check_pool(pool, f"tap '{pattern}'")
    exact = glob in paths
    matches = [glob] if exact else [path for path in paths if _matches(path.split("."), glob.split("."))]
    if not matches:
        near = difflib.get_close_matches(glob, paths, n=5, cutoff=0.3) or paths[:8]
        raise UserError(f"tap '{pattern}' names no module of the model; near names: {', '.join(near)}")
    return [Tap(path, side or "out", pool, required=exact) for path in matches]


def _matches(parts: list[str], globs: list[str]) -> bool:
    if not parts or not globs:
        return not parts and all(glob == "**" for glob in globs)
    if globs[0] == "**":
        return _matches(parts, globs[1:]) or _matches(parts[1:], globs)
    return fnmatchcase(parts[0], globs[0]) and _matches(parts[1:], globs[1:])


def check_pool(kind: str, where: str) -> None:
    """Raise a UserError that names ``where`` unless ``kind`` is one of :data:`POOLS`."""
    grid = kind.removeprefix("adaptive:")
    if kind not in POOLS[:-1] and not (grid != kind and grid.isdecimal() and int(grid) > 0):
        raise UserError(f"{where} has the pooling '{kind}'; expected one of {', '.join(POOLS)}")


@dataclass(frozen=True)
class Layout:
    """What pooling must know of a model.

    Attributes:
        prefix_tokens: tokens before the patches (class token, registers).
        class_token: the first of them is a class token.
        channels_last_maps: maps are ``[B, H, W, C]``, as in timm's Swin transformers (memory format is another matter).
    """

    prefix_tokens: int = 0
    class_token: bool = False
    channels_last_maps: bool = False


def layout_of(model: nn.Module) -> Layout:
    """The layout that a timm or torchvision model tells; other models are taken to have ``[B, C, H, W]`` maps."""
    own = [getattr(model, name, None) for name in ("cls_token", "class_token")]
    class_token = any(isinstance(token, Tensor) for token in own)
    prefix = getattr(model, "num_prefix_tokens", None)
    prefix = prefix if isinstance(prefix, int) else int(class_token)
    return Layout(prefix, class_token and prefix > 0, str(getattr(model, "output_fmt", "")).endswith("NHWC"))


def pool_features(value: Tensor, kind: str, layout: Layout, name: str) -> Tensor:
    """Features ``[B, D]`` of a tap's tensor, in memory of their own; averages of half precision are float32.

    ``auto`` is the global average of maps (4 dimensions), the class token of tokens ``[B, T, D]`` where the model has
    one and otherwise the mean of the patch tokens, and a vector as it is. ``avg`` is the mean over all places (``[B, C,
    H, W]``, unless the model is known to have ``[B, H, W, C]``), ``avg_last`` the mean over all dimensions between the
    first and the last, ``cls`` the first token, ``mean`` that of the patch tokens, ``adaptive:K`` the average in each
    field of a K x K grid, ``flatten`` everything.

    Raises:
        UserError: the tensor's shape does not allow this pooling.
    """
    dims, kind = value.dim(), _resolve_kind(value, kind, layout)
    wide = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
    if kind == "flatten":
        # The network may go on to change its tensor in place (ReLU); what the heads read must not change with it.
        return value.flatten(1).clone()
    if kind == "cls" and dims == 3:
        return value[:, 0].clone()
    if kind == "mean" and dims == 3:
        return value[:, layout.prefix_tokens :].mean(1, dtype=wide)
    if kind == "avg_last" and dims > 2:
        return value.mean(tuple(range(1, dims - 1)), dtype=wide)
    if kind == "avg" and dims > 2:
        return value.mean(tuple(range(2, dims)), dtype=wide)
    if kind.startswith("adaptive:") and dims == 4:
        maps = value.permute(0, 3, 1, 2) if layout.channels_last_maps else value
        return F.adaptive_avg_pool2d(maps.to(wide), int(kind.removeprefix("adaptive:"))).flatten(1)
    raise UserError(f"pooling '{kind}' does not fit tap '{name}', which gives a tensor of shape {[*value.shape]}")


def _resolve_kind(value: Tensor, kind: str, layout: Layout) -> str:
    """What ``auto``, ``avg`` and ``mean`` mean for this tensor."""
    dims = value.dim()
    if dims == 2:
        return "flatten"
    if kind == "auto":
        kind = "avg" if dims != 3 else "cls" if layout.class_token else "mean"
    if dims == 3 and kind == "avg":
        return "mean"
    if dims == 4 and kind in ("avg", "mean"):
        return "avg_last" if layout.channels_last_maps else "avg"
    return kind


class FeatureStore:
    """Features ``[B, D]`` by the taps' names, left here by the latest forward pass.

    A copy or pickle of the network, which carries its hooks along, gets an empty store of its own: an averaged copy of
    the weights cannot overwrite the features of the network itself.
    """

    def __init__(self) -> None:
        self.features: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"features": {}}


class _Keep:
    """Forward hook that pools what passes at a tap and keeps it; the network's tensors stay as they are.

    Pooling happens at once, because a later in-place operation of the network would change what was only referred to.
    """

    def __init__(self, tap: Tap, kind: str, layout: Layout, store: FeatureStore) -> None:
        self.name, self.kind, self.layout, self.store = tap.name, tap.pool or kind, layout, store

    def keep(self, value: Any) -> None:
        self.store.features[self.name] = pool_features(tap_tensor(self.name, value), self.kind, self.layout, self.name)


class _KeepOutput(_Keep):
    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.keep(output)


class _KeepInput(_Keep):
    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any]) -> None:
        self.keep((*inputs, *named_inputs.values()))


def hook_taps(
    model: nn.Module, taps: Sequence[Tap], kind: str, layout: Layout, store: FeatureStore
) -> list[RemovableHandle]:
    """Let every forward pass of ``model`` leave the taps' features, pooled by ``kind``, in ``store``.

    A module that runs twice in a pass leaves what its last run gave.
    """
    handles = []
    for tap in taps:
        module = model.get_submodule(tap.path)
        if tap.side == "in":
            hook = _KeepInput(tap, kind, layout, store)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(_KeepOutput(tap, kind, layout, store)))
    return handles


def tap_tensor(name: str, value: Any) -> Tensor:
    """The tensor at a tap; of a tuple or list the first one."""
    first = value
    if isinstance(value, tuple | list):
        first = next((item for item in value if isinstance(item, Tensor)), None)
    if not isinstance(first, Tensor):
        raise UserError(f"tap '{name}' gives {type(value).__name__}; expected a tensor, or a tuple that holds one")
    if first.dim() < 2:
        raise UserError(f"tap '{name}' gives a tensor of shape {[*first.shape]}; expected at least [batch, features]")
    return first


@torch.no_grad()
def probe(model: nn.Module, example: Tensor) -> None:
    """Run ``model`` once in eval mode so that hooks fire, leaving its modes, statistics and the random state alone."""
    devices = [example.device] if example.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices):
        model(example)
