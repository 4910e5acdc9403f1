"""Made-up probes for the tests of the page: the files that `python -m rlp.measure probe` writes, without measuring."""

import json
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
PROTOCOLS = ("converged", "views", "budget", "online", "retrieval")


def estimate(mean: float, half: float | None = 0.02, draws: int = 8, samples: int = 90) -> Row:
    """An Estimate as JSON has it; no half, no interval."""
    ends = {"low": None, "high": None} if half is None else {"low": mean - half, "high": mean + half}
    spread = {"sd_seed": None, "sd_draw": half, "sd_sample": 0.4}
    return {"mean": mean, **ends, **spread, "seeds": 1, "draws": draws, "samples": samples, "level": 0.95}


def probe_row(protocol: str, tap: str, depth: int, n: int, seed: int = 3, **changes: Any) -> Row:
    """One row of probe.json: κ rises with depth, members lie 0.03 above non-members."""
    random = np.random.default_rng([PROTOCOLS.index(protocol), depth, n, seed])
    height = 0.1 * (depth + 1) + 0.02 * random.normal()
    row: Row = {
        "run": "run", "seed": seed, "protocol": protocol, "tap": tap, "depth": depth, "D": 32 * 2**depth, "n": n,
        "N": 90, "draws": 8, "head": "linear", "features": "raw", "mode": "eval", "images": "clean", "steps": 137,
        "converged": 1.0, "chance": 1 / n, "accuracy": (1 + height * (n - 1)) / n, "members": estimate(height + 0.03),
        "non_members": estimate(height), "delta": estimate(0.03, 0.04), "untrained": estimate(height - 0.05),
        "noise": estimate(0.8 * height), "class_only": 0.04, "leak": estimate(0.001), "effective_rank": 7.5 + depth,
        "participation_ratio": 4.25 + depth, "curve": [], "note": "",
    }  # fmt: skip
    if protocol == "budget":
        row["curve"] = [[2**k, height * k / 8, 0.9 * height * k / 8] for k in range(9)]
    if protocol == "online":
        row |= dict.fromkeys(("non_members", "delta", "untrained", "noise", "effective_rank", "participation_ratio"))
    if protocol == "retrieval":
        row |= {"n": 90, "chance": 1 / 90, "leak": None, "draws": 1, "steps": 0}
    return row | changes


def fake_probe(
    taps: list[str], labels: tuple[int, ...] = (2, 10), seed: int = 3, protocols: tuple[str, ...] = PROTOCOLS
) -> Row:
    """All of probe.json; of online and retrieval without what they do not have."""
    rows = [
        probe_row(protocol, tap, depth, n, seed)
        for protocol in protocols
        for n in (labels if protocol != "retrieval" else labels[:1])
        for depth, tap in enumerate(taps)
    ]
    places = [{"tap": tap, "depth": depth, "D": 32 * 2**depth, "N": 90} for depth, tap in enumerate(taps)]
    same = {"features": "raw", "mode": "eval", "images": "clean"}
    spectra = [
        {**place, **same, "protocol": "converged", "group": group, "effective_rank": 7.5, "participation_ratio": 4.2,
         "numerical_rank": 30, "eigenvalues": [float(2.0**-k) for k in range(place["D"])]}
        for group in ("members", "non-members", "untrained") for place in places
    ]  # fmt: skip
    reading = {"n": 2, "draws": 8, "head": "linear", **same, "chance": 0.0, "meaning": "It bounds the heads' class."}
    rademacher = [
        {**place, **reading, "group": group, "estimate": estimate(0.3)}
        for group in ("members", "non-members", "untrained", "noise") for place in places
    ]  # fmt: skip
    planted = [
        {"protocol": "converged", "head": "linear", **same, **place, "n": 10, "draws": 8, "fitted": 90, "count": 9,
         "planted": "wrong label", "chance": 0.5, "score": "log p", "members": estimate(0.7), "non_members": None,
         "untrained": estimate(0.52), "class_loss": estimate(0.9)}
        for place in places
    ]  # fmt: skip
    return {
        "schema": 1, "run": {"name": "run", "seed": seed},
        "options": {"n": list(labels), "draws": 8, "taps": [], "seed": 0},
        "rows": rows, "spectra": spectra, "rademacher": rademacher, "planted": planted,
    }  # fmt: skip


def write_fake_probe(run_dir: Path, taps: list[str], **options: Any) -> Row:
    """Write ``measure/probe.json`` and return its content."""
    content = fake_probe(taps, **options)
    write_probe(run_dir, content)
    return content


def write_probe(run_dir: Path, content: Row) -> None:
    """Write any content as ``measure/probe.json``."""
    (run_dir / "measure").mkdir(parents=True, exist_ok=True)
    (run_dir / "measure" / "probe.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_fake_scores(run_dir: Path, taps: list[str], members: int, others: int, classes: int, draws: int = 8) -> None:
    """Write ``measure/scores.parquet``: sample i of the training file scores -1 - i / members at the last tap."""
    import pyarrow as pa
    from pyarrow import parquet

    tables = []
    for depth, tap in enumerate(taps):
        for group, split, count in (("members", "train", members), ("non-members", "val", others)):
            ids = np.arange(count)
            wrong = (ids % 10 == 3) & (group == "members")
            score = -1 - ids / count if depth == len(taps) - 1 else -np.ones(count)
            columns: dict[str, Any] = {
                "index": ids, "split": [split] * count, "group": [group] * count,
                "class": [f"class{i % classes}" for i in ids], "given": (ids + wrong) % classes, "true": ids % classes,
                "noisy": wrong, "planted": ["" for _ in ids], "tap": [tap] * count, "depth": [depth] * count,
                "n": [10] * count, "N": [count] * count, "draws": [draws] * count, "protocol": ["converged"] * count,
                "head": ["linear"] * count, "features": ["raw"] * count, "mode": ["eval"] * count,
                "images": ["clean"] * count, "log_p": score.astype(np.float32), "margin": score.astype(np.float32),
                "correct": np.full(count, 0.5, np.float32), "rank": ids + 1,
            }  # fmt: skip
            tables.append(pa.table(columns))
    (run_dir / "measure").mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.concat_tables(tables), run_dir / "measure" / "scores.parquet")
