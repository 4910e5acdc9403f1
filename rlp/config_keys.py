"""What a configuration is made of: sections (frozen dataclasses) of typed keys, each checked on its own.

A section class is the schema. Its annotations give the types, :func:`key` the default, the help and the range::

    @dataclass(frozen=True, kw_only=True)
    class HeadsConfig(Section, name="heads"):
        draws: int = key(8, "draws per tap", at_least(1))

Types: ``bool``, ``int``, ``float``, ``str``, ``Literal["a", "b"]``, ``tuple[X, ...]`` and ``tuple[X, X]`` of those,
``dict[str, Any]`` of plain values, and any of them ``| None``. Nothing is guessed: ``1`` is no bool, ``2.9`` no int,
``3`` no text; the one conversion is from an integer, or text like ``1e-4`` (which many YAML readers take for text), to
a float. Numbers are finite.
"""

from collections.abc import Callable
import dataclasses
from functools import cache
import inspect
from itertools import pairwise
import math
import re
import types
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from rlp.errors import UserError

REQUIRED: Any = dataclasses.MISSING
INTEGER = re.compile(r"[-+]?[0-9]+")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


@dataclasses.dataclass(frozen=True)
class Check:
    """A test of one key's value and, for messages and docs, the words for what passes it."""

    test: Callable[[Any], bool]
    expected: str


def at_least(low: float) -> Check:
    """``low`` or more."""
    return Check(lambda value: value >= low, f"at least {low}")


def above(low: float) -> Check:
    """More than ``low``."""
    return Check(lambda value: value > low, f"above {low}")


def between(low: float, high: float) -> Check:
    """From ``low`` to ``high``, both allowed."""
    return Check(lambda value: low <= value <= high, f"from {low} to {high}")


def at_most(high: float) -> Check:
    """``high`` or less."""
    return Check(lambda value: value <= high, f"at most {high}")


def below(high: float) -> Check:
    """Less than ``high``."""
    return Check(lambda value: value < high, f"below {high}")


def each(check: Check) -> Check:
    """Every element of a list passes ``check``."""
    return Check(lambda values: all(map(check.test, values)), f"each {check.expected}")


seed_range = Check(lambda value: 0 <= value < 2**64, "from 0 to 2^64 - 1")
not_empty = Check(lambda value: len(value) > 0, "not empty")
increasing = Check(lambda values: all(a < b for a, b in pairwise(values)), "increasing")


def key(default: Any, help: str, *checks: Check) -> Any:
    """A dataclass field that is a configuration key.

    ``default`` is :data:`REQUIRED` where there is none, and ``dict`` for an empty mapping.
    """
    metadata = {"help": help, "checks": checks}
    if default is dict:
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, eq=False)
class Key:
    """One key of a section, as read from its dataclass field; :func:`keys_of` gives the same object every time."""

    section: str
    name: str
    annotation: Any
    default: Any
    help: str
    checks: tuple[Check, ...]

    @property
    def path(self) -> str:
        """``section.name``."""
        return f"{self.section}.{self.name}"

    @property
    def required(self) -> bool:
        """True when there is no default."""
        return self.default is REQUIRED

    @property
    def expected(self) -> str:
        """What the value may be, in words."""
        annotation, optional = inner_type(self.annotation)
        words = ", ".join([describe(annotation), *(check.expected for check in self.checks)])
        return words + (", or null" if optional else "")

    def convert(self, value: Any, origin: str = "") -> Any:
        """The value in the key's type.

        Args:
            value: a plain Python value, as YAML gives it.
            origin: where it was written, for the message.

        Raises:
            UserError: wrong type, or out of range.
        """
        try:
            converted = convert(value, self.annotation)
        except ValueError:
            raise self.mistake(value, origin) from None
        if converted is not None and not all(check.test(converted) for check in self.checks):
            raise self.mistake(value, origin)
        return converted

    def mistake(self, value: Any, origin: str = "") -> UserError:
        """The error that says what was given, what was expected, and where."""
        shown = "null" if value is None else repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return UserError(f"{self.path} is {shown}; expected {self.expected}" + (f" ({origin})" if origin else ""))


class Section:
    """Base of a section's dataclass: values are converted and checked however the object is made."""

    section: ClassVar[str]

    def __init_subclass__(cls, name: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.section = name

    def __post_init__(self) -> None:
        for entry in keys_of(type(self), self.section):
            object.__setattr__(self, entry.name, entry.convert(getattr(self, entry.name)))
        self.check()

    def check(self) -> None:
        """Checks that concern several keys; raises UserError naming them."""


@cache
def keys_of(section: type, name: str) -> tuple[Key, ...]:
    """The keys of the section class that is called ``name``, in order.

    A plain dataclass serves too: its help is the text after each name below ``Attributes:`` in its docstring.
    """
    hints, described = get_type_hints(section), _described_attributes(section)
    return tuple(
        Key(
            name,
            field.name,
            hints[field.name],
            field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default,
            field.metadata.get("help") or described.get(field.name, ""),
            field.metadata.get("checks", ()),
        )
        for field in dataclasses.fields(section)
    )


def _described_attributes(section: type) -> dict[str, str]:
    _, _, text = (inspect.getdoc(section) or "").partition("Attributes:\n")
    return {name: " ".join(words.split()) for name, words in re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", text, re.M)}


def inner_type(annotation: Any) -> tuple[Any, bool]:
    """``X | None`` as ``(X, True)``, any other X as ``(X, False)``."""
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [argument for argument in get_args(annotation) if argument is not types.NoneType]
        if len(inner) == 1:
            return inner[0], True
    return annotation, False


def convert(value: Any, annotation: Any) -> Any:
    """``value`` in the type ``annotation``; ValueError when it is of another."""
    annotation, optional = inner_type(annotation)
    if value is None and optional:
        return None
    origin = get_origin(annotation)
    if origin is Literal:
        return _one_of(value, get_args(annotation))
    if origin is tuple:
        return _convert_list(value, get_args(annotation))
    if origin is dict:
        return _convert_mapping(value)
    return _SCALARS[annotation](value)


def _one_of(value: Any, options: tuple[Any, ...]) -> Any:
    if not isinstance(value, str) or value not in options:
        raise ValueError
    return str(value)


def _convert_list(value: Any, elements: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError
    if elements[-1] is Ellipsis:
        elements = elements[:1] * len(value)
    if len(elements) != len(value):
        raise ValueError
    return tuple(convert(item, element) for item, element in zip(value, elements, strict=True))


def _convert_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return {_convert_text(name): _convert_plain(item) for name, item in value.items()}


def _convert_plain(value: Any) -> Any:
    """A value that YAML can hold and a checkpoint can carry: None, bool, number, text, list or mapping of those."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, dict):
        return _convert_mapping(value)
    if isinstance(value, list | tuple):
        return [_convert_plain(item) for item in value]
    for kind in (int, float, str):
        if isinstance(value, kind):
            return _SCALARS[kind](value)
    raise ValueError


def _convert_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _convert_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError
    return int(value)


def _convert_float(value: Any) -> float:
    if isinstance(value, str) and NUMBER.fullmatch(value) and "e" in value.lower():
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    try:
        number = float(value)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(number):
        raise ValueError
    return number


def _convert_text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    return str(value)


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: _convert_bool,
    int: _convert_int,
    float: _convert_float,
    str: _convert_text,
}
_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
_PLURALS = {bool: "true or false", int: "integers", float: "numbers", str: "texts"}


def describe(annotation: Any) -> str:
    """The type (without ``| None``) in words, for messages, ``--help`` and the docs."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(arguments[:-1]) + f" or {arguments[-1]}"
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"a list of {count}{_PLURALS[arguments[0]]}"
    return "a mapping" if origin is dict else _NAMES[annotation]
