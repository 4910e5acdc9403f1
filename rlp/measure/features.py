"""Features of members and non-members at the taps of a frozen network: taken once, kept on disk."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
import hashlib
import json
import os
from pathlib import Path
import shutil
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rlp.data.batch import Loader
from rlp.data.geometry import Geometry
from rlp.data.loader import ffcv_installed, open_loader
from rlp.distributed import World
from rlp.errors import UserError
from rlp.files import sync_folder, write_atomically
from rlp.measure.run import Group, Run
from rlp.models.modes import modes_kept
from rlp.models.taps import FeatureStore, Tap, hook_taps, layout_of, resolve_taps
from rlp.philox import random_bits
from rlp.regularisers import tell_samples
from rlp.seeding import named_seed

Mode = Literal["eval", "train"]

FIRST_EPOCH = 2**31
"""Augmented view v is what the run would make of an image in epoch ``FIRST_EPOCH + v``: it has trained with none."""

_VERSION = 1  # of what lies on disk; part of every key
_META, _LOGITS = "meta.json", "logits"


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Features of one group in one view, and what is known of its samples.

    Attributes:
        group, split: ``members`` or ``non-members``; the split of the file that they lie in.
        ids: sample ids, int64 ``[N]``, ascending.
        given, true: class labels, int64 ``[N]``; true is that of the image which is shown.
        planted: kind of canary of each sample, ``""`` for none, text ``[N]``.
        words: fresh random words, int64 ``[N, K]`` in [0, 2^32); none that a run has trained with.
        logits: class logits, float32 ``[N, C]``.
        features: of each tap, shallowest first, float32 ``[N, D]``.
    """

    group: str
    split: str
    ids: np.ndarray
    given: np.ndarray
    true: np.ndarray
    planted: np.ndarray
    words: np.ndarray
    logits: Tensor
    features: dict[str, Tensor] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)


def probe_words(seed: int, split: str, ids: np.ndarray, draws: int) -> np.ndarray:
    """Random words of a probe, int64 ``[N, draws]``: a stream of their own, never the baked draws of the file."""
    return random_bits(seed, f"{split}.probe", ids, draws)


def probe_taps(run: Run, patterns: Sequence[str] | None = None) -> list[Tap]:
    """The taps that the patterns name, by default those of the run."""
    return resolve_taps(run.model, tuple(patterns) if patterns else run.taps)


def augmentation(run: Run) -> tuple[Geometry, str]:
    """What alters images in an augmented view, and its name: the run's own, or flip and crop where it had none."""
    if run.augmented:
        return run.geometry, "the run's own augmentation"
    padding = max(1, min(run.image_size) // 8)
    return replace(run.geometry, flip=True, crop_padding=padding), f"flip, crop of {padding} padded pixels (ours)"


def extract(
    run: Run,
    group: str | Group,
    *,
    taps: Sequence[str] | None = None,
    mode: Mode = "eval",
    view: int | None = None,
    limit: int | None = None,
    draws: int = 10,
    seed: int = 0,
    untrained: bool = False,
    cache: str | Path | None = None,
) -> FeatureSet:
    """Features of a group's samples, from the cache where they lie there already; float32, without autocast.

    Args:
        run: from :func:`rlp.measure.run.open_run`.
        group: ``members``, ``non-members``, or a part of one.
        taps: patterns; by default the run's own taps.
        mode: ``train`` uses the statistics of the batch in batch norm, and seeded dropout; batches are mixed then.
        view: number of an augmented view; None for clean images.
        limit: at most so many samples, drawn by words of ``seed``.
        draws, seed: of the fresh random words.
        untrained: of the same network with fresh weights of ``seed``.
        cache: folder of the cache; by default ``measure/cache`` in the run's folder.

    Raises:
        UserError: a tap takes no part in the forward pass, or gives numbers that are not finite.
    """
    chosen = run.groups[group] if isinstance(group, str) else group
    chosen = chosen.first(limit, seed) if limit is not None else chosen
    found = probe_taps(run, taps)
    folder = Path(cache) if cache is not None else run.dir / "measure" / "cache"
    wanted = _Wanted(run, chosen, found, mode, view, seed if untrained else None, seed)
    names, arrays = _cached(folder, wanted)
    rows, ids = chosen.view.ids, chosen.ids
    return FeatureSet(
        group=chosen.name,
        split=chosen.split,
        ids=ids,
        given=chosen.view.label[rows],
        true=chosen.beton.label[chosen.view.shown[rows]],
        planted=chosen.view.planted[rows],
        words=probe_words(seed, chosen.split, ids, draws),
        logits=arrays[-1],
        features=dict(zip(names, arrays[:-1], strict=True)),
    )


@dataclass(frozen=True)
class _Wanted:
    """One set of features: everything that they depend on."""

    run: Run
    group: Group
    taps: list[Tap]
    mode: Mode
    view: int | None
    untrained: int | None
    seed: int

    @property
    def key(self) -> str:
        """Name of the folder in the cache."""
        run, group = self.run, self.group
        weights = run.sha256 if self.untrained is None else f"untrained {self.untrained}"
        parts = [_VERSION, weights, repr(run.config.model), run.config.heads.pool, [tap.name for tap in self.taps]]
        parts += [group.beton.card.sha256, hashlib.sha256(group.view.ids.tobytes()).hexdigest(), self.mode, self.view]
        parts += [repr(run.geometry), repr(augmentation(run)), repr(run.config.data.mean), repr(run.config.data.std)]
        shown = (group.view.shown[group.view.ids], group.view.planted[group.view.ids].astype("S"))
        parts += [hashlib.sha256(column.tobytes()).hexdigest() for column in shown]
        if self.view is not None:
            data = run.config.data
            parts += [run.config.run.seed, data.cutout, data.color_jitter, data.randaugment]
        if self.mode == "train":
            parts += [self.seed, self.batch_size]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]

    @property
    def batch_size(self) -> int:
        """Samples a batch; in train mode about as many as in training, and never one left over for batch norm."""
        data, count = self.run.config.data, len(self.group.view.ids)
        if self.mode == "eval":
            return data.eval_batch_size or data.batch_size
        size = min(count, data.batch_size)
        while count % size == 1 and size < count:
            size += 1
        return size

    def model(self) -> nn.Module:
        return self.run.model if self.untrained is None else self.run.untrained(self.untrained)

    def loader(self) -> Loader:
        run, data = self.run, self.run.config.data
        rows = self.group.view.ids
        if self.mode == "train":  # batches of one class would have statistics that training never saw
            words = random_bits(self.seed, f"{self.group.split}.probe.order", self.group.ids, 1)[:, 0]
            rows = rows[np.argsort(words, kind="stable")]
        return open_loader(
            self.group.beton,
            train=self.view is not None,
            shuffle=False,
            batch_size=self.batch_size,
            seed=run.config.run.seed,
            world=World(device=run.device),
            view=self.group.of(rows).view,
            geometry=augmentation(run)[0] if self.view is not None else run.geometry,
            kind=data.loader if data.loader != "ffcv" or ffcv_installed() else "auto",
            resident_limit=int(data.resident_limit_gb * 2**30),
            workers=data.workers,
        )


def _cached(folder: Path, wanted: _Wanted) -> tuple[list[str], list[Tensor]]:
    """Names of the taps, their features and the logits; taken now if the cache has them not, or damaged."""
    place = folder / wanted.key
    try:
        return _read(place, len(wanted.group.view.ids))
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        shutil.rmtree(place, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_torn(folder)
    temporary = folder / f".{wanted.key}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _take(temporary, wanted)
        try:
            temporary.replace(place)
        except OSError:  # another process was faster: what it wrote is the same
            if not (place / _META).is_file():
                raise
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _read(place, len(wanted.group.view.ids))


def _read(place: Path, count: int) -> tuple[list[str], list[Tensor]]:
    names = json.loads((place / _META).read_text("utf-8"))["taps"]
    # Copy on write: pages are read when they are used, and nothing can change the file.
    arrays = [np.load(place / f"{number}.npy", mmap_mode="c") for number in range(len(names) + 1)]
    if any(len(array) != count or array.dtype != np.float32 for array in arrays):
        raise ValueError("another size")
    return names, [torch.from_numpy(array) for array in arrays]


def _remove_torn(folder: Path) -> None:
    """What killed processes of this machine left behind."""
    for torn in folder.glob(".*.tmp"):
        process = torn.name.split(".")[-2]
        if process.isdecimal() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(torn, ignore_errors=True)


@torch.no_grad()
def _take(folder: Path, wanted: _Wanted) -> None:
    """Run the network over the samples and write what it leaves at the taps, and the logits."""
    ids, files = wanted.group.ids, dict[str, np.memmap]()
    epoch = 0 if wanted.view is None else FIRST_EPOCH + wanted.view
    model, loader = wanted.model(), wanted.loader()
    with ExitStack() as stack:
        stack.enter_context(closing(loader))
        bar = stack.enter_context(_bar(len(ids), f"features of {wanted.group.name}"))
        store = stack.enter_context(_hooked(model, wanted))
        stack.enter_context(_in_mode(model, wanted.mode, named_seed(wanted.seed, f"dropout {wanted.view}")))
        for batch in stack.enter_context(closing(loader.epoch(epoch))):
            store.features.clear()
            images = wanted.run.augment(batch.image, batch.index, epoch, train=wanted.view is not None)
            tell_samples(model, batch.index)
            logits = model(images)
            _check_taps(wanted.taps, store)
            place = np.searchsorted(ids, batch.index.cpu().numpy())
            for number, (name, value) in enumerate([*store.features.items(), (_LOGITS, logits)]):
                _check_finite(name, value)
                if name not in files:
                    shape = (len(ids), value.shape[1])
                    files[name] = np.lib.format.open_memmap(folder / f"{number}.npy", "w+", np.float32, shape)
                files[name][place] = value.float().cpu().numpy()
            bar.update(len(batch.label))
    for file in files.values():
        file.flush()
    write_atomically(folder / _META, json.dumps({"taps": [name for name in files if name != _LOGITS]}))


@contextmanager
def _hooked(model: nn.Module, wanted: _Wanted) -> Iterator[FeatureStore]:
    store = FeatureStore()
    handles = hook_taps(model, wanted.taps, wanted.run.config.heads.pool, layout_of(model), store)
    try:
        yield store
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_mode(model: nn.Module, mode: Mode, seed: int) -> Iterator[None]:
    """The network in ``mode``; afterwards its modes, its buffers and the random state are as before."""
    if mode == "eval":
        model.eval()
        yield
        return
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with modes_kept(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed % 2**63)
            model.train()
            yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)


def _check_taps(taps: Sequence[Tap], store: FeatureStore) -> None:
    for tap in taps:
        if tap.required and tap.name not in store.features:
            raise UserError(
                f"tap '{tap.name}' takes no part in the forward pass of the model; expected a module that is called"
            )
    if not store.features:
        raise UserError(
            "none of the taps takes part in the forward pass of the model; expected modules that are called"
        )


def _check_finite(name: str, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        what = "class logits" if name == _LOGITS else f"features at tap '{name}'"
        raise UserError(f"the {what} are NaN or infinite; expected a network that gives finite numbers")


def _bar(total: int, description: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=description, unit=" images", disable=None, leave=False)
