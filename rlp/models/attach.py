"""``rlp.attach``: random-label heads on a network that somebody else trains."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rlp.distributed import average_gradients
from rlp.errors import UserError
from rlp.kernels.loss import MEMORY_BUDGET, check_impl
from rlp.models.backbone import default_taps
from rlp.models.banks import HeadBank
from rlp.models.heads import RandomLabelHeads
from rlp.models.taps import FeatureStore, Tap, check_pool, hook_taps, layout_of, probe, resolve_taps


def attach(
    model: nn.Module,
    taps: Sequence[str] | None = None,
    num_labels: int = 10,
    draws: int = 8,
    seed: int = 0,
    pool: str = "auto",
    layers: int = 1,
    hidden: int = 512,
    split: str = "train",
    example: Tensor | None = None,
    impl: str = "auto",
    memory_budget: int = MEMORY_BUDGET,
) -> RandomLabelHeads:
    """Put random-label heads at the taps of ``model``::

        heads = rlp.attach(model, taps=["layer3", "layer4"], num_labels=10, draws=8, seed=0)
        optimizer = torch.optim.SGD([*model.parameters(), *heads.parameters()], lr=0.1)
        for image, label, index in loader:
            loss = F.cross_entropy(model(image), label) + heads.loss(index, lam=0.0)
            loss.backward(); optimizer.step(); optimizer.zero_grad()
        print(heads.summary())

    Works under autocast, ``torch.compile`` and DistributedDataParallel. Attach before the first call of a compiled
    model. With several ranks, call after the process group is up and wrap ``model`` alone, before or after: the heads
    average their gradients themselves. Neither the model's output nor any global random state changes. The hooks go
    with the heads: :meth:`RandomLabelHeads.detach_hooks` takes them off, and so does the end of the heads' life.

    Args:
        model: any network with images in and logits out.
        taps: module paths or globs, each with ``:in`` for the module's input and ``@POOL`` for a pooling of its own
            (:func:`rlp.models.taps.resolve_taps`); by default those of :func:`rlp.models.default_taps`.
        num_labels: random labels n >= 2 of each head.
        draws: independent random labellings H, one head each at every tap.
        seed: seed of the heads' weights and, where ``loss`` gets sample ids, of their random words.
        pool: auto, avg, avg_last, cls, mean, flatten or adaptive:K (:func:`rlp.models.taps.pool_features`).
        layers: 1 (linear heads) or 2 (one hidden ReLU layer).
        hidden: units of that layer.
        split: name of the stream of random words, as in a .beton's card.
        example: one batch of images ``[B, C, H, W]`` to find the features' dimensions with; by default zeros of the
            model's own input size (timm's ``default_cfg``), else of 224 or 32 pixels.
        impl: how the loss is computed, ``auto``, ``reference``, ``eager`` or ``triton``
            (:func:`rlp.kernels.loss.random_label_loss`).
        memory_budget: bytes that temporary logits of one tap may take; more is faster at a very large ``num_labels``.

    Raises:
        UserError: a tap, pooling or number is wrong, or the model needs an ``example``.
    """
    _check(num_labels, draws, layers, hidden, seed, memory_budget)
    check_impl(impl)
    check_pool(pool, "attach")
    inner = _unwrap(model)
    found = resolve_taps(inner, _check_patterns(default_taps(inner) if taps is None else taps))
    store = FeatureStore()
    handles = hook_taps(inner, found, pool, layout_of(inner), store)
    try:
        image = _probe(inner, example)
        dims = _dimensions(found, store, len(image))
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    for tap, handle in zip(found, handles, strict=True):
        if tap.name not in dims:
            handle.remove()
    store.features.clear()
    banks = {
        name: HeadBank(dim, draws, num_labels, hidden if layers == 2 else 0, seed, name) for name, dim in dims.items()
    }
    heads = RandomLabelHeads(
        banks,
        store,
        handles,
        num_labels,
        draws,
        seed,
        split,
        image.device,
        impl,
        memory_budget,
    )
    average_gradients(heads)
    return heads


def _check(num_labels: int, draws: int, layers: int, hidden: int, seed: int, memory_budget: int) -> None:
    for name, value, least in (
        ("num_labels", num_labels, 2),
        ("draws", draws, 1),
        ("hidden", hidden, 1),
        ("memory_budget", memory_budget, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; expected at least {least}")
    if layers not in (1, 2):
        raise UserError(f"layers is {layers}; expected 1 or 2")
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}; expected 0 to 2^64 - 1")


def _check_patterns(taps: Sequence[str]) -> Sequence[str]:
    if isinstance(taps, str) or not taps:
        raise UserError(f"taps is {taps!r}; expected a list of at least one module path or glob")
    return taps


def _dimensions(taps: Sequence[Tap], store: FeatureStore, batch: int) -> dict[str, int]:
    """Number of features D at each tap, in the order in which the forward pass came to the taps.

    A module that a glob found and the forward pass never calls, such as a ``ModuleList``, is left out.
    """
    missing = [tap for tap in taps if tap.name not in store.features]
    required = next((tap for tap in missing if tap.required), missing[0] if len(missing) == len(taps) else None)
    if required is not None:
        raise UserError(
            f"tap '{required.name}' takes no part in the forward pass of the model; expected a module that is called"
        )
    for name, features in store.features.items():
        if len(features) != batch:
            raise UserError(
                f"tap '{name}' gives {len(features)} rows for {batch} images; expected the batch as first dimension"
            )
    return {name: features.shape[1] for name, features in store.features.items()}


def _unwrap(model: nn.Module) -> nn.Module:
    """The network inside torch.compile and DistributedDataParallel, whose module paths users know."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _probe(model: nn.Module, example: Tensor | None) -> Tensor:
    """Run the model on ``example``, or on the first guess that it accepts; returns the images used."""
    parameter = next(model.parameters(), torch.zeros(()))
    if example is not None:
        example = example.to(parameter.device)
        probe(model, example)
        return example
    failure: Exception | None = None
    for size in _guesses(model):
        image = torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype)
        try:
            probe(model, image)
            return image
        except (RuntimeError, ValueError, AssertionError) as error:
            failure = error
    raise UserError(f"attach cannot guess the model's input ({failure}); give example=, a batch of images")


def _guesses(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes ``(C, H, W)`` to try: what the model says of itself, then usual ones."""
    config: Any = getattr(model, "default_cfg", None)
    known = config.get("input_size") if isinstance(config, dict) else None
    convolution = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = convolution.in_channels if convolution else 3
    # timm: the size that a transformer was built for may differ from that of its published weights
    patches: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    built = [(channels, *patches)] if isinstance(patches, tuple) and len(patches) == 2 else []
    return [*built, *([tuple(known)] if known else []), (channels, 224, 224), (channels, 32, 32)]
