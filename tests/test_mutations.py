"""Faults planted in the kernels: the checks that every path goes through must find each one.

A mutation replaces one piece of text of one file; the package's other modules are imported anew on top of it, so that
what is tested is the mutated code alone, in a process of its own: a faulty kernel may write where nothing is its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
import importlib.util
import os
from pathlib import Path
import shutil
import signal
import sys
import time
import warnings

import pytest
import torch

import rlp.kernels
from tests.loss_cases import check_path

pytest.importorskip("triton")
KERNELS = Path(rlp.kernels.__file__).parent
LASTING = {f"rlp.kernels.{name}" for name in ("ops", "problem", "reference", "loss")}
"""Modules that stay as they are: what the checks themselves stand on, and the operators, which register once."""


@dataclass(frozen=True)
class Mutation:
    """``old`` becomes ``new`` in a file; ``path`` must then be found wrong."""

    fault: str
    file: str
    old: str
    new: str
    path: str
    triton: bool = True


MUTATIONS = [
    Mutation("padding columns count in the mean", "softmax_triton",
             "mask=known & (lane < n - begin), other=0.0)", "mask=known & (lane < n - begin), other=1.0)", "whole"),
    Mutation("the label is not left out of the sum", "softmax_triton",
             "(deep == mark - begin) | (deep >= n - begin)", "deep >= n - begin", "whole"),
    Mutation("padding columns count in the sum", "softmax_triton",
             "(deep == mark - begin) | (deep >= n - begin)", "deep == mark - begin", "whole"),
    Mutation("the last column is left out", "softmax_triton",
             "(deep == mark - begin) | (deep >= n - begin)", "(deep == mark - begin) | (deep + 1 >= n - begin)",
             "whole"),
    Mutation("the label is looked for in each block", "softmax_triton",
             "(deep == mark - begin) | (deep >= n - begin)", "(deep == mark) | (deep >= n - begin)", "whole"),
    Mutation("the sum is not rescaled when the maximum moves", "softmax_triton",
             "s = shrink * s + tl.sum(e, 0)", "s = s + tl.sum(e, 0)", "whole"),
    Mutation("the entropy's sum misses the moved maximum", "softmax_triton",
             "t = shrink * (t + tl.maximum(moved, -2000.0)[:, None] * s)", "t = shrink * t", "whole"),
    Mutation("heads' stride forgotten", "softmax_triton",
             "start = row * row_units * UNIT + head * head_units * UNIT", "start = row * row_units * UNIT", "whole"),
    Mutation("a label before the piece counts as its first", "softmax_triton",
             "tl.where((label >= 0) & (label < n), label, -1)", "tl.where(label < n, tl.maximum(label, 0), -1)",
             "by_columns"),
    Mutation("residual shifted by 1 / n", "softmax_triton", "tl.full([], n - 1, dtype)", "tl.full([], n, dtype)",
             "by_rows"),
    Mutation("the mean's share taken of the piece's labels", "softmax_triton",
             "_column(g_z_mean, part, there) / num_labels", "_column(g_z_mean, part, there) / n", "by_columns"),
    Mutation("1 - p becomes p", "triton_math", "tl.exp(z_t - lse_rest)", "tl.exp(lse_rest - z_t)", "whole"),
    Mutation("the label's own gradient has the wrong sign", "triton_math", "is_label, -1.0", "is_label, 1.0", "whole"),
    Mutation("the entropy's gradient without its mean", "triton_math", "+ entropy_rest)", ")", "whole"),
    Mutation("every chunk starts the sum anew", "by_rows", "parts[:3]], start == 0", "parts[:3]], True", "by_rows"),
    Mutation("the shift is not put back", "by_rows", "torch.addcmul(shift,", "torch.addcmul(0 * shift,", "by_rows"),
    Mutation("pieces merged without their sizes", "by_columns", "count / sum(counts)", "1 / len(counts)",
             "by_columns", triton=False),
    Mutation("the fit loss is summed, not averaged", "whole", "upstream.fit / problem.batch", "upstream.fit", "whole"),
    Mutation("the sums of attention are not rescaled", "grouped_kernels", "total * shrink", "total", "grouped"),
    Mutation("the mean of the weight is not stored", "grouped_kernels", "there | (is_mean & (first == start))", "there",
             "grouped"),
    Mutation("a gap between the blocks of a class", "grouped_kernels",
             "(slot - start // ROWS - low) * ROWS", "(slot - start // ROWS - low) * PLACES", "grouped"),
    Mutation("the bias of another head", "grouped_kernels", "bias + one * n", "bias + c * n", "grouped"),
    Mutation("too few blocks for small classes", "grouped",
             "problem.batch // rows + problem.weight.shape[1]", "triton.cdiv(problem.batch, rows)", "grouped"),
    Mutation("rows of other classes in the weight gradient", "grouped_kernels",
             "there = position < end\n        row", "there = position < tl.minimum(end + 1, batch)\n        row",
             "grouped"),
    Mutation("rows of all classes in the weight gradient", "tiny", "mask=mine, other=-1) == c\n",
             "mask=mine, other=-1) >= 0\n", "tiny"),
    Mutation("features of the first tile alone", "tiny", "at = begin + d", "at = d", "tiny"),
    Mutation("the class's weight taken from class 0", "tiny", "tile = weight + c * w_class", "tile = weight", "tiny"),
    Mutation("shared features' gradient of one head", "tiny", "range(heads if SHARED else 1)", "range(1)", "tiny"),
]  # fmt: skip


@contextmanager
def imported_from(folder: Path) -> Iterator[None]:
    """The modules of `rlp.kernels`, but those that last, from another folder; back to the old ones at the end."""
    before = {name: module for name, module in sys.modules.items() if name.startswith("rlp.kernels.")}
    changing = {name: module for name, module in before.items() if name not in LASTING}
    attributes, path = dict(vars(rlp.kernels)), rlp.kernels.__path__

    def forget() -> None:
        for name in [name for name in sys.modules if name.startswith("rlp.kernels.") and name not in LASTING]:
            del sys.modules[name]
            rlp.kernels.__dict__.pop(name.rpartition(".")[2], None)

    forget()
    rlp.kernels.__path__ = [str(folder)]
    try:
        yield
    finally:
        forget()
        rlp.kernels.__path__ = path
        sys.modules.update(changing)
        rlp.kernels.__dict__.update(attributes)


FOUND, MISSED, FAILED = 0, 1, 2
PATIENCE_S = 300


def in_child(work: Callable[[], None]) -> int:
    """Status of a child process: FOUND where ``work`` fails an assertion, MISSED where it does not; < 0 by a signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads: none is used
        child = os.fork()
    if child == 0:
        status = FAILED
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            work()
            status = MISSED
        except AssertionError:
            status = FOUND
        finally:
            os._exit(status)
    end = time.monotonic() + PATIENCE_S
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(child, 9)
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's folder, to be changed."""
    return Path(shutil.copytree(KERNELS, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.fault)
def test_a_planted_fault_is_found(mutation: Mutation, copy: Path) -> None:
    file = copy / f"{mutation.file}.py"
    text = file.read_text("utf-8")
    assert text.count(mutation.old) == 1, (
        f"{mutation.file}.py holds the text to replace {text.count(mutation.old)} times"
    )
    file.write_text(text.replace(mutation.old, mutation.new), "utf-8")
    with imported_from(copy):
        assert importlib.util.find_spec(f"rlp.kernels.{mutation.file}").origin == str(file)  # pyright: ignore
        status = in_child(lambda: check_path(mutation.path, mutation.triton))
    # A child that a signal ended was found out too, unless it never came to an end.
    assert status == FOUND or status in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)


def test_a_child_tells_how_its_work_ended() -> None:
    def fails() -> None:
        raise AssertionError

    assert in_child(fails) == FOUND
    assert in_child(lambda: None) == MISSED
    assert in_child(lambda: [][0]) == FAILED
    assert in_child(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM


@pytest.mark.parametrize(("path", "triton"), sorted({(mutation.path, mutation.triton) for mutation in MUTATIONS}))
def test_without_a_fault_nothing_is_found(path: str, triton: bool, copy: Path) -> None:
    with imported_from(copy):
        check_path(path, triton)


def test_the_old_modules_come_back(copy: Path) -> None:
    from rlp.kernels import whole

    with imported_from(copy):
        assert sys.modules.get("rlp.kernels.whole") is None
    assert sys.modules["rlp.kernels.whole"] is whole
