"""Files of keys read strictly, in one sentence for each mistake: what findings and sweeps are written in."""

from collections.abc import Sequence
import difflib
from pathlib import Path
from typing import Any

from rlp.config_keys import inner_type
from rlp.errors import UserError


def settings_in(value: Any, where: str) -> dict[str, Any]:
    """Settings by ``section.key``; what keys there are, the configuration itself checks."""
    if not isinstance(value, dict) or not all(name.count(".") >= 1 for name in value):
        raise UserError(f"{where} is {value!r}; expected 'section.key: value' lines")
    return value


class Fields:
    """A mapping whose keys are taken one by one; none may be left."""

    def __init__(self, content: dict[str, Any], where: str) -> None:
        self.content, self.where, self.known = dict(content), where, list[str]()

    def take(self, name: str, kind: Any, *default: Any) -> Any:
        """The value of a key, of a type, removed; ``default`` where it is missing."""
        self.known.append(name)
        if name not in self.content:
            if default:
                return default[0]
            raise UserError(f"{self.where}: {name} is missing")
        value = self.content.pop(name)
        plain, optional = inner_type(kind)
        if value is None and optional:
            return None
        if plain is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
            raise UserError(f"{self.where}: {name} is {value!r}; expected {_WORDS[plain]}")
        return value

    def finish(self) -> None:
        """An error if a key is left."""
        for name in self.content:
            near = difflib.get_close_matches(name, self.known, 1)
            hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(self.known)}"
            raise UserError(f"{self.where}: unknown key '{name}'; {hint}")


_WORDS: dict[Any, str] = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file of keys, read as strictly as every other configuration."""
    from rlp.config_files import load_value

    try:
        content = load_value(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no keys; expected a mapping")
    return content


def check_known(name: str, known: Sequence[str], what: str) -> None:
    """An error that names what comes nearest, if the name is not one of those known."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        raise UserError(f"{what} is '{name}'; {hint}")
