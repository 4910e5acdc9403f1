"""Words to labels: the one definition of random labels, label noise and member masks, for NumPy and torch alike.

Every label is a pure function of (seed, sample id, draw, n): a random word w in [0, 2^32) becomes the random label
``floor(w * n / 2^32)``. The same words serve every n, and noisy or member sets are nested as their rate grows.
"""

from typing import Any

import numpy as np
import torch

from rlp.philox import Array, random_bits

NAMED_WORDS = ("noise", "noise_class", "member")
"""Words beside the draws: is the label noisy, which wrong class it takes, is the sample a member."""

WORD_RANGE = 2**32


def random_words(seed: int, index: Array, draws: int, split: str = "train", first: int = 0) -> Array:
    """Random words of every sample, int64 ``[*index.shape, draws]`` in [0, 2^32); a column is one draw.

    ``first`` is the first draw's number: the columns are those of ``first + draws`` draws, without the first ones.
    """
    return random_bits(seed, f"{split}.draw", index, draws, first=first)


def draw_words(baked: Array, seed: int, index: Array, draws: int, split: str, first: int = 0) -> Array:
    """Words of ``draws`` draws from number ``first`` on, int64 ``[B, draws]``: baked columns, or computed ones.

    Where ``baked`` ``[B, K]`` ends too early, all are computed: they are what a file with more draws would hold.
    ``seed``, ``index`` and ``split`` are as for :func:`random_words`.
    """
    if first + draws <= baked.shape[1]:
        return baked[:, first : first + draws]
    return random_words(seed, index, draws, split, first)


def named_word(seed: int, index: Array, name: str, split: str = "train") -> Array:
    """One of :data:`NAMED_WORDS` for every sample, int64 ``[*index.shape]`` in [0, 2^32)."""
    if name not in NAMED_WORDS:
        raise ValueError(f"unknown word '{name}'; expected one of {', '.join(NAMED_WORDS)}")
    return random_bits(seed, f"{split}.{name}", index, 1)[..., 0]


def baked_words(seed: int, index: np.ndarray, draws: int, split: str) -> np.ndarray:
    """The ``words`` column of a .beton: int64 ``[N, draws + 3]``, the draws first, then :data:`NAMED_WORDS`."""
    named = [named_word(seed, index, name, split)[:, None] for name in NAMED_WORDS]
    return np.concatenate([random_words(seed, index, draws, split), *named], axis=1)


def random_labels(words: Array, n: int) -> Array:
    """Random labels ``floor(word * n / 2^32)``, int64 in [0, n), the shape of ``words``; 1 <= n <= 2^31."""
    if not 1 <= n <= 2**31:
        raise ValueError(f"num_labels is {n}; expected 1 to 2^31")
    return (words * n) >> 32


def _threshold(rate: float, name: str) -> int:
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"{name} is {rate}; expected a number from 0 to 1")
    return round(rate * WORD_RANGE)


def noisy_labels(label: Array, noise: Array, noise_class: Array, rate: float, num_classes: int) -> Array:
    """Given labels under symmetric noise: with probability ``rate`` a *different* class, all equally likely.

    ``label``, ``noise`` and ``noise_class`` are int64 of one shape (the latter two are words); what is noisy at 10%
    is noisy, with the same wrong class, at 20%.
    """
    if num_classes < 2:
        return label
    wrong: Any = (label + 1 + random_labels(noise_class, num_classes - 1)) % num_classes
    noisy: Any = noise < _threshold(rate, "label_noise")
    where: Any = torch.where if isinstance(label, torch.Tensor) else np.where
    return where(noisy, wrong, label)


def member_mask(member: Array, fraction: float) -> Array:
    """True for members: a random share ``fraction`` of the samples, nested as the fraction grows (bool)."""
    return member < _threshold(fraction, "member_fraction")


def class_floor(label: np.ndarray, random_label: np.ndarray, num_classes: int, n: int) -> np.ndarray:
    """Best random-label accuracy reachable from the class alone, per draw: Σ_c max_j #(class c, label j) / N.

    A head that sees nothing but the class reaches this, so accuracy up to here shows no sample-specific information.

    Args:
        label: int64 [N] in [0, num_classes).
        random_label: int64 [N, K] in [0, n).

    Returns:
        float64 [K].
    """
    floors = []
    for column in random_label.T:
        # Only the (class, label) pairs that occur are counted: n may be 100,000 and C·n too large for a dense table.
        pairs, counts = np.unique(label * n + column, return_counts=True)
        best = np.zeros(num_classes, dtype=np.int64)
        np.maximum.at(best, pairs // n, counts)
        floors.append(best.sum() / len(label))
    return np.array(floors)
