"""What the best epoch is known by: accuracy on data.val or, of training samples alone, the area at ``train.nmf_tap``.

The area is that of :func:`rlp.low_rank.curve.nmf_area` (Collins, Bigdeli, Süsstrunk, arXiv 1810.03372, who stop where
it is largest). Which samples it is read of is our choice: up to :data:`PER_LABEL` of each of up to :data:`LABELS` given
labels that have ten, evenly spread over the training set, as evaluation shows them.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlp.data.batch import Loader
from rlp.data.view import View
from rlp.errors import UserError
from rlp.low_rank.curve import FEWEST, nmf_area

LABELS, PER_LABEL, RESTARTS = 10, 100, 1
AREA = "nmf_area"
"""Key of an epoch's row."""


def score_of(row: dict[str, Any]) -> float:
    """What the best epoch has most of, from an epoch's row of metrics.jsonl."""
    return row.get(AREA, row["val"]["accuracy"])


def few_of_each_label(view: View) -> View:
    """The samples of a training set that the area is read of.

    Raises:
        UserError: no label has enough of them.
    """
    label = view.label[view.ids]
    found, counts = np.unique(label, return_counts=True)
    if counts.max(initial=0) < FEWEST:
        raise UserError(f"train.nmf_tap: no given label has {FEWEST} samples; expected more samples, or fewer classes")
    labels = _spread(found[counts >= FEWEST], LABELS)
    rows = [_spread(view.ids[label == value], PER_LABEL) for value in labels]
    return replace(view, ids=np.sort(np.concatenate(rows)))


def _spread(values: np.ndarray, count: int) -> np.ndarray:
    """At most so many of them, evenly spread."""
    return values[np.linspace(0, len(values) - 1, min(count, len(values))).astype(int)]


class NmfArea:
    """The area at one tap of a network, of the same samples each time.

    Args:
        loader: of the samples of :func:`few_of_each_label`, all on this rank; it is read once and closed.
        augment: as :class:`rlp.data.augment.Augment`, of which evaluation's part is used.
        tap: behind a ReLU.
        seed: of the factorisation.
    """

    def __init__(self, loader: Loader, augment: Callable[..., Tensor], tap: str, seed: int) -> None:
        with closing(loader):
            batches = list(loader.epoch(0))
        self._image, self._label, self._index = (
            torch.cat([getattr(batch, name) for batch in batches]) for name in ("image", "label", "index")
        )
        self._augment, self._tap, self._seed = augment, tap, seed

    def __call__(self, model: nn.Module) -> float:
        """From 0 to 1; the network has its modes back afterwards.

        Raises:
            UserError: activations are negative.
        """
        image = self._augment(self._image, self._index, 0, train=False)
        return nmf_area(model, image, self._label, self._tap, restarts=RESTARTS, seed=self._seed)
