"""The trainings of a sweep: which settings each trial has, where it lies, and its whole configuration."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlp.build import build_network
from rlp.config import parse
from rlp.data.beton import Beton
from rlp.errors import UserError
from rlp.models.taps import resolve_taps
from rlp.regularisers import regulariser_of
from rlp.reproduce.study import text_of
from rlp.schema import TrainConfig
from rlp.seeding import named_seed
from rlp.sweep.space import RESERVED, Regulariser, Searched, Space


@dataclass(frozen=True)
class Training:
    """One training of a sweep.

    Attributes:
        regulariser: what is tried.
        name: of its folder.
        number: of the trial from 0 on; of a retrained network its seed.
        params: the values of what is searched, by key.
        folder: where the run lies.
        config: its whole configuration.
    """

    regulariser: Regulariser
    name: str
    number: int
    params: dict[str, Any]
    folder: Path
    config: TrainConfig


@dataclass(frozen=True)
class Sweep:
    """A sweep to be run.

    Attributes:
        space: from its file.
        names: the regularisers that take part.
        trials: of each.
        seeds: of the networks that are retrained with the chosen settings.
        overrides: arguments ``--section.key value`` on top of the base and the space's settings.
        out: folder of everything that is written.
        data: the .beton files ``train`` and ``val`` (the test split); empty for those of the base.
    """

    space: Space
    names: tuple[str, ...]
    trials: int
    seeds: tuple[int, ...]
    out: Path
    overrides: tuple[str, ...] = ()
    data: dict[str, str] = field(default_factory=dict)

    @property
    def validation(self) -> Path:
        """The samples that settings are chosen on."""
        return self.out / "data" / "validation.beton"

    @property
    def base(self) -> TrainConfig:
        """What all trainings have in common; its ``data.val`` is the test split, which no training is given."""
        return self._parsed({})

    def _parsed(self, own: dict[str, Any]) -> TrainConfig:
        common = self.space.settings | {f"data.{split}": path for split, path in self.data.items()}
        arguments = ["--config", str(self.space.base), *_arguments(common), *self.overrides, *_arguments(own)]
        return parse(TrainConfig, arguments)

    def regularisers(self) -> list[Regulariser]:
        """Those that take part, in the order of the file."""
        return [each for name, each in self.space.regularisers.items() if name in self.names]

    def trial(self, regulariser: Regulariser, number: int, params: dict[str, Any]) -> Training:
        """The training of one trial."""
        return self._training(regulariser, f"trials/{regulariser.name}-trial{number}", number, params, self.space.seed)

    def final(self, regulariser: Regulariser, seed: int, params: dict[str, Any]) -> Training:
        """The training of the chosen settings with a fresh seed."""
        return self._training(regulariser, f"final/{regulariser.name}-seed{seed}", seed, params, seed)

    def _training(
        self, regulariser: Regulariser, name: str, number: int, params: dict[str, Any], seed: int
    ) -> Training:
        folder = self.out / name
        # Training reads data.val after each epoch, and stops early by it: it gets the validation samples.
        own = {"run.seed": seed, "run.dir": str(folder), "data.val": str(self.validation)}
        config = self._parsed(regulariser.settings | params | own)
        return Training(regulariser, name, number, params, folder, config)

    def all_trials(self) -> list[Training]:
        """Every trial, as many of each regulariser."""
        return [
            self.trial(regulariser, number, params)
            for regulariser in self.regularisers()
            for number, params in enumerate(proposals(self.space, regulariser, self.trials))
        ]

    def check(self) -> None:
        """Refuse what cannot work before anything is written.

        Raises:
            UserError: a setting does not exist, does not fit, or is given twice; a seed occurs twice.
        """
        taken = {each.key: "is searched" for regulariser in self.regularisers() for each in regulariser.search}
        taken |= {key: f"is set by {each.name}" for each in self.regularisers() for key in each.settings}
        taken |= dict.fromkeys(RESERVED, "is set by the sweep itself")
        for key in option_names(self.overrides):
            if key in taken:
                raise UserError(f"--{key} is given, but it {taken[key]}; expected other keys, or another CONFIG")
        seeds = [self.space.seed, *self.seeds]
        if len(set(seeds)) < len(seeds):  # one network counted twice has no spread, and a trial's is no fresh one
            listed = " ".join(map(str, self.seeds))
            raise UserError(f"--seeds is '{listed}'; expected each once, and not {self.space.seed}, the trials' own")
        data = self.base.data
        if data.member_fraction >= 1:
            raise UserError(
                f"data.member_fraction is {data.member_fraction}; expected below 1: settings are chosen on "
                "non-members, never on the test split"
            )
        self.all_trials()


def check_networks(sweep: Sweep) -> None:
    """Build networks of each regulariser once the data are there, to find what does not fit before hours of training.

    One by the defaults and one for every other choice, such as of a tap.

    Raises:
        UserError: a tap does not exist, or ``fresh.tap`` names more than one.
    """
    card, tap = Beton.open(sweep.base.data.train).card, sweep.space.fresh.tap
    for regulariser in sweep.regularisers():
        defaults = {each.key: each.default for each in regulariser.search}
        others = [{each.key: choice} for each in regulariser.search for choice in each.choices]
        for own in [{}, *(other for other in others if not other.items() <= defaults.items())]:
            config = sweep.trial(regulariser, 0, defaults | own).config
            with torch.random.fork_rng(devices=[]):
                model, _ = build_network(config, card, torch.device("cpu"))
            regulariser_of(config, model)
            found = [each.name for each in resolve_taps(model, [tap])]
            if len(found) > 1:
                raise UserError(f"fresh.tap '{tap}' names {', '.join(found)}; expected one of them")


def proposals(space: Space, regulariser: Regulariser, count: int) -> list[dict[str, Any]]:
    """The settings of a regulariser's trials: its defaults first, then at random.

    What every regulariser searches, such as the learning rate, has the same values in a trial of this number for all of
    them: none wins by better luck with the rates. Trials do not depend on each other's results: they are the same in
    any order, on any number of devices, and the first of more trials are those of fewer.
    """
    own = [each for each in regulariser.search if each not in space.search]
    parts = ((space.search, "sweep"), (own, f"sweep.{regulariser.name}"))
    shared, special = (_drawn(search, named_seed(space.seed, name), count) for search, name in parts)
    return [a | b for a, b in zip(shared, special, strict=True)]


def _drawn(search: Sequence[Searched], seed: int, count: int) -> list[dict[str, Any]]:
    """Defaults, then what Optuna's RandomSampler draws."""
    try:
        import optuna
    except ImportError:
        raise UserError("the search needs the package optuna, which is not installed") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed % 2**32))
    study.enqueue_trial({each.key: each.default for each in search})
    distributions = {each.key: each.as_optuna() for each in search}
    return [dict(study.ask(distributions).params) for _ in range(count)]


def _arguments(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={text_of(value)}" for name, value in settings.items()]


def option_names(arguments: Sequence[str]) -> Iterator[str]:
    """The keys of ``--section.key value`` and ``--section.key=value``."""
    return (each[2:].partition("=")[0] for each in arguments if each.startswith("--"))
