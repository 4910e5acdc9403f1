"""Fitting random-label heads to convergence on frozen features: all draws at once, against scikit-learn head by head.

Features have the size of CIFAR-10's training set, N=50,000 and D=256, and a network's look: ReLU of correlated
Gaussians, deviations over three orders of magnitude. Ours is timed with all that it does, from the covariance to the
reading of every sample, on each of 5 taps with 30 draws (n=10), and on one tap with n=2 and n=100. scikit-learn's
LogisticRegression without penalty gets standardised float32 features, which is kind to it, and is fitted to a few of
the same heads; what all would take is extrapolated, and said so. One pass over loss and gradient is also timed alone,
and its products are compared with a square product of the same libraries, taken in turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
import importlib.util
import sys
import time
from typing import Any
import warnings

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from rlp.errors import UserError
from rlp.measure.fit import fit_converged
from rlp.measure.linear import LinearObjective
from rlp.measure.preprocess import Preprocess

MEASURES = [
    "rlp/measure/fit.py",
    "rlp/measure/linear.py",
    "rlp/measure/lbfgs.py",
    "rlp/measure/heads.py",
    "rlp/measure/whiten.py",
    "rlp/measure/spectrum.py",
    "rlp/kernels/*.py",
]
SAMPLES, DIM, TAPS, DRAWS, LABELS = 50_000, 256, 5, 30, 10
OTHERS = ((2, 30), (100, 3))
"""n and draws of the further cases, on one tap."""
TARGET_SECONDS = 300.0
"""For all taps and draws, on 2 CPU cores."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured; smaller in tests."""

    samples: int = SAMPLES
    dim: int = DIM
    taps: int = TAPS
    draws: int = DRAWS
    others: tuple[tuple[int, int], ...] = OTHERS
    one_by_one: int = 3
    rounds: int = 5


def make_features(sizes: Sizes, tap: int, device: torch.device) -> Tensor:
    """Float32 ``[N, D]``."""
    random = torch.Generator().manual_seed(tap)
    mixing = torch.randn(sizes.dim, sizes.dim, generator=random) * torch.logspace(0, -3, sizes.dim)[:, None]
    return torch.randn(sizes.samples, sizes.dim, generator=random).matmul(mixing).add_(1.0).relu_().to(device)


def make_labels(sizes: Sizes, n: int, draws: int, seed: int, device: torch.device) -> Tensor:
    """Int64 ``[N, K]``."""
    random = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(n, (sizes.samples, draws), generator=random).to(device)


def fit_all(sizes: Sizes, n: int, draws: int, taps: int, device: torch.device) -> dict[str, Any]:
    """Row of one case: seconds of a tap (median and range over the taps), of all, and what was reached."""
    seconds, steps, losses, kappas, converged = [], [], [], [], []
    for tap in range(taps):
        x, target = make_features(sizes, tap, device), make_labels(sizes, n, draws, tap, device)
        start = time.perf_counter()
        fit = fit_converged(x, target, n)
        correct = fit.read(x, target)[0]  # brings the results to the CPU, so that a device has finished
        seconds.append(time.perf_counter() - start)
        steps.append(fit.steps)
        losses += fit.loss.tolist()
        kappas += ((n * correct.double().mean(0) - 1) / (n - 1)).tolist()
        converged += fit.converged.tolist()
        print(f"n={n}, tap {tap + 1} of {taps}: {seconds[-1]:.1f} s, {fit.steps} passes", flush=True)
    return {
        "case": "all draws at once", **_sizes(sizes, n, draws, taps),
        "seconds": vars(harness.Spread.of(seconds)), "total_seconds": sum(seconds), "extrapolated": False,
        "passes": vars(harness.Spread.of(steps)), "loss": vars(harness.Spread.of(losses)),
        "kappa": vars(harness.Spread.of(kappas)), "converged": sum(converged) / len(converged),
    }  # fmt: skip


def fit_one_by_one(sizes: Sizes) -> dict[str, Any]:
    """Row of scikit-learn: seconds of one head, extrapolated to all taps and draws; the first heads of tap 0."""
    from sklearn.linear_model import LogisticRegression

    x = make_features(sizes, 0, torch.device("cpu"))
    target = make_labels(sizes, LABELS, sizes.draws, 0, torch.device("cpu"))
    seconds, passes, losses, kappas = [], [], [], []
    standardised = Preprocess.fit(x, "standardised")(x).numpy()
    for head in range(sizes.one_by_one):
        labels = target[:, head].numpy()
        start = time.perf_counter()
        model = LogisticRegression(C=float("inf"), max_iter=2000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(standardised, labels)
        seconds.append(time.perf_counter() - start)
        log_p = torch.from_numpy(model.predict_log_proba(standardised)).gather(1, target[:, head : head + 1])
        accuracy = float(np.mean(model.predict(standardised) == labels))
        losses.append(-float(log_p.double().mean()))
        kappas.append((LABELS * accuracy - 1) / (LABELS - 1))
        passes.append(int(model.n_iter_[0]))
        print(f"scikit-learn, head {head + 1} of {sizes.one_by_one}: {seconds[-1]:.1f} s", flush=True)
    spread = harness.Spread.of(seconds)
    return {
        "case": "scikit-learn, head by head", **_sizes(sizes, LABELS, sizes.one_by_one, 1),
        "seconds": vars(spread), "total_seconds": spread.median * sizes.taps * sizes.draws, "extrapolated": True,
        "passes": vars(harness.Spread.of(passes)), "loss": vars(harness.Spread.of(losses)),
        "kappa": vars(harness.Spread.of(kappas)), "converged": 1.0 if max(passes) < 2000 else 0.0,
    }  # fmt: skip


def _sizes(sizes: Sizes, n: int, draws: int, taps: int) -> dict[str, int]:
    return {"n": n, "N": sizes.samples, "D": sizes.dim, "K": draws, "L": taps}


def one_pass(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Row of one pass over loss and gradient of all draws at a tap: seconds, and its products' share of a square one's.

    The pass's operations are counted as its two products, 4 N D K n; the softmax between them is not.
    """
    x, target = make_features(sizes, 0, device), make_labels(sizes, LABELS, sizes.draws, 0, device)
    objective, numbers = LinearObjective(x, target, LABELS), torch.arange(sizes.draws, device=device)
    point = torch.zeros(sizes.draws, LABELS * (sizes.dim + 1), device=device)
    side = 2048 if device.type == "cpu" else 8192
    square = torch.randn(side, side, device=device)
    cases = {"pass": lambda: objective(point, numbers), "square": lambda: square @ square}
    seconds = harness.time_interleaved(cases, device, sizes.rounds, calls=1, warmup=1)
    work = {"pass": 4 * sizes.samples * sizes.dim * sizes.draws * LABELS, "square": 2 * side**3}
    rate = {name: [work[name] / one for one in values] for name, values in seconds.items()}
    share = [mine / its for mine, its in zip(rate["pass"], rate["square"], strict=True)]
    return {
        "case": "one pass", **_sizes(sizes, LABELS, sizes.draws, 1),
        "seconds": vars(harness.Spread.of(seconds["pass"])), "flops": vars(harness.Spread.of(rate["pass"])),
        "square_flops": vars(harness.Spread.of(rate["square"])), "share": vars(harness.Spread.of(share)),
    }  # fmt: skip


def measure(sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """The rows: ours with n=10 on all taps, scikit-learn, ours with other n on one tap, one pass."""
    rows = [fit_all(sizes, LABELS, sizes.draws, sizes.taps, device)]
    if importlib.util.find_spec("sklearn"):
        rows.append(fit_one_by_one(sizes))
    rows += [fit_all(sizes, n, draws, 1, device) for n, draws in sizes.others]
    return [*rows, one_pass(sizes, device)]


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people; ranges in brackets."""

    def line(row: dict[str, Any]) -> list[str]:
        about = "extrapolated" if row["extrapolated"] else "measured"
        return [
            row["case"], *(f"{row[name]:,}" for name in ("n", "N", "D", "K", "L")), _spread(row["seconds"], 2),
            f"{row['total_seconds']:,.1f} ({about})", _spread(row["passes"], 0), _spread(row["loss"], 5),
            _spread(row["kappa"], 4), f"{row['converged']:.2f}",
        ]  # fmt: skip

    header = ["case", "n", "N", "D", "K", "taps", "s per tap (scikit-learn: per head)", "s in all", "passes",
              "loss, nats", "κ", "converged"]  # fmt: skip
    fits, last = rows[:-1], rows[-1]
    text = [harness.markdown_table(header, [line(row) for row in fits])]
    ours = rows[0]["total_seconds"]
    if len(rows) > 1 and rows[1]["extrapolated"]:
        text.append(
            f"scikit-learn was fitted to the first {rows[1]['K']} heads of tap 1; {rows[0]['L']} taps x {rows[0]['K']} "
            f"heads at its median would take {rows[1]['total_seconds'] / ours:.1f} times as long as ours. Its loss "
            "and κ are those of its heads alone, ours of all."
        )
    verdict = "reached" if ours <= TARGET_SECONDS else "missed"
    text.append(f"Target: at most {TARGET_SECONDS:.0f} s in all on 2 CPU cores; measured {ours:.1f} s: {verdict}.")
    text.append(
        f"One pass over loss and gradient of {last['K']} heads: {_spread(last['seconds'], 3)} s, "
        f"{last['flops']['median'] / 1e9:,.0f} GFLOP/s counted as its two products; a square product reaches "
        f"{last['square_flops']['median'] / 1e9:,.0f} GFLOP/s; share {_spread(last['share'], 2)}."
    )
    text.append("A κ here is that of features that know nothing of the labels: what D, N and n alone allow.")
    return "\n\n".join(text)


def _spread(spread: dict[str, float], digits: int) -> str:
    low, high = (f"{spread[name]:.{digits}f}" for name in ("low", "high"))
    return f"{spread['median']:.{digits}f} [{low}, {high}]"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the page, write the result."""
    options = harness.arguments(__doc__, argv)
    sizes = Sizes(rounds=options.rounds or Sizes.rounds)
    rows = measure(sizes, options.device)
    settings = {"dtype": "float32", "threads": torch.get_num_threads(), "rounds": sizes.rounds}
    print(page(rows))
    print(harness.write_result("probe", options.device, settings, rows, page(rows), options.out))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
