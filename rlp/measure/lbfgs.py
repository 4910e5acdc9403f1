"""L-BFGS for many independent convex problems of equal size at once: each with its own step, memory and end.

One pass evaluates all problems that are not finished yet, each at its own trial point; there is no inner loop of a line
search. A problem whose trial point is refused tries a shorter step in the next pass, while the others go on. Two-loop
recursion and scaling are those of Nocedal & Wright (2006), algorithm 7.4 and equation 7.20; a step is taken if it
lowers the loss enough (Armijo), or, where float32 cannot tell, if the slope says so (the approximate Wolfe condition of
Hager & Zhang 2005).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

MEMORY = 20
"""Pairs of steps and gradient differences that a problem keeps."""
WINDOW = 20
"""Accepted steps over which the loss must still fall."""
ARMIJO, SLOPE = 1e-4, 0.8
ROUNDING = 1e-7
"""Relative error that a float32 loss may have."""
SMALLEST_STEP = 1e-6

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""``(points [A, P], numbers of the problems [A])`` -> losses float64 ``[A]``, gradients ``[A, P]``, solved bool [A]."""


@dataclass(kw_only=True)
class Found:
    """Where each of H problems ended: points ``[H, P]``, losses float64 ``[H]``, why, and the passes that were made."""

    point: Tensor
    loss: Tensor
    reason: list[str]
    passes: int = 0


@dataclass(kw_only=True)
class _State:
    """Of the A problems that still run; every tensor has them in its first dimension."""

    number: Tensor  # [A] of the problem
    point: Tensor  # [A, P]
    loss: Tensor  # [A]
    gradient: Tensor  # [A, P]
    direction: Tensor  # [A, P]
    slope: Tensor  # [A], gradient times direction
    step: Tensor  # [A]
    first: Tensor  # [A], norm of the first gradient
    first_loss: Tensor  # [A]
    recent: Tensor  # [A, WINDOW] losses of the last accepted steps, oldest overwritten
    accepted: Tensor  # [A] steps so far
    pairs: Tensor  # [A] pairs remembered so far
    scale: Tensor  # [A], of the first guess of the inverse Hessian
    steps: Tensor = field(repr=False)  # [A, MEMORY, P]
    changes: Tensor = field(repr=False)  # [A, MEMORY, P] of the gradient
    rho: Tensor  # [A, MEMORY], 1 / (step times change), 0 for an empty place

    def keep(self, which: Tensor) -> "_State":
        return _State(**{part.name: getattr(self, part.name)[which] for part in fields(self)})


def minimise(
    evaluate: Evaluate,
    start: Tensor,
    *,
    curvature: float,
    tolerance: float,
    max_passes: int,
    memory: int = MEMORY,
    report: Callable[[int, int], None] | None = None,
) -> Found:
    """Minimise H smooth convex functions of P numbers.

    A problem ends, with the reason

    - ``separated`` as soon as `evaluate` calls it solved;
    - ``gradient`` when the gradient's norm is at most `tolerance` times that at the start;
    - ``loss`` when the last `WINDOW` steps lowered the loss by at most ``tolerance / 100`` of its fall since the start,
      or no step along the negative gradient lowers it in float32;
    - ``steps`` after `max_passes` evaluations.

    Args:
        evaluate: losses and gradients; called with the problems that still run only.
        start: ``[H, P]``.
        curvature: typical second derivative at the start, whose inverse is the first step.
        report: called after each pass with the passes made and the problems that still run.
    """
    numbers = torch.arange(len(start), device=start.device)
    loss, gradient, solved = evaluate(start, numbers)
    found = Found(point=start.clone(), loss=loss.clone(), reason=["steps"] * len(start))
    state = _begin(numbers, start, loss, gradient, 1 / curvature, memory)
    while True:
        found.passes += 1
        state = _finish(state, solved, tolerance, found)
        if report is not None:
            report(found.passes, len(state.number))
        if not len(state.number) or found.passes >= max_passes:
            break
        solved = _advance(state, evaluate, 1 / curvature)
    found.point[state.number], found.loss[state.number] = state.point, state.loss
    return found


def _begin(numbers: Tensor, start: Tensor, loss: Tensor, gradient: Tensor, scale: float, memory: int) -> _State:
    problems, size = start.shape
    zeros = start.new_zeros(problems)
    direction = -scale * gradient
    return _State(
        number=numbers, point=start.clone(), loss=loss, gradient=gradient, direction=direction,
        slope=_dot(gradient, direction), step=zeros + 1, first=gradient.norm(dim=1), first_loss=loss,
        recent=loss.new_full((problems, WINDOW), torch.inf), accepted=numbers * 0, pairs=numbers * 0,
        scale=zeros + scale, steps=start.new_zeros(problems, memory, size),
        changes=start.new_zeros(problems, memory, size), rho=start.new_zeros(problems, memory),
    )  # fmt: skip


def _finish(state: _State, solved: Tensor, tolerance: float, found: Found) -> _State:
    """Take the problems that ended out of the state; those that cannot go on forget their pairs first."""
    fallen = state.first_loss - state.loss
    oldest = state.recent.gather(1, (state.accepted % WINDOW).unsqueeze(1)).squeeze(1)  # inf until the window is full
    stuck = state.step < SMALLEST_STEP
    reasons = {
        "loss": (oldest - state.loss <= tolerance / 100 * fallen) | (stuck & (state.pairs == 0)),
        "gradient": state.gradient.norm(dim=1) <= tolerance * state.first,
        "separated": solved,
    }
    done = torch.stack(list(reasons.values())).any(0)
    if bool(done.any()):
        for name, which in reasons.items():
            for number in state.number[which].tolist():
                found.reason[number] = name
        ended = state.number[done]
        found.point[ended], found.loss[ended] = state.point[done], state.loss[done]
        state, stuck = state.keep(~done), stuck[~done]
    if bool(stuck.any()):
        _forget(state, stuck)
    return state


def _forget(state: _State, which: Tensor) -> None:
    """Begin again from the negative gradient."""
    state.rho[which], state.pairs[which], state.step[which] = 0.0, 0, 1.0
    state.direction[which] = -state.scale[which].unsqueeze(1) * state.gradient[which]
    state.slope[which] = _dot(state.gradient[which], state.direction[which])


def _advance(state: _State, evaluate: Evaluate, first_scale: float) -> Tensor:
    """One pass: evaluate the trial points, take or shorten the steps, choose new directions; who is solved."""
    trial = state.point + state.step.unsqueeze(1) * state.direction
    loss, gradient, solved = evaluate(trial, state.number)
    slope = _dot(gradient, state.direction)
    rounding = ROUNDING * state.loss.abs()
    enough = loss <= state.loss + ARMIJO * state.step * state.slope
    by_slope = (loss <= state.loss + rounding) & (slope <= -SLOPE * state.slope)
    take = (enough | by_slope) & gradient.isfinite().all(1)
    _remember(state, take, trial - state.point, gradient - state.gradient)
    # The parabola through both losses and the slope; not finite where the loss is not.
    shorter = -0.5 * state.slope * state.step / ((loss - state.loss) / state.step - state.slope)
    shorter = torch.where(shorter.isfinite(), shorter.float(), 0.1 * state.step)
    shorter = shorter.clamp(0.1 * state.step, 0.5 * state.step)
    column = take.unsqueeze(1)
    state.point = torch.where(column, trial, state.point)
    state.gradient = torch.where(column, gradient, state.gradient)
    state.recent[take, state.accepted[take] % WINDOW] = state.loss[take]
    state.accepted += take
    state.loss = torch.where(take, loss, state.loss)
    direction = torch.where(column, _two_loops(state), state.direction)
    state.step = torch.where(take, 1.0, shorter)
    state.direction, state.slope = direction, _dot(state.gradient, direction)
    uphill = take & (state.slope >= 0)
    if bool(uphill.any()):
        state.scale[uphill] = first_scale
        _forget(state, uphill)
    return solved & take


def _remember(state: _State, take: Tensor, step: Tensor, change: Tensor) -> None:
    """Store the pairs of the steps taken whose curvature is above rounding."""
    product = _dot(step, change)
    good = take & (product > 1e-8 * step.norm(dim=1) * change.norm(dim=1))
    place = state.pairs[good] % state.rho.shape[1]
    state.steps[good, place], state.changes[good, place] = step[good], change[good]
    state.rho[good, place] = 1 / product[good]
    state.scale[good] = product[good] / change[good].square().sum(1)
    state.pairs += good


def _two_loops(state: _State) -> Tensor:
    """``-H gradient``, H being the inverse Hessian as the remembered pairs have it."""
    memory, rows = state.rho.shape[1], torch.arange(len(state.rho), device=state.rho.device)
    direction, used = -state.gradient, []
    for back in range(1, 1 + min(memory, int(state.pairs.amax()))):
        place = (state.pairs - back) % memory
        change, rho = state.changes[rows, place], state.rho[rows, place]
        step = state.steps[rows, place]
        part = rho * _dot(step, direction)
        direction = direction - part.unsqueeze(1) * change
        used.append((step, change, rho, part))
    direction = direction * state.scale.unsqueeze(1)
    for step, change, rho, part in reversed(used):
        direction = direction + (part - rho * _dot(change, direction)).unsqueeze(1) * step
    return direction


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)
