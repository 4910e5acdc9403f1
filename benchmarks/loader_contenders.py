"""Who takes part in `benchmarks.loader`: this project's loaders, plain FFCV, and other people's."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
import math
import os
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.loader_cases import Case, Contender, Epochs, Item
from benchmarks.loader_sets import CROP_SIDE, LARGE_SIDE, ImageSet

WORKERS, SEED = 2, 1
RATIO = CROP_SIDE / LARGE_SIDE
_SHUFFLED = 1000  # samples in WebDataset's buffer
_AHEAD = 10  # batches that Grain has ready after a pause: they are thrown away


def _moved(batches: Iterator[Item], device: torch.device) -> Iterator[Item]:
    """The batches on the device, where those of this project are already."""
    for batch in batches:
        image, label, index = (part.to(device, non_blocking=True) for part in batch)
        yield image, label, index


def _ours(
    kind: Literal["ffcv", "resident"],
    interpolation: Literal["area", "bilinear"],
    case: Case,
    images: ImageSet,
    device: torch.device,
) -> Epochs:
    from rlp.data.geometry import Geometry
    from rlp.data.loader import open_loader
    from rlp.distributed import World

    geometry = Geometry(case.flip, case.padding, case.crop, center_ratio=RATIO, interpolation=interpolation)
    loader = open_loader(
        images.beton,
        train=case.train,
        batch_size=case.batch_size,
        seed=SEED,
        world=World(device=device),
        geometry=geometry,
        kind=kind,
        workers=WORKERS,
    )
    return lambda epoch: ((batch.image, batch.label, batch.index) for batch in loader.epoch(epoch))


def _augmented(case: Case, images: ImageSet, device: torch.device) -> Epochs:
    """Whatever augmentation there is."""
    from rlp.data.augment import Augment
    from rlp.data.beton import Card

    card = Card.read(images.beton)
    every = Augment(card.mean, card.std, SEED, cutout=8, color_jitter=(0.4, 0.4, 0.4, 0.1), randaugment=(2, 9))
    kind = "ffcv" if case.crop else "resident"
    loaded = _ours(kind, "area", replace(case, flip=True, padding=4), images, device)

    def epoch(number: int) -> Iterator[Item]:
        for image, label, index in loaded(number):
            yield every(image, index, number, train=True), label, index

    return epoch


def _plain_ffcv(case: Case, images: ImageSet, device: torch.device) -> Epochs:
    from ffcv.fields import decoders
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, RandomTranslate, Squeeze, ToTensor, ToTorchImage

    from rlp.data.format import FIELDS

    decoder = decoders.SimpleRGBImageDecoder()
    if case.crop:
        size = (case.crop, case.crop)
        random, middle = decoders.RandomResizedCropRGBImageDecoder, decoders.CenterCropRGBImageDecoder
        decoder = random(size) if case.train else middle(size, RATIO)
    moves = [RandomHorizontalFlip()] * case.flip + [RandomTranslate(case.padding)] * (case.padding > 0)
    pipelines: dict[str, Any] = dict.fromkeys(name for name, _ in FIELDS)  # None: not read
    pipelines["image"] = [decoder, *moves, ToTensor(), ToTorchImage()]
    pipelines |= {name: [decoders.IntDecoder(), ToTensor(), Squeeze(1)] for name in ("label", "index")}
    order = OrderOption.RANDOM if case.train else OrderOption.SEQUENTIAL
    options = {"order": order, "seed": SEED, "os_cache": True, "drop_last": case.train}
    loader = Loader(str(images.beton), case.batch_size, WORKERS, pipelines=pipelines, **options)
    return lambda _: _moved(((batch[0], batch[1], batch[2]) for batch in loader), device)


class _Samples(Dataset[tuple[Any, int, int]]):
    """Samples one by one as Pillow images or as arrays uint8 [H, W, 3], from a file each or out of the .npy."""

    def __init__(self, images: ImageSet, transform: Callable[[Any], Any], as_array: bool) -> None:
        self._transform, self._as_array = transform, as_array
        self._labels = images.labels().tolist()
        self._jpegs = [str(path) for path in images.jpegs()] if images.is_jpeg else []
        pixels = images.pixels()
        self._shape, self._size, self._offset = pixels.shape[1:], pixels[0].nbytes, pixels.offset
        self._path, self._file = str(images.array), -1

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[Any, int, int]:
        return self._transform(self._image(i)), self._labels[i], i

    def _image(self, i: int) -> Any:
        from PIL import Image

        if self._jpegs:
            picture = Image.open(self._jpegs[i]).convert("RGB")
            return np.array(picture) if self._as_array else picture
        if self._file < 0:  # in the process that reads
            self._file = os.open(self._path, os.O_RDONLY)
        array: Any = np.empty(self._shape, np.uint8)
        os.preadv(self._file, [array], self._offset + i * self._size)
        return array if self._as_array else Image.fromarray(array)


def _torch_loader(samples: Dataset[Any], case: Case, device: torch.device) -> Epochs:
    loader = DataLoader(
        samples,
        case.batch_size,
        shuffle=case.train,
        drop_last=case.train,
        num_workers=WORKERS,
        multiprocessing_context="fork",  # the default, but not in a process that was spawned itself
        persistent_workers=True,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(SEED),
    )
    return lambda _: _moved(((image, label, index) for image, label, index in loader), device)


def _torchvision(transforms: Any, case: Case, images: ImageSet) -> list[Any]:
    """The case in transforms of torchvision, of version 1 for Pillow images or 2 for tensors."""
    if case.crop and not case.train:
        return [transforms.CenterCrop(case.crop)]
    steps = [transforms.RandomCrop(images.side, padding=case.padding)] if case.padding else []
    steps += [transforms.RandomResizedCrop(case.crop)] if case.crop else []
    return steps + [transforms.RandomHorizontalFlip()] * case.flip


def _with_pillow(case: Case, images: ImageSet, device: torch.device) -> Epochs:
    from torchvision import transforms

    transform = transforms.Compose([*_torchvision(transforms, case, images), transforms.PILToTensor()])
    return _torch_loader(_Samples(images, transform, as_array=False), case, device)


def _with_tensors(case: Case, images: ImageSet, device: torch.device) -> Epochs:
    from torchvision.transforms import v2

    transform = v2.Compose([_to_tensor, *_torchvision(v2, case, images)])
    return _torch_loader(_Samples(images, transform, as_array=True), case, device)


def _to_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)


def _webdataset(case: Case, images: ImageSet, device: torch.device) -> Epochs:
    from torchvision import transforms

    webdataset = import_module("webdataset")
    transform = transforms.Compose([*_torchvision(transforms, case, images), transforms.PILToTensor()])
    tars = [str(path) for path in images.tars()]
    samples = webdataset.WebDataset(tars, shardshuffle=len(tars) if case.train else False, seed=SEED)
    if case.train:
        samples = samples.shuffle(_SHUFFLED)
    samples = samples.decode("pilrgb").to_tuple("jpg", "cls", "__key__").map_tuple(transform, int, int)
    batched = samples.batched(case.batch_size, partial=not case.train)
    options = {"num_workers": WORKERS, "multiprocessing_context": "fork", "persistent_workers": True}
    loader = webdataset.WebLoader(batched, batch_size=None, **options)

    def epoch(_: int) -> Iterator[Item]:
        for image, label, index in loader:
            yield image, torch.as_tensor(label), torch.as_tensor(index)

    return lambda number: _moved(epoch(number), device)


def _grain(case: Case, images: ImageSet, device: torch.device) -> Epochs:
    grain = import_module("grain")
    samples = grain.MapDataset.source(_Samples(images, _same, as_array=False)).seed(SEED)
    if case.train:
        samples = samples.shuffle()
    samples = samples.random_map(partial(move_picture, case)).batch(case.batch_size, drop_remainder=case.train)
    steps = len(samples)
    one_by_one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    workers = grain.MultiprocessingOptions(num_workers=WORKERS)
    # One for all epochs, since its workers take seconds to start.
    endless = iter(samples.repeat().to_iter_dataset(one_by_one).mp_prefetch(workers))

    def epoch(number: int) -> Iterator[Item]:
        for _ in range(_AHEAD if number else 0):
            next(endless)
        for _ in range(steps):
            image, label, index = next(endless)
            yield torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(label), torch.from_numpy(index)

    return lambda number: _moved(epoch(number), device)


def _same(picture: Any) -> Any:
    return picture


def move_picture(case: Case, sample: tuple[Any, int, int], rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
    """The case with Pillow and a generator of NumPy's: what torchvision does, for who does without."""
    from PIL import Image, ImageOps

    picture, label, index = sample
    if case.padding:
        side = picture.width
        left, top = rng.integers(2 * case.padding + 1, size=2)
        picture = ImageOps.expand(picture, case.padding).crop((left, top, left + side, top + side))
    if case.crop and case.train:
        left, top, wide, tall = _random_box(picture.width, picture.height, rng)
        box = (left, top, left + wide, top + tall)
        picture = picture.resize((case.crop, case.crop), Image.Resampling.BILINEAR, box)
    elif case.crop:
        left, top = (picture.width - case.crop) // 2, (picture.height - case.crop) // 2
        picture = picture.crop((left, top, left + case.crop, top + case.crop))
    if case.flip and rng.integers(2):
        picture = ImageOps.mirror(picture)
    return np.asarray(picture), label, index


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random resized crop (Szegedy et al., arXiv 1409.4842)."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if wide <= width and tall <= height:
            return int(rng.integers(width - wide + 1)), int(rng.integers(height - tall + 1)), wide, tall
    return 0, 0, width, height


def _memory_map(case: Case, images: ImageSet, device: torch.device) -> Epochs:
    pixels, labels = images.pixels(), images.labels()

    def epoch(number: int) -> Iterator[Item]:
        order = np.random.default_rng((SEED, number)).permutation(len(labels))
        for first in range(0, len(order) - case.batch_size + 1, case.batch_size):
            rows = order[first : first + case.batch_size]
            image = torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2)
            yield image, torch.from_numpy(labels[rows]), torch.from_numpy(rows)

    return lambda number: _moved(epoch(number), device)


RESIDENT, OURS, OURS_BILINEAR = "rlp, resident", "rlp, ffcv", "rlp, ffcv, bilinear"
EVERYTHING = "rlp, every augmentation"
PLAIN_FFCV, PILLOW, BARE = "FFCV", "DataLoader, Pillow", "NumPy memory map, bare index"

CONTENDERS = (
    Contender(RESIDENT, partial(_ours, "resident", "area"), "The set in memory; batches are gathered, mirrored and "
              "shifted from there. Checks the file's hash when it opens it, and gives the random words of every "
              "sample as well. Its cold epoch opens the set anew.", "ab", is_ours=True, in_memory=True),
    Contender(OURS, partial(_ours, "ffcv", "area"), "Decoded batch by batch in 2 threads, into memory of the batch's "
              "own, with the exact inverse transform of JPEGs; gives the random words of every sample as well. Area "
              "interpolation.", "abcde", ("ffcv",), is_ours=True),
    Contender(OURS_BILINEAR, partial(_ours, "ffcv", "bilinear"), "The same with Pillow's antialiased bilinear "
              "interpolation, to the bit.", "cd", ("ffcv",), is_ours=True),
    Contender(EVERYTHING, _augmented, "Resident for 32 px, else decoded batch by batch; flip and padded crop, then "
              "RandAugment, colour jitter, normalisation and cutout by `rlp.data.augment`. Only its start is measured.",
              "bc", ("ffcv",), is_ours=True, start_only=True),
    Contender(PLAIN_FFCV, _plain_ffcv, "`ffcv.loader.Loader` with its own decoders and transforms, 2 threads, "
              "`os_cache=True`, on the same .beton, whose words it does not read. Fast inverse transform of JPEGs, "
              "area interpolation; batches lie in a ring of buffers, so they are gone a few batches later.",
              "abcde", ("ffcv",)),
    Contender(PILLOW, _with_pillow, "`torch.utils.data.DataLoader`, 2 persistent worker processes, torchvision's "
              "transforms (version 1) on Pillow images; JPEGs from a file each, pixels from the .npy. Antialiased "
              "bilinear interpolation.", "abcde", ("torchvision", "PIL")),
    Contender("DataLoader, torchvision v2", _with_tensors, "The same with `torchvision.transforms.v2` on uint8 "
              "tensors; JPEGs are decoded by Pillow.", "abcde", ("torchvision", "PIL")),
    Contender("WebDataset", _webdataset, f"8 tars, 2 persistent worker processes, decoded by Pillow, then as "
              f"DataLoader with Pillow. Shuffles the tars and within a buffer of {_SHUFFLED} samples.", "ce",
              ("webdataset", "torchvision", "PIL")),
    Contender("Grain", _grain, "`grain.MapDataset` with `mp_prefetch`, 2 worker processes that live on from epoch to "
              "epoch, the same transforms on Pillow images by hand, for Grain has none. What it has ready from before "
              "its turn is thrown away.", "abcde", ("grain", "PIL"), runs_ahead=True),
    Contender(BARE, _memory_map, "`array[rows]` of a memory-mapped .npy in one thread, with labels and numbers: whole "
              "images whatever the case, nothing else done to them.", "abd", is_bare=True),
)  # fmt: skip
