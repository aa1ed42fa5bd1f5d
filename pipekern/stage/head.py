"""The product that a model ends in, left to the loss, which makes it chunk by chunk: no logits of all tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx, nn

from pipekern.errors import ConfigError
from pipekern.stage.unit import Unit, hooked


class Head(NamedTuple):
    """The last layer ``linear``, its ``name`` in the unit, and the unit's code without it, as in :class:`Unit`."""

    linear: nn.Linear
    name: str
    train: nn.Module
    evaluate: nn.Module


def find_head(unit: Unit) -> Head:
    """The ``nn.Linear`` that ``unit``, a model's last, ends in. Raises ``ConfigError`` where there is none.

    The unit is that layer, or a trace that returns its result, perhaps with leading dimensions flattened into one.
    """
    if not isinstance(unit.train, fx.GraphModule):
        return Head(_checked(unit.train, unit.name), unit.name, nn.Identity(), nn.Identity())
    name, train = _without(unit.train)
    if unit.evaluate is unit.train:
        return Head(_checked(unit.train.get_submodule(name), name), name, train, train)
    other, evaluate = _without(unit.evaluate)
    if other != name:
        raise ConfigError(f"the model ends in {name} in training, and in {other} in evaluation")
    return Head(_checked(unit.train.get_submodule(name), name), name, train, evaluate)


def _checked(module: nn.Module, name: str) -> nn.Linear:
    """``module`` as a linear layer whose product nobody watches or changes."""
    kind = type(module)
    if not isinstance(module, nn.Linear) or nn.Linear not in (kind, getattr(kind, "stands_for", None)):
        raise ConfigError(f"the last layer, {name}, is a {kind.__name__}, and no plain nn.Linear")
    if hooked(module) or "forward" in vars(module) or module._compiled_call_impl is not None:
        raise ConfigError(f"the last layer, {name}, has hooks, or a forward of its own, or is compiled")
    return module


def _without(module: Any) -> tuple[str, fx.GraphModule]:
    """The name of the module whose result the trace returns, and the trace with that module's input in its place."""
    node = _returned(module.graph)
    while isinstance(node, fx.Node) and len(node.users) == 1 and _flattens(node):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1 or len(node.args) != 1:
        raise ConfigError("the model does not return what a layer returns")
    graph, copies = fx.Graph(), dict[fx.Node, Any]()
    graph.output(graph.graph_copy(module.graph, copies))
    copies[node].replace_all_uses_with(copies[node].args[0])
    graph.erase_node(copies[node])
    graph.lint()
    return str(node.target), fx.GraphModule(module, graph)


def _returned(graph: fx.Graph) -> Any:
    (output,) = graph.find_nodes(op="output")
    return output.args[0]


def _flattens(node: fx.Node) -> bool:
    """Whether it makes leading dimensions one: 0 and 1, or all but the last."""
    if (node.op, node.target) not in (("call_method", "flatten"), ("call_function", torch.flatten)):
        return False
    start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
    end = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
    return (start, end) in ((0, 1), (0, -2))
