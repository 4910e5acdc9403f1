"""What a finding claims and how it is tested: the files ``configs/paper/NAME.yaml`` and ``configs/paper/sizes/*.yaml``.

A contrast orders readings, for example one tap after the other, and says whether they are expected to rise or to fall.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rlp.errors import UserError
from rlp.reproduce.fields import Fields, check_known, read_mapping, settings_in

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "configs" / "paper"

EXPECTED = ("rises", "falls", "chance", "open")
READ_BY = ("kappa", "test_accuracy", "train_accuracy")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """One reading of a contrast.

    Attributes:
        variant: which training.
        tap: ``first``, ``before last``, ``last``, or a tap's name.
        trained: share of the epochs done, above 0 and up to 1.
    """

    variant: str
    tap: str = "last"
    trained: float = 1.0

    @property
    def label(self) -> str:
        """Short name for tables and axes."""
        parts = [self.variant, self.tap, "" if self.trained == 1 else f"{self.trained:.0%} trained"]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """What is compared.

    Attributes:
        what: the comparison in words.
        over: readings in order. Two: the last minus the first; more: the rise of the fitted line from end to end;
            one: the reading itself, against chance.
        expected: ``rises`` or ``falls``; ``chance``, one reading within ``margin`` of 0; ``open``, no sign is claimed.
        of: ``kappa``, or the class accuracy ``test_accuracy`` or ``train_accuracy``.
        margin: what still counts as chance.
        matched: fresh heads are fitted to equally many samples of every variant.
    """

    what: str
    over: tuple[Selection, ...]
    expected: str
    of: str = "kappa"
    margin: float = 0.05
    matched: bool = False


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A finding of the papers.

    Attributes:
        name: that of its file.
        claim, source: a sentence, and who claims it.
        variants: name -> settings by ``section.key``, on top of ``settings``.
        contrasts: what is judged.
        settings: for all variants.
        sizes: further settings for all variants of one size.
        note: what to keep in mind when the verdict is read.
        fresh: options of the fresh heads' reading, on top of the size's.
    """

    name: str
    claim: str
    source: str
    variants: dict[str, dict[str, Any]]
    contrasts: tuple[Contrast, ...]
    settings: dict[str, Any]
    sizes: dict[str, dict[str, Any]]
    note: str = ""
    fresh: dict[str, Any] = field(default_factory=dict)

    def settings_of(self, variant: str, size: str) -> dict[str, Any]:
        """All settings of one variant by ``section.key``; the variant's own win."""
        return self.settings | self.sizes.get(size, {}) | self.variants[variant]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the networks and data are.

    Attributes:
        name: that of its file.
        base: configuration that every variant extends.
        data: configuration of write_datasets.py, used where no .beton is given and that has what it needs by itself;
            null: they must be given.
        settings: by ``section.key``, below those of the finding.
        threads: of the processor for each training.
        fresh: options of the fresh heads' reading, for each protocol.
        about: a sentence.
    """

    name: str
    base: Path
    data: Path | None
    settings: dict[str, Any]
    threads: int
    fresh: dict[str, dict[str, Any]]
    about: str


def finding_names() -> list[str]:
    """The findings that there are files for."""
    return sorted(path.stem for path in PAPER.glob("*.yaml"))


def size_names() -> list[str]:
    """The sizes that there are files for, the smallest first."""
    known = ["digits", "cifar10-subset", "cifar10"]
    return sorted(
        (path.stem for path in (PAPER / "sizes").glob("*.yaml")), key=lambda name: (*_rank(known, name), name)
    )


def _rank(known: Sequence[str], name: str) -> tuple[int]:
    return (known.index(name) if name in known else len(known),)


def load_finding(name: str) -> Finding:
    """A finding by its name.

    Raises:
        UserError: there is none of that name, or its file is wrong.
    """
    check_known(name, finding_names(), "finding")
    return read_finding(PAPER / f"{name}.yaml")


def load_size(name: str) -> Size:
    """A size by its name; as :func:`load_finding`."""
    check_known(name, size_names(), "size")
    path = PAPER / "sizes" / f"{name}.yaml"
    fields = Fields(read_mapping(path), str(path))
    size = Size(
        name=name,
        base=path.parent / fields.take("base", str),
        data=None if (data := fields.take("data", str | None, None)) is None else path.parent / data,
        settings=settings_in(fields.take("settings", dict, {}), f"{path}: settings"),
        threads=fields.take("threads", int, 1),
        fresh=fields.take("fresh", dict, {}),
        about=fields.take("about", str),
    )
    fields.finish()
    for protocol, options in size.fresh.items():
        if protocol not in ("converged", "budget") or not isinstance(options, dict):
            raise UserError(f"{path}: fresh.{protocol} is {options!r}; expected options below converged and budget")
    if size.threads < 1:
        raise UserError(f"{path}: threads is {size.threads}; expected at least 1")
    return size


def read_finding(path: Path) -> Finding:
    """A finding from its file.

    Raises:
        UserError: an unknown or missing key, or a value that does not fit.
    """
    fields = Fields(read_mapping(path), str(path))
    variants = fields.take("variants", dict)
    if not variants:
        raise UserError(f"{path}: variants is empty; expected at least one")
    for name in variants:
        if not name or not all(letter.isalnum() or letter in "._" for letter in name):
            raise UserError(f"{path}: variant '{name}' cannot name a folder; expected letters, digits, dots and _")
    contrasts = fields.take("contrasts", list)
    sizes = fields.take("sizes", dict, {})
    finding = Finding(
        name=path.stem,
        claim=fields.take("claim", str),
        source=fields.take("source", str),
        variants={name: settings_in(value or {}, f"{path}: variants.{name}") for name, value in variants.items()},
        contrasts=tuple(_contrast(item, f"{path}: contrasts[{i}]", list(variants)) for i, item in enumerate(contrasts)),
        settings=settings_in(fields.take("settings", dict, {}), f"{path}: settings"),
        sizes={name: settings_in(value, f"{path}: sizes.{name}") for name, value in sizes.items()},
        note=fields.take("note", str, ""),
        fresh=fields.take("fresh", dict, {}),
    )
    fields.finish()
    for name in sizes:
        check_known(name, size_names(), f"{path}: sizes; size")
    if not contrasts:
        raise UserError(f"{path}: contrasts is empty; expected at least one")
    return finding


def _contrast(item: Any, where: str, variants: Sequence[str]) -> Contrast:
    if not isinstance(item, dict):
        raise UserError(f"{where} is {item!r}; expected keys what, over and expected")
    fields = Fields(item, where)
    over = fields.take("over", list)
    contrast = Contrast(
        what=fields.take("what", str),
        over=tuple(_selection(each, f"{where}.over[{i}]", variants) for i, each in enumerate(over)),
        expected=fields.take("expected", str),
        of=fields.take("of", str, "kappa"),
        margin=fields.take("margin", float, 0.05),
        matched=fields.take("matched", bool, False),
    )
    fields.finish()
    check_known(contrast.expected, EXPECTED, f"{where}.expected")
    check_known(contrast.of, READ_BY, f"{where}.of")
    alone = contrast.expected == "chance"
    if alone != (len(over) == 1) or not over:
        raise UserError(f"{where}.over has {len(over)} entries; expected {'one' if alone else 'two or more'}")
    return contrast


def _selection(item: Any, where: str, variants: Sequence[str]) -> Selection:
    item = {"variant": item} if isinstance(item, str) else item
    if not isinstance(item, dict):
        raise UserError(f"{where} is {item!r}; expected a variant, or keys variant, tap and trained")
    fields = Fields(item, where)
    variant = fields.take("variant", str, variants[0])
    check_known(variant, variants, f"{where}.variant")
    selection = Selection(
        variant=variant, tap=fields.take("tap", str, "last"), trained=fields.take("trained", float, 1.0)
    )
    fields.finish()
    if not 0 < selection.trained <= 1:
        raise UserError(f"{where}.trained is {selection.trained}; expected above 0 and up to 1")
    return selection
