#!/usr/bin/env python
"""Train a network and measure with random-label heads how much it memorises.

    python train_rlp.py --config configs/digits_cnn.yaml [--section.key value ...]
    torchrun --standalone --nproc_per_node 8 train_rlp.py --config configs/imagenet_vit_b32.yaml

Exit status: 0 done; 2 a mistake in the input (one sentence says which); 3 a loss became NaN or infinite;
75 stopped by SIGTERM with a checkpoint saved.
"""

from contextlib import closing
import dataclasses
import json
from pathlib import Path
import sys
from typing import Any

from rlp import seeding
from rlp.build import build_data, build_network
from rlp.config import parse, to_yaml
from rlp.distributed import World, connect, wait_for_all
from rlp.errors import UserError, exit_on_user_error
from rlp.files import write_atomically
from rlp.report.figures import write_figures
from rlp.report.table import summary_table
from rlp.runfolder import check_same_run, find_resume_point, prepare_run_folder
from rlp.runlog import RunLog, environment, write_summary
from rlp.schema import TrainConfig
from rlp.trainer import Trainer


def train(config: TrainConfig, world: World) -> None:
    """One run: seed, build, fit, report. Nothing is written before everything has been built and checked."""
    run_dir = Path(config.run.dir)
    state = find_resume_point(run_dir, config.run.resume, config.run.overwrite)
    if config.run.deterministic:
        seeding.make_deterministic()
    seeding.seed_everything(config.run.seed)
    data = build_data(config, world)
    model, heads = build_network(config, data.train.card, world.device)
    if state is not None:
        check_same_run(state, dataclasses.asdict(config), data.hashes)
    wait_for_all()  # every rank has looked at the folder before one of them writes to it
    if world.is_main:
        prepare_run_folder(run_dir, fresh=state is None)
        write_atomically(run_dir / "config.yaml", to_yaml(config))
        write_atomically(run_dir / "environment.json", json.dumps(environment(world.device), indent=2))
    seeding.seed_everything(config.run.seed, world.rank)
    step = state["progress"]["step"] if state else 0
    log = RunLog(run_dir, world.is_main, config.run.tensorboard, truncate_after_step=step if state else None)
    with closing(data), closing(log):
        trainer = Trainer(config, world, model, heads, data, log)
        if state is not None:
            trainer.load_state(state)
            log.info(f"resumed at step {step}")
        last = trainer.fit()
        if world.is_main:
            finish(config, trainer, last, log)
        wait_for_all()  # a rank that leaves while another still works can bring the process group down


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
    with exit_on_user_error():
        main(sys.argv[1:])
