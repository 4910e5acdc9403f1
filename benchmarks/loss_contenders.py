"""Who takes part in `benchmarks.loss`: this package's operator, compositions in PyTorch, and other people's kernels.

A contender builds, from a case's inputs, a function of the features that gives the fit loss and, where it can, the
penalty ``-log(1 - p)``, both summed over heads and averaged over the batch; or it says why it cannot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
import math
from typing import NamedTuple

import torch
from torch import Tensor
import torch.nn.functional as F

from benchmarks.loss_cases import MODES, Case, Inputs
from rlp.kernels import reference
from rlp.kernels.loss import random_label_loss
from rlp.losses import forget_penalty

OURS = "random_label_loss"
"""The contender that the others are compared with."""
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-3}
"""Largest relative error ‖a − b‖ / ‖b‖ of losses and gradients that rounding explains."""


class Unavailable(Exception):
    """Why a contender does not take part, as a short clause."""


class Run(NamedTuple):
    """A contender at work: ``loss(x, penalised)`` gives fit loss and penalty (None if not `penalised`).

    Laid end to end, `weights` are the case's weight. With `wants_x` the features must require a gradient in any mode.
    """

    loss: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
    weights: Sequence[Tensor]
    bias: Tensor | None = None
    wants_x: bool = False


@dataclass(frozen=True)
class Contender:
    """Its name, how it is built (it may raise anything), the cases and modes that it serves, what to know about it."""

    name: str
    build: Callable[[Inputs], Run]
    serves: Callable[[Case], bool]
    note: str
    modes: tuple[str, ...] = tuple(MODES)
    is_ours: bool = False


def _ours(impl: str, with_bias: bool = False) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        if impl == "eager" and not inputs.x.is_cuda:
            raise Unavailable("the same as auto here")
        bias = inputs.bias if with_bias else None

        def loss(x: Tensor, penalised: bool) -> tuple[Tensor, Tensor | None]:
            fit, stats = random_label_loss(x, inputs.weight, bias, inputs.target, inputs.classes, impl=impl)
            return fit.sum(), forget_penalty(stats).mean(0).sum() if penalised else None

        return Run(loss, [inputs.weight], bias)

    return build


def _fit(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in float32, as autocast does it, of logits ``[B, H, n]``."""
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten()) * logits.shape[1]


def _penalty(logits: Tensor, target: Tensor) -> Tensor:
    """``-log(1 - p)`` of logits ``[B, H, n]``, the way that stays finite."""
    z, label = logits.float(), target.unsqueeze(-1)
    rest = z.scatter(-1, label, -torch.inf).logsumexp(-1)
    return F.softplus(z.gather(-1, label).squeeze(-1) - rest).mean(0).sum()


def _twice(
    logits_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, target: Tensor, penalised: bool
) -> tuple[Tensor, Tensor | None]:
    """One product for the fit loss and one for the penalty, detached where its gradient must not go."""
    if not torch.is_grad_enabled():
        logits = logits_of(x, weight)
        return _fit(logits, target), _penalty(logits, target)
    fit = _fit(logits_of(x.detach(), weight), target)
    return fit, _penalty(logits_of(x, weight.detach()), target) if penalised else None


def _shared_logits(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.flatten(0, 1)).unflatten(1, weight.shape[:2])


def _composition(inputs: Inputs) -> Run:
    """One product of all heads, or, per class, each sample's own weights gathered."""

    def gathered(x: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(weight.squeeze(0)[inputs.classes], x.unsqueeze(-1)).mT

    logits_of = _shared_logits if inputs.classes is None else gathered

    def loss(x: Tensor, penalised: bool) -> tuple[Tensor, Tensor | None]:
        return _twice(logits_of, x, inputs.weight, inputs.target, penalised)

    return Run(loss, [inputs.weight])


def _compiled(inputs: Inputs) -> Run:
    torch.compiler.reset()  # else the shapes of earlier cases count towards the limit of recompilations
    run = _composition(inputs)
    return run._replace(loss=torch.compile(run.loss, dynamic=False, fullgraph=True))


def _grouped_mm(inputs: Inputs) -> Run:
    """Sorted by class; rows are padded to the multiples of 16 bytes that grouped_mm wants."""
    if not hasattr(F, "grouped_mm"):
        raise Unavailable(f"torch {torch.__version__} has no F.grouped_mm")
    classes, case = inputs.classes, inputs.case
    assert classes is not None
    padding = -case.num_labels % (16 // case.itemsize)

    def loss(x: Tensor, penalised: bool) -> tuple[Tensor, Tensor | None]:
        ordered, rows = classes.sort(stable=True)
        numbers = torch.arange(inputs.weight.shape[1], device=x.device)
        ends = torch.searchsorted(ordered, numbers, right=True).int()

        def logits_of(x: Tensor, weight: Tensor) -> Tensor:
            padded = F.pad(weight.squeeze(0), (0, 0, 0, padding)) if padding else weight.squeeze(0)
            return F.grouped_mm(x, padded.mT, offs=ends)[:, : case.num_labels].unsqueeze(1)

        return _twice(logits_of, x.index_select(0, rows), inputs.weight, inputs.target[rows], penalised)

    return Run(loss, [inputs.weight])


def _loop(inputs: Inputs) -> Run:
    """Heads with parameters of their own, one after the other."""
    weights = [one.detach().clone().requires_grad_() for one in inputs.weight.split(1)]

    def loss(x: Tensor, penalised: bool) -> tuple[Tensor, Tensor | None]:
        pairs = zip(weights, inputs.target.split(1, dim=1), strict=True)
        fits, penalties = zip(*[_twice(_shared_logits, x, *pair, penalised) for pair in pairs], strict=True)
        found = [part for part in penalties if part is not None]
        return torch.stack(fits).sum(), torch.stack(found).sum() if found else None

    return Run(loss, weights)


def _plain_peer(
    package: str, loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], wants_x: bool = False
) -> Callable[[Inputs], Run]:
    """Somebody's fused linear layer and cross-entropy ``loss_of(x [B, D], weight [n, D], target [B])``."""

    def build(inputs: Inputs) -> Run:
        if package and find_spec(package) is None:
            raise Unavailable("not installed")
        if package and not inputs.x.is_cuda:
            raise Unavailable("needs a GPU")
        weight, target = inputs.weight, inputs.target.squeeze(1)
        return Run(lambda x, penalised: (loss_of(x, weight.squeeze(0), target), None), [weight], wants_x=wants_x)

    return build


def _torch_peer(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def _liger(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    ops = import_module("liger_kernel.ops.fused_linear_cross_entropy")
    return ops.LigerFusedLinearCrossEntropyFunction.apply(x, weight, target)[0]


def _cut(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return import_module("cut_cross_entropy").linear_cross_entropy(x, weight, target)


def _quack(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy(x, weight, target)


def _any(case: Case) -> bool:
    return True


def _per_class(case: Case) -> bool:
    return case.classes is not None


def _draws(case: Case) -> bool:
    return case.classes is None and case.heads > 1


def _one_head(case: Case) -> bool:
    return case.classes is None and case.heads == 1 and not case.is_sweep


def _no_sweep(case: Case) -> bool:
    return not case.is_sweep


COMPOSITION = "PyTorch composition"
_PLAIN = "Plain cross-entropy: no penalty, no statistics."

CONTENDERS = (
    Contender(OURS, _ours("auto"), _any, "`impl=\"auto\"`; also gives the statistics that accuracies need.",
              is_ours=True),
    Contender(f"{OURS}, with bias", _ours("auto", True), _no_sweep, "The same with a bias; all others go without.",
              is_ours=True),
    Contender(f"{OURS}, eager", _ours("eager"), _no_sweep, "`impl=\"eager\"`: no Triton.", is_ours=True),
    Contender(f"{OURS}, reference", _ours("reference"), _no_sweep,
              "`impl=\"reference\"`, the oracle by autograd: always both passes, always all statistics.", is_ours=True),
    Contender(COMPOSITION, _composition, _any,
              "Product, cross-entropy and −log(1−p) in float32; a second, detached product where the penalty is asked "
              "for. Per class it gathers `W[y]` for a bmm."),
    Contender(f"{COMPOSITION}, torch.compile", _compiled, _no_sweep, "The same through `torch.compile`."),
    Contender("F.grouped_mm composition", _grouped_mm, _per_class,
              "The same with samples sorted by class (on the device, in every call) and `F.grouped_mm`, weights padded "
              "to 16 bytes where n asks for it."),
    Contender("loop of linear layers", _loop, _draws, "The composition head by head, with parameters of their own."),
    Contender("F.linear_cross_entropy", _plain_peer("", _torch_peer), _one_head,
              _PLAIN + " PyTorch's chunked path with its own choice of chunks.", ("fit",)),
    Contender("liger-kernel", _plain_peer("liger_kernel", _liger, wants_x=True), _one_head,
              _PLAIN + " Computes the gradient of x too: without it, it computes none. Sums dW in the weight's type.",
              ("fit",)),
    Contender("cut-cross-entropy", _plain_peer("cut_cross_entropy", _cut), _one_head,
              _PLAIN + " Leaves out small gradients, as is its default.", ("fit",)),
    Contender("quack-kernels", _plain_peer("quack", _quack), _one_head, _PLAIN, ("fit",)),
)  # fmt: skip


def outcome(run: Run, inputs: Inputs, penalised: bool) -> dict[str, Tensor]:
    """Losses and gradients by name; the gradient of x is the penalty's alone, and only there with it."""
    x = inputs.x if penalised or run.wants_x else inputs.x.detach()
    fit, penalty = run.loss(x, penalised)
    (fit if penalty is None else fit + penalty).backward()
    found = {"fit": fit.detach(), "dW": torch.cat([one.grad.flatten() for one in run.weights if one.grad is not None])}
    if run.bias is not None and run.bias.grad is not None:
        found["db"] = run.bias.grad.flatten()
    if penalty is not None and inputs.x.grad is not None:
        found |= {"penalty": penalty.detach(), "dx": inputs.x.grad.flatten()}
    clear_gradients(run, inputs)
    return found


def clear_gradients(run: Run, inputs: Inputs) -> None:
    """Free them."""
    inputs.x.grad = inputs.bias.grad = None
    for one in run.weights:
        one.grad = None


def oracle(inputs: Inputs, with_bias: bool) -> dict[str, Tensor]:
    """The `outcome` in float64."""
    x, weight, bias = (part.detach().double().requires_grad_() for part in (inputs.x, inputs.weight, inputs.bias))
    fit, stats = reference.random_label_loss(x, weight, bias if with_bias else None, inputs.target, inputs.classes)
    penalty = forget_penalty(stats).mean(0).sum()
    (fit.sum() + penalty).backward()
    assert x.grad is not None
    assert weight.grad is not None
    losses = {"fit": fit.detach().sum(), "penalty": penalty.detach()}
    found = losses | {"dW": weight.grad.flatten(), "dx": x.grad.flatten()}
    return found | ({} if bias.grad is None else {"db": bias.grad.flatten()})


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest ‖a − b‖ / ‖b‖ over what both have; infinite where something is not finite."""
    errors = []
    for name in found.keys() & expected.keys():
        error = torch.linalg.vector_norm(found[name].to(expected[name].dtype) - expected[name], dtype=torch.float64)
        errors.append(float(error / torch.linalg.vector_norm(expected[name], dtype=torch.float64)))
    return max(math.inf if math.isnan(error) else error for error in errors)
