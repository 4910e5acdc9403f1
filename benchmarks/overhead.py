"""What heads add to the time and memory of a whole training step of WRN-16-4 on CIFAR-sized images.

    python -m benchmarks.overhead [--device auto|cpu|cuda] [--quick] [--rounds N]

A step is forward, class loss, the heads' loss, backward and both optimisers, on one batch of random images that lies
on the device. The same step without heads takes turns with the others of its group; ratios are taken within rounds.
On CUDA bfloat16 autocast, channels_last and 256 images; on the CPU float32, 64 images and fewer cases. A quick run
(few and small cases) is no result of the benchmark: it goes to build/benchmarks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
import gc
from pathlib import Path
import sys
import time
from typing import Any

import torch

from benchmarks import harness
from benchmarks.overhead_cases import LAM, NO_HEADS, Case, Group, Network, Step, all_groups
from benchmarks.overhead_memory import build_and_weigh
from benchmarks.overhead_plot import write_plot
from benchmarks.overhead_tables import page
from rlp.errors import UserError
from rlp.files import write_atomically

MEASURES = [
    "rlp/models/*.py", "rlp/kernels/*.py", "rlp/losses.py", "rlp/optim.py", "rlp/labels.py", "rlp/philox.py",
    "benchmarks/overhead_cases.py", "benchmarks/overhead_memory.py",
]  # fmt: skip
PARTIAL = harness.ROOT / "build" / "benchmarks"
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How a device is measured: the network and its batch, rounds, calls in a round, calls before the first."""

    device: torch.device
    network: Network
    rounds: int
    calls: int
    warmup: int

    @classmethod
    def of(cls, device: torch.device, quick: bool, rounds: int) -> "Plan":
        """The plan; `rounds` of 0 means the benchmark's own. Weighing has called every case twice already."""
        if device.type == "cuda":
            return cls(device, Network(), rounds or (3 if quick else 9), calls=10, warmup=3)
        return cls(device, Network(batch_size=8 if quick else 64), rounds or (2 if quick else 5), calls=1, warmup=0)


def measure(groups: Sequence[Group], plan: Plan) -> list[Row]:
    """The rows of all cases, each beside the step without heads of its own group."""
    rows, start = [], time.perf_counter()
    for group in groups:
        rows += measure_group(group, plan)
        gc.collect()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{time.perf_counter() - start:6.1f} s  {group.title}: {len(group.cases)} cases", flush=True)
    return rows


def measure_group(group: Group, plan: Plan) -> list[Row]:
    """A row for each case: seconds of a step, their ratio to the step without heads, peak bytes and what heads add.

    A case for which memory is too small, or that diverged, has the reason and no numbers.
    """
    by_title = {case.title: case for case in group.cases}
    builders = {title: partial(Step, case, plan.network, plan.device) for title, case in by_title.items()}
    steps, peaks, missing = build_and_weigh(builders, plan.device)
    base = NO_HEADS.title
    if base in missing:
        return [_describe(group, case) | {"reason": f"no heads: {missing[base]}"} for case in group.cases]
    seconds = harness.time_interleaved(steps, plan.device, plan.rounds, plan.calls, plan.warmup)
    ratio = harness.ratios(seconds, base)
    missing |= {title: "diverged" for title, step in steps.items() if not step.is_finite()}
    rows = []
    for title, case in by_title.items():
        row = _describe(group, case) | {"reason": missing.get(title)}
        if title not in missing:
            heads = steps[title].heads
            row |= {
                "taps": len(heads.tap_names) if heads else 0,
                "head_parameters": sum(one.numel() for one in heads.parameters()) if heads else 0,
                "seconds": vars(harness.Spread.of(seconds[title])),
                "rounds": [float(f"{one:.4g}") for one in seconds[title]],
                "ratio": vars(ratio[title]),
                "images_per_s": plan.network.batch_size / harness.Spread.of(seconds[title]).median,
                "peak_bytes": peaks[title],
                "extra_bytes": peaks[title] - peaks[base],
            }
        rows.append(row)
    return rows


def _describe(group: Group, case: Case) -> Row:
    return {
        "group": group.title, "case": case.title, "where": case.where, "draws": case.draws, "n": case.num_labels,
        "lam": case.lam, "kind": case.kind,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write result and plot."""
    more = {"--quick": {"action": "store_true", "help": "few rounds of few cases on small batches"}}
    options = harness.arguments(__doc__, argv, more)
    out = PARTIAL if options.quick and options.out == harness.RESULTS else options.out
    plan = Plan.of(options.device, options.quick, options.rounds)
    rows = measure(all_groups(options.device.type == "cuda", options.quick), plan)
    report(rows, plan, {"quick": True} if options.quick else {}, out)


def report(rows: Sequence[Row], plan: Plan, settings: Row, out: Path) -> Path:
    """Print the tables; write the result and the plot beside it; return the JSON's path."""
    is_cuda = plan.device.type == "cuda"
    settings = {
        "dtype": "bfloat16 autocast" if is_cuda else "float32", "threads": torch.get_num_threads(),
        "network": plan.network.name, "image_size": plan.network.image_size, "batch_size": plan.network.batch_size,
        "rounds": plan.rounds, "calls": plan.calls, "λ": LAM, **settings,
    }  # fmt: skip
    text = page(rows, is_cuda)
    print(text)
    path = harness.write_result("overhead", plan.device, settings, rows, text, out)
    if write_plot(rows, is_cuda, path.with_suffix(".png")):
        table = path.with_suffix(".md")
        write_atomically(table, f"{table.read_text('utf-8')}\n![overhead against draws and n]({path.stem}.png)\n")
    print(path)
    return path


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
