"""A finished run, opened from its folder: the network frozen, and who was trained on and who was not."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlp.build import build_augment, build_geometry, view_options
from rlp.checkpoint import list_checkpoints, load_checkpoint
from rlp.config import parse
from rlp.data.augment import Augment
from rlp.data.beton import Beton, Card
from rlp.data.geometry import Geometry
from rlp.data.open_file import file_sha256
from rlp.data.view import View, make_view
from rlp.distributed import choose_device
from rlp.errors import UserError
from rlp.models import build_model, default_taps
from rlp.philox import random_bits
from rlp.regularisers import hang_tied_dropout
from rlp.runfolder import check_same_run
from rlp.runlog import read_summary
from rlp.schema import DataConfig, TrainConfig
from rlp.seeding import named_seed

GROUPS = ("members", "non-members")


@dataclass(frozen=True)
class Group:
    """Samples of one file: those that the run trained on, or others.

    Attributes:
        name: one of :data:`GROUPS`.
        origin: where they come from, in words.
        beton, view: their file, and what is seen of it; ``view.ids`` are their rows, int64 [N].
    """

    name: str
    origin: str
    beton: Beton
    view: View

    @property
    def split(self) -> str:
        """Name of the file's split, which random words depend on."""
        return self.beton.card.split

    @property
    def ids(self) -> np.ndarray:
        """Sample ids, int64 [N]."""
        return self.beton.index[self.view.ids]

    def first(self, count: int, seed: int) -> "Group":
        """``count`` of the samples at random, by words of their own: the same for every run and nested in ``count``."""
        if count >= len(self.view.ids):
            return self
        words = random_bits(seed, f"{self.split}.probe.subset", self.ids, 2)
        order = np.lexsort((self.ids, words[:, 1], words[:, 0]))
        return self.of(np.sort(self.view.ids[order[:count]]))

    def of(self, rows: np.ndarray) -> "Group":
        """The group with these rows in this order."""
        return dataclasses.replace(self, view=dataclasses.replace(self.view, ids=rows))


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        dir: its folder.
        config: its configuration.
        model: the network of one checkpoint, in eval mode, frozen, on the device.
        step, epoch: optimiser steps and whole epochs done at that checkpoint.
        summary: what ``summary.json`` holds.
        card: that of the training set.
        taps: patterns of the taps that the run had heads at, or of the model's own.
        checkpoint, sha256: its file and the hash of it.
        groups: members and non-members.
        geometry, augment: what was done to training images.
    """

    dir: Path
    config: TrainConfig
    model: nn.Module
    step: int
    epoch: int
    summary: dict[str, Any]
    card: Card
    taps: tuple[str, ...]
    checkpoint: Path
    sha256: str
    groups: dict[str, Group]
    geometry: Geometry
    augment: Augment

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.dir.resolve().name

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what the network sees."""
        side = self.config.data.image_size
        return (side, side) if side else (self.card.height, self.card.width)

    @property
    def augmented(self) -> bool:
        """Whether the run altered its training images at all."""
        data = self.config.data
        return bool(
            self.geometry.moves
            or self.geometry.image_size
            or data.cutout
            or any(data.color_jitter)
            or data.randaugment[0]
        )

    def untrained(self, seed: int = 0) -> nn.Module:
        """The same network with fresh weights of ``seed``, frozen, in eval mode."""
        return _network(self.config, self.card, self.device, named_seed(seed, "untrained"))


def open_run(path: str | Path, *, checkpoint: str = "last", device: str = "auto") -> Run:
    """Open a finished run for measurement.

    Non-members are the other side of ``data.member_fraction`` where that is below 1 (the same file, the same label
    noise), and else the validation images with their true labels.

    Args:
        path: the run's folder.
        checkpoint: ``last``, ``best``, or a checkpoint's file.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserError: the folder holds no finished run, a file is damaged, the checkpoint is another run's, or a .beton is
            not the one that was trained on.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} holds no run: config.yaml is missing; expected a folder that train_rlp.py wrote")
    summary = read_summary(folder)
    config = parse(TrainConfig, ["--config", str(folder / "config.yaml")])
    file = _checkpoint_file(folder, checkpoint)
    state = load_checkpoint(file)
    _check_own(state, config, file, folder)
    train, val = Beton.open(config.data.train), Beton.open(config.data.val)
    view = make_view(train, view_options(config.data))
    _check_data(config.data, state["data"], {"train": train, "val": val}, view)
    model = _network(config, train.card, choose_device(device), 0, state["model"], file)
    return Run(
        dir=folder,
        config=config,
        model=model,
        step=state["progress"]["step"],
        epoch=state["progress"]["epoch"],
        summary=summary,
        card=train.card,
        taps=tuple(config.heads.taps) or tuple(default_taps(model)),
        checkpoint=file,
        sha256=file_sha256(file),
        groups={
            "members": Group("members", "training images", train, view),
            "non-members": _others(config, train, val),
        },
        geometry=build_geometry(config.data),
        augment=build_augment(config, train.card),
    )


def _checkpoint_file(folder: Path, checkpoint: str) -> Path:
    if checkpoint == "best":
        return folder / "checkpoints" / "best.pt"
    if checkpoint != "last":
        return Path(checkpoint)
    found = list_checkpoints(folder / "checkpoints")
    if not found:
        raise UserError(f"{folder / 'checkpoints'} holds no checkpoint; expected the last one of the run")
    return found[-1]


def _check_own(state: dict[str, Any], config: TrainConfig, file: Path, folder: Path) -> None:
    """Refuse another run's checkpoint: seed, λ and members would be told as the folder's settings have them."""
    try:
        check_same_run(state, dataclasses.asdict(config), {})
    except UserError as error:
        raise UserError(f"{file} is no checkpoint of the run {folder}: {error}") from error


def _check_data(data: DataConfig, trained: dict[str, str], files: dict[str, Beton], view: View) -> None:
    """Hold the files and the view to the hashes in the checkpoint."""
    for split, beton in files.items():
        if trained.get(split) != beton.card.sha256:
            raise UserError(
                f"data.{split} {getattr(data, split)} is not the file that the run was trained with (its hash "
                "differs); expected that file"
            )
    if trained.get("view", view.sha256) != view.sha256:
        raise UserError(
            "the training samples or their labels are not those that the run was trained on; expected data.label_file "
            "and the card's list of near-duplicates to be as they were"
        )


def _network(
    config: TrainConfig,
    card: Card,
    device: torch.device,
    seed: int,
    weights: dict[str, Any] | None = None,
    file: Path | None = None,
) -> nn.Module:
    """The network, frozen; the global random state stays as it is."""
    side = config.data.image_size or min(card.height, card.width)
    args = {key: value for key, value in config.model.args.items() if key != "pretrained"}  # nothing is downloaded
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        model = build_model(config.model.name, len(card.classes), side, args)
    if weights is not None:
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{file} does not fit the model of the run: {str(error).splitlines()[-1]}") from error
    hang_tied_dropout(model, config.train, config.run.seed)
    model.requires_grad_(False).eval().to(device)
    if config.model.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _others(config: TrainConfig, train: Beton, val: Beton) -> Group:
    data, options = config.data, view_options(config.data)
    if data.member_fraction >= 1:
        rows = np.arange(val.num_samples)
        return Group("non-members", "validation images, true labels", val, View(rows, val.label))
    other = "members" if data.members == "non-members" else "non-members"
    view = make_view(train, dataclasses.replace(options, members=other))
    return Group("non-members", "the other side of data.member_fraction", train, view)
