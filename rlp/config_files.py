"""YAML files of settings: a strict reader that knows its lines, ``extends``, and the writer.

YAML as in its version 1.2: ``true`` and ``false`` are the only booleans (``yes``, ``no``, ``on`` and ``off`` are text),
``1e-4`` is a number, ``010`` is ten, ``1:30`` and dates are text. Equal keys, aliases and merge keys are errors.
"""

from collections.abc import Iterator
import difflib
import os
from pathlib import Path
import re
from typing import Any, NamedTuple

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from rlp.config_keys import INTEGER, NUMBER
from rlp.errors import UserError

_SCALARS = {
    "null": (re.compile(r"(null|Null|NULL|~|)$"), ["n", "N", "~", ""]),
    "bool": (re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(rf"{INTEGER.pattern}$"), list("-+0123456789")),
    "float": (re.compile(rf"({NUMBER.pattern}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"), list("-+.0123456789")),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own way to give a class its resolvers)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"'*{event.anchor}' is an alias, which is not supported; quote text that begins with *"
            raise ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = self.construct_object(key_node, deep=True)
            problem = None
            if not isinstance(name, str):
                problem = f"the key {name!r} is not text; quote it"
            elif name in seen:
                problem = f"the key '{name}' is there twice"
            if problem:
                raise ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what other readers of YAML would take for something else than text, and what :class:`_Loader` would."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)


def _construct_int(loader: _Loader, node: Any) -> int:
    """Decimal, where PyYAML would take a leading zero for octal."""
    return int(str(loader.construct_scalar(node)))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Text; with one of YAML's rarer line breaks escaped, which PyYAML would fold into a blank."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


class Entry(NamedTuple):
    """One key of a file: ``section`` and ``name``, its plain value, and where it was written."""

    section: str
    name: str
    value: Any
    origin: str


def dump(data: dict[str, Any]) -> str:
    """Plain data as YAML that :func:`read_entries` and :func:`load_value` read back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def load_value(text: str) -> Any:
    """One YAML value; ValueError with the reason when it is ill-formed."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(_reason(error)) from None


def read_entries(path: str | Path) -> Iterator[Entry]:
    """The keys of a file, after those of the files that it ``extends``, in the order in which they take effect.

    Raises:
        UserError: a file is missing, unreadable or ill-formed, or files extend each other in a circle.
    """
    yield from _read(Path(path), ())


def _read(path: Path, chain: tuple[Path, ...]) -> Iterator[Entry]:
    if path.resolve() in [earlier.resolve() for earlier in chain]:
        circle = " -> ".join(str(file) for file in (*chain, path))
        raise UserError(f"extends goes round in a circle: {circle}")
    bases, entries = _parse(path)
    for base in bases:
        yield from _read(Path(os.path.normpath(path.parent / base)), (*chain, path))
    yield from entries


def _parse(path: Path) -> tuple[list[str], list[Entry]]:
    """One file: the names in its ``extends``, and its own keys."""
    text = _read_text(path)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path} holds no sections; expected 'section:' with 'key: value' below it")
        loader.construct_mapping(root)  # finds keys that are there twice
        bases: list[str] = []
        entries: list[Entry] = []
        for name_node, node in root.value:
            name, line = loader.construct_object(name_node), name_node.start_mark.line + 1
            if name == "extends":
                bases = _extends(loader.construct_document(node), f"{path}, line {line}")
            else:
                entries += _section(loader, path, name, line, node)
        return bases, entries
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {_reason(error)}") from None


def _extends(value: Any, origin: str) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"extends is {value!r}; expected the name of a file or a list of names ({origin})")
    return names


def _section(loader: _Loader, path: Path, section: str, line: int, node: Any) -> Iterator[Entry]:
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{section} holds no keys; expected 'key: value' lines below it ({path}, line {line})")
    loader.construct_mapping(node)
    for name_node, value_node in node.value:
        origin = f"{path}, line {name_node.start_mark.line + 1}"
        yield Entry(section, loader.construct_object(name_node), loader.construct_document(value_node), origin)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        folder = path.parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 1, 0.75)
        raise UserError(f"{path} does not exist" + (f"; did you mean {folder / near[0]}?" if near else "")) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; expected a YAML file") from None


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        context = f"{error.context}, " if error.context else ""
        return f"{context}{error.problem}" + (f" (line {mark.line + 1}, column {mark.column + 1})" if mark else "")
    return str(error).splitlines()[0]
