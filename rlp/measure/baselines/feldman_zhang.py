"""Memorisation as Feldman and Zhang estimate it: what a sample's label gains from the sample's being trained on.

    mem(i) = P[f(x_i) = y_i | i in S] - P[f(x_i) = y_i | i not in S],  S a random 70% of the training set

(Feldman and Zhang, "What neural networks memorize and why", NeurIPS 2020, arXiv 2008.03703;
Feldman, "Does learning require memorization?", STOC 2020). y is the given label. The two probabilities are shares of
copies of the run, each trained from fresh weights on a subset of its own. The paper has 2,000 to 4,000 copies; with 60
the standard error of one score is about 0.08 (0.13 at most), and the split-half ρ says how far ranks can be trusted.

Cost: 60 times 0.7 of the run's training, kept in the run's cache. Non-members have no score: no copy trains on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
import zipfile

import numpy as np

from rlp.errors import UserError
from rlp.measure.agreement import over_runs, spearman
from rlp.measure.baselines.ensemble import lacking
from rlp.measure.baselines.interface import Finding, Findings, SampleScore, Subject
from rlp.measure.baselines.planted import planted_findings
from rlp.measure.baselines.pool import Pool
from rlp.measure.baselines.retrain import AT_ONCE, retrain
from rlp.measure.estimate import mean_estimate
from rlp.philox import random_bits
from rlp.seeding import named_seed

COPIES, SHARE = 60, 0.7
NAME = "feldman_zhang"


@dataclass(frozen=True)
class Memorisation:
    """Scores of all training samples of a run.

    Attributes:
        ids: int64 ``[N]``.
        value, error: the score and its standard error, float64 ``[N]``; NaN where no copy has, or all have, the sample.
        halves: the score from each half of the copies, float64 ``[2, N]``.
    """

    ids: np.ndarray
    value: np.ndarray
    error: np.ndarray
    halves: np.ndarray


def measure(
    subject: Subject, *, copies: int = COPIES, share: float = SHARE, epochs: int = 0, at_once: int = AT_ONCE
) -> Findings:
    """Score ``feldman_zhang`` of members in [-1, 1]; rows: mean, standard error, split-half ρ, AUROC of planted truth.

    Args:
        subject: the run; copies train on all of its members, whichever the subject has.
        copies: networks, at least 4.
        share: of the members in each subset, between 0 and 1.
        epochs: of each copy; 0 for the run's.
        at_once: copies trained together.

    Raises:
        UserError: too few copies, or a share that leaves none in or out.
    """
    found = memorisation(subject, copies=copies, share=share, epochs=epochs, at_once=at_once)
    rows = np.searchsorted(found.ids, subject.members.ids)
    value, error, halves = found.value[rows], found.error[rows], found.halves[:, rows]
    scored = np.isfinite(value)
    if not scored.any():
        raise UserError(f"no member is both in and out of the subsets of {copies} copies; expected more copies")
    settings = f"{copies} copies, subsets of {share:.0%}, {epochs or subject.run.config.train.epochs} epochs"
    settings += lacking(subject.run)
    both = np.isfinite(halves).all(axis=0)
    rho = over_runs(spearman, [(halves[0, both], halves[1, both])], subject.seed)
    estimates = {
        "mean": mean_estimate([value[scored][None]]),
        "standard error": mean_estimate([error[scored][None]]),
        **({"split-half Spearman": rho} if rho is not None else {}),
    }
    findings = [
        Finding(
            measure=NAME,
            quantity=quantity,
            value=estimate,
            non_members=None,
            chance=None if quantity == "standard error" else 0.0,
            count=estimate.samples,
            settings=settings,
        )
        for quantity, estimate in estimates.items()
    ]
    score = SampleScore(name=NAME, group="members", ids=subject.members.ids, values=value)
    findings += planted_findings(subject, NAME, NAME, value, settings=settings)
    return Findings(scores=(score,), rows=tuple(findings))


def memorisation(
    subject: Subject, *, copies: int = COPIES, share: float = SHARE, epochs: int = 0, at_once: int = AT_ONCE
) -> Memorisation:
    """Scores of all training samples of the subject's run, with standard errors; see :func:`measure`."""
    run, members = subject.run, subject.run.groups["members"]
    if copies < 4:
        raise UserError(f"Feldman-Zhang with {copies} copies; expected at least 4, two in each half")
    subsets = random_subsets(subject.seed, members.split, members.ids, copies, share)
    last = epochs or run.config.train.epochs
    asked = {"margin": [last]}
    seed = named_seed(subject.seed, NAME)
    found = retrain(
        run, Pool.of(run, [members]), subsets, asked, seed=seed, epochs=last, at_once=at_once, what="subset models"
    )
    correct = found["margin"][:, 0] > 0
    value, error = gain(correct, subsets)
    halves = np.stack([gain(correct[half::2], subsets[half::2])[0] for half in (0, 1)])
    return Memorisation(members.ids, value, error, halves)


def random_subsets(seed: int, split: str, ids: np.ndarray, copies: int, share: float) -> np.ndarray:
    """Subsets of one size, bool ``[M, N]``: a function of (seed, sample id, copy).

    Raises:
        UserError: the share leaves no sample in, or none out.
    """
    size = round(share * len(ids))
    if not 0 < size < len(ids):
        raise UserError(f"subsets are to hold {share:g} of {len(ids)} samples; expected some in and some out")
    words = random_bits(seed, f"{split}.subset models", ids, copies).T
    subsets = np.zeros((copies, len(ids)), bool)
    np.put_along_axis(subsets, np.argsort(words, axis=1, kind="stable")[:, :size], True, axis=1)
    return subsets


def gain(correct: np.ndarray, subsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of right copies with the sample less that without it, and the standard error of the difference.

    The error counts one more right and one more wrong copy on either side (Agresti and Caffo 2000), since a few copies
    that agree are no proof that all do.

    Args:
        correct: which copies are right on which samples, bool ``[M, N]``.
        subsets: which trained on which, bool ``[M, N]``.

    Returns:
        float64 ``[N]`` each, NaN for samples that all or none of the copies trained on.
    """
    sides = subsets, ~subsets
    with np.errstate(invalid="ignore", divide="ignore"):
        counts = [side.sum(axis=0) for side in sides]
        right = [(side & correct).sum(axis=0) for side in sides]
        value = right[0] / counts[0] - right[1] / counts[1]
    smooth = [(r + 1) / (n + 2) for r, n in zip(right, counts, strict=True)]
    error = np.sqrt(sum(p * (1 - p) / (n + 2) for p, n in zip(smooth, counts, strict=True)))
    return value, np.where(np.isfinite(value), error, np.nan)


def load_published(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Scores that Feldman and Zhang have published for CIFAR-100 and ImageNet, from their .npz file.

    Of CIFAR-100 ids are rows of the original training set, which is also the order of torchvision's and of ours. The
    rows of ImageNet's file are in an order of their own, told by ``tr_filenames``; ids are places in the sorted file
    names, the order of torchvision's ``ImageFolder`` (folders are the synsets, which file names begin with).

    Args:
        path: ``cifar100_infl_matrix.npz`` or ``imagenet_index.npz`` from the paper's site.

    Returns:
        ids int64 ``[N]``, ascending, and scores float64 ``[N]``.

    Raises:
        UserError: no such file, no .npz, or arrays that are not theirs.
    """
    arrays = _arrays(Path(path), ("tr_mem", "tr_labels", "tr_filenames"))
    score = arrays.get("tr_mem")
    if score is None:
        raise UserError(f"{path} has no array 'tr_mem'; expected the memorisation file of Feldman and Zhang")
    if score.ndim != 1 or score.dtype.kind != "f" or not len(score) or not np.isfinite(score).all():
        raise UserError(
            f"{path}: 'tr_mem' is {score.dtype} {list(score.shape)}; expected finite numbers, one for each sample"
        )
    if np.abs(score).max() > 1 + 1e-6:
        raise UserError(f"{path}: 'tr_mem' goes up to {np.abs(score).max():.3g}; expected differences of probabilities")
    for name in ("tr_labels", "tr_filenames"):
        if name in arrays and arrays[name].shape != score.shape:
            raise UserError(f"{path}: '{name}' is {list(arrays[name].shape)}, and 'tr_mem' {list(score.shape)}")
    names = arrays.get("tr_filenames")
    order = np.arange(len(score)) if names is None else np.argsort(names, kind="stable")
    return np.arange(len(score)), score[order].astype(np.float64)


def _arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that a .npz file has; the large ones beside them are not read."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in names if name in content}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected the published .npz file") from None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as .npz of plain arrays: {error}") from None
