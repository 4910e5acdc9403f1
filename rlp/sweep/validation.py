"""The samples that settings are chosen on: a part of the non-members, written as a .beton of its own.

The training file falls into members and non-members (``data.member_fraction``). Of the non-members the sweep takes a
share for selection, with their true labels; all that training sees of the world outside, after each epoch and for
early stopping, is this part. The other non-members are left for Δ, and the test split for the last reading: no trial
is given its path.
"""

import dataclasses
from pathlib import Path
import tempfile

import numpy as np

from rlp.build import view_options
from rlp.data.beton import Beton
from rlp.data.view import make_view
from rlp.errors import UserError
from rlp.measure.probe import FEWEST
from rlp.measure.run import Group
from rlp.reproduce.study import write_data
from rlp.schema import DataConfig
from rlp.sweep.plan import Sweep

PROBE_SEED = 0
"""Of the probe that reads κ and Δ. Its words order the non-members too: the first are its own, the last selection's."""


def non_members(data: DataConfig) -> Group:
    """The side of ``data.member_fraction`` that is not trained on."""
    beton = Beton.open(data.train)
    other = "members" if data.members == "non-members" else "non-members"
    view = make_view(beton, dataclasses.replace(view_options(data), members=other))
    return Group("non-members", "the other side of data.member_fraction", beton, view)


def reserved(group: Group, selection: float) -> int:
    """How many of the non-members are left for Δ where a share ``selection`` of them is for selection.

    Raises:
        UserError: too few samples on one of the two sides.
    """
    total = len(group.ids)
    kept = total - round(selection * total)
    if min(kept, total - kept) < FEWEST:
        raise UserError(
            f"selection is {selection}, which splits {total} non-members into {total - kept} and {kept}; expected at "
            f"least {FEWEST} on both sides"
        )
    return kept


def selection_rows(group: Group, selection: float) -> np.ndarray:
    """Rows of the training file that settings are chosen on, int64, ascending: those that the probe would take last."""
    kept = group.first(reserved(group, selection), PROBE_SEED)
    return np.setdiff1d(group.view.ids, kept.view.ids)


def write_validation(sweep: Sweep) -> int:
    """Write the validation .beton, unless it is there already; returns its number of samples.

    Raises:
        UserError: too few samples, images of different sizes, other samples are there, or writing failed.
    """
    group = non_members(sweep.base.data)
    beton, rows = group.beton, selection_rows(group, sweep.space.selection)
    # write_datasets.py writes a pair, and wants each class in both: the first file has one image of each.
    firsts = np.unique(beton.label, return_index=True)[1]
    arrays = {
        "x_train": beton.images(firsts),
        "y_train": beton.label[firsts],
        "x_val": beton.images(rows),
        "y_val": beton.label[rows],
        "classes": np.array(beton.card.classes),
    }
    files = {"train": str(sweep.validation.with_name("one-of-each-class.beton")), "val": str(sweep.validation)}
    _check_there(sweep.validation, arrays["x_val"], arrays["y_val"])
    sweep.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=sweep.out, prefix=".validation-") as folder:
        archive = Path(folder) / "validation.npz"
        np.savez(archive, **arrays)  # type: ignore[arg-type]
        options = ["--source.kind=npz", f"--source.path={archive}", "--image.mode=raw"]
        write_data([*options, f"--words.draws={beton.card.draws}"], files)
    return len(rows)


def _check_there(path: Path, images: np.ndarray, label: np.ndarray) -> None:
    """Refuse a file of other samples, which trials were chosen on; none, or what a killed write left, is written."""
    try:
        there = Beton.open(path)
    except UserError:
        return
    if not np.array_equal(there.label, label) or not np.array_equal(there.images(), images):
        raise UserError(
            f"{path} holds other samples than the sweep would choose on now; expected the selection and the training "
            "set to be as they were: give another --out"
        )
