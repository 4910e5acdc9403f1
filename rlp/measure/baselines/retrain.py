"""What is read from retrained copies of a run, kept beside the run copy by copy: what was trained once is not again.

A reading is a number for each copy and sample, small enough to be kept after every epoch: ``float32 [M, E, N]``.
"""

from collections.abc import Callable, Mapping, Sequence
import hashlib
import io
from pathlib import Path
from typing import Any
import zipfile

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
import torch.nn.functional as F

from rlp.files import write_atomically
from rlp.measure.baselines.ensemble import Moment, quiet, train_together
from rlp.measure.baselines.pool import Pool
from rlp.measure.run import Run

AT_ONCE = 8
"""Copies trained together unless told otherwise: more gains little on a CPU, and on a GPU memory grows with it."""

_VERSION = 1  # of readings and training; part of every key
_GRADIENT_BYTES = 256 << 20

Asked = Mapping[str, Sequence[int]]


def margin(moment: Moment) -> Tensor:
    """Logit of the given class less the largest other one, ``[M, N]``; above 0 where the copy is right."""
    own, others = _split(moment)
    return own - others.amax(dim=-1)


def confidence(moment: Moment) -> Tensor:
    """log p/(1 - p) of the given class, ``[M, N]``, without cancellation: its logit less logsumexp of the others."""
    own, others = _split(moment)
    return own - others.logsumexp(dim=-1)


def error(moment: Moment) -> Tensor:
    """Length of p - y, probabilities less the given class as one-hot vector, ``[M, N]``."""
    target = F.one_hot(moment.labels, moment.logits.shape[-1])
    return (moment.logits.softmax(dim=-1) - target).norm(dim=-1)


def gradient(moment: Moment) -> Tensor:
    """Length of the loss's gradient in all parameters, for each sample by itself, ``[M, N]``; eval mode."""
    stack = moment.stack
    size = sum(value[0].numel() for value in stack.params.values())
    batch = max(1, _GRADIENT_BYTES // (4 * size))

    def loss(params: dict[str, Tensor], buffers: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(stack.model, (params, buffers), (image[None],))
        return F.cross_entropy(logits.float(), label[None])

    def length(*of: Any) -> Tensor:
        return torch.stack([each.square().sum() for each in grad(loss)(*of).values()]).sum().sqrt()

    def of_copy(copy: int) -> Tensor:
        state = tuple({name: value.detach() for name, value in part.items()} for part in stack.state(copy))
        each = vmap(length, in_dims=(None, None, 0, 0))
        if not stack.together:
            each = _one_by_one(length)
        with quiet():
            return torch.cat([each(*state, images, labels) for images, labels in moment.batches(batch)])

    return torch.stack([of_copy(copy) for copy in range(stack.copies)])


READINGS: dict[str, Callable[[Moment], Tensor]] = {
    "margin": margin,
    "confidence": confidence,
    "error": error,
    "gradient": gradient,
}


def retrain(
    run: Run,
    pool: Pool,
    subsets: np.ndarray,
    asked: Asked,
    *,
    seed: int = 0,
    epochs: int = 0,
    at_once: int = AT_ONCE,
    what: str = "copies",
) -> dict[str, np.ndarray]:
    """Readings of copies, from the cache where they lie there already; a run that was killed goes on with the next.

    Args:
        run, pool, subsets, seed, epochs: see :func:`rlp.measure.baselines.ensemble.train_together`.
        asked: epochs of each reading, keys of :data:`READINGS`.
        at_once: copies trained together.
        what: name of the copies in the progress bar.

    Returns:
        float32 ``[M, E, N]`` for each reading, in the order of its epochs.
    """
    epochs = epochs or run.config.train.epochs
    files = [_file(run, pool, subsets, asked, copy, seed, epochs) for copy in range(len(subsets))]
    kept = [_read(file, asked, len(pool)) for file in files]
    missing = [copy for copy, found in enumerate(kept) if found is None]
    at = sorted({epoch for each in asked.values() for epoch in each})
    with _bar(len(subsets), len(subsets) - len(missing), what) as bar:
        for first in range(0, len(missing), at_once):
            copies = missing[first : first + at_once]
            found = {name: [] for name in asked}
            for moment in train_together(run, pool, subsets, copies, seed=seed, epochs=epochs, at=at):
                for name in asked:
                    if moment.epoch in asked[name]:
                        found[name].append(READINGS[name](moment).detach().float().cpu().numpy())
            for place, copy in enumerate(copies):
                own = kept[copy] = {name: np.stack([each[place] for each in found[name]]) for name in asked}
                _write(files[copy], own)
            bar.update(len(copies))
    return {name: np.stack([each[name] for each in kept if each is not None]) for name in asked}


def _split(moment: Moment) -> tuple[Tensor, Tensor]:
    """Logits of the given class ``[M, N]``, and all with that one at -inf ``[M, N, C]``."""
    place = moment.labels.expand(moment.logits.shape[:2])[..., None]
    own = moment.logits.gather(-1, place)[..., 0]
    return own, moment.logits.scatter(-1, place, float("-inf"))


def _one_by_one(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def each(params: Any, buffers: Any, images: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([function(params, buffers, *pair) for pair in zip(images, labels, strict=True)])

    return each


def _file(run: Run, pool: Pool, subsets: np.ndarray, asked: Asked, copy: int, seed: int, epochs: int) -> Path:
    """Where a copy's readings lie: a hash of all that they depend on but the copies trained beside it."""
    config = run.config
    recipe = {name: value for name, value in vars(config.train).items() if name not in ("epochs", "amp")}
    data = config.data
    parts = [_VERSION, copy, seed, epochs, {name: tuple(at) for name, at in asked.items()}, repr(config.model), recipe]
    parts += [data.batch_size, data.mean, data.std, data.cutout, data.color_jitter, data.randaugment, config.run.seed]
    parts += [pool.key, repr(run.geometry), hashlib.sha256(np.packbits(subsets[copy]).tobytes()).hexdigest()]
    parts += [int(subsets.sum(axis=1).min())]  # which the steps of an epoch depend on
    return run.dir / "measure" / "cache" / "copies" / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.npz"


def _read(file: Path, asked: Asked, count: int) -> dict[str, np.ndarray] | None:
    """Readings of one copy ``[E, N]``; None where there are none, or damaged ones."""
    try:
        with np.load(file, allow_pickle=False) as content:
            found = {name: content[name] for name in asked}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    fits = all(found[name].shape == (len(at), count) for name, at in asked.items())
    return found if fits else None


def _write(file: Path, found: dict[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, **found)  # type: ignore[arg-type]
    write_atomically(file, content.getvalue())


def _bar(total: int, done: int, what: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=f"training {what}", unit=" copies", disable=None, leave=False)
