"""Exact evaluation of a network and its heads: clean images, eval mode, each sample once on any number of ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, closing
import math
from typing import Any

import torch
from torch import nn
import torch.nn.functional as F

from rlp.data.augment import Augment
from rlp.data.batch import Loader
from rlp.distributed import World
from rlp.headplan import words_of
from rlp.meters import NonFiniteError, Sums
from rlp.models import RandomLabelHeads, TapMetrics
from rlp.runlog import RunLog


@torch.no_grad()
def evaluate(
    model: nn.Module,
    heads: RandomLabelHeads | None,
    loader: Loader,
    augment: Augment,
    world: World,
    autocast: Callable[[], AbstractContextManager],
    log: RunLog,
    split: str,
) -> tuple[dict[str, Any], list[TapMetrics]]:
    """Mean class loss and accuracy of a loader's samples, their count, and the heads' readings of mode ``eval``.

    The ranks' numbers of batches may differ by one, so the loop itself exchanges nothing between them.

    Raises:
        NonFiniteError: the loss is NaN or infinite (on every rank, since it is the sum over all).
    """
    model.eval()
    sums = Sums(["loss", "correct", "count"], world.device)
    batches = loader.epoch(0)
    with closing(batches), log.progress(loader.steps, 0, f"evaluate {split}") as bar:
        for batch in batches:
            image = augment(batch.image, batch.index, 0, train=False)
            with autocast():
                logits = model(image).float()
                if heads is not None:
                    heads.evaluate(words=words_of(batch, loader.card, heads), classes=batch.label)
            loss = F.cross_entropy(logits, batch.label, reduction="sum")
            sums.add(loss, (logits.argmax(dim=1) == batch.label).sum(), float(len(batch.label)))
            bar.advance()
    total = sums.read()
    if not math.isfinite(total["loss"]):
        raise NonFiniteError(
            f"the {split} loss is {total['loss']} in evaluation; expected a finite number (start again with a lower "
            "learning rate or λ)"
        )
    count = int(total["count"])
    metrics = {"loss": total["loss"] / count, "accuracy": total["correct"] / count, "count": count}
    return metrics, heads.metrics("eval") if heads is not None else []
