"""How fast the loaders of this machine read a set: images a second, and the time to the first batch."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
import os
from pathlib import Path
import statistics
import time
from typing import Literal, get_args

import torch

from rlp.data.batch import Batch, Loader
from rlp.data.beton import Beton
from rlp.data.geometry import Geometry
from rlp.data.loader import open_loader
from rlp.distributed import World, choose_device
from rlp.errors import UserError

Kind = Literal["auto", "ffcv", "resident"]
PASSES = 5
_RESIDENT_LIMIT = 4 << 30  # bytes of images, as the default of data.resident_limit_gb
_SEED = 0


@dataclass
class Timing:
    """One loader's times.

    Attributes:
        kind: which loader, as asked for.
        loader: the loader, its name in the table.
        first: seconds from opening to the first batch. The first loader's include imports that the next one shares,
            and compilation where the compiled code is not on the disk yet.
        rates: images a second of each pass.
        epochs: the last epoch that was begun.
    """

    kind: str
    loader: Loader
    first: float
    rates: list[float] = field(default_factory=list)
    epochs: int = 0


def bench(
    path: str | Path,
    kind: str = "all",
    batch_size: int = 256,
    workers: int = 0,
    image_size: int = 0,
    seconds: float = 3.0,
    progress: bool = False,
) -> str:
    """Load a set for training, flipped, with one loader or all that can, and return the table.

    The passes of the loaders alternate, so that what else the machine does falls on all of them.

    Args:
        path: the .beton, or the name of a sharded set.
        kind: ``auto``, ``ffcv``, ``resident``, or ``all`` for the latter two as far as they can.
        batch_size: images a batch.
        workers: threads, 0 for as many as there are cores.
        image_size: pixels a side of random crops, 0 for images as they are.
        seconds: of each of the five passes.
        progress: show a bar on a terminal.

    Raises:
        UserError: no loader can read the set like that.
    """
    if not 0 < seconds < float("inf"):
        raise UserError(f"--seconds is {seconds}; expected a number above 0")
    beton = Beton.open(path)
    if not 1 <= batch_size <= beton.num_samples:
        raise UserError(f"--batch-size is {batch_size}; expected 1 to {beton.num_samples}, the samples of {path}")
    if not beton.card.height and not image_size:
        raise UserError(f"the images of {path} differ in size; expected --image-size S, to which they are cropped")
    world, geometry = World(device=choose_device("auto")), Geometry(flip=True, image_size=image_size)
    timings, left_out = _opened(beton, kind, batch_size, workers, geometry, world)
    try:
        _measure(timings, seconds, world.device, progress)
    finally:
        for timing in timings:
            timing.loader.close()
    return "\n".join([*_head(beton, batch_size, workers, image_size, world.device), *_table(timings), *left_out])


def _opened(
    beton: Beton, kind: str, batch_size: int, workers: int, geometry: Geometry, world: World
) -> tuple[list[Timing], list[str]]:
    """The loaders, each after its first batch; and why others are left out."""
    timings, left_out = [], []
    kinds: list[Kind] = [k for k in get_args(Kind) if k == kind] or ["ffcv", "resident"]
    for each in kinds:
        try:
            if kind == "all" and each == "resident":
                _check_memory(beton)
            timings.append(_first_batch(beton.path, each, batch_size, workers, geometry, world))
        except UserError as error:
            if kind != "all" or (each == kinds[-1] and not timings):
                raise
            left_out.append(f"{each} is left out: {error}")
    return timings, left_out


def _check_memory(beton: Beton) -> None:
    card = beton.card
    size = card.num_samples * card.height * card.width * 3
    if size > _RESIDENT_LIMIT:
        raise UserError(f"{beton.path} holds {size / 2**30:.1f} GiB of images; ask for it with --kind resident")


def _first_batch(path: Path, kind: Kind, batch_size: int, workers: int, geometry: Geometry, world: World) -> Timing:
    start = time.perf_counter()
    loader = open_loader(
        path,
        train=True,
        batch_size=batch_size,
        seed=_SEED,
        world=world,
        geometry=geometry,
        kind=kind,
        workers=workers,
    )
    with closing(loader.epoch(0)) as batches:
        next(batches)
        _wait(world.device)
    return Timing(kind, loader, time.perf_counter() - start)


def _measure(timings: list[Timing], seconds: float, device: torch.device, progress: bool) -> None:
    from tqdm import tqdm

    turns = [timing for _ in range(PASSES) for timing in timings]
    for timing in tqdm(turns, desc="bench", unit=" passes", disable=None if progress else True):
        timing.rates.append(_rate(timing, seconds, device))


def _rate(timing: Timing, seconds: float, device: torch.device) -> float:
    """Images a second of one pass: whole epochs, one after the other, until the time is up, at least one batch."""
    images, start, elapsed = 0, time.perf_counter(), 0.0
    with closing(_endless(timing)) as batches:
        for batch in batches:
            images += len(batch.label)
            elapsed = time.perf_counter() - start
            if elapsed >= seconds:
                break
        _wait(device)
        elapsed = time.perf_counter() - start
    return images / elapsed


def _endless(timing: Timing) -> Generator[Batch, None, None]:
    while True:
        timing.epochs += 1
        with closing(timing.loader.epoch(timing.epochs)) as batches:
            yield from batches


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _head(beton: Beton, batch_size: int, workers: int, image_size: int, device: torch.device) -> list[str]:
    card, stored = beton.card, beton.layout["image_size"].mean()
    size = f"{card.width} x {card.height}" if card.height else f"up to {card.max_width} x {card.max_height}"
    cropped = f", cropped to {image_size} x {image_size}" if image_size else ""
    where = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "the CPU"
    threads = f"{workers} threads" if workers else "a thread a core"
    return [
        f"{beton.path}: {card.num_samples:,} images of {size} px, {card.image_mode}, {stored:,.0f} bytes an image"
        f"{cropped}",
        f"batches of {batch_size}, mirrored, to {where}; {len(os.sched_getaffinity(0))} cores, {threads}, "
        f"torch {torch.__version__}",
    ]


def _table(timings: list[Timing]) -> list[str]:
    lines = [f"{'kind':<9} {'loader':<15} {'first batch (s)':>15} {'images/s':>10} {'range':>23} {'passes':>6}"]
    for timing in timings:
        low, middle, high = (f(timing.rates) for f in (min, statistics.median, max))
        lines.append(
            f"{timing.kind:<9} {type(timing.loader).__name__:<15} {timing.first:>15.3f} {middle:>10,.0f} "
            f"{f'{low:,.0f} to {high:,.0f}':>23} {len(timing.rates):>6}"
        )
    return lines
