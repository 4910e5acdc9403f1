"""Heads that are copies of the rest of the network ("copy depth", arXiv 2411.19640)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
import copy
import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from rlp.errors import UserError
from rlp.kernels.loss import MEMORY_BUDGET
from rlp.kernels.problem import ClassOrder
from rlp.kernels.reference import RandomLabelLoss, mean_fit, statistics_from_logits
from rlp.models.banks import Bank
from rlp.models.cut import WEIGHTED, tail_of, trace
from rlp.models.modes import evaluating
from rlp.models.taps import FeatureStore, Tap
from rlp.seeding import named_seed


class Branch(nn.Module):
    """One copy of everything behind a tap, its last linear layer replaced by one for n random labels.

    Args:
        tail: what lies behind the tap, from the forward pass in train mode.
        in_eval: the ``forward`` of the same in eval mode; a model may ask for its mode outside of its modules.
        num_labels: n.
    """

    def __init__(self, tail: fx.GraphModule, in_eval: Callable[..., Any], num_labels: int) -> None:
        super().__init__()
        self.tail = copy.deepcopy(tail)
        self._in_eval = in_eval
        path, old = _classifier(self.tail)
        self.classifier_path = path
        # Not initialised here, which would draw from the global generator.
        new = nn.utils.skip_init(
            nn.Linear, old.in_features, num_labels, old.bias is not None, device=old.weight.device,
            dtype=old.weight.dtype,
        )  # fmt: skip
        self.tail.set_submodule(path, new)
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        self._keep_what_has_no_start()

    def _keep_what_has_no_start(self) -> None:
        """Remember the parameters of modules that cannot start afresh, such as a scale of the network's own."""
        self._kept: dict[str, str] = {}
        for path, module in self.tail.named_modules():
            for name, parameter in module.named_parameters(path, recurse=False) if _reset_of(module) is None else ():
                self._kept[name] = f"kept{len(self._kept)}"
                # A buffer, so that it moves along and ranks can share it; not saved, for the network gives it again.
                self.register_buffer(self._kept[name], parameter.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """What the tap gives ``[B, ...]`` to logits ``[B, n]``."""
        x = x.clone()  # the network may change it in place, and all copies read the same one
        return self.tail(x) if self.training else self._in_eval(self.tail, x)

    @torch.no_grad()
    def initialise(self, seed: int, whole: bool) -> None:
        """A fresh last layer, as ``nn.Linear`` has it; with ``whole`` every module starts again as PyTorch has it.

        Parameters of a module that has no start of its own go back to what the network had when it was copied.
        """
        devices = [p.device for p in self.parameters() if p.is_cuda][:1]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for module in self.tail.modules() if whole else ():
                if (reset := _reset_of(module)) is not None:
                    reset()
        for path, kept in self._kept.items() if whole else ():
            self.tail.get_parameter(path).copy_(self.get_buffer(kept))
        layer = self.tail.get_submodule(self.classifier_path)
        generator, bound = torch.Generator().manual_seed(seed), 1 / math.sqrt(layer.in_features)  # type: ignore[arg-type]
        for parameter in layer.parameters():
            # On the CPU, so that the numbers do not depend on the device.
            fresh = torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound, generator=generator)
            parameter.copy_(fresh)


def _reset_of(module: nn.Module) -> Callable[[], Any] | None:
    """How a module starts again; PyTorch's attention and transformers have it under a name of their own."""
    found = (getattr(module, name, None) for name in ("reset_parameters", "_reset_parameters"))
    return next((reset for reset in found if callable(reset)), None)


def _classifier(tail: fx.GraphModule) -> tuple[str, nn.Linear]:
    """Path and module of the last linear layer, if no other weighted module comes behind it."""
    for node in reversed(tail.graph.nodes):
        if node.op == "call_module":
            inner = tail.get_submodule(str(node.target)).named_modules(prefix=str(node.target))
            found = [(path, module) for path, module in inner if isinstance(module, WEIGHTED)]
            if found and isinstance(found[-1][1], nn.Linear):
                return found[-1]  # pyright: ignore[reportReturnType]
            if found:
                raise UserError(
                    f"the last weighted module of the model is '{found[-1][0]}', {type(found[-1][1]).__name__}; heads "
                    "of kind copied expect nn.Linear"
                )
    raise UserError("no linear layer lies behind the tap; heads of kind copied expect the classifier to be nn.Linear")


class CopiedBank(Bank):
    """The heads of one tap: H copies of all modules behind it, one for each draw, which share nothing.

    Every copy starts with the network's present weights (and batch norms' statistics) but for its last linear layer,
    which is a fresh one for n labels, initialised from ``seed``, ``tap`` and the draw alone. It reads the tap's tensor
    unpooled. Batch norms of a copy have running statistics of their own. The fit loss trains the copies alone, the
    penalty passes through frozen copies and reaches the network alone.

    **Cost.** A step runs the rest of the network H times more, forward and backward, and with a penalty about twice
    that; parameters, optimiser state and activations grow H times too. Logits ``[B, H, n]`` are held as a whole.

    Dropout in a copy draws from the global generators, whose state is put back after it: what the network itself draws
    does not depend on its heads. With several ranks the batch norms see each rank's own part of a batch.

    Args:
        model: the network.
        tap: where the branch leaves.
        example: what the tap gives for a batch of any size, ``[B, ...]``.

    Raises:
        UserError: the network cannot be cut there, or its output is not that of a last linear layer ``[B, n]``.
    """

    kind, features, num_classes = "copied", "raw", 0

    def __init__(self, model: nn.Module, tap: Tap, example: Tensor, draws: int, num_labels: int, seed: int) -> None:
        super().__init__()
        self.shape, self.dim = tuple(example.shape[1:]), example[0].numel()
        self.draws, self.num_labels, self.seed, self.tap = draws, num_labels, seed, tap.name
        traced = trace(model, [tap], training=True)
        tail, in_eval = tail_of(traced, tap), tail_of(trace(model, [tap], training=False), tap)
        if _targets(in_eval) - _targets(tail):
            raise UserError(
                f"behind tap '{tap.name}' the model runs other modules in eval mode than in train mode "
                f"({', '.join(sorted(_targets(in_eval) - _targets(tail)))}); expected a part of it to be the same"
            )
        self.weighted = traced.weighted(traced.node_at(tap))
        forward = type(in_eval).forward
        self.branches = nn.ModuleList(Branch(tail, forward, num_labels) for _ in range(draws))
        self.initialise()
        self._check_output(example)

    @torch.no_grad()
    def _check_output(self, example: Tensor) -> None:
        """The first copy gives logits."""
        branch = self.branches[0].eval()
        try:
            found = branch(example)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"a copy of what lies behind tap '{self.tap}', its last linear layer with {self.num_labels} outputs, "
                f"does not run ({error}); expected that layer to be the model's output"
            ) from error
        branch.train()
        shape = (len(example), self.num_labels)
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            given = [*found.shape] if isinstance(found, Tensor) else type(found).__name__
            raise UserError(
                f"a copy of what lies behind tap '{self.tap}' gives {given} for {len(example)} images; expected "
                f"{[*shape]}, the model's last linear layer being its output"
            )

    def initialise(self, generation: int = 0) -> None:
        """Fresh weights, a function of seed, tap, draw and generation; at 0 in the last layers, later everywhere."""
        for draw, branch in enumerate(self.branches):
            name = f"heads.{self.tap}.{draw}" + (f".{generation}" if generation else "")
            branch.initialise(named_seed(self.seed, name), generation > 0)  # type: ignore[operator]

    def describe(self) -> str:
        """What the heads are, in a line."""
        count = sum(parameter.numel() for parameter in self.branches[0].parameters())
        modules = "the weighted module" if self.weighted == 1 else f"the {self.weighted} weighted modules"
        copies = "a copy" if self.draws == 1 else f"{self.draws} copies"
        return f"tap {self.tap}: {copies} of {modules} behind it, {count:,} parameters each"

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """Logits ``[B, H, n]`` of the tap's tensor ``[B, ...]``, with ordinary gradients."""
        return self._logits(x, lambda branch: branch)

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        penalised: bool,
        impl: str = "auto",
        memory_budget: int = MEMORY_BUDGET,
        classes: Tensor | ClassOrder | None = None,
        entropy: bool = False,
    ) -> RandomLabelLoss:
        """As :meth:`Bank.loss`, by plain autograd: ``impl`` and ``memory_budget`` have no say."""
        stats = statistics_from_logits(self._logits(x.detach(), lambda branch: branch), target, entropy)
        fit = mean_fit(stats.z_t, stats.lse_rest)
        if not penalised:
            return RandomLabelLoss(fit, stats.map(Tensor.detach))
        return RandomLabelLoss(fit, statistics_from_logits(self._logits(x, _frozen), target, entropy))

    def _logits(self, x: Tensor, of: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> Tensor:
        """Logits ``[B, H, n]``; ``of`` makes a function of each copy. A second call draws the same dropout."""
        parameter = next(self.parameters())
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(parameter.dtype)
        # Of an empty batch batch norms in train mode would note the mean of nothing.
        mode = nullcontext() if len(x) else evaluating(self)
        with _own_randomness(x.device) if self.training else nullcontext(), mode:
            return torch.stack([of(branch)(x) for branch in self.branches], dim=1)


def _frozen(branch: nn.Module) -> Callable[[Tensor], Tensor]:
    """The copy as a function whose weights get no gradient, and whose statistics stay as they are."""
    state = {name: parameter.detach() for name, parameter in branch.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in branch.named_buffers()}
    return lambda x: functional_call(branch, state, (x,))


def _targets(tail: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in tail.graph.nodes if node.op in ("call_module", "get_attr")}


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Put the global generators back at the end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


class _KeepWhole:
    """Forward hook that keeps what passes at a tap unpooled, in memory of its own: the network may change it later."""

    def __init__(self, tap: Tap, store: FeatureStore) -> None:
        self.tap, self.store = tap, store

    def keep(self, value: Any) -> None:
        if not isinstance(value, Tensor) or value.dim() < 2:
            given = f"a tensor of shape {[*value.shape]}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"tap '{self.tap.name}' gives {given}; heads of kind copied expect one tensor [B, ...]")
        self.store.features[self.tap.name] = value.clone()


class _KeepWholeOutput(_KeepWhole):
    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.keep(output)


class _KeepWholeInput(_KeepWhole):
    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any]) -> None:
        self.keep(next((value for value in (*inputs, *named_inputs.values()) if isinstance(value, Tensor)), inputs))


def hook_whole(model: nn.Module, taps: Sequence[Tap], store: FeatureStore) -> list[RemovableHandle]:
    """Let every forward pass of ``model`` leave the taps' tensors, unpooled, in ``store``."""
    handles = []
    for tap in taps:
        module = model.get_submodule(tap.path)
        if tap.side == "in":
            handles.append(module.register_forward_pre_hook(_KeepWholeInput(tap, store), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(_KeepWholeOutput(tap, store)))
    return handles
