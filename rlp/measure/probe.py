"""``python -m rlp.measure probe``: fresh heads on the frozen features of a finished run, with every control beside."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from rlp.errors import UserError
from rlp.files import write_atomically
from rlp.measure.controls import Material, Sets, materials
from rlp.measure.features import FeatureSet, Mode, augmentation, extract, probe_taps
from rlp.measure.fit import TOLERANCE, HeadSpec
from rlp.measure.preprocess import FEATURES
from rlp.measure.protocols import Protocol, Result, Setting, for_retrieval, read, views_of
from rlp.measure.reading import Reading, save_readings
from rlp.measure.rows import make_row, online_rows, planted_rows, rademacher_rows, run_facts
from rlp.measure.run import GROUPS, Run, open_run
from rlp.measure.scores import SampleScores, save_scores, scores_table

SCHEMA = 1
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
HEADS = ("linear", "two-layer", "per-class")
MODES: tuple[Mode, ...] = get_args(Mode)
IMAGES = ("clean", "augmented")
DEFAULT_N = {"converged": (2, 10, 100), "views": (10,), "budget": (10,)}
"""Random labels where none are asked for: many only where heads are fitted fast."""
FEWEST = 8
"""Samples that a group must have: the leak check halves them."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What is probed; see ``python -m rlp.measure probe --help``.

    Attributes:
        taps: patterns; empty for those of the run, or else of the model.
        n: numbers of random labels; empty for :data:`DEFAULT_N`.
        draws: independent labellings, each with heads of its own.
        protocols, heads, features: see :data:`PROTOCOLS`, :data:`HEADS`, :data:`rlp.measure.preprocess.FEATURES`.
        hidden: width of two-layer heads.
        width: of the projection.
        modes, images: of the network, and of what it sees.
        samples: of each group, at most; None for all that members and non-members have both.
        tolerance, max_steps: of fits until convergence, see :func:`rlp.measure.fit.fit_converged`.
        seed: of fresh draws, subsets, noise and the untrained network.
        checkpoint, device: as for :func:`rlp.measure.run.open_run`.
        out: folder of the results; None for ``measure`` in the run's.
    """

    taps: tuple[str, ...] = ()
    n: tuple[int, ...] = ()
    draws: int = 10
    protocols: tuple[Protocol, ...] = PROTOCOLS
    heads: tuple[Literal["linear", "two-layer", "per-class"], ...] = ("linear",)
    features: tuple[str, ...] = ("raw",)
    hidden: int = 512
    width: int = 128
    modes: tuple[Mode, ...] = ("eval",)
    images: tuple[str, ...] = ("clean",)
    samples: int | None = None
    tolerance: float = TOLERANCE
    max_steps: int = 2000
    seed: int = 0
    checkpoint: str = "last"
    device: str = "auto"
    out: str | None = None

    def __post_init__(self) -> None:
        known = {"protocols": PROTOCOLS, "heads": HEADS, "features": FEATURES, "modes": MODES, "images": IMAGES}
        for key, names in known.items():
            given = getattr(self, key)
            if not given or len(set(given)) < len(given) or not set(given) <= set(names):
                raise UserError(f"--{key} is {' '.join(given)!r}; expected some of {', '.join(names)}, each once")
        if any(not 2 <= n <= 2**31 for n in self.n) or len(set(self.n)) < len(self.n):
            raise UserError(f"--n is {' '.join(map(str, self.n))!r}; expected numbers from 2 to 2^31, each once")
        for key in ("draws", "hidden", "width", "max_steps"):
            if getattr(self, key) < 1:
                raise UserError(f"--{key.replace('_', '-')} is {getattr(self, key)}; expected at least 1")
        if not 0 <= self.tolerance < 1:
            raise UserError(f"--tolerance is {self.tolerance}; expected a number from 0 to below 1")
        if self.samples is not None and self.samples < FEWEST:
            raise UserError(f"--samples is {self.samples}; expected at least {FEWEST}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed is {self.seed}; expected 0 to 2^63 - 1")


@dataclass(frozen=True)
class Probed:
    """What a probe found, and where it lies."""

    run: dict[str, Any]
    options: dict[str, Any]
    rows: list[Row]
    spectra: list[Row]
    rademacher: list[Row]
    planted: list[Row]
    files: list[Path]


def probe(run_dir: str | Path, options: ProbeOptions | None = None) -> list[Row]:
    """Probe a finished run; returns the rows of ``probe.json``. See :func:`run_probe` for all that is found."""
    return run_probe(run_dir, options or ProbeOptions()).rows


def run_probe(run_dir: str | Path, options: ProbeOptions) -> Probed:
    """Probe a finished run and write ``probe.json``, ``readings.npz``, ``scores.parquet`` and ``scores.csv``.

    Members and non-members are as many of each, since κ depends on their number. Statistics of features, heads and
    draws are fitted to each group by itself, so that the two differ in nothing but having been trained on.

    Raises:
        UserError: the run cannot be opened (see :func:`rlp.measure.run.open_run`), a tap does not exist, a group has
            too few samples, or the folder cannot be written.
        OSError: likewise.
    """
    run = open_run(run_dir, checkpoint=options.checkpoint, device=options.device)
    folder = Path(options.out) if options.out else run.dir / "measure"
    found = _Gathered(run, options)
    total = _count(run, options)
    _check_writable(folder)
    with _bar(total) as bar:
        for mode in options.modes:
            _probe_mode(run, options, mode, found, bar)
    if "online" in options.protocols:
        found.rows += online_rows(run, [tap.name for tap in probe_taps(run, options.taps)])
    return _save(folder, run, options, found)


def _check_writable(folder: Path) -> None:
    """Make the folder now: what takes hours to find must not be lost for want of a place."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written; expected a folder for the results (--out)")


class _Gathered:
    """Everything found so far."""

    def __init__(self, run: Run, options: ProbeOptions) -> None:
        self.rows: list[Row] = []
        self.spectra: dict[tuple[str, ...], Row] = {}
        self.rademacher: list[Row] = []
        self.planted: list[Row] = []
        self.readings: list[Reading] = []
        self.scores: list[SampleScores] = []
        sizes = [len(run.groups[group].view.ids) for group in GROUPS]
        self.count = min([*sizes, options.samples or max(sizes)])
        if self.count < FEWEST:
            raise UserError(
                f"the run has {sizes[0]} members and {sizes[1]} non-members; expected at least {FEWEST} of each"
            )


def _count(run: Run, options: ProbeOptions) -> int:
    """Groups that heads are fitted to, or asked about: the bar's steps (but for taps that no pass comes to)."""
    steps = sum(4 if setting.protocol == "retrieval" else 5 for setting in _settings(run, options, "eval"))
    return steps * len(options.modes) * len(probe_taps(run, options.taps))


def _settings(run: Run, options: ProbeOptions, mode: Mode) -> Iterator[Setting]:
    """Every condition of one mode, but for the tap; protocols that fix the images or have no heads occur once."""
    for protocol, images, features in product(options.protocols, options.images, options.features):
        fixed = protocol in ("views", "retrieval")
        if protocol == "online" or (fixed and images != options.images[0]):
            continue
        for kind, n in product(*_heads_and_n(options, protocol)):
            yield Setting(
                protocol=protocol,
                mode=mode,
                images="augmented" if fixed else images,
                features=features,
                width=options.width,
                n=n,
                head=HeadSpec(kind=kind, hidden=options.hidden),  # type: ignore[arg-type]
                seed=options.seed,
                num_classes=len(run.card.classes),
                tolerance=options.tolerance,
                max_steps=options.max_steps,
                device=run.device,
            )


def _heads_and_n(options: ProbeOptions, protocol: Protocol) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if protocol == "retrieval":  # no heads, and as many labels as samples
        return ("linear",), (0,)
    return options.heads, options.n or DEFAULT_N[protocol]


def _probe_mode(run: Run, options: ProbeOptions, mode: Mode, found: _Gathered, bar: Any) -> None:
    settings = list(_settings(run, options, mode))
    views = sorted({view for s in settings for part in views_of(s.protocol, s.images) for view in part}, key=str)
    if not views:
        return
    sets = _feature_sets(run, options, mode, views, found.count)
    taps = list(sets["members", views[0]].features)
    for depth, tap in enumerate(taps):
        for plan in dict.fromkeys((views_of(s.protocol, s.images), s.protocol == "retrieval") for s in settings):
            parts = materials(sets, tap, *plan[0], options.seed)
            if plan[1]:
                parts = [for_retrieval(part) for part in parts if part.group != "leak"]
            for setting in settings:
                if (views_of(setting.protocol, setting.images), setting.protocol == "retrieval") == plan:
                    _probe_condition(run, setting, (tap, depth), parts, sets, found, bar)


def _feature_sets(
    run: Run, options: ProbeOptions, mode: Mode, views: Sequence[int | None], count: int
) -> dict[tuple[str, int | None], FeatureSet]:
    """Features of members, non-members, and of members in an untrained network, in all these views."""
    sets = {}
    for view in views:
        for name, group, untrained in (
            ("members", "members", False),
            ("non-members", "non-members", False),
            ("untrained", "members", True),
        ):
            sets[name, view] = extract(
                run,
                group,
                taps=options.taps or None,
                mode=mode,
                view=view,
                limit=count,
                draws=options.draws,
                seed=options.seed,
                untrained=untrained,
            )
    return sets


def _probe_condition(
    run: Run,
    setting: Setting,
    place: tuple[str, int],
    parts: Sequence[Material],
    sets: Sets,
    found: _Gathered,
    bar: Any,
) -> None:
    tap, depth = place
    results: dict[str, Result] = {}
    for part in parts:
        bar.set_postfix_str(f"{setting.protocol} {tap} n={setting.n or 'N'} {part.group}", refresh=False)
        results[part.group] = read(part, setting)
        bar.update()
    row = make_row(run, setting, tap, depth, results)
    found.rows.append(row)
    found.readings += [result.reading(setting, tap, depth) for result in results.values()]
    view = views_of(setting.protocol, setting.images)[0][0]
    samples = {group: sets[group, view] for group in GROUPS}
    found.scores += [_scores(results[group], setting, tap, depth, samples[group]) for group in GROUPS]
    found.spectra |= {
        (setting.mode, setting.images, setting.protocol, tap, setting.features, group): _spectrum(row, result)
        for group, result in results.items()
        if group in (*GROUPS, "untrained")
    }
    if setting.protocol == "converged" and setting.n == 2:
        found.rademacher += rademacher_rows(row, results)
    if setting.protocol in ("converged", "views"):
        found.planted += planted_rows(row, results, samples)


def _scores(result: Result, setting: Setting, tap: str, depth: int, samples: FeatureSet) -> SampleScores:
    return SampleScores(
        condition=result.reading(setting, tap, depth).condition,
        samples=samples,
        places=np.searchsorted(samples.ids, result.part.ids),
        draws=len(result.correct),
        log_p=result.log_p.mean(axis=(0, 1)),
        margin=result.margin.mean(axis=(0, 1)),
        correct=result.by_sample.mean(axis=0),
    )


def _spectrum(row: Row, result: Result) -> Row:
    entry = {key: row[key] for key in ("tap", "depth", "D", "N", "features", "mode", "images", "protocol")}
    found = result.spectrum
    return {
        **entry,
        "group": result.group,
        "effective_rank": found.effective_rank,
        "participation_ratio": found.participation_ratio,
        "numerical_rank": found.numerical_rank,
        "eigenvalues": [float(f"{value:.6g}") for value in found.eigenvalues],
    }


def _save(folder: Path, run: Run, options: ProbeOptions, found: _Gathered) -> Probed:
    facts = run_facts(run, {"samples": found.count, "augmentation": augmentation(run)[1]})
    chosen = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(options).items()}
    spectra = list(found.spectra.values())
    content = {
        "schema": SCHEMA,
        "run": facts,
        "options": chosen,
        "rows": found.rows,
        "spectra": spectra,
        "rademacher": found.rademacher,
        "planted": found.planted,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    # An older one would stand beside readings that are not its own if writing ended half-way.
    (folder / "probe.json").unlink(missing_ok=True)
    files = [
        save_readings(folder / "readings.npz", found.readings),
        *save_scores(folder, scores_table(found.scores, run.card.classes)),
        write_atomically(folder / "probe.json", text + "\n"),  # last: where it lies, the probe is complete
    ]
    return Probed(facts, chosen, found.rows, spectra, found.rademacher, found.planted, files)


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="heads", unit=" fits", disable=None, leave=False)
