"""The images behind a set of features, as the network is shown them."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import torch
from torch import Tensor
import torch.nn.functional as F

from rlp.data.batch import Batch
from rlp.data.loader import ffcv_installed, open_loader
from rlp.distributed import World
from rlp.measure.features import FeatureSet, probe_taps
from rlp.measure.run import Group, Run
from rlp.models.taps import FeatureStore, hook_taps, layout_of
from rlp.seeding import named_seed

SIDE = 32
"""Pixels a side that inputs are averaged down to, where they are larger, before they are compared with one another."""


@contextmanager
def clean_batches(run: Run, group: Group) -> Iterator[Iterator[Batch]]:
    """A group's clean images as the run's evaluation loads them, uint8, in the order of the group's rows."""
    data = run.config.data
    loader = open_loader(
        group.beton,
        train=False,
        batch_size=data.eval_batch_size or data.batch_size,
        seed=run.config.run.seed,
        world=World(device=run.device),
        view=group.view,
        geometry=run.geometry,
        kind=data.loader if data.loader != "ffcv" or ffcv_installed() else "auto",
        resident_limit=int(data.resident_limit_gb * 2**30),
        workers=data.workers,
    )
    with closing(loader), closing(loader.epoch(0)) as batches:
        yield batches


def image_batches(run: Run, ids: np.ndarray, group: str) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Clean images of some samples of a group, ready for the network, batch by batch.

    Args:
        run: whose normalisation, image size and device are used.
        ids: sample ids, int64 ``[N]``, in any order.
        group: ``members`` or ``non-members``.

    Yields:
        images float32 ``[B, 3, H, W]``, and their places in ``ids``, int64 ``[B]``.
    """
    chosen = run.groups[group]
    order = np.argsort(ids)
    with clean_batches(run, chosen.of(chosen.view.ids[np.isin(chosen.ids, ids)])) as batches:
        for batch in batches:
            place = order[np.searchsorted(ids, batch.index.cpu().numpy(), sorter=order)]
            yield run.augment(batch.image, batch.index, 0, train=False).float(), place


def images_of(run: Run, ids: np.ndarray, group: str) -> Tensor:
    """:func:`image_batches` in one tensor, float32 ``[N, 3, H, W]`` on the run's device, in the order of ``ids``."""
    images: Tensor | None = None
    for part, place in image_batches(run, ids, group):
        if images is None:
            images = part.new_empty((len(ids), *part.shape[1:]))
        images[torch.from_numpy(place).to(part.device)] = part
    if images is None:
        raise ValueError("no ids; expected at least one sample")
    return images


def inputs_of(run: Run, features: FeatureSet) -> Tensor:
    """Clean images of the samples as features, float32 ``[N, D]`` on the CPU; at most :data:`SIDE` pixels a side."""
    inputs: Tensor | None = None
    for part, place in image_batches(run, features.ids, features.group):
        height, width = (min(side, SIDE) for side in part.shape[2:])
        flat = F.adaptive_avg_pool2d(part, (height, width)).flatten(1).cpu()
        if inputs is None:
            inputs = torch.empty((len(features), flat.shape[1]))
        inputs[torch.from_numpy(place)] = flat
    if inputs is None:
        raise ValueError("no samples; expected at least one")
    return inputs


@torch.no_grad()
def noisy_features(
    run: Run, features: FeatureSet, noise: float, seed: int, *, untrained: int | None = None
) -> dict[str, Tensor]:
    """What the taps give for the same samples with Gaussian noise on their images.

    Args:
        run: the network's run.
        features: the samples and the taps.
        noise: standard deviation, in those of the training set's pixels.
        seed: of the noise.
        untrained: seed of fresh weights to use instead of the run's.

    Returns:
        by tap float32 ``[N, D]`` on the CPU.
    """
    model = run.model if untrained is None else run.untrained(untrained)
    random = torch.Generator().manual_seed(named_seed(seed, f"baselines.noise.{features.split}"))
    found = {tap: torch.empty_like(value) for tap, value in features.features.items()}
    store = FeatureStore()
    handles = hook_taps(model, probe_taps(run, list(features.features)), run.config.heads.pool, layout_of(model), store)
    try:
        for images, place in image_batches(run, features.ids, features.group):
            model(images + noise * torch.randn(images.shape, generator=random).to(images.device))
            for tap, values in found.items():
                values[torch.from_numpy(place)] = store.features[tap].float().cpu()
    finally:
        for handle in handles:
            handle.remove()
    return found
