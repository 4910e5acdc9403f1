"""Accuracy of a network whose activations at a tap are replaced by ones of low rank, batch by batch of one label."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rlp.errors import UserError
from rlp.low_rank.activations import activations, as_matrices, replaced
from rlp.low_rank.factors import few_units, non_negative, principal
from rlp.models.modes import evaluating
from rlp.models.taps import Tap, layout_of, resolve_taps
from rlp.seeding import named_seed

RANKS = (1, 2, 4, 8)
KINDS = ("nmf", "pca", "ablation")
FEWEST = 10
"""Samples of a label below which it is left out."""
HELD = 2**26
"""Activations that are factorised at a time."""


class NegativeActivations(UserError):
    """The tap does not lie behind a ReLU."""


def area(by_rank: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
    """Mean over log k by the trapezoid rule, ``[..., len(ranks)]`` to ``[...]``."""
    place = np.log(ranks)
    return np.trapezoid(by_rank, place, axis=-1) / (place[-1] - place[0])


@torch.no_grad()
def accuracy_by_rank(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    tap: str,
    kinds: Sequence[str] = KINDS,
    *,
    ranks: Sequence[int] = RANKS,
    size: int = 100,
    restarts: int = 3,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """How often each sample keeps its label with activations of rank k, by kind float64 ``[N, len(ranks)]``.

    A sample of several batches has the mean over them, one of none NaN. ``kinds`` of :data:`KINDS`; what else is
    given or goes wrong is as for :func:`nmf_area`.
    """
    if len(ranks) < 2 or list(ranks) != sorted({*ranks}) or ranks[0] < 1:
        raise UserError(f"the ranks are {[*ranks]}; expected two or more from 1 on, ascending")
    place = _tap(model, tap)
    rows = batches_of(labels.cpu().numpy(), size)
    random = torch.Generator().manual_seed(named_seed(seed, f"baselines.nmf.{tap}"))
    total = {kind: np.zeros((len(labels), len(ranks))) for kind in kinds}
    count = np.zeros(len(labels))
    with evaluating(model):
        step = max(1, HELD // activations(model, place, images[rows[0]]).numel())
        for part in tqdm(np.split(rows, range(step, len(rows), step)), f"ranks at {tap}", disable=None, leave=False):
            shown = images[part.ravel()]
            whole = checked_activations(model, place, shown)
            matrices, back = as_matrices(whole, len(part), layout_of(model).channels_last_maps)
            np.add.at(count, part.ravel(), 1)
            for kind in kinds:
                for number, lower in enumerate(_lowered(matrices, kind, ranks, restarts, random)):
                    right = _answers(model, place, shown, back(lower)) == labels[part.ravel()]
                    np.add.at(total[kind][:, number], part.ravel(), right.cpu().numpy())
    with np.errstate(invalid="ignore"):
        return {kind: sums / count[:, None] for kind, sums in total.items()}


def nmf_area(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    tap: str,
    *,
    ranks: Sequence[int] = RANKS,
    size: int = 100,
    restarts: int = 3,
    seed: int = 0,
) -> float:
    """Area under the accuracy over log k at non-negative rank k: 0 to 1, the larger the less is memorised.

    It reads training data alone, so it can say when to stop training without a validation set.

    Args:
        model: the network; it runs in eval mode, and has its modes back afterwards.
        images: ``[N, 3, H, W]`` on its device, ready for it.
        labels: given labels, int64 ``[N]``.
        tap: a module behind a ReLU.
        ranks: k, ascending, two or more.
        size: samples of one label that are factorised together, at most.
        restarts: of the factorisation.
        seed: of its initial values.

    Raises:
        UserError: activations are negative, the tap cannot be replaced, or no label has ten samples.
    """
    found = accuracy_by_rank(model, images, labels, tap, ("nmf",), ranks=ranks, size=size, restarts=restarts, seed=seed)
    return float(np.nanmean(area(found["nmf"], ranks)))


def check_tap(model: nn.Module, tap: str, example: Tensor, key: str) -> None:
    """Whether activations at a tap can be replaced by products of non-negative factors.

    Args:
        model: the network, which may be untrained.
        tap: its name.
        example: images ``[B, 3, H, W]`` of the right size, on its device; noise is shown in their place.
        key: the setting to blame.

    Raises:
        UserError: no module or several are named, or one that is not behind a ReLU.
    """
    random = torch.Generator().manual_seed(0)
    noise = torch.randn((2, *example.shape[1:]), generator=random).to(example)
    with torch.no_grad(), evaluating(model):
        try:
            checked_activations(model, _tap(model, tap), noise)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error


def _tap(model: nn.Module, name: str) -> Tap:
    found = resolve_taps(model, [name])
    if len(found) > 1:
        raise UserError(f"'{name}' names {len(found)} taps, {found[0].name} and others; expected one")
    return found[0]


def checked_activations(model: nn.Module, tap: Tap, images: Tensor) -> Tensor:
    """What passes at a tap behind a ReLU, as :func:`rlp.low_rank.activations.activations` has it.

    Raises:
        NegativeActivations: some of it is negative.
    """
    found = activations(model, tap, images)
    if float(found.min()) < 0:
        raise NegativeActivations(
            f"activations at tap '{tap.name}' go down to {float(found.min()):.3g}; expected a tap behind a ReLU, for "
            "non-negative factors have no negative products (GELU and sums of blocks are negative in part)"
        )
    return found


def _answers(model: nn.Module, tap: Tap, images: Tensor, instead: Tensor) -> Tensor:
    """Classes that the network gives with other activations at the tap, int64 ``[B]``."""
    with replaced(model, tap, lambda _: instead):
        return model(images).argmax(1)


def batches_of(labels: np.ndarray, size: int) -> np.ndarray:
    """Batches of one label and of one size, int64 ``[b, n]``: rows of ``labels``.

    n is ``size``, or what the rarest label has, if it has :data:`FEWEST`; rarer labels are left out. Where a label
    does not divide, batches overlap, so that each of its samples lies in one.

    Raises:
        UserError: no label has enough samples.
    """
    found = [rows for c in np.unique(labels) if len(rows := np.flatnonzero(labels == c)) >= FEWEST]
    if not found:
        raise UserError(f"no given label has {FEWEST} samples; expected more samples, or fewer classes")
    n = min(size, *(len(rows) for rows in found))
    batches = []
    for rows in found:
        starts = np.linspace(0, len(rows) - n, -(-len(rows) // n)).astype(int)
        batches += [rows[start : start + n] for start in starts]
    return np.stack(batches)


def _lowered(
    matrices: Tensor, kind: str, ranks: Sequence[int], restarts: int, random: torch.Generator
) -> Iterator[Tensor]:
    """The matrices at each rank."""
    if kind == "pca":
        yield from principal(matrices, list(ranks))
    for k in ranks if kind != "pca" else ():
        if kind == "nmf":
            yield non_negative(matrices, k, random, restarts=restarts)
        else:
            yield few_units(matrices, k, random)
