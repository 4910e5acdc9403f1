"""From a configuration to the objects of a run: data, model, heads. Everything is checked before training starts."""

from dataclasses import fields
from functools import cache
from pathlib import Path

import torch
from torch import nn

from rlp import labels
from rlp.checkpoint import load_model_weights
from rlp.data.augment import Augment
from rlp.data.beton import Beton, Card
from rlp.data.geometry import Geometry, fill_of
from rlp.data.loader import Loader, open_loader
from rlp.data.view import View, ViewOptions, make_view
from rlp.distributed import World
from rlp.errors import UserError
from rlp.headplan import tap_factors
from rlp.low_rank.curve import check_tap
from rlp.models import RandomLabelHeads, attach, build_model
from rlp.models.attach import check_together
from rlp.models.taps import probe
from rlp.regularisers import hang_tied_dropout
from rlp.schema import DataConfig, TrainConfig
from rlp.stopping import NmfArea, few_of_each_label
from rlp.trainer import Data


def build_data(config: TrainConfig, world: World) -> Data:
    """Open both .beton files and their loaders.

    Raises:
        UserError: a file or card is missing or damaged, or the two files or the heads do not fit together.
    """
    data = config.data
    if config.train.amp == "fp16" and world.device.type == "cpu":
        raise UserError("train.amp is fp16, which needs a GPU; expected none or bf16 on the CPU")
    files = {"train": Beton.open(data.train), "val": Beton.open(data.val)}
    _check_cards(config, files["train"].card, files["val"].card)
    view = make_view(files["train"], view_options(data))
    train = _open(config, world, files["train"], view, train=True)
    evaluation = {
        "train": _open(config, world, files["train"], view, train=False),
        "val": _open(config, world, files["val"], None, train=False),
    }
    augment = build_augment(config, files["train"].card)
    hashes = {**{split: beton.card.sha256 for split, beton in files.items()}, "view": view.sha256}
    floors = cache(lambda first: _class_floors(config, files["train"], view, first))
    floors(0)
    return Data(train, evaluation, augment, floors, hashes, _nmf_area(config, world, files["train"], view, augment))


def build_augment(config: TrainConfig, card: Card) -> Augment:
    """What is done to images on the device; ``card`` is that of the training set."""
    data = config.data
    return Augment(
        mean=data.mean or card.mean,
        std=data.std or card.std,
        seed=config.run.seed,
        cutout=data.cutout,
        color_jitter=data.color_jitter,
        randaugment=data.randaugment,
    )


def build_geometry(data: DataConfig) -> Geometry:
    """How the loaders crop, resize and move images."""
    return Geometry(
        flip=data.flip,
        crop_padding=data.crop_padding,
        image_size=data.image_size,
        crop_scale=data.crop_scale,
        center_ratio=data.center_ratio,
        interpolation=data.interpolation,
        fill=fill_of(data.mean) if data.mean else None,
    )


def _check_cards(config: TrainConfig, train: Card, val: Card) -> None:
    if train.classes != val.classes:
        raise UserError(f"data.val {config.data.val} has other classes than data.train {config.data.train}")
    for path, card in ((config.data.train, train), (config.data.val, val)):
        if config.heads.taps and config.heads.draws > card.draws:
            raise UserError(
                f"heads.draws is {config.heads.draws}, but {path} holds {card.draws} draws; expected at most that "
                "many, or a file written with a larger words.draws"
            )
    for key, card in (("data.train", train), ("data.val", val)):
        if not config.data.image_size and not card.height:
            raise UserError(
                f"{key} has images of differing sizes, up to {card.max_width}x{card.max_height} px; set "
                "data.image_size, or write it with image.size"
            )
    if not config.data.image_size and (train.height, train.width) != (val.height, val.width):
        raise UserError(
            f"data.val has images of {val.width}x{val.height} px and data.train of {train.width}x{train.height}; "
            "expected one size, or data.image_size"
        )


def _open(config: TrainConfig, world: World, beton: Beton, view: View | None, train: bool) -> Loader:
    data = config.data
    return open_loader(
        beton,
        train=train,
        batch_size=data.batch_size if train else data.eval_batch_size or data.batch_size,
        seed=config.run.seed,
        world=world,
        view=view,
        geometry=build_geometry(data),
        kind=data.loader,
        resident_limit=int(data.resident_limit_gb * 2**30),
        workers=data.workers,
        verify=data.verify,
        splits=config.train.bilevel if train else 0,
    )


def _nmf_area(config: TrainConfig, world: World, beton: Beton, view: View, augment: Augment) -> NmfArea | None:
    """The criterion of ``train.nmf_tap``; its samples lie on each rank, whole."""
    tap = config.train.nmf_tap
    if not tap:
        return None
    alone = World(device=world.device)
    loader = _open(config, alone, beton, few_of_each_label(view), train=False)
    return NmfArea(loader, augment, tap, config.run.seed)


def view_options(data: DataConfig) -> ViewOptions:
    """Which samples are trained on, with which labels."""
    return ViewOptions(**{field.name: getattr(data, field.name) for field in fields(ViewOptions)})


def _class_floors(config: TrainConfig, beton: Beton, view: View, first: int) -> list[float]:
    """Class-only floor of each draw from number ``first`` on, over the samples trained on with their given labels."""
    heads, card, classes = config.heads, beton.card, len(beton.card.classes)
    if not heads.taps:
        return []
    baked, index = beton.draw_words[view.ids], beton.index[view.ids]
    words = labels.draw_words(baked, card.words_seed, index, heads.draws, card.split, first)
    random_labels = labels.random_labels(words, heads.num_labels)
    return labels.class_floor(view.label[view.ids], random_labels, classes, heads.num_labels).tolist()


def build_network(config: TrainConfig, card: Card, device: torch.device) -> tuple[nn.Module, RandomLabelHeads | None]:
    """The backbone and, where ``heads.taps`` names any, its heads, on ``device``."""
    size = config.data.image_size
    height, width = (size, size) if size else (card.height, card.width)
    model = build_model(config.model.name, len(card.classes), min(height, width), dict(config.model.args))
    if config.model.weights:
        load_model_weights(model, Path(config.model.weights))
    hang_tied_dropout(model, config.train, config.run.seed)
    model.to(device)
    if config.model.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    example = torch.zeros(1, 3, height, width, device=device)
    if config.train.tied_dropout:
        probe(model, example)  # a tap that leaves no channel out is a mistake before anything is written
    if config.train.nmf_tap:
        check_tap(model, config.train.nmf_tap, example, "train.nmf_tap")
    heads = config.heads
    if not heads.taps:
        return model, None
    check_together(heads.kind, heads.features, heads.layers, heads.pool, "heads.")
    attached = attach(
        model,
        taps=list(heads.taps),
        num_labels=heads.num_labels,
        draws=heads.draws,
        seed=config.run.seed,
        pool=heads.pool,
        layers=heads.layers,
        hidden=heads.hidden,
        example=example,
        impl=heads.impl,
        memory_budget=heads.memory_mb * 2**20,
        kind=heads.kind,
        features=heads.features,
        width=heads.width,
        num_classes=len(card.classes),
    )
    tap_factors(heads.lam_taps, attached.tap_names)  # a name that fits no tap is a mistake before anything is written
    return model, attached
