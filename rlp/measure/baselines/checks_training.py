"""Checks of training modes: on digits with 40% of wrong labels, mixup and Deep Bilevel Learning beat plain training.

Each mode is held to plain training by the very recipe: rate, momentum and length alone decide how much a network fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rlp.data.batch import Batch, Schedule
from rlp.errors import UserError
from rlp.labels import noisy_labels, random_words
from rlp.measure.baselines.check import CheckResult
from rlp.measure.estimate import mean_estimate
from rlp.models import build_model
from rlp.optim import build_optimizer, parameter_groups, set_lr
from rlp.progress import Progress
from rlp.regularisers.bilevel import Bilevel
from rlp.regularisers.class_loss import ClassLoss, Plain
from rlp.regularisers.mixing import Mixing
from rlp.seeding import named_seed

TRAIN, NOISE, CLASSES, BATCH, SPLITS = 800, 0.4, 10, 64, 8
EPOCHS, SMALL_EPOCHS = 100, 50

_CARD = "card: 8 px digits, 4 x 256 ReLU MLP, 800 samples, 40% of wrong labels"


@dataclass(frozen=True)
class Recipe:
    """A learning rate, what it is multiplied by after every epoch, and weight decay; SGD with momentum 0.9."""

    lr: float
    factor: float = 1.0
    weight_decay: float = 0.0


CONSTANT, DECAYING = Recipe(0.05), Recipe(0.1, 0.95, 4e-3)
"""Of configs/digits_mlp.yaml, and the rates of Jenni and Favaro, with a weight decay that was chosen to match."""


@dataclass(frozen=True)
class Trained:
    """Which of the N test samples are answered rightly, bool ``[N]``, and the share of wrong training labels fitted."""

    right: np.ndarray
    fitted: float


def check_mixup(seeds: Sequence[int] = (0, 1, 2), small: bool = False) -> list[CheckResult]:
    """Plain about .665, α = 1 about .695, α = 8 about .794; half as many epochs where ``small``."""
    epochs = SMALL_EPOCHS if small else EPOCHS
    plain, one, eight = ([trained(seed, mode, CONSTANT, epochs) for seed in seeds] for mode in ("plain", "1", "8"))
    return [
        _accuracy("mixup", "plain", plain, (0.5, 0.72) if small else (0.6, 0.72), ".665"),
        _accuracy("mixup", "α = 1", one, (0.66, 0.85) if small else (0.66, 0.76), ".695"),
        _accuracy("mixup", "α = 8", eight, (0.76, 0.93) if small else (0.75, 0.86), ".794"),
        _gain("mixup", "α = 8", eight, plain),
    ]


def check_bilevel(seeds: Sequence[int] = (0, 1, 2), small: bool = False) -> list[CheckResult]:
    """About .848 against .665, with 12% of wrong labels fitted against all; half as many epochs where ``small``.

    The weight decay of the known figures is not told. With none it is .813 and 34% (3 seeds), so it was chosen.
    """
    epochs = SMALL_EPOCHS if small else EPOCHS
    modes = ("plain", "bilevel", "bilevel 1")
    plain, bilevel, mixed = ([trained(seed, mode, DECAYING, epochs) for seed in seeds] for mode in modes)
    return [
        _accuracy("bilevel", "plain, same rates", plain, (0.6, 0.72), ".665"),
        _accuracy("bilevel", "8 splits", bilevel, (0.8, 0.93) if small else (0.8, 0.9), ".848"),
        _gain("bilevel", "8 splits", bilevel, plain),
        _gain("bilevel", "8 splits, mixup α = 1", mixed, plain),
        _fitted("plain, same rates", plain, (0.8, 1.0) if small else (0.9, 1.0), "1.00"),
        _fitted("8 splits", bilevel, (0.0, 0.2), ".12"),
    ]


@cache
def trained(seed: int, mode: str, recipe: Recipe, epochs: int) -> Trained:
    """A network trained in a mode: ``plain``, α of mixup, ``bilevel``, or ``bilevel`` and an α.

    Raises:
        UserError: scikit-learn, which brings the digits, is not installed.
    """
    image, true, given = digits(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(named_seed(seed, "check.weights"))
        model = build_model("mlp", CLASSES, image.shape[-1], {})
    splits = SPLITS if mode.startswith("bilevel") else 0
    label = given[:TRAIN].numpy() if splits else None
    schedule = Schedule(np.arange(TRAIN), True, BATCH, seed, 0, 1, splits=splits, label=label)
    optimizer = build_optimizer("sgd", parameter_groups(model, recipe.weight_decay), recipe.lr)
    class_loss = _class_loss(mode, model, seed)
    for epoch in tqdm(range(epochs), desc=f"digits, {mode}, seed {seed}", disable=None, leave=False):
        set_lr(optimizer, recipe.lr * recipe.factor**epoch)
        for number, rows in enumerate(schedule.batches(epoch)):
            ids = torch.from_numpy(np.ascontiguousarray(rows))
            batch = Batch(image[ids], given[ids], ids, ids[:, None])
            class_loss.step(model, batch.image, batch, Progress(epoch=epoch, batch=number)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        answer = model(image).argmax(1)
    wrong = (given != true)[:TRAIN]
    fitted = (answer == given)[:TRAIN][wrong].double().mean().item()
    return Trained((answer == true)[TRAIN:].numpy(), fitted)


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images float32 ``[N, 3, 8, 8]`` of mean 0 and deviation 1, true and given labels int64; the first 800 train."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"the digits of the checks need scikit-learn, which cannot be imported: {error}") from error
    pixels, classes = map(np.asarray, load_digits(return_X_y=True))
    words = random_words(named_seed(seed, "check.digits"), np.arange(len(classes)), 3)
    order = np.argsort(words[:, 0], kind="stable")
    image = torch.from_numpy(pixels[order].reshape(-1, 8, 8)).float()
    image = ((image - image[:TRAIN].mean()) / image[:TRAIN].std())[:, None].expand(-1, 3, -1, -1)
    true = classes[order].astype(np.int64)
    given = noisy_labels(true, words[order, 1], words[order, 2], NOISE, CLASSES)
    return image.contiguous(), torch.from_numpy(true), torch.from_numpy(given)


def _class_loss(mode: str, model: nn.Module, seed: int) -> ClassLoss:
    alphas = [float(word) for word in mode.split() if word not in ("plain", "bilevel")]
    mixing = Mixing(alphas[0], seed) if alphas else None
    if mode.startswith("bilevel"):
        return Bilevel(list(model.parameters()), SPLITS, training=mixing)
    return mixing or Plain()


def _accuracy(
    measure: str, mode: str, runs: Sequence[Trained], expected: tuple[float, float], card: str
) -> CheckResult:
    found = mean_estimate([run.right[None].astype(float) for run in runs])
    quantity = f"test accuracy, {mode}"
    return CheckResult(measure=measure, quantity=quantity, found=found, expected=expected, source=f"{_CARD}: {card}")


def _gain(measure: str, mode: str, runs: Sequence[Trained], plain: Sequence[Trained]) -> CheckResult:
    """Test accuracy above plain training's, seed by seed; it must be above the spread of either over seeds."""
    found = mean_estimate([(a.right.astype(float) - b.right)[None] for a, b in zip(runs, plain, strict=True)])
    spreads = [float(np.ptp([run.right.mean() for run in group])) for group in (runs, plain)]
    return CheckResult(
        measure=measure,
        quantity=f"test accuracy above plain training, {mode}",
        found=found,
        expected=(max(spreads), 1.0),
        source="at least the range of either's accuracies over seeds",
    )


def _fitted(mode: str, runs: Sequence[Trained], expected: tuple[float, float], card: str) -> CheckResult:
    found = float(np.mean([run.fitted for run in runs]))
    quantity = f"wrong labels fitted, {mode}"
    return CheckResult(measure="bilevel", quantity=quantity, found=found, expected=expected, source=f"{_CARD}: {card}")
