"""Whether a contender of `benchmarks.loader` gives what its case asks for: samples, labels, and plausible pixels."""

from collections.abc import Iterable

import numpy as np
import torch

from benchmarks.loader_cases import Case, Item
from benchmarks.loader_sets import ImageSet

EXAMINED = 32
"""Samples an epoch whose crops are searched for in their originals."""
JPEG_TOLERANCE = 2.0  # mean absolute difference; decoders with a fast inverse transform are that far from Pillow
_ALIKE = 0.9  # correlation of a crop with the place that it was cut from, at a quarter of the size
_SEARCH = 64  # pixels a side, in which crops are searched


def why_wrong(batches: Iterable[Item], case: Case, images: ImageSet) -> str | None:
    """What is wrong with the batches of one epoch, as a short clause; None if nothing is."""
    pixels, labels = images.pixels(), images.labels()
    count, side = len(labels), case.crop or images.side
    seen, kept, kept_ids = np.zeros(count, np.int64), [], []
    for image, label, index in batches:
        ids = index.cpu().numpy()
        if image.dtype != torch.uint8 or tuple(image.shape) != (len(ids), 3, side, side):
            return f"images are {image.dtype} of shape {tuple(image.shape)}; expected uint8 of {side} px"
        if not (label == torch.from_numpy(labels[ids]).to(label.device)).all():
            return "labels are not those of the samples"
        np.add.at(seen, ids, 1)
        found = image.permute(0, 2, 3, 1).cpu().numpy()
        if not (case.train and (case.crop or case.padding or case.flip)):
            worst = max(_difference(one, _middle(pixels[i], side)) for one, i in zip(found, ids, strict=True))
            if worst > JPEG_TOLERANCE * images.is_jpeg:
                return f"pixels differ from the original's by {worst:.2f} on average"
        else:
            more = max(0, EXAMINED - len(kept))
            kept += list(found[:more].copy())
            kept_ids += ids[:more].tolist()
    if seen.max() > 1:
        return f"sample {seen.argmax()} comes {seen.max()} times in an epoch"
    expected = count - count % case.batch_size if case.train else count
    if seen.sum() != expected:
        return f"{seen.sum()} samples come in an epoch; expected {expected}"
    originals = [pixels[i] for i in kept_ids]
    if not kept:
        return None
    return _wrong_crops(kept, originals) if case.crop else _wrong_shifts(kept, originals, case.padding)


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean())


def _middle(image: np.ndarray, side: int) -> np.ndarray:
    first = (len(image) - side) // 2
    return image[first : first + side, first : first + side]


def _wrong_shifts(found: list[np.ndarray], originals: list[np.ndarray], padding: int) -> str | None:
    """Every image must be its original, mirrored or not, shifted by up to `padding`; and they must vary."""
    places = [_shift_of(one, original, padding) for one, original in zip(found, originals, strict=True)]
    lost = [place for place in places if place is None]
    if lost:
        return f"{len(lost)} of {len(places)} images are no shift of their original"
    mirrored = {place[0] for place in places if place}
    shifts = {place[1:] for place in places if place}
    if len(mirrored) < 2 or len(shifts) < min(len(places), (2 * padding + 1) ** 2) // 3:
        return f"{len(places)} images have {len(shifts)} different shifts and {len(mirrored)} directions"
    return None


def _shift_of(found: np.ndarray, original: np.ndarray, padding: int) -> tuple[bool, int, int] | None:
    """Mirrored or not, and how far down and right; the rest must have one colour."""
    side = len(original)
    for mirrored in (False, True):
        source = original[:, ::-1] if mirrored else original
        padded = np.full((side + 2 * padding, side + 2 * padding, 3), -1, np.int16)
        padded[padding : padding + side, padding : padding + side] = source
        for down in range(2 * padding + 1):
            for right in range(2 * padding + 1):
                window = padded[down : down + side, right : right + side]
                inside = window[..., 0] >= 0
                if (found[inside] == window[inside]).all() and len(np.unique(found[~inside], axis=0)) <= 1:
                    return mirrored, down, right
    return None


def _wrong_crops(found: list[np.ndarray], originals: list[np.ndarray]) -> str | None:
    """Most images must be found in their original at some scale, shape and direction; and these must vary."""
    results = [_crop_of(one, original) for one, original in zip(found, originals, strict=True)]
    likeness, mirrored, area = (np.array(column) for column in zip(*results, strict=True))
    alike = likeness > _ALIKE
    if alike.mean() < 0.75:  # pieces of sky are mere grain, which no search at low resolution finds
        return f"only {alike.sum()} of {len(alike)} images are found in their original"
    share, mean = mirrored[alike].mean(), area[alike].mean()
    if not (0.2 < share < 0.8 and 0.35 < mean < 0.75):
        return f"{100 * share:.0f}% are mirrored, and crops cover {100 * mean:.0f}% on average; expected about half"
    return None


def _crop_of(found: np.ndarray, original: np.ndarray) -> tuple[float, bool, float]:
    """Largest correlation of a crop with a box of its original, whether it is mirrored, and the box's area share."""
    import cv2

    searched = cv2.resize(_grey(original), (_SEARCH, _SEARCH), interpolation=cv2.INTER_AREA)
    best = (-1.0, False, 0.0)
    for mirrored in (False, True):
        crop = _grey(found[:, ::-1] if mirrored else found)
        for area in np.linspace(0.08, 1, 16):
            for ratio in np.geomspace(3 / 4, 4 / 3, 5):
                wide, tall = round(_SEARCH * (area * ratio) ** 0.5), round(_SEARCH * (area / ratio) ** 0.5)
                if max(wide, tall) <= _SEARCH:
                    piece = cv2.resize(crop, (wide, tall), interpolation=cv2.INTER_AREA)
                    likeness = float(cv2.matchTemplate(searched, piece, cv2.TM_CCOEFF_NORMED).max())
                    best = max(best, (likeness, mirrored, float(area)))
    return best


def _grey(image: np.ndarray) -> np.ndarray:
    return image.mean(-1, dtype=np.float32)
