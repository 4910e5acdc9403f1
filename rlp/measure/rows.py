"""From results to rows: one condition with everything beside it that its κ must be read with."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
import math
from typing import Any

import numpy as np

from rlp.intervals import draw_interval
from rlp.measure.controls import Part, class_only
from rlp.measure.estimate import (
    Estimate,
    auroc_estimate,
    delta_estimate,
    kappa_estimate,
    mean_estimate,
    rademacher,
)
from rlp.measure.features import FeatureSet
from rlp.measure.protocols import Result, Setting
from rlp.measure.run import Run
from rlp.runlog import METRICS, read_rows, weight_text

Row = dict[str, Any]

NOTES = {
    "views": "heads fitted to 6 augmented views of each sample, scored on 2 unseen views of it",
    "budget": "κ is the mean over log2 of the optimiser's steps, the curve's area over its width",
    "retrieval": "κ of naming the sample that a new view belongs to, by the nearest of N clean images; no heads, so "
    "nothing can leak",
    "online": "the run's own heads on the baked draws, from its log, so intervals are over draws alone; no such heads "
    "were trained on non-members, noise or an untrained network; leak: these heads on validation images",
}


def make_row(run: Run, setting: Setting, tap: str, depth: int, found: Mapping[str, Result]) -> Row:
    """The row of one condition.

    Args:
        run: the probed run.
        setting, tap, depth: the condition.
        found: results of ``members``, ``non-members`` and of the controls that the protocol has.
    """
    members, others = found["members"], found["non-members"]
    n, draws, samples = members.n, *members.by_sample.shape
    estimates = {group: _kappa(result, setting) for group, result in found.items()}
    return {
        "run": run.name,
        "seed": run.config.run.seed,
        "protocol": setting.protocol,
        "tap": tap,
        "depth": depth,
        "D": members.dim,
        "n": n,
        "N": samples,
        "draws": draws,
        "head": setting.head_name,
        "features": setting.features,
        "mode": setting.mode,
        "images": setting.images,
        "steps": members.steps,
        "converged": members.converged,
        "chance": 1 / n,
        "accuracy": float(members.by_sample.mean()),
        "members": estimates["members"].as_dict(),
        "non_members": estimates["non-members"].as_dict(),
        "delta": _delta(members, others, setting, estimates).as_dict(),
        **{name: estimates[name].as_dict() if name in estimates else None for name in ("untrained", "noise", "leak")},
        "class_only": _class_only(members.part, n, setting),
        "effective_rank": members.spectrum.effective_rank,
        "participation_ratio": members.spectrum.participation_ratio,
        "curve": [[step, kappa, other] for (step, kappa), (_, other) in zip(members.curve, others.curve, strict=True)],
        "note": NOTES.get(setting.protocol, ""),
    }


def _kappa(result: Result, setting: Setting) -> Estimate:
    if setting.protocol != "retrieval":
        return kappa_estimate([result.by_sample], result.n)
    # No draws: each sample is a question of its own, so samples alone give the interval.
    return mean_estimate([(result.n * result.by_sample - 1) / (result.n - 1)])


def _delta(members: Result, others: Result, setting: Setting, estimates: Mapping[str, Estimate]) -> Estimate:
    if setting.protocol != "retrieval":
        return delta_estimate([members.by_sample], [others.by_sample], members.n)
    return difference(estimates["members"], estimates["non-members"])


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Of two estimates from samples apart: the squares of the half widths add up."""
    mean = first.mean - second.mean
    if first.high is None or second.high is None:
        return replace(first, mean=mean, low=None, high=None, sd_sample=None)
    half = math.hypot(first.high - first.mean, second.high - second.mean)
    spread = None
    if first.sd_sample is not None and second.sd_sample is not None:
        spread = math.hypot(first.sd_sample, second.sd_sample)
    return replace(
        first, mean=mean, low=mean - half, high=mean + half, sd_sample=spread,
        samples=min(first.samples, second.samples),
    )  # fmt: skip


def _class_only(part: Part, n: int, setting: Setting) -> float:
    if setting.protocol == "retrieval":  # one right answer a class, at best
        share = len(np.unique(part.classes)) / n
        return (n * share - 1) / (n - 1)
    return class_only(part.classes, part.words, n)


def online_rows(run: Run, taps: Sequence[str] | None = None) -> list[Row]:
    """The run's own heads as its log has them at this checkpoint's epoch: running (train mode), and in eval mode."""
    epoch = next((row for row in _epochs(run) if row["epoch"] == run.epoch and row["step"] == run.step), None)
    if epoch is None or not epoch.get("heads"):
        return []
    images = "augmented" if run.augmented else "clean"
    rows = []
    for mode, network, seen in (("online", "train", images), ("eval", "eval", "clean")):
        heads = [h for h in epoch["heads"] if h["split"] == "train" and h["mode"] == mode and h["kappa"] is not None]
        for tap in sorted(
            {h["tap"] for h in heads}, key=lambda name: next(h["depth"] for h in heads if h["tap"] == name)
        ):
            if taps is None or tap in taps:
                mine = [h for h in heads if h["tap"] == tap]
                leak = [h for h in epoch["heads"] if (h["split"], h["mode"], h["tap"]) == ("val", "eval", tap)]
                rows.append(_online_row(run, mine, leak, network, seen))
    return rows


def _epochs(run: Run) -> list[Row]:
    return [row for row in read_rows(run.dir / METRICS) if row["kind"] == "epoch"]


def _online_row(run: Run, heads: list[Row], leak: list[Row], mode: str, images: str) -> Row:
    config, first, n = run.config.heads, heads[0], heads[0]["num_labels"]
    floors = [h["floor"] for h in heads if h["floor"] is not None]
    kind = getattr(config, "kind", "shared")
    names = {"per_class": "per-class", "copied": "copied"}
    return {
        "run": run.name,
        "seed": run.config.run.seed,
        "protocol": "online",
        "tap": first["tap"],
        "depth": first["depth"],
        "D": first["dim"],
        "n": n,
        "N": int(first["count"]),
        "draws": len(heads),
        "head": names.get(kind, "linear" if config.layers == 1 else "two-layer"),
        "features": getattr(config, "features", "raw"),
        "mode": mode,
        "images": images,
        "steps": run.step,
        "converged": 0.0,
        "chance": 1 / n,
        "accuracy": float(np.mean([h["accuracy"] for h in heads])),
        "members": _over_draws(heads).as_dict(),
        "non_members": None,
        "delta": None,
        "untrained": None,
        "noise": None,
        "leak": _over_draws(leak).as_dict() if leak else None,
        "class_only": float((n * np.mean(floors) - 1) / (n - 1)) if floors else None,
        "effective_rank": None,
        "participation_ratio": None,
        "curve": [],
        "note": NOTES["online"],
    }


def _over_draws(heads: list[Row]) -> Estimate:
    """Mean κ of the heads with Student's interval over draws: the log has no samples."""
    kappas = [float(h["kappa"]) for h in heads]
    interval = draw_interval(kappas)
    return Estimate(
        mean=interval.mean,
        low=interval.low,
        high=interval.high,
        sd_seed=None,
        sd_draw=float(np.std(kappas, ddof=1)) if len(kappas) > 1 else None,
        sd_sample=None,
        seeds=1,
        draws=len(kappas),
        samples=int(min(h["count"] for h in heads)),
    )


def run_facts(run: Run, names: Mapping[str, Any]) -> Row:
    """What is known of the run at this checkpoint, for ``probe.json``."""
    epoch = next((row for row in _epochs(run) if row["epoch"] == run.epoch), {})
    trained = epoch.get("train_eval") or epoch.get("train") or {}
    return {
        "name": run.name,
        "seed": run.config.run.seed,
        "lam": run.config.heads.weight,
        "penalty": weight_text(run.config.heads.weight, asdict(run.config.heads)),
        "model": run.config.model.name,
        "epochs": run.epoch,
        "steps": run.step,
        "train_accuracy": trained.get("accuracy"),
        "val_accuracy": (epoch.get("val") or {}).get("accuracy"),
        "train_samples": len(run.groups["members"].view.ids),
        "label_noise": run.config.data.label_noise,
        "checkpoint": run.checkpoint.name,
        "checkpoint_sha256": run.sha256,
        "members": run.groups["members"].origin,
        "non_members": run.groups["non-members"].origin,
        **names,
    }


def rademacher_rows(row: Row, found: Mapping[str, Result]) -> list[Row]:
    """The reading of n = 2 for members, non-members and the controls, but for the leak check, which bounds nothing."""
    rows = []
    for group, result in found.items():
        if group == "leak":
            continue
        estimate, meaning = rademacher([result.by_sample])
        facts = {
            key: row[key] for key in ("tap", "depth", "D", "n", "N", "draws", "head", "features", "mode", "images")
        }
        rows.append({**facts, "group": group, "chance": 0.0, "estimate": estimate.as_dict(), "meaning": meaning})
    return rows


def planted_rows(row: Row, found: Mapping[str, Result], sets: Mapping[str, FeatureSet]) -> list[Row]:
    """Whether samples with planted truth are told from plain ones by how well heads know their random labels.

    AUROC of mean log p for every kind that members have: above 1/2 the planted are better known. Beside it the same
    of non-members and of an untrained network, and, as the usual score, that of the network's loss on the given label,
    of members and non-members.
    """
    kinds = planted_masks(sets["members"])
    rows = []
    for kind, (mask, scored) in kinds.items():
        entry = {key: row[key] for key in ("protocol", "tap", "depth", "D", "n", "draws", "head", "features")}
        entry |= {"mode": row["mode"], "images": row["images"], "N": int(scored.sum()), "fitted": row["N"]}
        entry |= {"planted": kind, "count": int(mask.sum()), "chance": 0.5, "score": "log p of the random label"}
        for group in ("members", "non-members", "untrained"):
            score = found[group].log_p.mean(axis=(0, 1))
            name = "non-members" if group == "non-members" else "members"
            entry[group.replace("-", "_")] = _auroc(score, planted_masks(sets[name]).get(kind))
        for group in ("members", "non-members"):
            name = "class_loss" if group == "members" else "class_loss_non_members"
            entry[name] = _auroc(class_loss(sets[group]), planted_masks(sets[group]).get(kind))
        rows.append(entry)
    return rows


def _auroc(score: np.ndarray, masks: tuple[np.ndarray, np.ndarray] | None) -> Row | None:
    if masks is None or not np.isfinite(score).all():
        return None
    planted, scored = masks
    return auroc_estimate(score[scored], planted[scored]).as_dict()


def planted_masks(samples: FeatureSet) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By kind which samples are planted, and which are scored: these and the plain ones, both bool ``[N]``.

    ``wrong label`` are the samples that label noise or a file of labels gave another class, canaries apart.
    """
    wrong, canary = samples.given != samples.true, samples.planted != ""
    masks = {"wrong label": wrong & ~canary}
    masks |= {str(kind): samples.planted == kind for kind in np.unique(samples.planted) if kind}
    plain = ~wrong & ~canary
    return {kind: (mask, mask | plain) for kind, mask in masks.items() if mask.any() and plain.any()}


def class_loss(samples: FeatureSet) -> np.ndarray:
    """Loss of the network on the given labels, float64 ``[N]``: the usual score that AUROC is compared with."""
    logits = samples.logits.double().numpy()
    largest = logits.max(axis=1)
    total = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    return total - logits[np.arange(len(logits)), samples.given]
