"""Critical sample ratio: how many samples have another class close by.

Arpit et al., "A closer look at memorization in deep networks", ICML 2017, arXiv 1706.05394: a sample is critical if the
network answers otherwise somewhere within a box of half side r around it; networks that memorise have more critical
samples. The search is theirs in form (Langevin adversarial sample search): α · sign of a gradient + β · normal noise,
back into the box, until the answer changes or the steps are used up. A search can miss: the ratio is a lower bound.

*Chosen*, each a setting: r = .05 of the pixels' range, α = r/10, 30 steps. β is 0.8 α, as in the paper (α = .25/255,
β = .2/255). We also stay within valid pixels and descend the logit of the answer less the largest other one, whose
gradient does not vanish where the network is sure.

Cost: up to 31 passes forward and backward for each sample, in three searches (members, non-members, members untrained).
"""

import numpy as np
import torch
from torch import Tensor, nn

from rlp.errors import UserError
from rlp.measure.baselines.interface import Finding, Findings, SampleScore, Subject
from rlp.measure.baselines.planted import planted_findings
from rlp.measure.baselines.pool import Pool
from rlp.measure.estimate import share_estimate
from rlp.measure.features import FeatureSet
from rlp.seeding import named_seed

RADIUS, STEPS = 0.05, 30
NAME = "adversarial"


def measure(
    subject: Subject, *, radius: float = RADIUS, steps: int = STEPS, step: float = 0.0, noise: float = 0.8
) -> Findings:
    """The critical sample ratio of members, non-members and the untrained network, and score ``critical``.

    The score is 1 where the first step changes the answer, falls linearly with the step that does, and is 0 where none
    did: a sample is critical where it is above 0. (That it counts steps is ours.)

    Args:
        subject: the run.
        radius: half the side of the box, as share of the pixels' range.
        steps: of the search, at least 1.
        step: α, in units of ``radius``' kind; 0 for a tenth of the radius.
        noise: β/α.

    Raises:
        UserError: a setting is out of range.
    """
    if not 0 < radius <= 1 or steps < 1 or step < 0 or noise < 0:
        raise UserError(
            f"the search has radius {radius:g}, {steps} steps of {step:g} and noise {noise:g}; expected a radius above "
            "0 and up to 1, at least 1 step, and no negative number"
        )
    step = step or radius / 10
    run, sets = subject.run, (subject.members, subject.non_members, subject.untrained)
    models = (run.model, run.model, run.untrained(subject.seed))
    members, others, untrained = (
        _scores(subject, samples, model, radius, steps, step, noise)
        for samples, model in zip(sets, models, strict=True)
    )
    ratios = [share_estimate(score > 0) for score in (members, others, untrained)]
    settings = f"L∞ radius {radius:.4f} of the pixels' range, {steps} steps of {step:.4f}, noise {noise:g} of that"
    ratio = Finding(
        measure=NAME,
        quantity="critical sample ratio",
        value=ratios[0],
        non_members=ratios[1],
        chance=None,
        controls={"untrained": ratios[2].mean},
        count=ratios[0].samples,
        settings=settings,
    )
    scores = [
        SampleScore(name="critical", group=samples.group, ids=samples.ids, values=values)
        for samples, values in zip(sets[:2], (members, others), strict=True)
    ]
    planted = planted_findings(subject, NAME, "critical", members, others, settings=settings)
    return Findings(scores=tuple(scores), rows=(ratio, *planted))


def first_change(
    model: nn.Module,
    images: Tensor,
    bounds: tuple[Tensor, Tensor],
    *,
    step: Tensor,
    noise: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """The step of the search after which the network answers otherwise, int64 ``[B]``; 0 where it never does.

    Args:
        model: frozen, in eval mode.
        images: where to start, as the network sees them, float ``[B, 3, H, W]``.
        bounds: lowest and highest value of each pixel, as ``images``.
        step: α, which broadcasts to ``images``.
        noise: β/α.
        steps: of the search.
        generator: of the noise, on the device of ``images``.
    """
    found = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    active, here, answer = torch.arange(len(images), device=images.device), images, images.new_empty(0)
    for number in range(steps + 1):
        here = here.detach().requires_grad_()
        logits = model(here).float()
        if number == 0:
            answer = logits.argmax(dim=1, keepdim=True)
        changed = (logits.argmax(dim=1) != answer[:, 0]).detach()
        found[active[changed]] = number
        active = active[~changed]
        if number == steps or not len(active):
            break
        margin = logits.gather(1, answer)[:, 0] - logits.scatter(1, answer, float("-inf")).amax(dim=1)
        (slope,) = torch.autograd.grad(margin.sum(), here)
        # Noise for the whole batch, so that a sample's does not depend on when the others were found.
        eta = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)[active]
        moved = here.detach()[~changed] + step * (noise * eta - slope[~changed].sign())
        answer, here = answer[~changed], moved.clamp(bounds[0][active], bounds[1][active])
    return found


def _scores(
    subject: Subject, samples: FeatureSet, model: nn.Module, radius: float, steps: int, step: float, noise: float
) -> np.ndarray:
    """The score of each sample, float64 ``[N]``."""
    from tqdm import tqdm

    run = subject.run
    group = run.groups[samples.group]
    pool = Pool.of(run, [group.of(group.view.ids[np.isin(group.ids, samples.ids)])])
    size = run.config.data.eval_batch_size or run.config.data.batch_size
    generator = torch.Generator(run.device).manual_seed(named_seed(subject.seed, f"{NAME} {samples.group}"))
    black, white = (
        run.augment(torch.full_like(pool.images[:1], value).permute(0, 3, 1, 2), pool.ids[:1], 0, train=False)
        for value in (0, 255)
    )
    unit, found = white - black, []
    for rows in tqdm(torch.arange(len(pool)).split(size), desc=f"critical {samples.group}", disable=None, leave=False):
        rows = rows.to(run.device)
        images = run.augment(pool.images[rows].permute(0, 3, 1, 2), pool.ids[rows], 0, train=False)
        bounds = (images - radius * unit).maximum(black), (images + radius * unit).minimum(white)
        found.append(
            first_change(model, images, bounds, step=step * unit, noise=noise, steps=steps, generator=generator)
        )
    number = torch.cat(found).cpu().numpy()
    return np.where(number > 0, 1 - (number - 1) / steps, 0.0)
