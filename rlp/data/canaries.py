"""Canaries: samples planted among the others to be memorised, so that a score of memorisation can be held to the truth.

- ``noise``: the image is replaced by uniform noise; nothing but its label can be learnt from it.
- ``mislabelled``: the given label is another class, whatever the label noise.
- ``duplicate``: the sample shows the image of another one, its original, and has that one's label; random words and
  augmentations are its own, so a head would have to give one image two random labels.

One word of (words seed, sample id) decides whether a sample is a canary, and of which kind. Each kind has a third of
the word's range to itself: the kinds are disjoint, a larger share holds a smaller one, and no kind depends on another's
share. The file is never rewritten.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlp.data.beton import Beton, Card
from rlp.errors import UserError
from rlp.labels import WORD_RANGE, random_labels
from rlp.philox import random_bits

KINDS = ("noise", "mislabelled", "duplicate")
LARGEST = 0.3
"""Largest share of one kind."""

_NOISE, _MISLABELLED, _DUPLICATE = range(1, len(KINDS) + 1)
_WORDS_AT_ONCE = 1 << 22


class Shares(NamedTuple):
    """The share of each kind, 0 to :data:`LARGEST`."""

    noise: float = 0.0
    mislabelled: float = 0.0
    duplicate: float = 0.0


@dataclass(frozen=True)
class Canaries:
    """The canaries of a view.

    Attributes:
        kind: 0 for none, else 1 + place in :data:`KINDS`; int8 [N], of all rows of the file, 0 outside of the view.
        shown: row whose image is shown, int64 [N]: the original's for duplicates, else the row itself.
    """

    kind: np.ndarray
    shown: np.ndarray

    @property
    def planted(self) -> np.ndarray:
        """Name of the kind, empty for none; text [N]."""
        return np.array(("", *KINDS))[self.kind]

    @cached_property
    def is_noise(self) -> np.ndarray:
        """Rows that show noise, bool [N]."""
        return self.kind == _NOISE

    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        return {name: int((self.kind == number).sum()) for number, name in enumerate(KINDS, 1)}


def plant(beton: Beton, rows: np.ndarray, label: np.ndarray, shares: Shares) -> tuple[Canaries, np.ndarray]:
    """Choose the canaries among ``rows`` (int64, sorted); returns them and the given labels int64 [N] with theirs.

    A duplicate's original is the next sample of the view, in the order of words of their own, that is no canary: when
    shares grow, only originals that became canaries are replaced.

    Raises:
        UserError: wrong labels are asked for where there is one class, or every sample is a canary.
    """
    card, ids = beton.card, beton.index[rows]
    kind = np.zeros(beton.num_samples, np.int8)
    shown = np.arange(beton.num_samples)
    kind[rows] = _kinds(_word(card, ids, "canary"), shares)
    label = label.copy()
    wrong = np.flatnonzero(kind == _MISLABELLED)
    if len(wrong):
        label[wrong] = _other_class(beton, wrong)
    copies, rest = rows[kind[rows] == _DUPLICATE], rows[kind[rows] == 0]
    if len(copies):
        if not len(rest):
            raise UserError(
                f"data.canary_duplicates is {shares.duplicate}, but every sample seen of {beton.path} is a canary; "
                "expected some that duplicates can show"
            )
        shown[copies] = _originals(card, beton.index, copies, rest)
        label[copies] = label[shown[copies]]
    return Canaries(kind, shown), label


def _kinds(word: np.ndarray, shares: Shares) -> np.ndarray:
    kind = np.zeros(len(word), np.int8)
    for number, share in enumerate(shares):
        first = number * WORD_RANGE // len(KINDS)
        kind[(word >= first) & (word < first + round(share * WORD_RANGE))] = number + 1
    return kind


def _word(card: Card, ids: np.ndarray, name: str) -> np.ndarray:
    return random_bits(card.words_seed, f"{card.split}.{name}", ids, 1)[..., 0]


def _other_class(beton: Beton, rows: np.ndarray) -> np.ndarray:
    classes = len(beton.card.classes)
    if classes < 2:
        raise UserError(f"data.canary_mislabelled is set, but {beton.path} has one class; expected at least two")
    step = 1 + random_labels(_word(beton.card, beton.index[rows], "canary.class"), classes - 1)
    return (beton.label[rows] + step) % classes


def _originals(card: Card, index: np.ndarray, copies: np.ndarray, rest: np.ndarray) -> np.ndarray:
    word = {name: _word(card, index[rows], "canary.original") for name, rows in (("copies", copies), ("rest", rest))}
    order = np.lexsort((rest, word["rest"]))
    place = np.searchsorted(word["rest"][order], word["copies"], side="right") % len(rest)
    return rest[order[place]]


def noise_images(card: Card, ids: np.ndarray, height: int, width: int) -> np.ndarray:
    """Uniform noise, a function of (words seed, sample id): uint8 [n, H, W, 3] for sample ids int64 [n]."""
    size = height * width * 3
    count = -(-size // 4)
    images = np.empty((len(ids), size), np.uint8)
    step = max(1, _WORDS_AT_ONCE // count)
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        words = random_bits(card.words_seed, f"{card.split}.canary.image", ids[part], count)
        images[part] = words.astype("<u4").view(np.uint8)[:, :size]
    return images.reshape(len(ids), height, width, 3)


class Gallery:
    """What a loader shows of each row, gathered by the host: its own image, that of its original, or noise.

    Args:
        card: of the set.
        canaries: of the view; None where nothing is planted.
    """

    def __init__(self, card: Card, canaries: Canaries | None) -> None:
        self._card, self._canaries = card, canaries

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows whose stored images are shown for ``rows``, int64 [B], contiguous."""
        return np.ascontiguousarray(rows if self._canaries is None else self._canaries.shown[rows])

    def hang_noise(self, images: np.ndarray, rows: np.ndarray, ids: np.ndarray, plan: Any, fill: np.ndarray) -> None:
        """Put noise over ``images`` uint8 [B, H, W, 3] where ``rows`` show it, mirrored and shifted as images are.

        ``ids`` are the sample ids of ``rows``, both int64 [B]; ``plan`` is that of :func:`rlp.data.decode.plan_of`, and
        ``fill`` uint8 [3] the padding.
        """
        if self._canaries is None or not len(places := np.flatnonzero(self._canaries.is_noise[rows])):
            return
        from rlp.data.decode import gather_images

        noise = noise_images(self._card, ids[places], *images.shape[1:3])
        moved = np.empty_like(noise)
        gather_images(noise, np.arange(len(places)), ids[places], plan, fill, moved)
        images[places] = moved


class DeviceGallery:
    """The same by torch: all noise lies on the device, and no step waits for the host.

    Args:
        beton: the open set, its images of one size.
        canaries: of the view.
        device: where rows and images are.
    """

    def __init__(self, beton: Beton, canaries: Canaries, device: torch.device) -> None:
        noisy = np.flatnonzero(canaries.is_noise)
        place = np.full(len(canaries.kind), -1)
        place[noisy] = np.arange(len(noisy))
        noise = noise_images(beton.card, beton.index[noisy], beton.card.height, beton.card.width)
        self._shown, self._place, self._noise = (
            torch.from_numpy(column).to(device) for column in (canaries.shown, place, noise)
        )

    def rows(self, rows: Tensor) -> Tensor:
        """Rows whose stored images are shown for ``rows``, int64 [B]."""
        return self._shown.index_select(0, rows)

    def hang_noise(self, images: Tensor, rows: Tensor) -> Tensor:
        """``images`` uint8 [B, H, W, 3] with noise where ``rows`` show it; nothing is moved yet."""
        if not len(self._noise):
            return images
        place = self._place.index_select(0, rows)
        noise = self._noise.index_select(0, place.clamp(min=0))
        return torch.where((place >= 0)[:, None, None, None], noise, images)
