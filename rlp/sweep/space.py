"""What a sweep compares and where it searches: the files ``configs/sweep/NAME.yaml``."""

from collections.abc import Iterable, Sequence
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlp.data.view import ViewOptions
from rlp.errors import UserError
from rlp.reproduce.fields import Fields, check_known, read_mapping, settings_in

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

RANGES = ("uniform", "log_uniform", "integer", "log_integer")
DISTRIBUTIONS = (*RANGES, "choice")
CHECKPOINTS = ("last", "best")
PROTOCOLS = ("converged", "budget")
FEATURES = ("raw", "standardised", "normalised", "projected")
RESERVED = ("run.dir", "run.seed", "run.resume", "run.overwrite")
"""Keys that the sweep itself sets."""
SAMPLES = ("data.train", "data.val", *(f"data.{field.name}" for field in dataclasses.fields(ViewOptions)))
"""Keys that say who is trained on: the same for all, or one would train on what settings are chosen on."""


@dataclass(frozen=True, kw_only=True)
class Searched:
    """One key that is searched.

    Attributes:
        key: ``section.key``, or ``section.key.entry`` of a mapping.
        distribution: one of :data:`DISTRIBUTIONS`.
        low, high: ends of a range, both possible.
        choices: the values of a ``choice``.
        default: what the first trial takes.
    """

    key: str
    distribution: str
    low: float
    high: float
    choices: tuple[Any, ...]
    default: Any

    def as_optuna(self) -> "BaseDistribution":
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        log = self.distribution.startswith("log_")
        if self.distribution == "choice":
            return CategoricalDistribution(self.choices)
        if self.distribution.endswith("integer"):
            return IntDistribution(int(self.low), int(self.high), log=log)
        return FloatDistribution(self.low, self.high, log=log)

    def __str__(self) -> str:
        if self.distribution == "choice":
            return f"{self.key}: one of {', '.join(map(str, self.choices))} (default {self.default})"
        words = self.distribution.replace("_", "-")
        return f"{self.key}: {words} from {self.low:g} to {self.high:g} (default {self.default:g})"


@dataclass(frozen=True, kw_only=True)
class Regulariser:
    """One way to train.

    Attributes:
        name: of its folders.
        settings: by ``section.key``, for all of its trials.
        search: what is searched, the keys common to all regularisers first.
        checkpoint: which one counts: ``last``, or the one that was ``best`` on the validation samples.
    """

    name: str
    settings: dict[str, Any]
    search: tuple[Searched, ...]
    checkpoint: Literal["last", "best"]


@dataclass(frozen=True, kw_only=True)
class FreshHeads:
    """How κ and Δ are read of the chosen networks: the options of ``python -m rlp.measure probe`` of these names."""

    tap: str
    protocol: Literal["converged", "budget"]
    n: int
    draws: int
    features: str
    width: int


@dataclass(frozen=True, kw_only=True)
class Space:
    """A sweep as its file describes it.

    Attributes:
        name, about: of the file, and a sentence on networks and data.
        base: configuration that all trainings extend.
        data: configuration of write_datasets.py; null: those of the base are there.
        settings: by ``section.key``, for all trainings.
        trials: of each regulariser.
        selection: share of the non-members that settings are chosen on.
        seed: of the trials' networks and of the search.
        threads: of the processor for each training.
        fresh: how κ and Δ are read.
        search: what every regulariser searches.
        regularisers: by name, in the order of the file.
    """

    name: str
    about: str
    base: Path
    data: Path | None
    settings: dict[str, Any]
    trials: int
    selection: float
    seed: int
    threads: int
    fresh: FreshHeads
    search: tuple[Searched, ...]
    regularisers: dict[str, Regulariser]


def read_space(path: Path) -> Space:
    """A sweep from its file.

    Raises:
        UserError: an unknown or missing key, or a value that does not fit.
    """
    fields = Fields(read_mapping(path), str(path))
    shared = _search(fields.take("search", dict, {}), f"{path}: search")
    listed = fields.take("regularisers", dict)
    if not listed:
        raise UserError(f"{path}: regularisers is empty; expected at least one")
    space = Space(
        name=path.stem,
        about=fields.take("about", str),
        base=path.parent / fields.take("base", str),
        data=None if (data := fields.take("data", str | None, None)) is None else path.parent / data,
        settings=settings_in(fields.take("settings", dict, {}), f"{path}: settings"),
        trials=fields.take("trials", int),
        selection=fields.take("selection", float, 0.5),
        seed=fields.take("seed", int, 1000),
        threads=fields.take("threads", int, 1),
        fresh=_fresh(fields.take("fresh", dict), f"{path}: fresh"),
        search=shared,
        regularisers={name: _regulariser(name, each, shared, str(path)) for name, each in listed.items()},
    )
    fields.finish()
    _check_keys(space.settings, f"{path}: settings", RESERVED)
    for name in ("trials", "threads"):
        if getattr(space, name) < 1:
            raise UserError(f"{path}: {name} is {getattr(space, name)}; expected at least 1")
    if not 0 < space.selection < 1:
        raise UserError(f"{path}: selection is {space.selection}; expected a share between 0 and 1")
    if not 0 <= space.seed < 2**31:
        raise UserError(f"{path}: seed is {space.seed}; expected 0 to 2^31 - 1")
    return space


def _fresh(content: dict[str, Any], where: str) -> FreshHeads:
    fields = Fields(content, where)
    fresh = FreshHeads(
        tap=fields.take("tap", str),
        protocol=fields.take("protocol", str, "converged"),
        n=fields.take("n", int, 10),
        draws=fields.take("draws", int, 5),
        features=fields.take("features", str, "raw"),
        width=fields.take("width", int, 128),
    )
    fields.finish()
    check_known(fresh.protocol, PROTOCOLS, f"{where}.protocol")
    check_known(fresh.features, FEATURES, f"{where}.features")
    for name, least in (("n", 2), ("draws", 1), ("width", 1)):
        if getattr(fresh, name) < least:
            raise UserError(f"{where}.{name} is {getattr(fresh, name)}; expected at least {least}")
    return fresh


def _regulariser(name: str, content: Any, shared: tuple[Searched, ...], path: str) -> Regulariser:
    where = f"{path}: regularisers.{name}"
    if not name or not all(letter.isalnum() or letter == "_" for letter in name):
        raise UserError(f"{path}: regulariser '{name}' cannot name a folder; expected letters, digits and _")
    if not isinstance(content, dict):
        raise UserError(f"{where} is {content!r}; expected keys search, settings and checkpoint ({{}} for none)")
    fields = Fields(content, where)
    regulariser = Regulariser(
        name=name,
        settings=settings_in(fields.take("settings", dict, {}), f"{where}.settings"),
        search=(*shared, *_search(fields.take("search", dict, {}), f"{where}.search")),
        checkpoint=fields.take("checkpoint", str, "last"),
    )
    fields.finish()
    check_known(regulariser.checkpoint, CHECKPOINTS, f"{where}.checkpoint")
    keys = [each.key for each in regulariser.search]
    _check_keys([*regulariser.settings, *keys], where, (*RESERVED, *SAMPLES))
    for key in keys:
        if keys.count(key) > 1 or key in regulariser.settings:
            raise UserError(f"{where} gives {key} twice; expected it once, in settings or in one search")
    return regulariser


def _check_keys(keys: Iterable[str], where: str, refused: Sequence[str]) -> None:
    for key in keys:
        if key in refused:
            whose = "the sweep itself sets" if key in RESERVED else "all regularisers have the same samples, and so"
            raise UserError(f"{where}: {whose} {key}; expected another key")


def _search(content: dict[str, Any], where: str) -> tuple[Searched, ...]:
    return tuple(_searched(key, each, f"{where}.{key}") for key, each in settings_in(content, where).items())


def _searched(key: str, content: Any, where: str) -> Searched:
    if not isinstance(content, dict):
        raise UserError(f"{where} is {content!r}; expected keys distribution, low, high (or choices) and default")
    fields = Fields(content, where)
    distribution = fields.take("distribution", str)
    check_known(distribution, DISTRIBUTIONS, f"{where}.distribution")
    if distribution == "choice":
        choices = tuple(fields.take("choices", list))
        default = content.get("default")
        fields.content.pop("default", None)
        fields.finish()
        if len(choices) < 2 or not all(isinstance(each, bool | int | float | str) for each in choices):
            raise UserError(f"{where}.choices is {list(choices)}; expected two or more numbers or texts")
        if default not in choices:
            raise UserError(f"{where}.default is {default!r}; expected one of {', '.join(map(str, choices))}")
        return Searched(key=key, distribution=distribution, low=0, high=0, choices=choices, default=default)
    kind = int if distribution.endswith("integer") else float
    low, high, default = (fields.take(name, kind) for name in ("low", "high", "default"))
    fields.finish()
    if not low < high or (distribution.startswith("log_") and low <= 0):
        bound = "above 0 " if distribution.startswith("log_") else ""
        raise UserError(f"{where} goes from {low} to {high}; expected low {bound}below high")
    if not low <= default <= high:
        raise UserError(f"{where}.default is {default}; expected {low} to {high}, for the first trial takes it")
    return Searched(key=key, distribution=distribution, low=low, high=high, choices=(), default=default)
