"""The top of a page: which runs, what they reached, and how to repeat them."""

import json
from pathlib import Path
import shlex
from typing import Any

from rlp.report.page_estimates import counted, ends_of, estimate_cell, mean_of, primary, shown, signed
from rlp.report.page_html import Cell, Html, code, element, facts, folded, is_number, join, number_cell, table
from rlp.report.page_run import PROBE, ReportRun, probe_command
from rlp.report.readings import readings
from rlp.runlog import Row, weight_text

SATURATED = 0.995
"""κ from which on two groups cannot differ, whatever they hold."""


def header(runs: list[ReportRun]) -> Html:
    """Title, main facts of every run, the first numbers, and what is needed to repeat them."""
    single = len(runs) == 1
    title = f"Run {runs[0].name}" if single else f"{len(runs)} runs side by side"
    parts = [
        element("h1", title),
        element("p", "Random labels read from the features of a trained network: what was measured, beside what it "
                "must be compared with.", class_="lead"),
    ]  # fmt: skip
    parts.append(facts(_facts(runs[0])) if single else _overview(runs))
    parts += [_cards(run) for run in runs] if single else []
    parts += [_details(run, named=not single) for run in runs]
    return join(parts)


def _facts(run: ReportRun) -> list[tuple[str, str]]:
    final = run.epochs[-1]
    lam = run.lam
    pairs = [
        ("model", run.model),
        ("training data", "/".join(Path(str(run.setting("data", "train") or "unknown")).parts[-2:])),
        ("N, training images", _count(run, "train")),
        ("validation images", _count(run, "val")),
        ("classes", str(len(class_names(run)) or "unknown")),
        ("seed", "unknown" if run.seed is None else str(run.seed)),
        ("penalty", weight_text(lam, run.heads) if is_number(lam) else "unknown"),
        ("random labels in training", _heads(final)),
        ("epochs", f"{final['epoch']:,}"),
        ("steps", f"{final['step']:,}"),
        ("time", _duration(run.summary.get("seconds"))),
        ("ended", "yes" if run.summary else "no: the last finished epoch is shown"),
    ]
    return pairs


def class_names(run: ReportRun) -> list[str]:
    """Names of the classes; none for a run that has not ended."""
    return [str(name) for name in (run.summary.get("data") or {}).get("train", {}).get("classes", [])]


def _count(run: ReportRun, split: str) -> str:
    told = (run.summary.get("data") or {}).get(split, {}).get("num_samples")
    count = told if told is not None else (run.epochs[-1].get(split) or {}).get("count")
    return f"{int(count):,}" if is_number(count) else "none"


def _heads(final: Row) -> str:
    rows = final.get("heads") or []
    if not rows:
        return "no heads"
    n = ", ".join(map(str, sorted({row["num_labels"] for row in rows})))
    return f"n = {n}, {len({row['draw'] for row in rows})} draws, {len({row['tap'] for row in rows})} taps"


def _duration(seconds: Any) -> str:
    if not is_number(seconds):
        return "unknown"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def accuracies(run: ReportRun) -> tuple[float | None, str, float | None]:
    """Class accuracy on training images, how it was read, and on validation images."""
    final = run.epochs[-1]
    clean = final.get("train_eval")
    train = (clean or final.get("train") or {}).get("accuracy")
    how = "clean images, eval mode" if clean else "running over the last epoch"
    return train, how, (final.get("val") or {}).get("accuracy")


def _percent(value: float | None) -> str:
    return f"{100 * value:.1f}%" if is_number(value) else "–"


def _cards(run: ReportRun) -> Html:
    train, how, val = accuracies(run)
    gap = signed(100 * (train - val), 1) if is_number(train) and is_number(val) else "unknown"
    cards = [
        _card("class accuracy, training → validation", f"{_percent(train)} → {_percent(val)}", f"training: {how}; N = "
              f"{_count(run, 'train')} and {_count(run, 'val')}; difference {gap} points"),
        *_kappa_cards(run),
    ]  # fmt: skip
    return element("div", *cards, class_="cards")


def _card(name: str, value: str, below: str) -> Html:
    return element("div", name, element("strong", value), element("span", below, class_="muted"), class_="card")


def _kappa_cards(run: ReportRun) -> list[Html]:
    rows = primary(run.rows)
    if not rows:
        return [_training_card(run)]
    row = rows[-1]
    floor = signed(row["class_only"]) if is_number(row.get("class_only")) else "–"
    below = (
        f"0 is chance (accuracy {row['chance']:.3g}); non-members {shown(row['non_members'])}, untrained "
        f"{shown(row.get('untrained'))}, class-only {floor}. {row['protocol'].capitalize()}, {row['head']}, "
        f"{row['features']} features, D = {row['D']:,}, n = {row['n']:,}, N = {row['N']:,}, {row['draws']} draws."
    )
    return [
        _card(f"κ of members at {row['tap']}", shown(row["members"]), below),
        _card(f"Δ, members − non-members, at {row['tap']}", shown(row["delta"]), verdict(row)),
    ]


def _training_card(run: ReportRun) -> Html:
    heads = run.epochs[-1].get("heads") or []
    clean, val = (readings(heads, split, "eval") for split in ("train", "val"))
    if not clean:
        return _card("κ", "not measured", "no heads were read in eval mode; a probe can measure this run all the same")
    last, interval = clean[-1], clean[-1].interval
    leak = next((reading.interval.mean for reading in val if reading.tap == last.tap), None)
    floor = f"class-only {signed(sum(last.floors) / len(last.floors))}, " if last.floors else ""
    ends = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    below = (
        f"the training's own heads, not fresh ones; 0 is chance (accuracy {1 / last.num_labels:.3g}); {floor}leak "
        f"check {'–' if leak is None else signed(leak)}. D = {last.dim:,}, n = {last.num_labels:,}, N = "
        f"{last.count:,}, {last.draws} draws. Interval over draws alone. "
        "It cannot tell members from non-members: probe the run."
    )
    return _card(f"κ of the training heads at {last.tap}", shown(ends), below)


def verdict(row: Row) -> str:
    """What the interval of Δ allows to say, in one sentence."""
    ends = ends_of(row["delta"])
    if mean_of(row["delta"]) is None:
        return "There is no Δ: this protocol has no non-members."
    if ends is None:
        return "One draw gives no interval, so nothing can be said."
    groups = [mean_of(row["members"]), mean_of(row["non_members"])]
    if all(mean is not None and mean >= SATURATED for mean in groups):
        return "Nearly every label was read in both groups, so Δ had no room: this reading can say nothing."
    one = (
        ""
        if (counted(row["delta"], "seeds") or 1) > 1
        else " This is one network; another seed may differ by more than its interval."
    )
    if ends[0] > 0:
        return f"The interval lies above 0: members are read better than non-members here.{one}"
    if ends[1] < 0:
        return f"The interval lies below 0: members are read worse than non-members here.{one}"
    return f"The interval holds 0: this reading does not tell members from non-members.{one}"


def _overview(runs: list[ReportRun]) -> Html:
    columns = [
        ("run", "name of the folder"), ("λ", "weight of the penalty"), ("seed", ""),
        ("acc. train", "class accuracy"), ("acc. val", "class accuracy"), ("Δ", "κ(members) − κ(non-members)"),
        ("κ members", ""), ("κ non-members", ""), ("untrained", "control"), ("class-only", "control"),
        ("leak", "control: must be 0"), ("tap", "the deepest that was probed"), ("D", "features"),
        ("n", "random labels"), ("chance", "accuracy of guessing"), ("N", "members"), ("draws", ""),
        ("how", "how κ was read"), ("model", ""), ("epochs", ""), ("steps", ""), ("training images", ""),
    ]  # fmt: skip
    caption = "The runs; κ and Δ at the deepest tap with their 95% intervals, 0 is chance"
    return table(caption, columns, [_overview_row(run) for run in runs], sort=True)


def _overview_row(run: ReportRun) -> list[str | Cell]:
    train, _, val = accuracies(run)
    final = run.epochs[-1]
    lam = Cell(f"{run.lam:g}", float(run.lam)) if is_number(run.lam) else Cell("–")
    before: list[str | Cell] = [run.name, lam, number_cell(run.seed), number_cell(train), number_cell(val)]
    after = [run.model, number_cell(final["epoch"]), number_cell(final["step"]), _count(run, "train")]
    rows = primary(run.rows)
    if not rows:
        return [*before, *["–"] * 12, "not probed", *after]
    row = rows[-1]
    controls = [number_cell(row.get("class_only")), estimate_cell(row.get("leak"))]
    estimates = [estimate_cell(row.get(key)) for key in ("delta", "members", "non_members", "untrained")]
    place = [row["tap"], number_cell(row["D"]), number_cell(row["n"]), number_cell(row["chance"])]
    place += [number_cell(row["N"]), number_cell(row["draws"])]
    how = f"{row['protocol']}, {row['head']}, {row['features']} features"
    return [*before, *estimates, *controls, *place, how, *after]


def _details(run: ReportRun, named: bool) -> Html:
    """Commands, environment and settings behind a line each; of one run among several behind one line."""
    environment = {key: value for key, value in run.environment.items() if key != "argv"}
    parts = [
        folded("Commands that repeat it", code(commands(run))),
        folded("Environment", code(_lines(environment) or "unknown")),
        folded("All settings", code(_lines(run.config) or "unknown: neither summary.json nor config.yaml has them")),
    ]
    return folded(f"{run.name}: commands, environment, settings", *parts) if named else join(parts)


def commands(run: ReportRun) -> str:
    """What was typed to train, as recorded, and what to type for the rest."""
    argv = run.environment.get("argv")
    lines = (
        [f"python {shlex.join(map(str, argv))}"] if isinstance(argv, list) and argv else ["# training: not recorded"]
    )
    git = run.environment.get("git")
    if isinstance(git, dict) and git.get("commit"):
        state = " with uncommitted changes" if git.get("dirty") else ""
        lines.insert(0, f"git checkout {git['commit']}  # the code{state}")
    lines.append(_probe_line(run))
    lines.append(f"python -m rlp.report {shlex.quote(str(run.dir))}")
    return "\n".join(lines)


def _probe_line(run: ReportRun) -> str:
    """The probe's command with the options that its file records."""
    options = (run.probe or {}).get("options") or {}
    words = [probe_command(run.dir / PROBE)]
    for key in (
        "taps",
        "n",
        "draws",
        "protocols",
        "heads",
        "features",
        "modes",
        "images",
        "samples",
        "seed",
        "checkpoint",
    ):
        value = options.get(key)
        if value not in (None, [], ""):
            values = value if isinstance(value, list) else [value]
            words.append(f"--{key} {shlex.join(map(str, values))}")
    return " ".join(words)


def _lines(content: Row) -> str:
    """Nested settings as ``section.key: value``."""
    lines = []
    for key, value in content.items():
        if isinstance(value, dict):
            lines += [f"{key}.{line}" for line in _lines(value).splitlines()]
        else:
            lines.append(f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines)
