"""Cutting a network in two: which places everything behind them reads the image through, and the part behind one."""

from collections.abc import Callable, Iterator, Set
import copy
from dataclasses import dataclass
import inspect
from typing import Any

from torch import fx, nn
import torch.nn.functional as F

from rlp.errors import UserError
from rlp.models.taps import Tap

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WEIGHTED_FUNCTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Trace:
    """A network's forward pass as a graph.

    Attributes:
        model: the network that was traced: a copy, without our hooks.
        graph: its nodes, in order.
        outputs, inputs: by module path, the node that its last run gave or read first.
    """

    model: nn.Module
    graph: fx.Graph
    outputs: dict[str, fx.Node]
    inputs: dict[str, fx.Node]

    def node_at(self, tap: Tap) -> fx.Node:
        """The node whose value the tap sees."""
        node = (self.inputs if tap.side == "in" else self.outputs).get(tap.path)
        if node is None:
            raise UserError(f"tap '{tap.name}' is not seen when the model is traced; expected another place to cut at")
        return node

    def tap_at(self, node: fx.Node) -> Tap | None:
        """The outermost tap that sees the node's value, if one does."""
        for side, nodes in (("out", self.outputs), ("in", self.inputs)):
            paths = [path for path, found in nodes.items() if found is node]
            if paths:
                return Tap(min(paths, key=lambda path: path.count(".")), side)
        return None

    def tail(self, cut: fx.Node) -> list[fx.Node]:
        """Nodes that the output needs beside ``cut`` and what lies before it; in order, the output last."""
        needed, stack = set(), [self.output]
        while stack:
            node = stack.pop()
            if node is not cut and node not in needed:
                needed.add(node)
                stack += node.all_input_nodes
        return [node for node in self.graph.nodes if node in needed]

    @property
    def output(self) -> fx.Node:
        """What the network returns."""
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    def is_legal(self, cut: fx.Node) -> bool:
        """Whether everything behind ``cut`` reads the image through it alone."""
        return cut.op != "placeholder" and all(node.op != "placeholder" for node in self.tail(cut))

    def legal_taps(self) -> list[Tap]:
        """Where the network can be cut with a weighted module behind, shallowest first."""
        nodes = [node for node in self.graph.nodes if node.op not in ("output", "get_attr") and _image_in(node)]
        legal = [node for node in nodes if self.is_legal(node) and self.weighted(node)]
        return [tap for node in legal if (tap := self.tap_at(node)) is not None]

    def weighted(self, cut: fx.Node) -> int:
        """Linear layers and convolutions behind ``cut``."""
        return sum(self._weighted_in(node) for node in self.tail(cut))

    def _weighted_in(self, node: fx.Node) -> int:
        if node.op == "call_module":
            return sum(isinstance(part, WEIGHTED) for part in self.model.get_submodule(str(node.target)).modules())
        return int(node.op == "call_function" and node.target in _WEIGHTED_FUNCTIONS)


def _image_in(node: fx.Node) -> bool:
    """Whether the node's value depends on the image."""
    seen, stack = set(), [node]
    while stack:
        found = stack.pop()
        if found.op == "placeholder":
            return True
        if found not in seen:
            seen.add(found)
            stack += found.all_input_nodes
    return False


class _Tracer(fx.Tracer):
    """Notes where modules begin and end. ``opened``: the modules to look into, besides ``nn.Sequential``; None for all
    but PyTorch's own."""

    def __init__(self, opened: Set[str] | None) -> None:
        super().__init__()
        self.opened = opened
        self.outputs: dict[str, fx.Node] = {}
        self.inputs: dict[str, fx.Node] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, WEIGHTED):  # also where a library has a class of its own
            return True
        if self.opened is None:
            return super().is_leaf_module(m, module_qualified_name)
        return module_qualified_name not in self.opened and not isinstance(m, nn.Sequential)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        given = super().call_module(m, forward, args, kwargs)
        for nodes, value in ((self.inputs, (*args, *kwargs.values())), (self.outputs, (given,))):
            first = next((item for item in value if isinstance(item, fx.Proxy)), None)
            if first is not None:
                nodes[path] = first.node
        return given


def trace(model: nn.Module, taps: list[Tap], training: bool) -> Trace:
    """Trace a copy of ``model`` in train or eval mode, down to PyTorch's own modules where the model allows it.

    Where it does not (its forward pass asks for values), only the modules that hold a tap are looked into.

    Raises:
        UserError: the model cannot be copied, or torch.fx cannot follow its forward pass.
    """
    copied = without_hooks(_copy(model)).train(training)
    parents = {".".join(tap.path.split(".")[:count]) for tap in taps for count in range(1, tap.path.count(".") + 1)}
    parameters = inspect.signature(copied.forward).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
    failure: Exception | None = None
    for opened in (None, parents):
        tracer = _Tracer(opened)
        try:
            graph = tracer.trace(copied, concrete_args=defaults or None)
        except Exception as error:  # whatever the model's code raises when it is given no numbers
            failure = error
            continue
        return Trace(copied, graph, tracer.outputs, tracer.inputs)
    reason = (str(failure) or type(failure).__name__).splitlines()[0]
    raise UserError(
        f"the forward pass of {type(model).__name__} cannot be cut, for torch.fx cannot trace it ({reason}); expected "
        "one without branches on values, or heads of another kind"
    )


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a model's parts raise, such as a tensor kept from a forward pass
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{type(model).__name__} cannot be copied ({reason}); expected a network that copy.deepcopy takes, or "
            "heads of another kind"
        ) from error


def without_hooks(model: nn.Module) -> nn.Module:
    """The same module, our taps' hooks taken off it; others' stay."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if type(hook).__module__.startswith("rlp.models.")]:
                hooks.pop(key)
                for flags in (module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs):
                    flags.pop(key, None)
    return model


def depth_tap(model: nn.Module, depth: int) -> Tap:
    """The deepest place with at least ``depth`` linear layers and convolutions behind it where ``model`` can be cut.

    Depth 1 is the classifier's input. Inside a residual block there is no cut, so one lies before the block.

    Raises:
        UserError: there is no such place, or the model cannot be traced.
    """
    traced = trace(model, [], training=False)
    taps = traced.legal_taps()
    deepest = 0
    for tap in reversed(taps):
        deepest = max(deepest, traced.weighted(traced.node_at(tap)))
        if deepest >= depth >= 1:
            return tap
    raise UserError(f"tap 'depth:{depth}' is no place to cut the model at; expected a depth of 1 to {deepest}")


def tail_of(traced: Trace, tap: Tap) -> fx.GraphModule:
    """The part of a network behind a tap, as a module of its own that reads what the tap sees.

    Raises:
        UserError: something behind the tap reads the image past it.
    """
    cut = traced.node_at(tap)
    if not traced.is_legal(cut):
        raise UserError(_why_not(traced, tap, cut))
    graph = fx.Graph()
    env = {cut: graph.placeholder("x")}
    for node in traced.tail(cut):
        env[node] = graph.node_copy(node, lambda old: env[old])
    return fx.GraphModule(traced.model, graph)


def _why_not(traced: Trace, tap: Tap, cut: fx.Node) -> str:
    """The sentence that names who reads past the cut, and the nearest places to cut at."""
    behind = {cut}
    for node in traced.graph.nodes:
        if behind.intersection(node.all_input_nodes):
            behind.add(node)
    if traced.output not in behind:
        reason = "the model's output does not depend on it"
    else:
        readers = (
            (node, earlier)
            for node in traced.tail(cut)
            if node in behind
            for earlier in node.all_input_nodes
            if earlier not in behind and _image_in(earlier)
        )
        node, earlier = next(readers, (None, None))
        reason = f"'{node}' behind it also reads '{earlier}'" if node else "it is the image itself"
    return f"the model cannot be cut at tap '{tap.name}': {reason}; it can be at {', '.join(_nearest(traced, cut))}"


def _nearest(traced: Trace, cut: fx.Node) -> Iterator[str]:
    """The legal taps around a node, the two before it and the two behind."""
    order = {node: place for place, node in enumerate(traced.graph.nodes)}
    taps = [(order[traced.node_at(tap)], tap.name) for tap in traced.legal_taps()]
    before = [name for place, name in taps if place < order[cut]][-2:]
    after = [name for place, name in taps if place > order[cut]][:2]
    yield from [*before, *after] or ["no place at all"]
