"""Images in a NumPy .npz archive."""

from pathlib import Path
import zipfile

import numpy as np

from data_prep.samples import Samples
from rlp.errors import UserError

_VALIDATION = ("val", "test")


def read_npz(path: Path, convert_rgb: bool) -> tuple[tuple[str, ...], Samples, Samples | None]:
    """Class names, training samples and validation samples (None when the archive has one set to be split).

    Keys: ``x_train``, ``y_train`` and ``x_val``, ``y_val`` (or ``x_test``, ``y_test``); or ``x`` and ``y``. Images
    are uint8 [N, H, W, 3], or grey [N, H, W] with ``convert_rgb``; labels are integers [N] or [N, 1]. ``classes``
    (texts) names the classes; without it they are called by their numbers.

    Raises:
        UserError: not an .npz, a missing key, or a wrong dtype or shape.
    """
    arrays = _load(path)
    if "x" in arrays or "y" in arrays:
        train, val = _split(arrays, "x", "y", path, convert_rgb), None
    else:
        train = _split(arrays, "x_train", "y_train", path, convert_rgb)
        name = next((name for name in _VALIDATION if f"x_{name}" in arrays), _VALIDATION[0])
        val = _split(arrays, f"x_{name}", f"y_{name}", path, convert_rgb)
    if "classes" in arrays:
        return tuple(str(name) for name in arrays["classes"].ravel()), train, val
    highest = max(int(samples.labels.max(initial=-1)) for samples in (train, val) if samples is not None)
    return tuple(str(number) for number in range(highest + 1)), train, val


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; source.path must name an .npz file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an .npz of arrays: {error}") from None


def _split(arrays: dict[str, np.ndarray], x: str, y: str, path: Path, convert_rgb: bool) -> Samples:
    for key in (x, y):
        if key not in arrays:
            raise UserError(
                f"{path} has no array '{key}'; expected x_train, y_train, x_val, y_val, or x and y "
                f"(found {', '.join(arrays) or 'none'})"
            )
    images, labels = _images(arrays[x], f"{path}: {x}", convert_rgb), arrays[y]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{path}: {y} is {labels.dtype} of shape {labels.shape}; expected one integer per image")
    if len(labels) != len(images):
        raise UserError(f"{path}: {x} has {len(images)} images but {y} has {len(labels)} labels")
    if labels.min(initial=0) < 0:
        raise UserError(f"{path}: {y} has the label {labels.min()}; expected labels from 0")
    names = [f"{x}[{i}]" for i in range(len(images))]
    return Samples(names, labels.astype(np.int64), images)


def _images(images: np.ndarray, where: str, convert_rgb: bool) -> np.ndarray:
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    grey = images.ndim == 3
    if images.dtype != np.uint8 or not (grey or (images.ndim == 4 and images.shape[3] == 3)) or 0 in images.shape[1:]:
        raise UserError(f"{where} is {images.dtype} of shape {images.shape}; expected uint8 [N, height, width, 3]")
    if grey and not convert_rgb:
        raise UserError(f"{where} holds grey images of shape {images.shape}; --source.convert_rgb true converts them")
    return images
