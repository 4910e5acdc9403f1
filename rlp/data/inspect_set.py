"""What is in a set, in words and numbers: its card, its classes, and whether its random words look random.

The words are made by a counter-based generator and are right when :mod:`rlp.data.verify` says so. The tests here ask
something else, of any file: are the random labels that it holds equally frequent, independent of one another and of
the class? Without that, no number that a head reaches means anything.
"""

from collections.abc import Iterator
from dataclasses import dataclass
import math

import numpy as np

from rlp.data.beton import Beton
from rlp.data.format import RAW
from rlp.labels import random_labels

NUM_LABELS = (2, 10, 100)
"""Numbers of random labels n that are tested, as far as there are :data:`FEWEST` samples for each label."""
FEWEST = 5  # samples expected in a cell, below which χ² is no longer near its distribution
LEVEL = 0.001
"""Chance that a set of truly random words is called not uniform, shared by all tests (Bonferroni)."""
_NOTABLE = 0.01  # p-values below are counted
_ROWS = 1 << 16  # whose correlations are summed at once
_ALL_CLASSES = 40  # more are summed up
_ENDS = 5  # of the sorted classes that a summary shows
_BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Check:
    """One question put to every column of words, or to every pair.

    Attributes:
        name: what would be true of random words.
        p: p-values, float64 [tests].
        columns: what each test is about.
        note: what else there is to say.
    """

    name: str
    p: np.ndarray
    columns: list[str]
    note: str = ""


def describe(beton: Beton, all_classes: bool = False) -> str:
    """Everything about a set as text.

    Args:
        beton: the open set.
        all_classes: a bar for every class, however many there are.
    """
    parts = (card_lines(beton), class_lines(beton, all_classes), word_lines(beton))
    return "\n\n".join("\n".join(lines) for lines in parts)


def card_lines(beton: Beton) -> list[str]:
    """What the card says, and the sizes that the index has."""
    card, layout = beton.card, beton.layout
    last = card.first_sample + card.num_samples - 1
    height, width, stored = (layout[name] for name in ("height", "width", "image_size"))
    raw = int((layout["mode"] == RAW).sum())
    modes = " and ".join(f"{n:,} {name}" for n, name in ((raw, "raw"), (len(layout) - raw, "JPEG")) if n)
    size = (
        f"{card.width} x {card.height} px"
        if card.height
        else (f"{width.min()} to {width.max()} px wide, {height.min()} to {height.max()} px high")
    )
    mean, std = (" ".join(f"{v:.4f}" for v in values) for values in (card.mean, card.std))
    rows = {
        "split": card.split,
        "samples": f"{card.num_samples:,} (ids {card.first_sample} to {last})",
        "classes": f"{len(card.classes):,}",
        "images": f"{size}, mode {card.image_mode} ({modes}), {spread(stored)} bytes an image",
        "mean, std": f"{mean}, {std} (red, green, blue; 0 to 1)",
        "bytes": f"{card.size:,}",
        "words": f"{card.draws} draws and {', '.join(card.word_names[card.draws :])}, seed {card.words_seed}",
        "source": f"{card.source.get('kind', '?')} {card.source.get('name', '?')}, "
        f"fingerprint {card.source.get('fingerprint', '?')[:16]}",
        "shards": _shards(beton),
        "near-duplicates": _duplicates(beton),
        "written by": ", ".join(f"{name} {version}" for name, version in card.written_by.items()) or "not said",
        "created": card.created,
        "sha256": card.sha256,
    }
    return [str(beton.path), *(f"  {key:<15} {value}" for key, value in rows.items())]


def _shards(beton: Beton) -> str:
    shards = beton.card.shards
    if not shards:
        return "none, one file"
    counts = [shard["num_samples"] for shard in shards]
    return f"{len(shards)} of {spread(np.array(counts))} samples, {shards[0]['name']} and so on"


def _duplicates(beton: Beton) -> str:
    found = beton.card.duplicates
    if "dropped" not in found:
        return "not looked for"
    return f"{len(found['dropped']):,} (distance {found.get('distance')}, {found.get('method')})"


def spread(values: np.ndarray) -> str:
    """The one value that integers (of any shape) have, or the smallest, the median and the largest."""
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,} (median {np.median(values):,.0f})"


def class_lines(beton: Beton, all_classes: bool = False) -> list[str]:
    """Samples of every class as bars; of more than 40 classes the quartiles and the extremes."""
    counts = np.bincount(beton.label, minlength=len(beton.card.classes))
    head = f"Samples a class: {spread(counts)}"
    if all_classes or len(counts) <= _ALL_CLASSES:
        return [head, *_bars(beton, counts, np.arange(len(counts)))]
    names = ("smallest", "quarter", "median", "three quarters", "largest")
    quartiles = ", ".join(
        f"{n} {v:,.0f}" for n, v in zip(names, np.quantile(counts, np.linspace(0, 1, 5)), strict=True)
    )
    order = np.argsort(-counts, kind="stable")
    shown = [*_bars(beton, counts, order[:_ENDS]), "  ...", *_bars(beton, counts, order[-_ENDS:])]
    return [head, f"  {quartiles}; all with --classes", *shown]


def _bars(beton: Beton, counts: np.ndarray, classes: np.ndarray) -> list[str]:
    width = min(24, max(len(name) for name in beton.card.classes))
    digits, number = len(f"{counts.max():,}"), len(str(len(counts) - 1))
    lines = []
    for c in classes.tolist():
        name = shortened(beton.card.classes[c], width)
        bar = "█" * round(_BAR * counts[c] / counts.max())
        lines.append(f"  {c:>{number}} {name:<{width}} {counts[c]:>{digits},} {counts[c] / counts.sum():>6.2%} {bar}")
    return [line.rstrip() for line in lines]


def shortened(name: str, width: int) -> str:
    """The name on one line, cut with an ellipsis to ``width`` characters."""
    name = " ".join(name.split())
    return name if len(name) <= width else name[: width - 1] + "…"


def word_lines(beton: Beton) -> list[str]:
    """The tests of the random words as a table, and the verdict."""
    head = f"Random words: {len(beton.card.word_names)} columns of {beton.num_samples:,} samples"
    fewest = FEWEST * NUM_LABELS[0]
    if beton.num_samples < fewest:
        return [head, f"uniform: cannot be told from so few samples; expected at least {fewest}"]
    checks = [check for check in word_checks(beton) if len(check.p)]
    tests = sum(len(check.p) for check in checks)
    width = max(len(check.name) for check in checks)
    titles = f"  {'test':<{width}} {'tests':>5} {'smallest p':>10} {'Bonferroni':>10} {'p < 0.01 (expected)':>20}  at"
    lines = [_check_line(check, width) for check in checks]
    notes = [f"  {check.note}" for check in checks if check.note]
    if (np.bincount(beton.label) >= fewest).sum() < 2:
        notes.append(f"  dependence on the class is not tested: fewer than two classes have {fewest} samples")
    return [head, titles, *lines, *notes, _verdict(checks, tests)]


def _check_line(check: Check, width: int) -> str:
    smallest, where = check.p.min(), check.columns[int(check.p.argmin())]
    notable = f"{(check.p < _NOTABLE).sum()} ({_NOTABLE * len(check.p):.1f})"
    corrected = min(1.0, smallest * len(check.p))
    return f"  {check.name:<{width}} {len(check.p):>5} {smallest:>10.2g} {corrected:>10.2g} {notable:>20}  {where}"


def _verdict(checks: list[Check], tests: int) -> str:
    smallest = min(check.p.min() for check in checks)
    told = f"{tests} tests, smallest p {smallest:.2g}, which is {min(1.0, smallest * tests):.2g} after Bonferroni"
    if smallest * tests >= LEVEL:
        return f"uniform: yes ({told}; below {LEVEL} would be no)"
    odd = [f"{check.columns[i]} ({check.name})" for check in checks for i in np.flatnonzero(check.p * tests < LEVEL)]
    more = f" and {len(odd) - _ENDS} more" if len(odd) > _ENDS else ""
    return f"uniform: NO: {', '.join(odd[:_ENDS])}{more} ({told}; expected at least {LEVEL})"


def word_checks(beton: Beton) -> Iterator[Check]:
    """The tests of all word columns, draws and named ones alike; empty where there are too few samples for them."""
    from scipy.stats import chi2

    words, names = beton.stored_words(np.arange(beton.num_samples)), list(beton.card.word_names)
    tested = [n for n in NUM_LABELS if len(words) >= FEWEST * n]
    frequencies, dependences = {n: [] for n in tested}, {n: [] for n in tested}
    sizes = np.bincount(beton.label)
    for column in words.T:
        for n in tested:
            labels = random_labels(column.astype(np.int64), n)
            frequencies[n].append(chi2.sf(*frequency_test(labels, n)))
            if (sizes >= FEWEST * n).sum() > 1:
                dependences[n].append(chi2.sf(*class_test(beton.label, labels, n)))
    for n in tested:
        yield Check(f"{n} labels are equally frequent", np.array(frequencies[n]), names)
    yield correlation_check(words, names)
    for n in tested:
        yield Check(f"{n} labels do not depend on the class", np.array(dependences[n]), names)


def frequency_test(labels: np.ndarray, n: int) -> tuple[float, int]:
    """Pearson's χ² of labels (int64 [N] in [0, n)) against equal frequencies, and its n - 1 degrees of freedom."""
    counts, expected = np.bincount(labels, minlength=n), len(labels) / n
    return float(((counts - expected) ** 2).sum() / expected), n - 1


def class_test(label: np.ndarray, random_label: np.ndarray, n: int) -> tuple[float, int]:
    """Pearson's χ² of independence of class and random label (both int64 [N]), and its degrees of freedom.

    Classes with fewer than 5 samples for each label are left out. A constant depends on nothing.
    """
    sizes = np.bincount(label)
    classes = np.flatnonzero(sizes >= FEWEST * n)
    pairs = np.bincount(label * n + random_label, minlength=len(sizes) * n).reshape(len(sizes), n)[classes]
    pairs = pairs[:, pairs.any(0)]
    if min(pairs.shape) < 2:
        return 0.0, 1
    expected = pairs.sum(1, keepdims=True) * pairs.sum(0) / pairs.sum()
    return float(((pairs - expected) ** 2 / expected).sum()), (pairs.shape[0] - 1) * (pairs.shape[1] - 1)


def correlation_check(words: np.ndarray, names: list[str]) -> Check:
    """Correlations of all pairs of columns of ``words``, uint32 [N, K]; r·√N is near a standard normal."""
    from scipy.stats import norm

    first, second = np.triu_indices(len(names), 1)
    size = np.abs(correlations(words)[first, second])
    p = 2 * norm.sf(size * math.sqrt(len(words)))
    largest = int(size.argmax())
    # The median of the largest of m independent |r|: P(|r| <= x)^m = 1/2.
    expected = norm.isf((1 - 0.5 ** (1 / len(size))) / 2) / math.sqrt(len(words))
    columns = [f"{names[a]} and {names[b]}" for a, b in zip(first, second, strict=True)]
    note = f"largest |correlation| {size[largest]:.4f} of {columns[largest]}; expected about {expected:.4f}"
    return Check("two columns are uncorrelated", p, columns, note)


def correlations(words: np.ndarray) -> np.ndarray:
    """Pearson's correlations of the columns of uint32 [N, K], float64 [K, K]; 0 for a constant column."""
    total, products = np.zeros(words.shape[1]), np.zeros((words.shape[1],) * 2)
    for start in range(0, len(words), _ROWS):
        part = words[start : start + _ROWS] / 2**32 - 0.5
        total += part.sum(0)
        products += part.T @ part
    covariance = products - np.outer(total, total) / len(words)
    scale = np.sqrt(np.diag(covariance).clip(0))
    scale[scale < 1e-6 * math.sqrt(len(words))] = np.inf
    return covariance / np.outer(scale, scale)
