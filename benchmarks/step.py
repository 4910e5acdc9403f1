"""Time and memory of a training step of WRN-16-4 on CIFAR-sized images, without and with random-label heads.

A step is forward, backward and both optimisers, on one batch of random images that lies on the device: no loading,
no augmentation. Heads: 3 taps x 8 draws, linear, at the ends of the three groups. On CUDA bfloat16 autocast and
channels_last; on the CPU float32 and a small batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import sys
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import harness
from rlp.errors import UserError
from rlp.models import attach, build_model
from rlp.optim import build_optimizer, parameter_groups

MEASURES = ["rlp/models/*.py", "rlp/kernels/*.py", "rlp/losses.py", "rlp/optim.py", "rlp/labels.py", "rlp/philox.py"]

CLASSES, IMAGE_SIZE, DRAWS = 100, 32, 8
TAPS = ["group1", "group2", "group3"]
LEARNING_RATE = 1e-3  # small: the numbers stay finite however long the benchmark runs


@dataclass(frozen=True)
class Case:
    """What is attached: n random labels (0: no heads) and the weight λ of the penalty."""

    num_labels: int = 0
    lam: float = 0.0

    @property
    def title(self) -> str:
        """The row's name in the table."""
        return f"{len(TAPS)} x {DRAWS} heads, n={self.num_labels}, λ={self.lam:g}" if self.num_labels else "no heads"


CASES = [Case(), Case(10, 0.0), Case(10, 10.0), Case(1000, 0.0), Case(1000, 10.0)]
"""The first is what the others are compared with."""


def build_step(case: Case, device: torch.device, batch_size: int) -> Callable[[], None]:
    """One training step with its own network, heads, optimisers and batch, all from the same seed."""
    torch.manual_seed(0)
    is_cuda = device.type == "cuda"
    model = build_model("wrn_16_4", CLASSES, IMAGE_SIZE, {}).to(device)
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    image = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device).to(memory_format=torch.channels_last)
    label = torch.randint(CLASSES, (batch_size,), device=device)
    words = torch.randint(2**32, (batch_size, DRAWS), device=device)
    heads = attach(model, TAPS, case.num_labels, DRAWS, example=image[:2]) if case.num_labels else None
    optimizers = [build_optimizer("sgd", parameter_groups(model, 5e-4), lr=LEARNING_RATE, nesterov=True)]
    if heads is not None:
        optimizers.append(build_optimizer("adamw", heads.parameters(), lr=LEARNING_RATE))
    model.train()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=is_cuda):
            loss = F.cross_entropy(model(image).float(), label)
            if heads is not None:
                loss = loss + heads.loss(words=words, lam=case.lam)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def measure(device: torch.device, batch_size: int, rounds: int, calls: int, warmup: int) -> list[dict[str, Any]]:
    """A row per case: seconds of a step (median, low, high), their ratio to `no heads`, images/s, peak bytes.

    Memory is what one case alone needs, so each is built, measured and freed before the timing.
    """
    peaks = {case.title: _peak_of(case, device, batch_size) for case in CASES}
    steps = {case.title: build_step(case, device, batch_size) for case in CASES}
    seconds = harness.time_interleaved(steps, device, rounds, calls, warmup)
    ratio = harness.ratios(seconds, CASES[0].title)
    rows = []
    for title, values in seconds.items():
        spread = harness.Spread.of(values)
        rows.append(
            {
                "case": title,
                "seconds": vars(spread),
                "ratio": vars(ratio[title]),
                "images_per_s": batch_size / spread.median,
                "peak_bytes": peaks[title],
            }
        )
    return rows


def _peak_of(case: Case, device: torch.device, batch_size: int) -> int | None:
    if device.type != "cuda":
        return None
    step = build_step(case, device, batch_size)
    step()  # the optimisers make their state in the first step
    return harness.peak_memory(step, device)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people; ranges in brackets."""

    def line(row: dict[str, Any]) -> list[str]:
        seconds, ratio, peak = row["seconds"], row["ratio"], row["peak_bytes"]
        return [
            row["case"],
            f"{1e3 * seconds['median']:.2f} [{1e3 * seconds['low']:.2f}, {1e3 * seconds['high']:.2f}]",
            f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
            f"{row['images_per_s']:,.0f}",
            "–" if peak is None else f"{peak / 2**20:,.0f}",
        ]

    header = ["case", "ms per step", "time / no heads", "images/s", "peak MiB"]
    return harness.markdown_table(header, [line(row) for row in rows])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the result."""
    options = harness.arguments(__doc__, argv)
    is_cuda = options.device.type == "cuda"
    sizes = {"batch_size": 512, "rounds": 15, "calls": 20, "warmup": 20}
    if not is_cuda:
        sizes = {"batch_size": 32, "rounds": 9, "calls": 1, "warmup": 3}
    sizes["rounds"] = options.rounds or sizes["rounds"]
    rows = measure(options.device, **sizes)
    settings = {"dtype": "bfloat16 autocast" if is_cuda else "float32", "threads": torch.get_num_threads(), **sizes}
    print(table(rows))
    print(harness.write_result("step", options.device, settings, rows, table(rows), options.out))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
