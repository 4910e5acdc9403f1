"""Frozen dataclasses ⇄ YAML ⇄ command line.

Each field of a root dataclass is a section (see :mod:`rlp.config_keys`). :func:`parse` fills it from the defaults, the
files (``--config FILE``, each after the files it ``extends``, in turn) and the command line (``--section.key value``);
later wins. The environment is never read.

fastargs merges the settings and runs the checks. Only this file knows it, and only a private ``fastargs.Config`` of
strict checkers: its own reading of files, environment and ``sys.argv`` is never used, because that drops unknown keys,
lets the environment win, turns ``False`` into ``True`` and ends with status 0 on an error.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import difflib
from pathlib import Path
import sys
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from rlp.config_keys import INTEGER, NUMBER, Key, inner_type, keys_of
from rlp.errors import UserError

T = TypeVar("T")
COMMAND_LINE = "command line"


@dataclasses.dataclass(frozen=True)
class Given:
    """A value and where it was written. To fastargs it is opaque: neither None nor mapping, which it would drop."""

    value: Any
    origin: str = ""


Layer = dict[Key, Given]


def sections_of(root: type) -> dict[str, type]:
    """The section classes of a root dataclass by name."""
    hints = get_type_hints(root)
    return {field.name: hints[field.name] for field in dataclasses.fields(root)}


def keys_by_path(root: type) -> dict[str, Key]:
    """All keys of a root dataclass by ``section.name``, in order."""
    return {entry.path: entry for name, kind in sections_of(root).items() for entry in keys_of(kind, name)}


def parse(root: type[T], argv: Sequence[str]) -> T:
    """The configuration that a command line asks for; ``--help`` prints all keys and exits with status 0.

    Args:
        root: dataclass whose fields are sections.
        argv: the arguments, without the program's name.

    Raises:
        UserError: an unknown option or key, a wrong value, a missing key, an unreadable or ill-formed file, or fastargs
            is not installed.
    """
    if {"--help", "-h"} & set(argv):
        print(help_text(root))
        raise SystemExit(0)
    files, options = _split(argv)
    settings = _settings(root)
    for file in files:
        for entry, given in _file_layer(root, file):
            _collect(settings, entry, given)
    for name, text in options:
        _collect(settings, *_option(root, settings, name, text))
    return _validated(root, settings)


def from_dict(root: type[T], data: dict[str, Any]) -> T:
    """The configuration in ``{section: {key: value}}``, what is left out at its default; fastargs is not needed.

    Raises:
        UserError: an unknown section or key, a wrong value, or a missing key.
    """
    values: dict[Key, Any] = {}
    for section, content in data.items():
        _check_section(root, section)
        if not isinstance(content, dict):
            raise UserError(f"{section} is {content!r}; expected a mapping of keys")
        for name, value in content.items():
            entry = _find(root, f"{section}.{name}")
            values[entry] = entry.convert(value)
    _check_complete(entry for entry in keys_by_path(root).values() if entry.required and entry not in values)
    return _build(root, values)


def to_dict(config: Any) -> dict[str, dict[str, Any]]:
    """The configuration as plain data: mappings, lists, text, numbers, booleans and None."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return {
        section: {name: plain(value) for name, value in keys.items()}
        for section, keys in dataclasses.asdict(config).items()
    }


def to_yaml(config: Any) -> str:
    """The configuration as a YAML file with every key; given back as ``--config`` it gives an equal configuration."""
    from rlp.config_files import dump

    return dump(to_dict(config))


def help_text(root: type) -> str:
    """What ``--help`` prints: usage, precedence and every key with its type, default and meaning."""
    lines = [
        f"usage: {Path(sys.argv[0]).name} [--config FILE]... [--section.key VALUE]...",
        "",
        "Later wins: default, files in the order given (each after the files it extends), command line.",
        "A list is a,b or [a, b]; a mapping is {depth: 16}, and --model.args.depth 16 sets one entry of it.",
    ]
    for section, kind in sections_of(root).items():
        lines += ["", f"{section}: {_first_line(kind)}"]
        for entry in keys_of(kind, section):
            default = "required" if entry.required else f"default {show(entry.default)}"
            lines += [f"  --{entry.path}  {entry.expected} ({default})", f"      {entry.help}"]
    return "\n".join(lines)


def markdown(root: type) -> str:
    """The reference of all keys as Markdown, one table a section."""
    parts = []
    for section, kind in sections_of(root).items():
        rows = [
            f"| `{entry.name}` | {entry.expected} | {'*required*' if entry.required else f'`{show(entry.default)}`'} "
            f"| {entry.help} |"
            for entry in keys_of(kind, section)
        ]
        head = ["| key | value | default | meaning |", "|---|---|---|---|"]
        parts.append("\n".join([f"### `{section}`", "", _first_line(kind), "", *head, *rows, ""]))
    return "\n".join(parts)


def show(value: Any) -> str:
    """A value as it would be written on the command line or in a file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return "[" + ", ".join(map(show, value)) + "]"
    return str(value)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The ``--config`` files, and ``(section.key, text)`` of every other option, each in order."""
    files: list[str] = []
    options: list[tuple[str, str]] = []
    rest = iter(argv)
    for argument in rest:
        if not argument.startswith("--") or argument == "--":
            raise UserError(f"unexpected argument '{argument}'; expected --config FILE or --section.key VALUE")
        name, equals, text = argument[2:].partition("=")
        if not equals:
            text = next(rest, "--")
            if text.startswith("--"):
                raise UserError(f"--{name} needs a value; expected --{name} VALUE or --{name}=VALUE")
        if name == "config":
            files.append(text)
        else:
            options.append((name, text))
    return files, options


def _file_layer(root: type, file: str) -> Iterator[tuple[Key, Given]]:
    from rlp.config_files import read_entries

    for section, name, value, origin in read_entries(file):
        _check_section(root, section, origin)
        yield _find(root, f"{section}.{name}", origin), Given(value, origin)


def _option(root: type, settings: Any, name: str, text: str) -> tuple[Key, Given]:
    """One option of the command line; ``--section.key.entry`` sets an entry of a mapping given before."""
    parts = name.split(".")
    entry, entry_path = keys_by_path(root).get(".".join(parts[:2])), parts[2:]
    if entry is None or (entry_path and get_origin(inner_type(entry.annotation)[0]) is not dict):
        raise _unknown(root, name, COMMAND_LINE, "--")
    if not entry_path:
        return entry, Given(_read_text(entry, text), COMMAND_LINE)
    before = settings.content.get((entry.section, entry.name), Given(entry.default)).value
    value = _with_entry(before if isinstance(before, dict) else {}, entry_path, _read_yaml(name, text))
    return entry, Given(value, COMMAND_LINE)


def _with_entry(mapping: dict[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of nested mappings with one entry set."""
    if len(path) == 1:
        return {**mapping, path[0]: value}
    inner = mapping.get(path[0])
    return {**mapping, path[0]: _with_entry(inner if isinstance(inner, dict) else {}, path[1:], value)}


def _read_text(entry: Key, text: str) -> Any:
    """The plain value of an option's text, read in the light of the key's type."""
    annotation, optional = inner_type(entry.annotation)
    if optional and text == "null":
        return None
    if get_origin(annotation) is dict:
        return _read_yaml(entry.path, text)
    if get_origin(annotation) is tuple:
        if text.startswith("[") and text.endswith("]"):
            return _read_yaml(entry.path, text)
        return [_read_scalar(part.strip(), get_args(annotation)[0]) for part in text.split(",")] if text else []
    return _read_scalar(text, annotation)


def _read_scalar(text: str, annotation: Any) -> Any:
    """A number or boolean where the type asks for one and the text is one; otherwise the text, for the check to see."""
    if annotation is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if annotation is int and INTEGER.fullmatch(text) and len(text) <= 20:
        return int(text)
    if annotation is float and NUMBER.fullmatch(text):
        return float(text)
    return text


def _read_yaml(name: str, text: str) -> Any:
    from rlp.config_files import load_value

    try:
        return load_value(text)
    except ValueError as error:
        raise UserError(f"--{name} is '{text}', which is not valid YAML: {error} ({COMMAND_LINE})") from None


def _settings(root: type) -> Any:
    """A private fastargs Config in which every key is a Param with a strict checker."""
    try:
        import fastargs
        from fastargs.validation import Checker
    except ImportError as error:
        raise UserError(
            f"reading the command line needs the package '{error.name}', which is not installed; expected it "
            "beside rlp: pip install fastargs terminaltables"
        ) from None

    class KeyChecker(Checker):
        def __init__(self, entry: Key) -> None:
            self.entry = entry

        def check(self, value: Given) -> Any:
            return self.entry.convert(value.value, value.origin)

        def help(self) -> str:
            return self.entry.expected

    settings = fastargs.Config()
    for section, kind in sections_of(root).items():
        registered = fastargs.Section(section, _first_line(kind), config_descriptor=settings)
        for entry in keys_of(kind, section):
            default = None if entry.required else Given(entry.default)
            param = fastargs.Param(KeyChecker(entry), entry.help, default=default, required=entry.required)
            registered.params(**{entry.name: param})
    return settings


def _collect(settings: Any, entry: Key, given: Given) -> None:
    entry.convert(given.value, given.origin)  # fastargs checks only what wins; a mistake that is overridden is one too
    settings.collect({entry.section: {entry.name: given}})


def _validated(root: type[T], settings: Any) -> T:
    """Run the checkers; fastargs hides what they raised behind an empty error, whose context it is."""
    from fastargs.exceptions import MissingValueError

    errors = settings.validate(mode="errordict")
    for error in errors.values():
        if isinstance(error.__context__, UserError):
            raise error.__context__ from None
    keys = {(entry.section, entry.name): entry for entry in keys_by_path(root).values()}
    _check_complete(keys[path] for path, error in errors.items() if isinstance(error, MissingValueError))
    return _build(root, {entry: settings[path] for path, entry in keys.items()})


def _check_complete(missing: Iterable[Key]) -> None:
    names = [entry.path for entry in missing]
    if names:
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        verb = "are" if len(names) > 1 else "is"
        raise UserError(f"{listed} {verb} missing; expected in a --config file or as --section.key VALUE")


def _build(root: type[T], values: dict[Key, Any]) -> T:
    """The root object; sections check what concerns several of their keys."""
    sections = {
        section: kind(**{entry.name: values[entry] for entry in keys_of(kind, section) if entry in values})
        for section, kind in sections_of(root).items()
    }
    return root(**sections)


def _check_section(root: type, section: Any, origin: str = "") -> None:
    if section not in sections_of(root):
        near = _near(str(section), [*sections_of(root), "extends"])
        names = ", ".join(sections_of(root))
        hint = f"did you mean {near}?" if near else f"expected one of {names}"
        raise UserError(f"unknown section '{section}'; {hint}" + (f" ({origin})" if origin else ""))


def _find(root: type, path: str, origin: str = "") -> Key:
    entry = keys_by_path(root).get(path)
    if entry is None:
        raise _unknown(root, path, origin)
    return entry


def _unknown(root: type, path: str, origin: str, dashes: str = "") -> UserError:
    """The error for an unknown key, with the nearest known one: same name elsewhere, then alike as a whole."""
    known = keys_by_path(root)
    section, _, name = path.rpartition(".")
    elsewhere = [entry.path for entry in known.values() if _plain(entry.name) == _plain(name)]
    if elsewhere:
        near = elsewhere[0]
    elif section in sections_of(root):
        near = _near(name, [entry.name for entry in known.values() if entry.section == section])
        near = near and f"{section}.{near}"
    else:
        near = _near(path, [*known, *(["config"] if dashes else [])])
    hint = f"did you mean {dashes}{near}?" if near else "expected one of the keys that --help lists"
    return UserError(f"unknown key {dashes}{path}; {hint}" + (f" ({origin})" if origin else ""))


def _near(word: str, known: Sequence[str]) -> str:
    """The known word most like ``word``, regardless of case, ``_`` and ``-``; empty when none is near."""
    plain = {_plain(name): name for name in known}
    found = difflib.get_close_matches(_plain(word), list(plain), 1)
    return plain[found[0]] if found else ""


def _plain(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "")
