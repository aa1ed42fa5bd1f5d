"""Cutting a module whose forward runs a layer list with something before and after it.

The forward is traced once with torch.fx, with every submodule outside the path to the layer list as one node. The
trace is then cut before each layer. Whatever is computed before a cut and used after it travels over it, so masks and
skip connections work. The code of the module's own forward runs as it was traced: it may not branch on tensor values,
and what it reads of ``self`` is read once, here; ``self.training`` alone is followed, by tracing both modes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

from pipekern.errors import ConfigError
from pipekern.stage.arguments import Arguments
from pipekern.stage.state import adopt, layer_list, state


class UntraceableError(ConfigError):
    """The forward does what a trace cannot follow."""


class Piece(NamedTuple):
    """One unit of the cut: its name, and its traces in training and in evaluation (one object where they are equal)."""

    name: str
    train: fx.GraphModule
    evaluate: fx.GraphModule


def cut_graph(root: nn.Module, arguments: Arguments | None = None) -> list[Piece]:
    """The units of ``root``: what is before the layers, each layer, what is after them. Raises ``ConfigError``.

    The first takes what ``arguments`` say is given (if None: what the forward needs), under those names.
    """
    path, layers = layer_list(root)
    arguments = arguments or Arguments.of(root)
    before = {module: dict(vars(module)) for module in root.modules()}  # modes, and what a forward counts
    try:
        train = _pieces(root.train(), path, layers, arguments)
        evaluate = _pieces(root.eval(), path, layers, arguments)
    finally:
        for module, attributes in before.items():
            vars(module).update(attributes)
    if [name for name, _ in train] != [name for name, _ in evaluate]:
        raise ConfigError(
            f"{type(root).__name__} runs other layers in training than in evaluation; the split must be the same in "
            "both"
        )
    pieces = [Piece(name, a, a if a.code == b.code else b) for (name, a), (_, b) in zip(train, evaluate, strict=True)]
    _give_homes(root, pieces)
    return pieces


def _give_homes(root: nn.Module, pieces: Sequence[Piece]) -> None:
    """Let every name of a parameter or buffer be in a training trace, so that none is missing in the model's state.

    A further name of a tensor goes where the tensor is, what only evaluation uses to the piece that does, and what no
    forward uses to the first one.
    """
    place: dict[int, Piece] = {}
    for piece in pieces:
        own = state(piece.train)
        adopt(root, piece.train, [name for name in state(piece.evaluate) if name not in own])
        for tensor in state(piece.train).values():
            place.setdefault(id(tensor), piece)
    known = {name for piece in pieces for name in state(piece.train)}
    for name, tensor in state(root).items():
        if name not in known:
            adopt(root, place.get(id(tensor), pieces[0]).train, [name])


class _Tracer(fx.Tracer):
    """Every submodule is a leaf but those that hold the layer list. What is not given keeps its default."""

    proxy_buffer_attributes = True  # so that a causal mask can be sliced by the sequence's length

    def __init__(self, path: str, arguments: Arguments):
        super().__init__()
        self._path = path
        self._arguments = arguments

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: object = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The forward as a function of what is given alone."""

        def forward(root: nn.Module, *values: fx.Proxy) -> Any:
            positional, named = self._arguments.order(values)
            output = root_fn(root, *positional, **named)
            if isinstance(output, dict) and type(output) is not dict:
                raise TypeError(f"it returns a {type(output).__name__}, which a trace would make a dict")
            return output

        inputs = [self.create_proxy("placeholder", name, (), {}) for name in self._arguments.given]
        return forward, [self.root, *inputs]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not (self._path == module_qualified_name or self._path.startswith(module_qualified_name + "."))


def _pieces(
    root: nn.Module, path: str, layers: Sequence[str], arguments: Arguments
) -> list[tuple[str, fx.GraphModule]]:
    graph = _trace(root, path, arguments)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    calls = [i for i, node in enumerate(nodes) if node.op == "call_module" and node.target in layers]
    if not calls:
        raise ConfigError(f"the forward of {type(root).__name__} does not call the layers of self.{path} one by one")
    starts = [*calls, calls[-1] + 1]
    names = [str(nodes[i].target) for i in calls] + ["after"]
    if calls[0] > 0:
        starts, names = [0, *starts], ["before", *names]
    if starts[-1] == len(nodes):
        starts, names = starts[:-1], names[:-1]
    segments = [nodes[a:b] for a, b in zip(starts, [*starts[1:], len(nodes)], strict=True)]
    return list(zip(names, _split(root, graph, segments), strict=True))


def _trace(root: nn.Module, path: str, arguments: Arguments) -> fx.Graph:
    try:
        graph = _Tracer(path, arguments).trace(root)
    except Exception as error:
        raise UntraceableError(
            f"the forward of {type(root).__name__} cannot be traced around self.{path}: {error}. Keep branches on "
            "tensor values inside the layers, or give an nn.Sequential or a list of pk.LayerSpec"
        ) from error
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(node.target, str) and node.target.startswith("_tensor_constant"):
            raise UntraceableError(
                f"the forward of {type(root).__name__} makes a tensor from Python values ({node.target}), which a "
                "trace would freeze; register it as a buffer"
            )
    return graph


def _split(root: nn.Module, graph: fx.Graph, segments: Sequence[Sequence[fx.Node]]) -> list[fx.GraphModule]:
    """One GraphModule a segment. Neighbours agree on the values that cross a cut: those made before and used after
    it.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    where = {node: i for i, segment in enumerate(segments) for node in segment}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    where.update(dict.fromkeys(inputs, 0))
    output = next(node for node in graph.nodes if node.op == "output")
    last_use: dict[fx.Node, int] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if source.op != "get_attr":
                last_use[source] = max(last_use.get(source, 0), where.get(node, len(segments) - 1))
    cuts = [
        sorted((node for node, use in last_use.items() if where[node] < i <= use), key=order.__getitem__)
        for i in range(1, len(segments))
    ]
    return [
        _module(root, segment, inputs if i == 0 else cuts[i - 1], i == 0, cuts[i] if i < len(cuts) else None, output)
        for i, segment in enumerate(segments)
    ]


def _module(
    root: nn.Module,
    segment: Sequence[fx.Node],
    entering: Sequence[fx.Node],
    first: bool,
    leaving: Sequence[fx.Node] | None,
    output: fx.Node,
) -> fx.GraphModule:
    """The segment as a module: takes what enters as one value (the first: the forward's own arguments)."""
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    if first:
        known = {node: graph.node_copy(node) for node in entering}
    elif len(entering) == 1:
        known = {entering[0]: graph.placeholder("value")}
    else:
        value = graph.placeholder("value")
        known = {node: graph.call_function(operator.getitem, (value, i)) for i, node in enumerate(entering)}

    def find(node: fx.Node) -> fx.Node:
        if node.op == "get_attr" and node not in known:
            known[node] = graph.node_copy(node)
        return known[node]

    for node in segment:
        known[node] = graph.node_copy(node, find)
    if leaving is None:
        graph.output(fx.node.map_arg(output.args[0], find))
    else:
        graph.output(find(leaving[0]) if len(leaving) == 1 else tuple(find(node) for node in leaving))
    graph.lint()
    return fx.GraphModule(root, graph)
