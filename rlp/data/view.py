"""Views: which samples of a file a run sees, and with which labels; chosen at training time, the file never rewritten.

Every choice is a function of (words seed, sample id), and views of one kind are nested: a smaller share is part of a
larger one, a stronger imbalance of a weaker one, what is noisy at 10% is noisy, with the same wrong class, at 20%. All
choices by size go by one word for each sample: in each class, whatever is kept is the beginning of the class's order by
that word. So a share of a long tail and a long tail of a share nest too.

The steps come in one order: near-duplicates, share, long tail, members. Label noise depends on the sample alone.
Canaries (:mod:`rlp.data.canaries`) are planted last, among what is left.
"""

from collections.abc import Callable
from dataclasses import dataclass
import hashlib
from typing import Any, Literal, get_args

import numpy as np

from rlp.data.beton import Beton
from rlp.data.canaries import LARGEST, Canaries, Shares, plant
from rlp.data.duplicates import dropped_samples
from rlp.data.label_noise import NoiseKind, given_labels, labels_from_file
from rlp.errors import UserError
from rlp.labels import member_mask, named_word
from rlp.philox import random_bits

Members = Literal["members", "non-members"]
CANARY_KEYS = ("canary_noise", "canary_mislabelled", "canary_duplicates")


@dataclass(frozen=True)
class ViewOptions:
    """What a view keeps and how it labels; the defaults are the whole set with its true labels.

    Attributes:
        fraction: share of the samples, at least one.
        fraction_per_class: the share of each class, at least one sample of it, instead of the whole.
        imbalance: ρ of a long tail: class c of C keeps up to n·ρ^(-c / (C - 1)) samples, n being the largest class
            (Cui et al., arXiv 1901.05555; Cao et al., arXiv 1906.07413). Of equal classes the first is then ρ times
            the last. 1 for none.
        drop_duplicates: leave out near-duplicates of other samples, as the card lists them.
        member_fraction: share of the samples that are members, by words of their own.
        members: which side of that split.
        label_noise: share of the samples with a wrong label.
        noise_kind: which wrong class: see :func:`rlp.data.label_noise.given_labels`.
        label_file: given labels from a file, see :func:`rlp.data.label_noise.labels_from_file`.
        label_key: its key or column.
        canary_noise: share of the samples whose image is replaced by noise.
        canary_mislabelled: share of the samples that are given another class, whatever the label noise.
        canary_duplicates: share of the samples that show another sample's image and have its label.
    """

    fraction: float = 1.0
    fraction_per_class: bool = False
    imbalance: float = 1.0
    drop_duplicates: bool = False
    member_fraction: float = 1.0
    members: Members = "members"
    label_noise: float = 0.0
    noise_kind: NoiseKind = "symmetric"
    label_file: str | None = None
    label_key: str | None = None
    canary_noise: float = 0.0
    canary_mislabelled: float = 0.0
    canary_duplicates: float = 0.0

    @property
    def canaries(self) -> Shares:
        """The shares of canaries by kind."""
        return Shares(self.canary_noise, self.canary_mislabelled, self.canary_duplicates)

    def __post_init__(self) -> None:
        for key, value in (("fraction", self.fraction), ("member_fraction", self.member_fraction)):
            if not 0 < value <= 1:
                raise UserError(f"data.{key} is {value}; expected a number above 0 and up to 1")
        if not 0 <= self.label_noise <= 1:
            raise UserError(f"data.label_noise is {self.label_noise}; expected a number from 0 to 1")
        for key, share in zip(CANARY_KEYS, self.canaries, strict=True):
            if not 0 <= share <= LARGEST:
                raise UserError(f"data.{key} is {share}; expected a number from 0 to {LARGEST}")
        if not 1 <= self.imbalance < float("inf"):
            raise UserError(f"data.imbalance is {self.imbalance}; expected a number of at least 1")
        for key, value, kinds in (("members", self.members, Members), ("noise_kind", self.noise_kind, NoiseKind)):
            if value not in get_args(kinds):
                raise UserError(f"data.{key} is '{value}'; expected one of {', '.join(get_args(kinds))}")
        if self.label_file is not None and self.label_noise:
            raise UserError("data.label_file and data.label_noise are both set; expected only one of them")
        if self.label_key is not None and self.label_file is None:
            raise UserError(f"data.label_key is '{self.label_key}', but data.label_file is null; expected a file")


@dataclass(frozen=True)
class Step:
    """What one step of a view left."""

    setting: str
    before: int
    after: int
    smallest_class: int
    largest_class: int


@dataclass(frozen=True)
class View:
    """Samples and labels.

    Attributes:
        ids: rows of the samples, int64 [M], in file order.
        label: given labels of all rows, seen or not, int64 [N].
        steps: what each choice left.
        noise: what the labels are, in words; empty for the true ones.
        wrong: how many of the samples in the view have a label that is not that of the image they show.
        canaries: what is planted; None where nothing is asked for.
    """

    ids: np.ndarray
    label: np.ndarray
    steps: tuple[Step, ...] = ()
    noise: str = ""
    wrong: int = 0
    canaries: Canaries | None = None

    @property
    def planted(self) -> np.ndarray:
        """Kind of canary of all rows: one of :data:`rlp.data.canaries.KINDS`, or empty; text [N]."""
        return self.canaries.planted if self.canaries is not None else np.full(len(self.label), "")

    @property
    def shown(self) -> np.ndarray:
        """Row whose image each row shows, int64 [N]; the true label of what is seen is that row's."""
        return self.canaries.shown if self.canaries is not None else np.arange(len(self.label))

    def describe(self) -> list[str]:
        """The view in lines for a log; none for the whole set with its true labels."""
        lines = [
            f"{step.setting}: {step.after:,} of {step.before:,} samples "
            f"({step.smallest_class:,} to {step.largest_class:,} a class)"
            for step in self.steps
        ]
        if self.noise:
            lines.append(f"{self.noise}: {self.wrong:,} of {len(self.ids):,} labels are wrong ({self.rate:.2%})")
        if self.canaries is not None:
            counts = ", ".join(f"{count:,} {kind}" for kind, count in self.canaries.counts().items())
            lines.append(f"canaries: {counts} of {len(self.ids):,} samples")
        return lines

    @property
    def rate(self) -> float:
        """Share of wrong labels in the view."""
        return self.wrong / max(1, len(self.ids))

    @property
    def sha256(self) -> str:
        """Hash of samples, labels and canaries: tells whether a run goes on with the view that it began with."""
        digest = hashlib.sha256(len(self.ids).to_bytes(8, "little"))
        planted = (self.canaries.kind, self.canaries.shown) if self.canaries is not None else ()
        for column in (self.ids, self.label, *planted):
            digest.update(np.ascontiguousarray(column, "<i8").tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """The same as numbers, for a file of the run."""
        planted = {"canaries": self.canaries.counts()} if self.canaries is not None else {}
        return {
            "samples": len(self.ids),
            "steps": [vars(step) for step in self.steps],
            "labels": self.noise or "true",
            "wrong_labels": self.wrong,
            **planted,
        }


def make_view(beton: Beton, options: ViewOptions) -> View:
    """The samples and labels that ``options`` choose.

    Raises:
        UserError: a step leaves nothing, the card lists no duplicates, or the label file does not fit.
    """
    rows, steps = np.arange(beton.num_samples), []
    for setting, choose in _choices(beton, options):
        kept = choose(rows)
        if not len(kept):
            raise UserError(f"{setting} leaves no sample of {beton.path}; expected a setting that keeps some")
        counts = np.bincount(beton.label[kept], minlength=len(beton.card.classes))
        steps.append(Step(setting, len(rows), len(kept), int(counts.min()), int(counts.max())))
        rows = kept
    label, noise = beton.label, ""
    if options.label_file is not None:
        label, noise = labels_from_file(beton, options.label_file, options.label_key)
    elif options.label_noise > 0:
        label = given_labels(beton, options.label_noise, options.noise_kind)
        noise = f"data.label_noise {options.label_noise} ({options.noise_kind})"
    canaries, true = None, beton.label
    if any(options.canaries):
        canaries, label = plant(beton, rows, label, options.canaries)
        true = true[canaries.shown]
    return View(rows, label, tuple(steps), noise, int((label[rows] != true[rows]).sum()), canaries)


def _choices(beton: Beton, options: ViewOptions) -> list[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Each step that does anything, in order: what it is called, and rows (sorted) to the rows that it keeps."""
    chosen: list[tuple[str, Callable[[np.ndarray], np.ndarray]]] = []
    if options.drop_duplicates:
        dropped = dropped_samples(beton)
        chosen.append(("data.drop_duplicates", lambda rows: rows[~np.isin(beton.index[rows], dropped)]))
    if options.fraction < 1:
        share = _fraction_of_classes if options.fraction_per_class else _fraction
        setting = f"data.fraction {options.fraction}" + (" of each class" if options.fraction_per_class else "")
        chosen.append((setting, lambda rows: share(beton, rows, options.fraction)))
    if options.imbalance > 1:
        chosen.append((f"data.imbalance {options.imbalance}", lambda rows: _long_tail(beton, rows, options.imbalance)))
    if options.member_fraction < 1 or options.members == "non-members":
        words = named_word(beton.card.words_seed, beton.index, "member", beton.card.split)
        members = member_mask(words, options.member_fraction)
        side = members if options.members == "members" else ~members
        setting = f"data.member_fraction {options.member_fraction} ({options.members})"
        chosen.append((setting, lambda rows: rows[side[rows]]))
    return chosen


def _subset_order(beton: Beton, rows: np.ndarray) -> np.ndarray:
    """``rows`` in the order of their subset words, of which every choice by size takes the beginning."""
    words = random_bits(beton.card.words_seed, f"{beton.card.split}.subset", beton.index[rows], 2)
    return rows[np.lexsort((beton.index[rows], words[:, 1], words[:, 0]))]


def _fraction(beton: Beton, rows: np.ndarray, fraction: float) -> np.ndarray:
    return np.sort(_subset_order(beton, rows)[: max(1, round(fraction * len(rows)))])


def _fraction_of_classes(beton: Beton, rows: np.ndarray, fraction: float) -> np.ndarray:
    counts = np.bincount(beton.label[rows], minlength=len(beton.card.classes))
    return _beginnings(beton, rows, np.maximum(1, np.rint(fraction * counts)))


def _long_tail(beton: Beton, rows: np.ndarray, imbalance: float) -> np.ndarray:
    classes = len(beton.card.classes)
    largest = np.bincount(beton.label[rows], minlength=classes).max()
    place = np.arange(classes) / max(1, classes - 1)
    return _beginnings(beton, rows, np.maximum(1, np.rint(largest * imbalance**-place)))


def _beginnings(beton: Beton, rows: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Of each class c the first ``sizes[c]`` of ``rows`` in the order of the subset words, sorted."""
    ordered = _subset_order(beton, rows)
    label = beton.label[ordered]
    by_class = np.argsort(label, kind="stable")  # keeps the order within a class
    starts = np.searchsorted(label[by_class], np.arange(len(sizes)))
    rank = np.empty(len(ordered), np.int64)
    rank[by_class] = np.arange(len(ordered)) - starts[label[by_class]]
    return np.sort(ordered[rank < sizes[label]])
