"""Sums on the device, and the watch that finds the first non-finite loss."""

import pytest
import torch

from rlp.meters import FiniteWatch, NonFiniteError, Sums


def test_sums_add_up_in_double_precision():
    sums = Sums(["a", "b"], torch.device("cpu"))
    for _ in range(1000):
        sums.add(torch.tensor(0.1), 1e8)
    read = sums.read()
    assert read["a"] == pytest.approx(100 * float(torch.tensor(0.1)) * 10, rel=1e-12)
    assert read["b"] == 1e11
    sums.reset()
    assert sums.read() == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_step_is_named(bad):
    watch = FiniteWatch(["class loss", "penalty", "fit loss at tap layer1"], torch.device("cpu"), rank=0)
    watch.watch(torch.tensor([1.0, 2.0, 3.0]), 6)
    watch.check()
    watch.watch(torch.tensor([1.0, 0.0, bad]), 7)
    watch.watch(torch.tensor([bad, 0.0, bad]), 8)
    watch.watch(torch.tensor([1.0, 0.0, 1.0]), 9)  # it stays remembered
    with pytest.raises(NonFiniteError, match="fit loss at tap layer1 became NaN or infinite at step 7 on rank 0"):
        watch.check()
