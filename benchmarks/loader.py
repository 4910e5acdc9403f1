"""Images per second of data loaders, and how long they take to start, on this machine's cores.

    python -m benchmarks.loader [--quick] [--cases a,b,c,d,e] [--rounds N] [--device auto|cpu|cuda]

The images are made first, in a temporary folder (TMPDIR). Every contender has a process of its own and is checked: each
sample once, its label, its pixels or where they were cut out. Then they take turns, an epoch or more at a time, first
with the files in the page cache and then without. What is wrong, missing, or raises is a row with the reason. A quick
run, or one of some cases, is no result of the benchmark: it goes to build/benchmarks.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
import os
from pathlib import Path
import signal
import sys
import tempfile
import time
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import harness
from benchmarks.loader_cases import CASES, Case, Contender
from benchmarks.loader_contenders import CONTENDERS, WORKERS
from benchmarks.loader_plot import write_plot
from benchmarks.loader_process import ContenderError, Process, cached_share, drop_cache
from benchmarks.loader_sets import ImageSet, make_sets
from benchmarks.loader_tables import page
from rlp.errors import UserError
from rlp.files import write_atomically

MEASURES = ["rlp/data/*.py", "benchmarks/loader_c*.py", "benchmarks/loader_process.py", "benchmarks/loader_sets.py"]
NEEDS = ["ffcv", "torchvision", "sklearn", "PIL", "cv2", "tqdm"]

PARTIAL = harness.ROOT / "build" / "benchmarks"
STAYS = 0.02
"""Share of pages that may stay in the page cache before a cold epoch."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        small, large: images of 32 and of 256 px.
        rounds, cold_rounds: turns of every contender with and without the page cache.
        turn_seconds: least duration of a warm turn.
        starts: starts of ours after the first, others have one; 0: starting is not measured.
        cases: keys.
    """

    small: int = 50_000
    large: int = 2_048
    rounds: int = 3
    cold_rounds: int = 2
    turn_seconds: float = 0.5
    starts: int = 2
    cases: str = "a,b,c,d,e"

    @classmethod
    def of(cls, quick: bool, rounds: int, cases: str | None) -> "Plan":
        """The plan; `rounds` of 0 and `cases` of None mean the benchmark's own."""
        plan = cls(5_120, 256, 1, 1, 0.1, 0, "b,c") if quick else cls()
        if rounds:
            plan = replace(plan, rounds=rounds, cold_rounds=rounds)
        return plan if cases is None else replace(plan, cases=cases)


class Bench:
    """The measurement of cases.

    Attributes:
        rows: what was found so far.
        left: largest share of pages that stayed in the page cache before a cold epoch.
    """

    def __init__(self, sets: dict[str, ImageSet], plan: Plan, device: torch.device) -> None:
        self._sets, self._plan, self._device = sets, plan, device
        self.rows: list[Row] = []
        self.left = 0.0

    def measure(self, case: Case, contenders: Sequence[Contender]) -> None:
        """Add the rows of one case; never raises for what a contender does."""
        plan = self._plan
        serving = [one for one in contenders if one.serves(case) and (plan.starts or not one.start_only)]
        alone = case.start_up and plan.starts > 0  # nothing runs beside a start that is measured
        turns = plan.rounds + plan.cold_rounds + 1
        with ExitStack() as stack, tqdm(total=len(serving) * turns, desc=f"case {case.key}", disable=None) as bar:
            with ThreadPoolExecutor(1 if alone else WORKERS) as pool:
                processes = list(pool.map(partial(self._launch, case, alone, stack, bar), serving))
            running = {one: process for one, process in zip(serving, processes, strict=True) if process}
            with ThreadPoolExecutor(WORKERS) as pool:
                reasons = list(pool.map(partial(self._ask, case, running, Process.check), list(running)))
            for contender, reason in zip(list(running), reasons, strict=True):
                if reason is not None:
                    self._leave_out(case, running, contender, f"wrong, not timed: {reason}")
            self._time(case, running, "warm", plan.rounds, lambda one: one.time(plan.turn_seconds), bar)
            self._time(case, running, "cold", plan.cold_rounds, partial(self._cold, case, running), bar)

    def _launch(self, case: Case, alone: bool, stack: ExitStack, bar: tqdm, contender: Contender) -> Process | None:
        """Its process; None if there is none to go on with, for a reason in the rows if that is a fault."""
        try:
            reason = contender.why_missing()
            if reason is None and alone:
                return self._start(case, stack, contender)
            if reason is None:
                return stack.enter_context(self._process(case, contender))
        except ContenderError as error:
            reason = str(error)
        finally:
            bar.update()
        self._leave_out(case, {}, contender, reason)
        return None

    def _process(self, case: Case, contender: Contender) -> Process:
        return Process(contender, case, self._sets[case.images], self._device)

    def _start(self, case: Case, stack: ExitStack, contender: Contender) -> Process | None:
        """Start it once without compiled code of numba's on the disk and then with it; the last one stays."""
        again = self._plan.starts if contender.is_ours else 1
        processes: list[Process] = []
        with tempfile.TemporaryDirectory(prefix="compiled-") as folder:
            for _ in range(1 + again):
                for before in processes:
                    before.close()
                processes.append(_with_variable("NUMBA_CACHE_DIR", folder, partial(self._process, case, contender)))
                stack.callback(processes[-1].close)
        first, *later = [(process.launch, process.opening) for process in processes]
        launch, opening = ([one[part] for one in later] for part in (0, 1))
        self._add(case, contender, "start", reason=None, first_launch=first[0], first_opening=first[1],
                  launch=_spread(launch), opening=_spread(opening))  # fmt: skip
        if contender.start_only:
            processes[-1].close()
            return None
        return processes[-1]

    def _time(self, case: Case, running: dict[Contender, Process], cache: str, rounds: int,
              turn: Callable[[Process], float], bar: tqdm) -> None:  # fmt: skip
        """Rows with images per second; who goes first moves by one from round to round."""
        rates: dict[Contender, list[float]] = {one: [] for one in running}
        names, images = list(running), self._sets[case.images]
        count = len(images.labels())
        count -= count % case.batch_size if case.train else 0
        for place in range(rounds):
            first = place % max(1, len(names))
            for contender in names[first:] + names[:first]:
                if contender in running:
                    seconds = self._ask(case, running, turn, contender, cache)
                    rates[contender] += [] if seconds is None else [count / seconds]
                bar.update()
        ours = next((rates[one] for one in running if one.is_ours), None)
        for contender in running:
            mine = rates[contender]
            over = None if ours is None else [a / b for a, b in zip(mine, ours, strict=True)]
            self._add(case, contender, cache, reason=None, images_per_s=_spread(mine),
                      rounds=[_short(one) for one in mine], over_ours=over and _spread(over))  # fmt: skip

    def _cold(self, case: Case, running: dict[Contender, Process], process: Process) -> float:
        """Seconds of an epoch that begins with none of its files in the page cache."""
        for one in running.values():
            one.forget()
        files = self._sets[case.images].files()
        drop_cache(files)
        share = cached_share(files)
        self.left = max(self.left, share)
        if share > STAYS:
            raise ContenderError(f"{100 * share:.0f}% of the files stay in the page cache when they are to leave it")
        return process.time(cold=True)

    def _ask(self, case: Case, running: dict[Contender, Process], question: Callable[[Process], Any],
             contender: Contender, cache: str = "all") -> Any:  # fmt: skip
        """The answer of one contender, None if it fails: then it is left out from now on."""
        try:
            return question(running[contender])
        except ContenderError as error:
            self._leave_out(case, running, contender, str(error), cache)
            return None

    def _leave_out(
        self, case: Case, running: dict[Contender, Process], contender: Contender, reason: str, cache: str = "all"
    ) -> None:
        self._add(case, contender, cache, reason=reason)
        if contender in running:
            running.pop(contender).close()

    def _add(self, case: Case, contender: Contender, measure: str, **facts: Any) -> None:
        about = {"case": case.key, "title": case.title, "contender": contender.name, "is_ours": contender.is_ours}
        self.rows.append(about | {"measure": measure} | facts)


def _with_variable(name: str, value: str, call: Callable[[], Process]) -> Process:
    """Call with an environment variable that new processes inherit."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        return call()
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _spread(values: Sequence[float]) -> Row:
    return {name: _short(value) for name, value in vars(harness.Spread.of(values)).items()}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def read_rate(path: Path) -> float:
    """MB/s of reading a file from end to end when it is not in the page cache."""
    drop_cache([path])
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
    return path.stat().st_size / 1e6 / (time.perf_counter() - start)


def chosen(keys: str) -> list[Case]:
    """The cases of a comma-separated list."""
    known = [case.key for case in CASES]
    unknown = [key for key in keys.split(",") if key not in known]
    if unknown:
        raise UserError(f"--cases names {', '.join(unknown)}; expected some of {', '.join(known)}")
    return [case for case in CASES if case.key in keys.split(",")]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write result and plot."""
    more = {
        "--quick": {"action": "store_true", "help": "few images, one round, two cases, no starts"},
        "--cases": {"metavar": "a,b,...", "help": "only these"},
    }
    options = harness.arguments(__doc__, argv, more)
    is_partial = options.quick or options.cases is not None
    out = PARTIAL if is_partial and options.out == harness.RESULTS else options.out
    plan = Plan.of(options.quick, options.rounds, options.cases)
    cases = chosen(plan.cases)
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        bench = Bench(make_sets(Path(folder), plan.small, plan.large), plan, options.device)
        rate = read_rate(Path(folder) / "raw" / "pixels.npy")
        for case in cases:
            start = time.perf_counter()
            bench.measure(case, CONTENDERS)
            print(f"{time.perf_counter() - start:6.1f} s  {case.key}: {case.title}", flush=True)
    settings = {"images of 32 px": plan.small, "of 256 px": plan.large, "workers": WORKERS, "rounds": plan.rounds,
                "cold rounds": plan.cold_rounds, "left in the page cache": f"{100 * bench.left:.1f}%",
                "first read": f"{rate:,.0f} MB/s", **_versions()}  # fmt: skip
    report(bench.rows, options.device, settings | ({"cases": plan.cases} if is_partial else {}), out)


def _versions() -> Row:
    """Versions of what takes part."""
    found = {}
    for name in ("ffcv", "torchvision", "pillow", "webdataset", "grain"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def report(rows: Sequence[Row], device: torch.device, settings: Row, out: Path) -> Path:
    """Print the tables; write the result and the plot beside it; return the JSON's path."""
    text = page(rows, CONTENDERS)
    print(text)
    path = harness.write_result("loader", device, settings, rows, text, out)
    plot = write_plot(rows, path.with_suffix(".png"))
    if plot:
        table = path.with_suffix(".md")
        write_atomically(table, f"{table.read_text('utf-8')}\n![images per second]({path.stem}.png)\n")
    print(path)
    return path


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder goes
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
