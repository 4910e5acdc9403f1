"""Open a .beton for training or evaluation: the one place that chooses and checks."""

import importlib.util
import os
from pathlib import Path
from typing import Literal

import numpy as np

from rlp.data.batch import Loader, Schedule
from rlp.data.beton import Beton
from rlp.data.resident import ResidentLoader
from rlp.distributed import World
from rlp.errors import UserError
from rlp.labels import member_mask

KINDS = ("auto", "ffcv", "resident")
_GIB = 2**30


def open_loader(
    path: str | Path,
    *,
    train: bool,
    batch_size: int,
    seed: int,
    world: World,
    kind: Literal["auto", "ffcv", "resident"] = "auto",
    resident_limit: int = 4 * _GIB,
    workers: int = 0,
    label_noise: float = 0.0,
    member_fraction: float = 1.0,
    image_size: int = 0,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    center_ratio: float = 0.875,
    verify: bool = False,
) -> Loader:
    """Open ``path`` and its card, and choose how to load it.

    Args:
        path: the .beton.
        train: shuffled, augmented whole batches; otherwise every sample once, in file order, over all ranks.
        batch_size: samples a step over all ranks.
        seed: seed of order and crops.
        world: the ranks, and the device the batches go to.
        kind: ``resident`` (the whole set on the device), ``ffcv`` (decoded batch by batch), or ``auto``: resident when
            images of one size, not to be resized, fit within ``resident_limit``.
        resident_limit: bytes of images that may lie on the device.
        workers: FFCV's decoding threads of this rank; 0 = the usable cores over the ranks of this machine.
        label_noise: share of the samples with a wrong given label.
        member_fraction: share of the samples that are members; the others are left out.
        image_size: side in pixels of the squares that FFCV crops and resizes to; 0 keeps images whole.
        crop_scale: smallest and largest share of the area in a random crop (training).
        center_ratio: side of the central crop over the shorter side (evaluation).
        verify: hash the whole file first; a resident set, which is read as a whole, is always hashed.

    Raises:
        UserError: names the key or file that does not fit.
    """
    _check(kind, workers, image_size, crop_scale, center_ratio, label_noise, member_fraction)
    beton = Beton.open(path, full_hash=verify)
    chosen = _choose(kind, beton, resident_limit, image_size)
    if chosen == "resident" and not verify:
        beton = Beton.open(path, full_hash=True)
    ids = np.arange(beton.num_samples)
    if member_fraction < 1:
        ids = ids[member_mask(beton.named("member"), member_fraction)]
    _check_batches(beton, ids, train, batch_size, world, member_fraction)
    schedule = Schedule(ids, train, batch_size, seed, world.rank, world.size)
    if chosen == "resident":
        return ResidentLoader(beton, schedule, world.device, label_noise)
    try:
        from rlp.data.ffcv_loader import Crop, FFCVLoader
    except ImportError as error:
        raise UserError(f"FFCV is installed but cannot be imported ({error}); install its libraries again") from error

    crop = Crop(image_size, train, crop_scale, center_ratio, seed) if image_size else None
    return FFCVLoader(beton, schedule, world.device, workers or _auto_workers(world), label_noise, crop)


def ffcv_installed() -> bool:
    """True when FFCV can be found (it is not imported: that takes seconds)."""
    return importlib.util.find_spec("ffcv") is not None


def _auto_workers(world: World) -> int:
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return max(1, len(os.sched_getaffinity(0)) // local_size)


def _choose(kind: str, beton: Beton, limit: int, image_size: int) -> str:
    card, path = beton.card, beton.path
    size = card.num_samples * card.height * card.width * 3
    if image_size:
        obstacle, remedy = f"data.image_size is {image_size}", "set data.image_size to 0"
    elif not card.height:
        obstacle, remedy = f"the images of {path} differ in size", "write them with one size (image.size)"
    elif size > limit:
        obstacle = f"{path} holds {size / _GIB:.2f} GiB of images, more than data.resident_limit_gb"
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


def _check(
    kind: str,
    workers: int,
    image_size: int,
    crop_scale: tuple[float, float],
    center_ratio: float,
    label_noise: float,
    member_fraction: float,
) -> None:
    if kind not in KINDS:
        raise UserError(f"data.loader is '{kind}'; expected one of {', '.join(KINDS)}")
    if workers < 0:
        raise UserError(f"data.workers is {workers}; expected a number of threads, 0 for automatic")
    if image_size < 0:
        raise UserError(f"data.image_size is {image_size}; expected pixels, 0 for the images as they are")
    if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise UserError(f"data.crop_scale is {list(crop_scale)}; expected 0 < smallest <= largest <= 1")
    if not 0 < center_ratio <= 1:
        raise UserError(f"data.center_ratio is {center_ratio}; expected a number above 0 and up to 1")
    for key, value in (("label_noise", label_noise), ("member_fraction", member_fraction)):
        if not 0 <= value <= 1:
            raise UserError(f"data.{key} is {value}; expected a number from 0 to 1")


def _check_batches(
    beton: Beton, ids: np.ndarray, train: bool, batch_size: int, world: World, member_fraction: float
) -> None:
    key = "data.batch_size" if train else "data.eval_batch_size"
    if batch_size < 1:
        raise UserError(f"{key} is {batch_size}; expected at least 1")
    if not train:
        return
    if batch_size % world.size:
        raise UserError(f"{key} is {batch_size}, which cannot be shared equally by {world.size} ranks")
    if not len(ids):
        raise UserError(f"data.member_fraction is {member_fraction}, which leaves no sample of {beton.path}")
    if batch_size > len(ids):
        view = f"the {len(ids)} samples of {beton.path}"
        if member_fraction < 1:
            view = f"the {len(ids)} members of {beton.path} (data.member_fraction is {member_fraction})"
        raise UserError(f"{key} is {batch_size}, more than {view}")
