#!/usr/bin/env python
"""Train a network and measure with random-label heads how much it memorises.

    python train_rlp.py --config configs/digits_cnn.yaml [--section.key value ...]
    torchrun --standalone --nproc_per_node 8 train_rlp.py --config configs/imagenet_vit_b32.yaml

Exit status: 0 done; 2 a mistake in the input (one sentence says which); 3 a loss became NaN or infinite; 75 stopped by
SIGTERM with a checkpoint saved. torchrun has exit statuses of its own: 0, or 1 when a rank did not end with 0.
"""

from contextlib import closing
import dataclasses
import json
from pathlib import Path
import sys
from typing import Any

from rlp import seeding
from rlp.build import build_data, build_network
from rlp.checkpoint import restore_best
from rlp.config import parse, to_yaml
from rlp.distributed import World, connect, prompt_exit, wait_for_all
from rlp.errors import UserError, exit_on_user_error
from rlp.files import write_atomically
from rlp.report.figures import write_figures
from rlp.report.table import summary_table
from rlp.runfolder import IDENTITY, check_same_run, find_resume_point, prepare_run_folder
from rlp.runlog import RunLog, check_tensorboard, environment, write_summary
from rlp.schema import TrainConfig
from rlp.trainer import Trainer


def train(config: TrainConfig, world: World) -> None:
    """One run: seed, build, fit, report. Nothing is written before everything has been built and checked."""
    run_dir = Path(config.run.dir)
    if config.run.tensorboard:
        check_tensorboard()
    state = find_resume_point(run_dir, config.run.resume, config.run.overwrite)
    if config.run.deterministic:
        seeding.make_deterministic()
    seeding.seed_everything(config.run.seed)
    data = build_data(config, world)
    model, heads = build_network(config, data.train.card, world.device)
    remarks = check_same_run(state, dataclasses.asdict(config), data.hashes) if state else []
    step, epoch = (state["progress"]["step"], state["progress"]["epoch"]) if state else (None, None)
    wait_for_all()  # every rank has looked at the folder before one of them writes to it
    if world.is_main:
        start_folder(config, world, step)
        if state is not None:
            restore_best(run_dir / "checkpoints", state["progress"])
    seeding.seed_everything(config.run.seed, world.rank)
    log = RunLog(run_dir, world.is_main, config.run.tensorboard, truncate_after_step=step, truncate_after_epoch=epoch)
    with closing(data), closing(log):
        trainer = Trainer(config, world, model, heads, data, log)
        if state is not None:
            trainer.load_state(state)
            log.info("; ".join([f"resumed at step {step}", *remarks]))
        del state  # as large as the network and its optimiser
        last = trainer.fit()
        if world.is_main:
            finish(config, trainer, last, log)
        wait_for_all()  # a rank that leaves while another still works can bring the process group down


def start_folder(config: TrainConfig, world: World, step: int | None) -> None:
    """The run's folder, with what identifies the run; ``step`` is where a resumed run goes on."""
    run_dir = Path(config.run.dir)
    prepare_run_folder(run_dir, step)
    if step is None or not (run_dir / IDENTITY).exists():
        write_atomically(run_dir / IDENTITY, json.dumps(environment(world.device), indent=2))
    # Without the two keys that say how this process started: the file can be given back as --config.
    lasting = dataclasses.replace(config.run, resume=None, overwrite=False)
    write_atomically(run_dir / "config.yaml", to_yaml(dataclasses.replace(config, run=lasting)))


def finish(config: TrainConfig, trainer: Trainer, last: dict[str, Any], log: RunLog) -> None:
    """Figures, the table, and summary.json, which comes last: where it lies, the run is complete."""
    run_dir = Path(config.run.dir)
    cards = {split: loader.card for split, loader in trainer.data.evaluation.items()}
    summary = {
        "schema": 1,
        "config": dataclasses.asdict(config),
        "environment": environment(trainer.world.device),
        "data": {
            split: {
                "num_samples": trainer.data.evaluation[split].num_samples,
                "classes": list(card.classes),
                "sha256": card.sha256,
                "view": trainer.data.evaluation[split].view.summary(),
            }
            for split, card in cards.items()
        },
        "ranks": trainer.world.size,
        "seed": config.run.seed,
        "lam": config.heads.weight,
        "epochs": trainer.progress.epoch,
        "steps": trainer.progress.step,
        "seconds": trainer.progress.seconds,
        "final": last,
    }
    log.info(summary_table(summary))
    try:
        log.info("figures: " + ", ".join(map(str, write_figures(run_dir, summary))))
    except UserError as error:  # no matplotlib here: the numbers are whole, and the figures can be drawn elsewhere
        log.info(f"no figures: {error}")
    log.info(f"summary: {write_summary(run_dir, summary)}")


def main(argv: list[str]) -> None:
    """Command line: see the module's docstring and ``--help``."""
    config = parse(TrainConfig, argv)
    with connect(config.run.device) as world:
        train(config, world)


if __name__ == "__main__":
    with prompt_exit(), exit_on_user_error():
        main(sys.argv[1:])
