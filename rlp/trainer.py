"""The training loop: class loss for the backbone, random-label heads beside it, exact resume, honest bookkeeping."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
import dataclasses
from pathlib import Path
import signal
import threading
import time
from typing import Any

import torch
from torch import Tensor, nn
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from rlp import checkpoint, seeding
from rlp.data.augment import Augment
from rlp.data.batch import Batch
from rlp.data.loader import Loader
from rlp.distributed import World, any_rank, broadcast_buffers, from_main, wait_for_all
from rlp.evaluate import evaluate
from rlp.headplan import HeadPlan, words_of
from rlp.meters import FiniteWatch, NonFiniteError, Sums
from rlp.models import RandomLabelHeads, TapMetrics
from rlp.optim import build_optimizer, lr_factor, parameter_groups, set_lr
from rlp.progress import Progress
from rlp.regularisers import pass_for_heads, regulariser_of
from rlp.runlog import RunLog, last_epoch_row
from rlp.schema import TrainConfig
from rlp.stopping import AREA, NmfArea, score_of

INTERRUPTED = 75
"""Exit status after SIGTERM with a checkpoint saved (EX_TEMPFAIL: run again with --run.resume auto)."""

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Data:
    """What the loop reads: training batches, and the same images in order for evaluation.

    ``floors``: class-only floor of each of the draws from the given number on, for the training split's given labels;
    ``nmf_area``: what the best epoch is known by, if not by accuracy on ``val``.
    """

    train: Loader
    evaluation: dict[str, Loader]  # "train" and "val"
    augment: Augment
    floors: Callable[[int], list[float]]
    hashes: dict[str, str]
    nmf_area: NmfArea | None = None

    def close(self) -> None:
        """Free what the loaders hold."""
        for loader in (self.train, *self.evaluation.values()):
            loader.close()


class Trainer:
    """Trains ``model`` with ``heads`` on ``data`` as ``config`` says; :meth:`fit` is all a caller needs."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        model: nn.Module,
        heads: RandomLabelHeads | None,
        data: Data,
        log: RunLog,
    ) -> None:
        self.config, self.world, self.model, self.heads, self.data, self.log = config, world, model, heads, data, log
        self.progress = Progress()
        self.checkpoints = Path(config.run.dir) / "checkpoints"
        self.distributed = self._distribute(model)
        self.forward = torch.compile(self.distributed) if config.model.compile else self.distributed
        self.class_loss = regulariser_of(config, model)
        self.optimizers = self._build_optimizers()
        self.plan = self._head_plan()
        self.amp = AMP_DTYPES.get(config.train.amp)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.train.amp == "fp16")
        names = ["loss", "class_loss", "fit_loss", "penalty", "correct", "count"]
        self.window, self.epoch_sums = Sums(names, world.device), Sums(names, world.device)
        taps = list(heads.tap_names) if heads else []
        self.watch = FiniteWatch(
            ["class loss", *(f"fit loss at tap {tap}" for tap in taps), "penalty"], world.device, world.rank
        )
        self._terminated = False
        self._clock = time.monotonic()

    def _distribute(self, model: nn.Module) -> nn.Module:
        if self.world.size == 1:
            return model
        devices = [self.world.device.index] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def _build_optimizers(self) -> list[torch.optim.Optimizer]:
        """One optimiser for the backbone and one for the heads, so that neither step can touch the other's state."""
        train, heads = self.config.train, self.config.heads
        groups = parameter_groups(self.model, train.weight_decay)
        shared = {"momentum": train.momentum, "nesterov": train.nesterov, "betas": train.betas}
        optimizers = [build_optimizer(train.optimizer, groups, train.lr, **shared)]
        if self.heads is not None:
            groups = parameter_groups(self.heads, heads.weight_decay)
            optimizers.append(build_optimizer(heads.optimizer, groups, heads.lr, **shared))
        return optimizers

    def _head_plan(self) -> HeadPlan | None:
        accumulate = self.config.train.accumulate
        updates = -(-self.data.train.steps // accumulate)
        return None if self.heads is None else HeadPlan(self.config.heads, self.heads, updates, accumulate)

    # -- the run ---------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch; returns the row of the last epoch (see docs/results/README.md for its fields).

        Raises:
            SystemExit: with status :data:`INTERRUPTED` after SIGTERM, a checkpoint saved.
            NonFiniteError: a loss became NaN or infinite.
        """
        for line in (*self.data.train.view.describe(), *(self.heads.describe() if self.heads else [])):
            self.log.info(line)
        with _on_sigterm(self._terminate):
            row: dict[str, Any] = {}
            while not self._ends(self.progress.epoch):
                row = self._run_epoch()
            return row or self._last_epoch_row()

    def _terminate(self) -> None:
        self._terminated = True

    def _ends(self, epochs: int) -> bool:
        """Whether ``epochs`` epochs, the best of which is known, are all that is to be done."""
        train, progress = self.config.train, self.progress
        waited = epochs - progress.best_step // self.data.train.steps
        return epochs >= train.epochs or (0 < train.patience <= waited and progress.best_step > 0)

    def _run_epoch(self) -> dict[str, Any]:
        progress = self.progress
        self._train_epoch()
        row = self._epoch_row()
        is_best = score_of(row) > progress.best
        if is_best:
            progress.best, progress.best_step = score_of(row), progress.step
        progress.epoch, progress.batch, progress.epoch_seconds = progress.epoch + 1, 0, 0.0
        self.epoch_sums.reset()
        if self.heads is not None:
            self.heads.metrics("online", reset=True)
        # The row first: a crash before the checkpoint repeats the epoch and writes the row again, none is lost.
        self.log.write(row)
        self._save(is_best, any_rank(self._terminated, self.world.device))
        return row

    def _last_epoch_row(self) -> dict[str, Any]:
        """The row of the last epoch of a run that had already been trained when it was resumed."""
        row = last_epoch_row(self.config.run.dir)
        if self.heads is not None and "train_eval" not in row:  # it was not the last epoch when it was trained
            row["train_eval"], rows = self._evaluate("train")
            row["heads"] += rows
        return row

    def _tick(self) -> None:
        """Add the time since the last call to the run's, the epoch's and the window's."""
        now = time.monotonic()
        self.progress.add_time(now - self._clock)
        self._clock = now

    def _train_epoch(self) -> None:
        loader, progress = self.data.train, self.progress
        total = loader.steps
        self.distributed.train()
        description = f"epoch {progress.epoch + 1}/{self.config.train.epochs}"
        batches = loader.epoch(progress.epoch, progress.batch)
        self._tick()
        if progress.batch == 0:
            progress.window_seconds = 0.0
            if self.plan is not None and self.plan.start_epoch(progress.epoch, self.optimizers[1]):
                self.log.info(f"epoch {progress.epoch + 1}: heads start again with fresh weights")
        with closing(batches), self.log.progress(total, progress.batch, description) as bar:
            for batch in batches:
                last = progress.batch + 1 == total
                update = last or (progress.batch + 1) % self.config.train.accumulate == 0
                self._train_batch(batch, update)
                progress.batch += 1
                progress.step += 1
                bar.advance()
                if progress.step % self.config.run.log_every == 0 or last:
                    self._log_window()
                if update:
                    self._save_if_due(last)

    def _train_batch(self, batch: Batch, update: bool) -> None:
        train = self.config.train
        place = self.progress.batch % train.accumulate
        if place == 0:
            self._set_learning_rates()
        # The last group of an epoch may be smaller; its gradient is a mean too.
        group = min(train.accumulate, self.data.train.steps - self.progress.batch + place)
        with self._gradient_sync(update):
            loss = self._loss(batch) / group
            self.scaler.scale(loss).backward()
        if not update:
            return
        if train.clip_norm > 0:
            self.scaler.unscale_(self.optimizers[0])
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

    def _loss(self, batch: Batch) -> Tensor:
        image = self.data.augment(batch.image, batch.index, self.progress.epoch, train=True)
        with self._autocast():
            class_loss, correct = self.class_loss.step(self.forward, image, batch, self.progress)
            if self.heads is not None and not self.class_loss.clean:
                # The bare network: DDP exchanges gradients once for both passes, which end in one backward pass.
                pass_for_heads(self.model, image, gradient=self.config.heads.weight > 0)
        heads_loss = self._heads_loss(batch)
        loss = class_loss + heads_loss
        self._bookkeep(correct, len(image), loss.detach(), class_loss.detach())
        return loss

    def _heads_loss(self, batch: Batch) -> Tensor | float:
        """Loss of the heads after the steps that they take alone."""
        if self.heads is None or self.plan is None:
            return 0.0
        config = self.config.heads
        given = {"words": words_of(batch, self.data.train.card, self.heads), "classes": batch.label}
        for _ in range(config.steps - 1):
            with self._autocast():
                fit = self.heads.fit(**given)
            self.scaler.scale(fit).backward()
            self.scaler.step(self.optimizers[1])
            self.scaler.update()
            self.optimizers[1].zero_grad(set_to_none=True)
        with self._autocast():
            lam = self.plan.lam(self.progress)
            return self.heads.loss(**given, lam=lam, penalty=config.penalty, ridge=config.ridge)

    def _bookkeep(self, correct: Tensor, count: int, loss: Tensor, class_loss: Tensor) -> None:
        """Add to the running sums and look for non-finite losses, all on the device."""
        fits = self.heads.last_fit if self.heads else class_loss.new_zeros(0)
        penalty = self.heads.last_penalty if self.heads else class_loss.new_zeros(())
        fit = fits.mean() if len(fits) else penalty
        values = [loss * count, class_loss * count, fit * count, penalty * count, correct, float(count)]
        self.window.add(*values)
        self.epoch_sums.add(*values)
        self.watch.watch(torch.cat([class_loss.view(1), fits, penalty.view(1)]).float(), self.progress.step)

    def _autocast(self) -> AbstractContextManager:
        if self.amp is None:
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=self.amp)

    def _gradient_sync(self, update: bool) -> AbstractContextManager:
        """DDP exchanges gradients only where an optimiser step follows."""
        if isinstance(self.distributed, DistributedDataParallel) and not update:
            return self.distributed.no_sync()
        return nullcontext()

    def _set_learning_rates(self) -> None:
        train, heads = self.config.train, self.config.heads
        per_epoch = -(-self.data.train.steps // train.accumulate)
        step = self.progress.epoch * per_epoch + self.progress.batch // train.accumulate
        factor = lr_factor(
            train.schedule, step, per_epoch, train.epochs, train.warmup_epochs, train.step_epochs, train.step_gamma
        )
        for optimizer, peak in zip(self.optimizers, [train.lr, heads.lr], strict=False):
            set_lr(optimizer, peak * factor)

    def _log_window(self) -> None:
        """Read the sums since the last row (the step's only host sync), check for NaN, write a step row."""
        self.watch.check()
        sums = self.window.read()
        self.window.reset()
        self._tick()  # after reading, which waits for the device
        seconds, self.progress.window_seconds = self.progress.window_seconds, 0.0
        count = sums.pop("count")
        row = {"kind": "step", "step": self.progress.step, "epoch": self.progress.epoch + 1}
        row |= {name: total / count for name, total in sums.items() if name != "correct"}
        row |= {"accuracy": sums["correct"] / count, "lr": self.optimizers[0].param_groups[0]["lr"]}
        row["images_per_s"] = count / max(seconds, 1e-9)
        if self.plan is not None:
            row |= self.plan.row(self.progress)
            self.plan.close_window()
        self.log.write(row)

    # -- evaluation ------------------------------------------------------------------------------------------

    def _epoch_row(self) -> dict[str, Any]:
        """The epoch's row: running training metrics, and readings in eval mode.

        Nothing is reset here, so that a SIGTERM during evaluation can still save the trained epoch.
        """
        self.watch.check()
        broadcast_buffers(self.model)  # after the last step each rank has batch-norm statistics of its own
        if self.heads is not None:
            self.heads.synchronise()
        progress, run = self.progress, self.config.run
        sums = self.epoch_sums.read()
        count = sums["count"]
        row: dict[str, Any] = {"kind": "epoch", "epoch": progress.epoch + 1, "step": progress.step}
        row["train"] = {"loss": sums["class_loss"] / count, "accuracy": sums["correct"] / count, "count": int(count)}
        online = self.heads.metrics("online", reset=False) if self.heads else []
        row["val"], val_rows = self._evaluate("val")
        row["heads"] = self._head_rows("train", "online", online) + val_rows
        if self.data.nmf_area is not None:  # one rank's for all, for they have to agree when to stop
            row[AREA] = from_main(self.data.nmf_area(self.model) if self.world.is_main else 0.0, self.world.device)
        last = progress.epoch + 1 == self.config.train.epochs or (
            score_of(row) <= progress.best and self._ends(progress.epoch + 1)
        )
        due = last or (progress.epoch + 1) % run.eval_every == 0
        if due and self.heads is not None:
            if any_rank(self._terminated, self.world.device):
                self._save(best=False, terminated=True)
            row["train_eval"], train_rows = self._evaluate("train")
            row["heads"] += train_rows
        if self.plan is not None:
            row |= self.plan.row(progress)
        self._tick()
        row["seconds"] = progress.epoch_seconds
        return row

    def _evaluate(self, split: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        loader, augment = self.data.evaluation[split], self.data.augment
        metrics, readings = evaluate(
            self.model, self.heads, loader, augment, self.world, self._autocast, self.log, split
        )
        return metrics, self._head_rows(split, "eval", readings)

    def _head_rows(self, split: str, mode: str, readings: Sequence[TapMetrics]) -> list[dict[str, Any]]:
        if self.heads is None or self.plan is None:
            return []
        first = self.heads.first_draw
        floors = self.data.floors(first) if split == "train" else [None] * self.heads.draws
        beside = self.plan.describe(self.progress)
        return [
            {"split": split, "mode": mode, **dataclasses.asdict(reading), "draw": first + reading.draw,
             "floor": floors[reading.draw], **beside}
            for reading in readings
        ]  # fmt: skip

    # -- checkpoints -----------------------------------------------------------------------------------------

    def _save_if_due(self, last: bool) -> None:
        """Save where a checkpoint is due, or when SIGTERM came (then leave); also just before an evaluation."""
        run, step = self.config.run, self.progress.step
        updates = -(-self.progress.batch // self.config.train.accumulate)
        agree = self.world.size == 1 or last or updates % run.log_every == 0  # ranks must stop at the same step
        terminated = agree and any_rank(self._terminated, self.world.device)
        if terminated or (run.checkpoint_every and step % run.checkpoint_every == 0):
            self._save(best=False, terminated=terminated)

    def _save(self, best: bool, terminated: bool) -> None:
        self.watch.check()
        self._check_weights()
        self._tick()
        state = self.state()
        if self.world.is_main:
            path = checkpoint.save_checkpoint(self.checkpoints, state, self.config.run.keep_last, best)
            if terminated:
                self.log.info(f"SIGTERM: saved {path}; go on with --run.resume auto")
        wait_for_all()
        if terminated:
            raise SystemExit(INTERRUPTED)

    def _check_weights(self) -> None:
        """The watch sees losses, and so each step's result only at the next step; the last one would pass it."""
        modules = [self.model, *([self.heads] if self.heads else [])]
        finite = torch.stack([p.detach().isfinite().all() for module in modules for p in module.parameters()]).all()
        if any_rank(not finite, self.world.device):
            raise NonFiniteError(
                f"weights became NaN or infinite by step {self.progress.step - 1}; expected finite numbers "
                "(start again with a lower learning rate or λ)"
            )

    def state(self) -> dict[str, Any]:
        """Everything an exact resume needs; the same on every rank but for the sums, which rank 0 holds for all."""
        random_states = [seeding.capture_random_state(self.world.device)]
        if self.world.size > 1:
            gathered: list[Any] = [None] * self.world.size
            dist.all_gather_object(gathered, random_states[0])
            random_states = gathered
        return {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict() if self.heads else {},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "random_states": random_states,
            "running": self._running_sums(),
            "head_plan": self.plan.state() if self.plan else {},
            "config": dataclasses.asdict(self.config),
            "data": dict(self.data.hashes),
        }

    def _running_sums(self) -> dict[str, Any]:
        window, epoch = self.window.total(), self.epoch_sums.total()
        return {"window": window, "epoch": epoch, "heads": self.heads.running_state() if self.heads else {}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where the checkpoint was taken."""
        self.model.load_state_dict(state["model"])
        if self.heads is not None:
            self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        if self.plan is not None:
            self.plan.load_state(state.get("head_plan", {}), self.progress)
        self._clock = time.monotonic()
        if self.world.is_main:  # the sums hold all ranks' share
            self.window.values.copy_(state["running"]["window"])
            self.epoch_sums.values.copy_(state["running"]["epoch"])
            if self.heads is not None:
                self.heads.load_running_state(state["running"]["heads"])
        if len(state["random_states"]) == self.world.size:
            seeding.restore_random_state(state["random_states"][self.world.rank], self.world.device)
        else:
            self.log.info(
                f"the checkpoint was taken on {len(state['random_states'])} ranks, this run has {self.world.size}: "
                "dropout draws differ from the undisturbed run"
            )


@contextmanager
def _on_sigterm(action: Callable[[], None]) -> Iterator[None]:
    """Call ``action`` on SIGTERM meanwhile; outside the main thread, where Python hears no signals, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)
