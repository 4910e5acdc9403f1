"""Open a .beton for training or evaluation: the one place that chooses and checks."""

import importlib.util
import os
from pathlib import Path
from typing import Literal

from rlp.data.batch import Loader, Schedule
from rlp.data.beton import Beton
from rlp.data.geometry import Geometry
from rlp.data.resident import ResidentLoader
from rlp.data.view import View, ViewOptions, make_view
from rlp.distributed import World
from rlp.errors import UserError

KINDS = ("auto", "ffcv", "resident")
_GIB = 2**30


def open_loader(
    source: Beton | str | Path,
    *,
    train: bool,
    batch_size: int,
    seed: int,
    world: World,
    view: View | ViewOptions | None = None,
    geometry: Geometry | None = None,
    kind: Literal["auto", "ffcv", "resident"] = "auto",
    resident_limit: int = 4 * _GIB,
    workers: int = 0,
    verify: bool = False,
    shuffle: bool = True,
    splits: int = 0,
) -> Loader:
    """Open a set and choose how to load it.

    Args:
        source: the .beton, or the name of a sharded set, or one that is open.
        train: shuffled, augmented whole batches; otherwise every sample once, in file order, over all ranks.
        batch_size: samples a step over all ranks.
        seed: seed of order, crops and moves.
        world: the ranks, and the device the batches go to.
        view: which samples, with which labels; None for all with their true ones.
        geometry: how images are cropped, mirrored and shifted; None keeps them as they are.
        kind: ``resident`` (the whole set in memory), ``ffcv`` (decoded batch by batch), or ``auto``: resident when
            images of one size, not to be resized, fit within ``resident_limit``.
        resident_limit: bytes of images and words that may lie in memory.
        workers: threads of this rank that decode or gather; 0 = the usable cores over the ranks of this machine.
        verify: hash the whole set first; a resident set, which is read as a whole, is always hashed.
        shuffle: False for training images, moved as in training, once each and in the order of the view.
        splits: cut training batches into so many splits with equal class lists
            (:func:`rlp.data.batch.balanced_batches`), on one process; 0 for batches in random order.

    Raises:
        UserError: names the key or file that does not fit.
    """
    geometry = geometry or Geometry()
    if kind not in KINDS:
        raise UserError(f"data.loader is '{kind}'; expected one of {', '.join(KINDS)}")
    if workers < 0:
        raise UserError(f"data.workers is {workers}; expected a number of threads, 0 for automatic")
    beton = source if isinstance(source, Beton) else Beton.open(source)
    chosen = _choose(kind, beton, resident_limit, geometry.image_size)
    if verify or chosen == "resident":
        beton.check_hashes()
    seen = view if isinstance(view, View) else make_view(beton, view or ViewOptions())
    _check_batches(beton, seen, train and shuffle, batch_size, world)
    label = seen.label[seen.ids] if splits else None
    schedule = Schedule(seen.ids, train, batch_size, seed, world.rank, world.size, shuffle, splits, label)
    if splits:
        _check_splits(schedule)
    workers = workers or _auto_workers(world)
    if chosen == "resident":
        return ResidentLoader(beton, seen, schedule, world.device, geometry, workers)
    try:
        from rlp.data.ffcv_loader import FFCVLoader

        return FFCVLoader(beton, seen, schedule, world.device, geometry, workers)
    except ImportError as error:
        raise UserError(f"FFCV is installed but cannot be imported ({error}); install its libraries again") from error


def ffcv_installed() -> bool:
    """True when FFCV can be found (it is not imported: that takes seconds)."""
    return importlib.util.find_spec("ffcv") is not None


def _auto_workers(world: World) -> int:
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return max(1, len(os.sched_getaffinity(0)) // local_size)


def _choose(kind: str, beton: Beton, limit: int, image_size: int) -> str:
    card, path = beton.card, beton.path
    size = card.num_samples * (card.height * card.width * 3 + 4 * card.draws)
    if image_size:
        obstacle, remedy = f"data.image_size is {image_size}", "set data.image_size to 0"
    elif not card.height:
        obstacle, remedy = f"the images of {path} differ in size", "write them with one size (image.size)"
    elif size > limit:
        obstacle = f"{path} holds {size / _GIB:.2f} GiB of images and words, more than data.resident_limit_gb"
        remedy = "raise data.resident_limit_gb"
    else:
        obstacle, remedy = "", ""
    if kind == "resident" and (image_size or not card.height):
        raise UserError(f"data.loader is resident, which keeps images as they are, but {obstacle}; {remedy}")
    if not card.height and not image_size:
        raise UserError(f"{obstacle} ({card.max_height} x {card.max_width} at most); set data.image_size")
    chosen = kind if kind != "auto" else ("ffcv" if obstacle else "resident")
    if chosen == "ffcv" and not ffcv_installed():
        if kind == "ffcv":
            raise UserError("data.loader is ffcv, but FFCV is not installed; install it or set data.loader to resident")
        raise UserError(f"{obstacle}, which needs FFCV, and FFCV is not installed; install it or {remedy}")
    return chosen


def _check_splits(schedule: Schedule) -> None:
    splits, size = schedule.splits, schedule.size
    if size > 1:
        raise UserError(f"train.bilevel is {splits}, which needs whole batches, on {size} ranks; expected one process")
    if schedule.batch_size % splits:
        raise UserError(f"data.batch_size is {schedule.batch_size}; expected a multiple of the {splits} splits")
    if not schedule.steps:
        raise UserError(
            f"the {len(schedule.ids)} training samples give no batch of {schedule.batch_size} in which {splits} splits "
            "have equal class lists; expected more samples a class, or a smaller data.batch_size"
        )


def _check_batches(beton: Beton, view: View, train: bool, batch_size: int, world: World) -> None:
    key = "data.batch_size" if train else "data.eval_batch_size"
    if batch_size < 1:
        raise UserError(f"{key} is {batch_size}; expected at least 1")
    if not train:
        return
    if batch_size % world.size:
        raise UserError(f"{key} is {batch_size}, which cannot be shared equally by {world.size} ranks")
    if batch_size > len(view.ids):
        of = "" if len(view.ids) == beton.num_samples else "of the view "
        raise UserError(f"{key} is {batch_size}, more than the {len(view.ids)} samples {of}of {beton.path}")
