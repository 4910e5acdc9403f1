"""``rlp.attach``: random-label heads on a network that somebody else trains."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from rlp.distributed import average_gradients, group_size
from rlp.errors import UserError
from rlp.kernels.loss import MEMORY_BUDGET, check_impl
from rlp.models.backbone import default_taps
from rlp.models.banks import Bank, HeadBank, check_kind
from rlp.models.copied import CopiedBank, hook_whole
from rlp.models.featurize import check_features
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
    kind: str = "shared",
    features: str = "raw",
    width: int = 128,
    num_classes: int | None = None,
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
    average their gradients themselves (their running statistics, where they have any, are each rank's own until
    :meth:`RandomLabelHeads.synchronise`). Neither the model's output nor any global random state changes. The hooks go
    with the heads: :meth:`RandomLabelHeads.detach_hooks` takes them off, and so does the end of the heads' life.

    Args:
        model: any network with images in and logits out.
        taps: module paths or globs, each with ``:in`` for the module's input and ``@POOL`` for a pooling of its own
            (:func:`rlp.models.taps.resolve_taps`), or ``depth:d``, the place d weighted modules before the end; by
            default those of :func:`rlp.models.default_taps`.
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
        kind: ``shared``, one head a draw (arXiv 2607.11541); ``per_class``, one for each draw and class, of which a
            sample uses its given class's (arXiv 2411.19640): ``loss`` then needs ``classes``; or ``copied``, each head
            a copy of all modules behind the tap with a last layer of its own, on the unpooled tensor (there, as "copy
            depth"; :class:`rlp.models.copied.CopiedBank` says what it costs).
        features: what the heads get of the features, ``raw``, ``standardised``, ``normalised`` or ``projected``
            (:class:`rlp.models.featurize.Featurizer`).
        width: features after the projection.
        num_classes: C where the kind is ``per_class``; by default as many as the model has outputs.

    Raises:
        UserError: a tap, pooling or number is wrong, settings do not go together, the model needs an ``example``, or
            it cannot be cut at a tap of copied heads.
    """
    _check(num_labels, draws, layers, hidden, width, seed, memory_budget)
    check_impl(impl)
    check_pool(pool, "attach")
    check_kind(kind)
    check_features(features)
    check_together(kind, features, layers, pool, "")
    inner = _unwrap(model)
    found = resolve_taps(inner, _check_patterns(default_taps(inner) if taps is None else taps))
    store = FeatureStore()
    if kind == "copied":
        _check_unpooled(found)
        handles = hook_whole(inner, found, store)
    else:
        handles = hook_taps(inner, found, pool, layout_of(inner), store)
    banks: dict[str, Bank] = {}
    try:
        image, outputs = _probe(inner, example)
        for tap in _in_order(found, store, len(image)):
            given = store.features[tap.name]
            if kind == "copied":
                banks[tap.name] = CopiedBank(inner, tap, given, draws, num_labels, seed)
            else:
                banks[tap.name] = HeadBank(
                    given.shape[1], draws, num_labels, hidden if layers == 2 else 0, seed, tap.name,
                    num_classes=_classes(num_classes, outputs) if kind == "per_class" else 0,
                    features=features, width=width,
                )  # fmt: skip
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    for tap, handle in zip(found, handles, strict=True):
        if tap.name not in banks:
            handle.remove()
    store.features.clear()
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
    if kind == "copied":
        _share(heads)
    heads.synchronise()
    average_gradients(heads)
    return heads


def _share(heads: nn.Module) -> None:
    """Give every rank rank 0's copies: the network itself may differ between ranks until it is wrapped."""
    if group_size() > 1:
        for parameter in heads.parameters():
            dist.broadcast(parameter.data, 0)


def check_together(kind: str, features: str, layers: int, pool: str, section: str) -> None:
    """Raise a UserError that names the keys, with ``section`` before them, where settings of heads contradict."""
    if kind != "shared" and layers != 1:
        raise UserError(f"{section}kind is {kind} and {section}layers is {layers}; expected 1, or the kind shared")
    if kind == "copied" and features != "raw":
        raise UserError(
            f"{section}kind is copied and {section}features is {features}; expected raw, for copies read what the "
            "network's own modules read"
        )
    if kind == "copied" and pool != "auto":
        raise UserError(
            f"{section}kind is copied and {section}pool is {pool}; expected auto, for copies read the unpooled tensor"
        )


def _check_unpooled(taps: Sequence[Tap]) -> None:
    for tap in taps:
        if tap.pool:
            raise UserError(
                f"tap '{tap.name}' has a pooling, but heads of kind copied read the unpooled tensor; expected "
                f"'{tap.name.partition('@')[0]}'"
            )


def _classes(given: int | None, outputs: int | None) -> int:
    """C of heads that each class has for itself."""
    count = outputs if given is None else given
    if count is None:
        raise UserError("the model's output is not [B, C]; expected num_classes= for heads of kind per_class")
    if count < 1:
        raise UserError(f"num_classes is {count}; expected at least 1")
    return count


def _check(num_labels: int, draws: int, layers: int, hidden: int, width: int, seed: int, memory_budget: int) -> None:
    for name, value, least in (
        ("num_labels", num_labels, 2),
        ("draws", draws, 1),
        ("hidden", hidden, 1),
        ("width", width, 1),
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


def _in_order(taps: Sequence[Tap], store: FeatureStore, batch: int) -> list[Tap]:
    """The taps in the order in which the forward pass came to them.

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
    by_name = {tap.name: tap for tap in taps}
    return [by_name[name] for name in store.features]


def _unwrap(model: nn.Module) -> nn.Module:
    """The network inside torch.compile and DistributedDataParallel, whose module paths users know."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _probe(model: nn.Module, example: Tensor | None) -> tuple[Tensor, int | None]:
    """Run the model on ``example``, or on the first guess that it accepts; images used, and outputs C of ``[B, C]``."""
    outputs: list[int] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 2:
            outputs.append(output.shape[1])

    handle = model.register_forward_hook(note)
    try:
        return _run_probe(model, example), outputs[-1] if outputs else None
    finally:
        handle.remove()


def _run_probe(model: nn.Module, example: Tensor | None) -> Tensor:
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
