"""Time and memory of the random-label loss against compositions in PyTorch, other people's kernels, and the floor.

    python -m benchmarks.loss [--device auto|cpu|cuda] [--quick] [--cases A,B,C,D,E,n,n-class,H10,H100] [--rounds N]

Every contender is first checked: losses and gradients against the float64 oracle at a reduced size, then against the
first contender at full size. What is wrong, cannot be had, raises or runs out of memory is a row with the reason. The
floor is the least work of the case over the rates of a large copy and a large matrix product, which take turns with
the contenders. A quick run, or one of some cases, is no result of the benchmark: it goes to build/benchmarks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
import gc
from pathlib import Path
from statistics import median
import sys
import time
from typing import Any

import torch

from benchmarks import harness
from benchmarks.loss_cases import MODES, Case, Inputs, all_cases, least_work, make_inputs
from benchmarks.loss_contenders import (
    CONTENDERS,
    OURS,
    TOLERANCE,
    Contender,
    Run,
    Unavailable,
    clear_gradients,
    largest_error,
    oracle,
    outcome,
)
from benchmarks.loss_plot import write_plot
from benchmarks.loss_tables import page
from rlp.errors import UserError
from rlp.files import write_atomically

MEASURES = ["rlp/kernels/*.py", "benchmarks/loss_cases.py", "benchmarks/loss_contenders.py"]

LAM = 1.0
LEARNING_RATE = 0.0  # all the work of AdamW, and the same weights for every contender
PARTIAL = harness.ROOT / "build" / "benchmarks"
GRAPH = ", graph replay"
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How a device is measured: rounds, seconds that a group of calls should last, sizes of copy and product."""

    device: torch.device
    rounds: int
    sweep_rounds: int
    group_seconds: float
    copy_bytes: int
    product_size: int
    compiles: bool

    @classmethod
    def of(cls, device: torch.device, quick: bool, rounds: int) -> "Plan":
        """The plan; `rounds` of 0 means the benchmark's own."""
        if device.type == "cuda":
            own = (3, 2) if quick else (11, 5)
            return cls(device, rounds or own[0], rounds or own[1], 0.01, 2**31, 8192, not quick)
        own = (2, 2) if quick else (5, 3)
        return cls(device, rounds or own[0], rounds or own[1], 0.02, 2**26, 1024, not quick)


@dataclass
class Entry:
    """What is timed, one contender in one mode, and what is known of it beforehand."""

    contender: Contender
    mode: str
    reason: str | None = None
    call: Callable[[], object] | None = None
    repeats: int = 1
    facts: Row = field(default_factory=dict)


def measure(cases: Iterable[Case], contenders: Sequence[Contender], plan: Plan) -> list[Row]:
    """The rows of all cases; never raises for what a contender does."""
    rows, checked, start = [], {}, time.perf_counter()
    for case in cases:
        try:
            rows += _measure_case(case, contenders, plan, checked)
        except Exception as error:  # not even the inputs could be made
            rows.append(_describe(case) | {"contender": "all", "mode": "all", "reason": _clause(error)})
        _free(plan.device)
        print(f"{time.perf_counter() - start:6.1f} s  {case.key}: {case.title}, {case.shape}", flush=True)
    return rows


def _measure_case(case: Case, contenders: Sequence[Contender], plan: Plan, checked: dict[Any, str | None]) -> list[Row]:
    inputs = make_inputs(case, plan.device)
    optimizer = _adamw([inputs.weight])
    entries, first = [], None
    for contender in contenders:
        if not contender.serves(case):
            continue
        reason = _why_not(contender, case, plan, checked)
        if reason is None:
            try:
                run = contender.build(inputs)
                first, reason = _compare(run, contender, inputs, first)
                if reason is None:
                    entries += _prepare(contender, run, inputs, optimizer, plan)
            except Exception as error:
                reason = _clause(error)
        if reason is not None:
            entries.append(Entry(contender, "all", reason))
        _free(plan.device)
    del first
    _free(plan.device)
    seconds, reason = _time(entries, case, plan)
    return [_describe(case) | _row(entry, inputs, seconds, reason, plan) for entry in entries]


def _why_not(contender: Contender, case: Case, plan: Plan, checked: dict[Any, str | None]) -> str | None:
    """Why the contender is not built at full size: left out, not to be had, or wrong at the reduced size."""
    if contender.name.endswith("torch.compile") and not plan.compiles:
        return "left out of quick runs"
    key = contender.name, case.reduced().shape
    if key not in checked:
        try:
            inputs = make_inputs(case.reduced(), plan.device)
            run = contender.build(inputs)
            error = largest_error(outcome(run, inputs, "both" in contender.modes), oracle(inputs, run.bias is not None))
            wrong = error > TOLERANCE[case.dtype]
            checked[key] = f"wrong, not timed: relative error {error:.1e} at {inputs.case.shape}" if wrong else None
        except Exception as error:
            checked[key] = _clause(error)
    return checked[key]


def _compare(
    run: Run, contender: Contender, inputs: Inputs, first: dict[str, torch.Tensor] | None
) -> tuple[dict[str, torch.Tensor] | None, str | None]:
    """The first contender's outcome at full size, and how another differs from it, if it does."""
    if run.bias is not None:
        return first, None
    found = outcome(run, inputs, "both" in contender.modes)
    if first is None:
        return found, None
    error = largest_error(found, first)
    wrong = error > TOLERANCE[inputs.case.dtype]
    return first, f"not timed: differs by {error:.1e} from the first at full size" if wrong else None


def _adamw(weights: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
    try:
        return torch.optim.AdamW(weights, lr=LEARNING_RATE, fused=True)
    except RuntimeError:
        return torch.optim.AdamW(weights, lr=LEARNING_RATE)


def _prepare(
    contender: Contender, run: Run, inputs: Inputs, optimizer: torch.optim.Optimizer, plan: Plan
) -> list[Entry]:
    """An entry for each mode, warmed up and with its memory; a mode that fails has the reason."""
    if run.weights[0] is not inputs.weight:
        optimizer = _adamw(run.weights)
    entries = []
    for mode in MODES:
        if mode not in contender.modes or (inputs.case.is_sweep and mode != "both"):
            continue
        call = partial(_call, mode, run, inputs, optimizer)
        entries.append(_warmed(Entry(contender, mode, call=call), run, inputs, plan))
        if inputs.case.launch_bound and plan.device.type == "cuda" and mode != "adamw":
            entries.append(_warmed(_captured(Entry(contender, mode + GRAPH, call=call)), run, inputs, plan))
    return entries


def _call(mode: str, run: Run, inputs: Inputs, optimizer: torch.optim.Optimizer) -> None:
    """What is timed."""
    if mode == "forward":
        with torch.no_grad():
            run.loss(inputs.x, True)
        return
    penalised = mode != "fit"
    fit, penalty = run.loss(inputs.x if penalised or run.wants_x else inputs.x.detach(), penalised)
    (fit if penalty is None else fit + LAM * penalty).backward()
    if mode == "adamw":
        optimizer.step()
    clear_gradients(run, inputs)


def _captured(entry: Entry) -> Entry:
    """The entry's call as a replay of a CUDA graph."""
    call = entry.call
    assert call is not None
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        entry.call = graph.replay
    except Exception as error:
        entry.reason = f"cannot be captured: {_clause(error)}"
    return entry


def _warmed(entry: Entry, run: Run, inputs: Inputs, plan: Plan) -> Entry:
    if entry.reason is not None or entry.call is None:
        return entry
    try:
        for _ in range(2):
            entry.call()
        _wait(plan.device)
        start = time.perf_counter()
        entry.call()
        _wait(plan.device)
        entry.repeats = max(1, min(100, int(plan.group_seconds / (time.perf_counter() - start))))
        if not entry.mode.endswith(GRAPH):
            entry.facts |= _memory(entry, run, inputs, plan.device)
    except Exception as error:
        entry.reason = _clause(error)
        clear_gradients(run, inputs)
    return entry


def _memory(entry: Entry, run: Run, inputs: Inputs, device: torch.device) -> Row:
    """Bytes while the contender alone is at work, and how many of them are neither inputs nor outputs."""
    if device.type != "cuda":
        return {"peak_bytes": None, "extra_bytes": None}
    assert entry.call is not None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    entry.call()
    _wait(device)
    grown = torch.cuda.max_memory_allocated(device) - before
    weight, case = inputs.weight.nbytes, inputs.case
    outputs = 4 * case.heads * (1 + 4 * case.batch)
    outputs += weight * (entry.mode != "forward") + inputs.x.nbytes * (entry.mode in ("both", "adamw") or run.wants_x)
    resting = inputs.nbytes + 2 * weight * (entry.mode == "adamw")
    return {"peak_bytes": resting + grown, "extra_bytes": max(0, grown - outputs)}


def _time(entries: Sequence[Entry], case: Case, plan: Plan) -> tuple[dict[str, list[float]], str | None]:
    """Seconds of every entry that can be timed, and of the two ceilings, a number a round; or why not."""

    def repeated(entry: Entry) -> None:
        assert entry.call is not None
        for _ in range(entry.repeats):
            entry.call()

    ready = {_title(entry): entry for entry in entries if entry.reason is None}
    calls = _ceilings(case, plan)
    calls |= {title: partial(repeated, entry) for title, entry in ready.items()}
    try:
        rounds = plan.sweep_rounds if case.is_sweep else plan.rounds
        seconds = harness.time_interleaved(calls, plan.device, rounds, calls=1, warmup=1)
    except Exception as error:
        return {}, f"while timing: {_clause(error)}"
    return {title: [one / ready[title].repeats if title in ready else one for one in values]
            for title, values in seconds.items()}, None  # fmt: skip


def _ceilings(case: Case, plan: Plan) -> dict[str, Callable[[], object]]:
    piece = min(2**20, plan.copy_bytes)
    source = torch.randint(256, (piece,), dtype=torch.uint8, device=plan.device).repeat(plan.copy_bytes // piece)
    copy = torch.empty_like(source)
    side = plan.product_size
    a, b = (torch.randn(side, side, device=plan.device, dtype=case.dtype) for _ in range(2))
    product = torch.empty_like(a)
    return {"copy": lambda: copy.copy_(source), "product": lambda: torch.mm(a, b, out=product)}


def _row(entry: Entry, inputs: Inputs, seconds: Mapping[str, Sequence[float]], failed: str | None, plan: Plan) -> Row:
    """What was found out about an entry; ratios are taken within rounds."""
    row = {"contender": entry.contender.name, "is_ours": entry.contender.is_ours, "mode": entry.mode}
    reason = entry.reason or failed
    if reason is not None:
        return row | {"reason": reason}
    mine, ours = seconds[_title(entry)], seconds.get(f"{entry.mode}, {OURS}")
    work = least_work(inputs.case, entry.mode.removesuffix(GRAPH), inputs.touched)
    bandwidths = [2 * plan.copy_bytes / one for one in seconds["copy"]]
    rates = [2 * plan.product_size**3 / one for one in seconds["product"]]
    floors = [work.seconds(*pair) for pair in zip(rates, bandwidths, strict=True)]
    return row | {
        "reason": None,
        "seconds": _spread(mine),
        "rounds": [_short(one) for one in mine],
        "calls": entry.repeats,
        "floor": _spread(floors),
        "over_floor": _spread(_ratios(mine, floors)),
        "over_ours": None if ours is None else _spread(_ratios(mine, ours)),
        "of_bandwidth": _short(median([work.bytes / one / rate for one, rate in zip(mine, bandwidths, strict=True)])),
        "of_products": _short(median([work.operations / one / rate for one, rate in zip(mine, rates, strict=True)])),
        **entry.facts,
    }


def _describe(case: Case) -> Row:
    sizes = {"batch": case.batch, "dim": case.dim, "heads": case.heads, "classes": case.classes}
    return {"case": case.key, "title": case.title, "is_sweep": case.is_sweep, **sizes, "num_labels": case.num_labels}


def _title(entry: Entry) -> str:
    return f"{entry.mode}, {entry.contender.name}"


def _ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    return [mine / its for mine, its in zip(values, base, strict=True)]


def _spread(values: Sequence[float]) -> Row:
    return {name: _short(value) for name, value in vars(harness.Spread.of(values)).items()}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _clause(error: Exception) -> str:
    """An exception in one line without the paths and hints that some carry."""
    if isinstance(error, Unavailable):
        return str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:120]}" if first else type(error).__name__


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    """Give back what the last contender leaves behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def chosen(cases: Sequence[Case], names: str | None) -> list[Case]:
    """The cases of a comma-separated list of keys; all for None."""
    keys = list(dict.fromkeys(case.key for case in cases))
    wanted = keys if names is None else names.split(",")
    unknown = [name for name in wanted if name not in keys]
    if unknown:
        raise UserError(f"--cases names {', '.join(unknown)}; expected some of {', '.join(keys)}")
    return [case for case in cases if case.key in wanted]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write result and plot."""
    more = {
        "--quick": {"action": "store_true", "help": "few rounds, no torch.compile, no large points"},
        "--cases": {"metavar": "A,B,...", "help": "only these"},
    }
    options = harness.arguments(__doc__, argv, more)
    is_partial = options.quick or options.cases is not None
    out = PARTIAL if is_partial and options.out == harness.RESULTS else options.out
    plan = Plan.of(options.device, options.quick, options.rounds)
    rows = measure(chosen(all_cases(options.device, options.quick), options.cases), CONTENDERS, plan)
    report(rows, plan, {"quick": options.quick, "cases": options.cases or "all"} if is_partial else {}, out)


def report(rows: Sequence[Row], plan: Plan, settings: Row, out: Path) -> Path:
    """Print the tables; write the result and the plot beside it; return the JSON's path."""
    dtype = "bfloat16" if plan.device.type == "cuda" else "float32"
    settings = {"dtype": dtype, "threads": torch.get_num_threads(), "rounds": plan.rounds,
                "rounds of sweeps": plan.sweep_rounds, "λ": LAM, **settings}  # fmt: skip
    text = page(rows, CONTENDERS)
    print(text)
    path = harness.write_result("loss", plan.device, settings, rows, text, out)
    plots = write_plot(rows, path.with_suffix(".png"))
    if plots:
        table = path.with_suffix(".md")
        write_atomically(table, f"{table.read_text('utf-8')}\n![time against n and H]({path.stem}.png)\n")
    print(path)
    return path


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
