"""Images that `benchmarks.loader` makes for itself: pieces of two photographs, as arrays, JPEGs, tars and .betons.

The photographs come with scikit-learn. Film grain is added, so that a JPEG of 256 px at quality 90 has the 20 to 30 kB
that photographs have.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
import io
import os
from pathlib import Path
import tarfile

import numpy as np

SMALL_SIDE, LARGE_SIDE, CROP_SIDE = 32, 256, 224
CLASSES, TARS, QUALITY = 16, 8, 90
_GRAIN = 5.0  # standard deviation in grey levels
_HELD = CLASSES  # validation images, which the writer asks for: one a class
_LONGEST = 427  # the photographs' shorter side


@dataclass(frozen=True)
class ImageSet:
    """One made set: the same images, in the same order, in every form that a contender reads.

    Attributes:
        folder: where it lies: ``train.beton`` with its card, ``pixels.npy``, ``labels.npy``, and the JPEGs and tars.
        side: pixels a side of every image.
        is_jpeg: the .beton holds JPEGs; ``pixels.npy`` is what Pillow decodes from them.
    """

    folder: Path
    side: int
    is_jpeg: bool

    @property
    def beton(self) -> Path:
        """Written by this project's writer."""
        return self.folder / "train.beton"

    @property
    def array(self) -> Path:
        """The pixels, uint8 [N, side, side, 3]."""
        return self.folder / "pixels.npy"

    def pixels(self) -> np.memmap:
        """The same, mapped into memory."""
        return np.lib.format.open_memmap(self.array, mode="r")

    def labels(self) -> np.ndarray:
        """Class of every image, int64 [N]."""
        return np.load(self.folder / "labels.npy")

    def jpegs(self) -> list[Path]:
        """One file an image, in order."""
        return sorted((self.folder / "images" / "train").glob("*/*.jpg"))

    def tars(self) -> list[Path]:
        """The same files in tars, with their class and number beside each."""
        return sorted(self.folder.glob("*.tar"))

    def files(self) -> list[Path]:
        """All that is read in an epoch by anyone."""
        return [self.beton, self.array, *self.jpegs(), *self.tars()]


def make_sets(folder: Path, small: int, large: int) -> dict[str, ImageSet]:
    """Make ``small`` (32 px raw), ``jpeg`` and ``raw`` (256 px) with so many images each, below `folder`."""
    sets = {
        "small": ImageSet(folder / "small", SMALL_SIDE, False),
        "jpeg": ImageSet(folder / "jpeg", LARGE_SIDE, True),
        "raw": ImageSet(folder / "raw", LARGE_SIDE, False),
    }
    for images in sets.values():
        images.folder.mkdir(parents=True)
    _make_small(sets["small"], small)
    _make_large(sets["jpeg"], sets["raw"], large)
    return sets


def _make_small(images: ImageSet, count: int) -> None:
    pixels = np.stack(list(_bar(natural_images(count, SMALL_SIDE, seed=1), count, "32 px images")))
    labels = np.arange(count) % CLASSES
    np.save(images.array, pixels)
    np.save(images.folder / "labels.npy", labels)
    source = images.folder / "source.npz"
    held = {"x_val": pixels[:_HELD], "y_val": np.arange(_HELD)}
    np.savez(source, x_train=pixels, y_train=labels, **held)
    _write_beton(images, "npz", source)
    source.unlink()


def _make_large(jpeg: ImageSet, raw: ImageSet, count: int) -> None:
    """JPEGs in folders of classes, from which both .betons are written."""
    labels = np.arange(count) * CLASSES // count  # folders are read class by class
    root = jpeg.folder / "images"
    for split in ("train", "val"):
        for label in range(CLASSES):
            (root / split / f"class{label:02d}").mkdir(parents=True)
    paths = [root / "train" / f"class{label:02d}" / f"{i:06d}.jpg" for i, label in enumerate(labels)]
    paths += [root / "val" / f"class{label:02d}" / "0.jpg" for label in range(CLASSES)]
    pictures = natural_images(len(paths), LARGE_SIDE, seed=2)
    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter's lock
        decoded = list(_bar(pool.map(_write_jpeg, paths, pictures), len(paths), "256 px JPEGs"))
    np.save(raw.array, np.stack(decoded[:count]))
    os.link(raw.array, jpeg.array)
    for images in (jpeg, raw):
        np.save(images.folder / "labels.npy", labels)
        _write_beton(images, "folder", root)
    _write_tars(jpeg, labels)


def natural_images(count: int, side: int, seed: int) -> Iterator[np.ndarray]:
    """Squares cut out of two photographs at random places and scales, half mirrored, of varied brightness, uint8."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    rng = np.random.default_rng(seed)
    grain = rng.normal(0, _GRAIN, (3 * side, 3 * side, 3)).astype(np.float32)
    for _ in range(count):
        photograph = photographs[rng.integers(len(photographs))]
        wide = rng.uniform(0.625 * side, min(_LONGEST, 3 * side))
        left, top = rng.uniform(0, photograph.width - wide), rng.uniform(0, photograph.height - wide)
        box = (left, top, left + wide, top + wide)
        piece = np.asarray(photograph.resize((side, side), Image.Resampling.BILINEAR, box), np.float32)
        row, column = rng.integers(2 * side, size=2)
        piece = piece * rng.uniform(0.6, 1.0) + grain[row : row + side, column : column + side]
        piece = piece[:, ::-1] if rng.integers(2) else piece
        yield np.clip(np.rint(piece), 0, 255).astype(np.uint8)


def _write_jpeg(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Write one file; return what Pillow decodes from it."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    path.write_bytes(buffer.getvalue())
    return np.asarray(Image.open(buffer))


def _write_beton(images: ImageSet, kind: str, source: Path) -> None:
    from data_prep.schema import ImageConfig, OutputConfig, PrepareConfig, SourceConfig
    from data_prep.write_datasets import prepare

    config = PrepareConfig(
        source=SourceConfig(kind=kind, path=str(source)),  # type: ignore[arg-type]
        image=ImageConfig(mode="jpg" if images.is_jpeg else "raw"),
        output=OutputConfig(train=str(images.beton), val=str(images.folder / "val.beton")),
    )
    prepare(config, progress=True)


def _write_tars(images: ImageSet, labels: np.ndarray) -> None:
    """Every image as ``ID.jpg`` with ``ID.cls``, dealt out to the tars by turns: all have every class."""
    paths = images.jpegs()
    for number in range(TARS):
        with tarfile.open(images.folder / f"{number:02d}.tar", "w") as tar:
            for i in range(number, len(paths), TARS):
                tar.add(paths[i], f"{i:06d}.jpg")
                content = str(labels[i]).encode()
                entry = tarfile.TarInfo(f"{i:06d}.cls")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def _bar(items: Iterator[np.ndarray], count: int, title: str) -> Iterator[np.ndarray]:
    from tqdm import tqdm

    return iter(tqdm(items, title, count, unit=" images", disable=None))
