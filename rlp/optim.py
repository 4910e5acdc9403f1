"""Optimisers, which parameters decay, and the learning rate as a pure function of the step."""

from collections.abc import Iterable, Sequence
import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlp.errors import UserError

# Modules whose weight is a linear map of features; only those are decayed. Norm scales, biases, class tokens and
# position embeddings are not: shrinking them changes the function without limiting its complexity.
DECAYED_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Bilinear)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for an optimiser: weights of linear and convolution modules decay, everything else does not.

    A module of another kind may name its own in ``decayed_parameters``, as the banks of heads do. A timm model's
    own ``no_weight_decay()`` is respected. Shared parameters appear once. Frozen ones are left out.
    """
    excluded: set[str] = set(getattr(model, "no_weight_decay", set)())
    decayed_ids = {
        id(getattr(module, name))
        for path, module in model.named_modules()
        for name in _decayed_names(module)
        if f"{path}.{name}" not in excluded
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in decayed_ids], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in decayed_ids], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _decayed_names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, DECAYED_MODULES):
        return ("weight",)
    return tuple(name for name in getattr(module, "decayed_parameters", ()) if hasattr(module, name))


def build_optimizer(
    kind: str,
    groups: Iterable[dict] | Iterable[Tensor],
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> Optimizer:
    """``sgd`` or ``adamw`` over parameters or parameter groups; ``lr`` is the peak that :func:`set_lr` scales."""
    if kind == "sgd":
        return torch.optim.SGD(
            groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=weight_decay
        )
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay)
    raise UserError(f"optimizer is '{kind}'; expected sgd or adamw")


def lr_factor(
    schedule: str,
    step: int,
    steps_per_epoch: int,
    epochs: int,
    warmup_epochs: float = 0.0,
    step_epochs: Sequence[float] = (),
    step_gamma: float = 0.1,
) -> float:
    """Share of the peak learning rate at optimiser step ``step`` (0 is the first); no state, so resume is exact.

    Warm-up is linear from ``1/w`` to 1 over ``w = warmup_epochs * steps_per_epoch`` steps. Then ``cosine`` and
    ``linear`` fall to 0 just after the last step, ``step`` multiplies by ``step_gamma`` at each of
    ``step_epochs``, ``constant`` stays.
    """
    warmup = round(warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, epochs * steps_per_epoch - warmup)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    if schedule == "step":
        return step_gamma ** sum(step >= round(epoch * steps_per_epoch) for epoch in step_epochs)
    if schedule == "constant":
        return 1.0
    raise UserError(f"train.schedule is '{schedule}'; expected cosine, linear, step or constant")


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
