"""Copies of a run's network, trained again many at once, each from its own weights on its own part of the samples.

The copies' weights lie in one tensor for each parameter, and one vectorised pass serves all of them (``torch.func``);
the optimiser is the run's own, which works number by number and so never mixes copies. Copies get the run's recipe:
optimiser, rate, momentum, weight decay, schedule, batch size, label smoothing, clipping, augmentation. What differs:

- class loss alone: no random-label heads, whatever λ was, and no other regulariser (:func:`lacking` names them);
- fresh weights, whatever the run started from, and all epochs, where the run may have stopped early;
- float32 without autocast or compilation;
- ``train.accumulate`` batches are one batch;
- ``data.image_size``: central crops in place of random ones. Mirrors, shifts and colours are as in the run, and in one
  epoch a sample is altered alike in all copies.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
import warnings

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
import torch.nn.functional as F

from rlp.data.batch import epoch_order
from rlp.data.geometry import fill_of, move
from rlp.errors import UserError
from rlp.measure.baselines.pool import Pool
from rlp.measure.run import Run
from rlp.optim import build_optimizer, lr_factor, parameter_groups, set_lr
from rlp.schema import TrainingConfig
from rlp.seeding import named_seed

LACKING = ("mixup", "manifold_mixup", "bilevel", "tied_dropout", "patience")
"""Keys of ``train`` that copies do without."""

_PROBE = 4  # images on which is tried whether a network can be vectorised


class Stack:
    """M networks of one architecture.

    Attributes:
        model: the architecture, in train or eval mode; its own weights take no part.
        params, buffers: by name ``[M, ...]``; parameters are leaves with gradients.
        together: whether one vectorised pass serves all copies; else they run one by one.
    """

    def __init__(self, models: Sequence[nn.Module], example: Tensor) -> None:
        self.params, self.buffers = stack_module_state(list(models))
        self.params = {name: value.detach().requires_grad_() for name, value in self.params.items()}
        self.model, self.copies = models[0].requires_grad_(True), len(models)
        self.together = self._vectorises(example)

    def __call__(self, images: Tensor, *, own: bool) -> Tensor:
        """Class logits ``[M, B, C]`` of images ``[M, B, 3, H, W]``, each copy's ``own``, or ``[B, 3, H, W]``."""
        if self.together:
            each = vmap(self._one, in_dims=(0, 0, 0 if own else None), randomness="different")
            with quiet():
                return each(self.params, self.buffers, images)
        return torch.stack([self._one(*self.state(m), images[m] if own else images) for m in range(self.copies)])

    def state(self, copy: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and buffers of one copy: views, so that what batch norm writes is kept."""
        params = {name: value[copy] for name, value in self.params.items()}
        return params, {name: value[copy] for name, value in self.buffers.items()}

    def optimizer(self, recipe: TrainingConfig) -> torch.optim.Optimizer:
        """The run's optimiser over all copies, with weight decay where the run has it."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = parameter_groups(self.model, recipe.weight_decay)
        stacked = [{**group, "params": [self.params[names[id(p)]] for p in group["params"]]} for group in groups]
        shared = {"momentum": recipe.momentum, "nesterov": recipe.nesterov, "betas": recipe.betas}
        return build_optimizer(recipe.optimizer, stacked, recipe.lr, **shared)

    def clip(self, largest: float) -> None:
        """Scale each copy's gradient by itself to a norm of at most ``largest``."""
        gradients = [value.grad for value in self.params.values() if value.grad is not None]
        norm = torch.stack([each.flatten(1).square().sum(1) for each in gradients]).sum(0).sqrt()
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        for each in gradients:
            each.mul_(factor.view(-1, *[1] * (each.ndim - 1)))

    def _one(self, params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(self.model, (params, buffers), (images,))

    def _vectorises(self, example: Tensor) -> bool:
        """Try it in both modes, on copies of the buffers."""
        kept, self.together = self.buffers, True
        self.buffers = {name: value.clone() for name, value in kept.items()}
        try:
            with torch.no_grad(), _random_state(0, example.device):
                for training in (True, False):
                    self.model.train(training)
                    self(example, own=False)
        except (RuntimeError, NotImplementedError):
            return False
        finally:
            self.buffers = kept
        return True


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The copies at the end of an epoch.

    Attributes:
        epoch: epochs done.
        logits: float32 ``[M, N, C]`` of all samples of the pool, clean images in eval mode.
        labels: given classes, int64 ``[N]``.
        stack, pool, run: the copies in eval mode, the samples, whose run it is.
    """

    epoch: int
    logits: Tensor
    labels: Tensor
    stack: Stack
    pool: Pool
    run: Run

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised clean images ``[B, 3, H, W]`` and given classes ``[B]`` of the pool, in order."""
        columns = (self.pool.images, self.pool.ids, self.pool.labels)
        for images, ids, labels in zip(*(column.split(size) for column in columns), strict=True):
            yield self.run.augment(images.permute(0, 3, 1, 2), ids, 0, train=False), labels


def lacking(run: Run) -> str:
    """What the run was trained with and its copies are not, for the settings of a number: ``; copies without …``."""
    keys = [f"train.{key}" for key in LACKING if getattr(run.config.train, key)]
    keys += ["the heads' penalty"] if run.config.heads.weight else []
    return f"; copies without {', '.join(keys)}" if keys else ""


def train_together(
    run: Run,
    pool: Pool,
    subsets: np.ndarray,
    copies: Sequence[int] | None = None,
    *,
    seed: int = 0,
    epochs: int = 0,
    at: Sequence[int] | None = None,
) -> Iterator[Moment]:
    """Train copies of the run's network at once.

    A copy is the same whichever others are trained beside it, but for dropout, whose masks depend on those. Every copy
    takes as many steps an epoch as whole batches fit in the smallest of all subsets.

    Args:
        run: whose architecture and recipe.
        pool: samples to train on and to read.
        subsets: which samples each copy trains on, bool ``[copies, N]``.
        copies: numbers of the M copies to train now; all by default.
        seed: of weights, order and dropout.
        epochs: the schedule is squeezed into so many; 0 for the run's.
        at: epochs (1 is the first) after which to yield; all by default.

    Yields:
        the copies after each epoch asked for, in order; use a moment before asking for the next.

    Raises:
        UserError: a copy has no samples, an epoch does not exist, or logits are not finite.
    """
    recipe, epochs = run.config.train, epochs or run.config.train.epochs
    wanted = set(range(1, epochs + 1) if at is None else at)
    if not wanted or not wanted <= set(range(1, epochs + 1)):
        raise UserError(f"readings are asked for after epochs {sorted(wanted)}; expected some of 1 to {epochs}")
    numbers = list(range(len(subsets)) if copies is None else copies)
    rows = [np.flatnonzero(subsets[number]) for number in numbers]
    fewest = int(subsets.sum(axis=1).min())
    if not fewest:
        raise UserError("a copy has no samples to train on; expected some for each")
    size = min(run.config.data.batch_size * recipe.accumulate, fewest)
    steps = fewest // size
    stack = Stack([_fresh(run, named_seed(seed, f"copy {number}")) for number in numbers], _example(run, pool))
    optimizer = stack.optimizer(recipe)
    for epoch in range(max(wanted)):
        orders = [epoch_order(named_seed(seed, f"order {n}"), epoch, r) for n, r in zip(numbers, rows, strict=True)]
        chosen = np.stack([order[: steps * size].reshape(steps, size) for order in orders], axis=1)
        stack.model.train()
        with _random_state(named_seed(seed, f"dropout {numbers} {epoch}"), run.device):
            for step, batch in enumerate(torch.from_numpy(chosen).to(run.device), epoch * steps):
                factor = lr_factor(
                    recipe.schedule, step, steps, epochs, recipe.warmup_epochs, recipe.step_epochs, recipe.step_gamma
                )
                set_lr(optimizer, recipe.lr * factor)
                _step(run, pool, stack, optimizer, batch, epoch)
        if epoch + 1 in wanted:
            yield _moment(run, pool, stack, epoch + 1)


def _fresh(run: Run, seed: int) -> nn.Module:
    """The network with fresh weights; example-tied dropout, which would ask for the ids of a batch, is left out."""
    train = replace(run.config.train, tied_dropout=0.0)
    return replace(run, config=replace(run.config, train=train)).untrained(seed)


def _step(run: Run, pool: Pool, stack: Stack, optimizer: torch.optim.Optimizer, batch: Tensor, epoch: int) -> None:
    """One step of every copy on its own samples, ``batch`` int64 ``[M, B]``; a sum over copies mixes no gradients."""
    rows, recipe = batch.flatten(), run.config.train
    ids, labels = pool.ids[rows], pool.labels[rows]
    fill = run.geometry.fill or fill_of(run.card.mean)
    images = pool.images.flatten(1).index_select(0, rows).view(-1, *pool.images.shape[1:])
    images = move(images, ids, epoch, run.config.run.seed, run.geometry, fill).permute(0, 3, 1, 2)
    images = run.augment(images, ids, epoch, train=True)
    logits = stack(images.view(*batch.shape, *images.shape[1:]), own=True)
    loss = F.cross_entropy(logits.flatten(0, 1), labels, label_smoothing=recipe.label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    with quiet():
        (loss * len(batch)).backward()
    if recipe.clip_norm > 0:
        stack.clip(recipe.clip_norm)
    optimizer.step()


@torch.no_grad()
def _moment(run: Run, pool: Pool, stack: Stack, epoch: int) -> Moment:
    stack.model.eval()
    size = run.config.data.eval_batch_size or run.config.data.batch_size
    bare = Moment(epoch=epoch, logits=torch.empty(0), labels=pool.labels, stack=stack, pool=pool, run=run)
    logits = torch.cat([stack(images, own=False).float() for images, _ in bare.batches(size)], dim=1)
    if not bool(logits.isfinite().all()):
        raise UserError(
            f"copies of the run diverge: logits after epoch {epoch} are NaN or infinite; expected a recipe that trains "
            "without random-label heads in float32 too"
        )
    return Moment(epoch=epoch, logits=logits, labels=pool.labels, stack=stack, pool=pool, run=run)


def _example(run: Run, pool: Pool) -> Tensor:
    few = slice(0, _PROBE)
    return run.augment(pool.images[few].permute(0, 3, 1, 2), pool.ids[few], 0, train=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that an operation has no vectorised rule of its own, and runs copy by copy inside."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


@contextmanager
def _random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global state, which dropout draws from, seeded; afterwards as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed % 2**63)
        yield
