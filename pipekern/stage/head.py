"""The product that a model ends in, left to the loss, which makes it chunk by chunk: no logits of all tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx, nn

from pipekern.errors import ConfigError
from pipekern.stage.unit import Unit, hooked


class Head(NamedTuple):
    """The last layer ``linear``, its ``name`` in the unit, and the unit's code without it, as in :class:`Unit`.

    ``transposed``: what that code returns is [N, H, d], as the unit's own result is [N, C, d].
    """

    linear: nn.Linear
    name: str
    train: nn.Module
    evaluate: nn.Module
    transposed: bool = False


def find_head(unit: Unit) -> Head:
    """The ``nn.Linear`` that ``unit``, a model's last, ends in. Raises ``ConfigError`` where there is none.

    The unit is that layer, or a trace that returns its result, perhaps with leading dimensions flattened into one, or
    with the classes as second dimension of three, where torch's losses want them.
    """
    if unit.skeleton is not None:
        raise ConfigError("the model's forward could not be traced, so what its last layer returns may be used further")
    if not isinstance(unit.train, fx.GraphModule):
        return Head(_checked(unit.train, unit.name), unit.name, nn.Identity(), nn.Identity())
    one, other = _without(unit.train), _without(unit.evaluate)
    if (one.name, one.transposed) != (other.name, other.transposed):
        raise ConfigError(f"the model ends in {one.name} in training, and otherwise in evaluation")
    linear = _checked(unit.train.get_submodule(one.name), one.name)
    return Head(linear, one.name, one.trace, other.trace, one.transposed)


def _checked(module: nn.Module, name: str) -> nn.Linear:
    """``module`` as a linear layer whose product nobody watches or changes."""
    kind = type(module)
    if not isinstance(module, nn.Linear) or nn.Linear not in (kind, getattr(kind, "stands_for", None)):
        raise ConfigError(f"the last layer, {name}, is a {kind.__name__}, and no plain nn.Linear")
    if hooked(module) or "forward" in vars(module) or module._compiled_call_impl is not None:
        raise ConfigError(f"the last layer, {name}, has hooks, or a forward of its own, or is compiled")
    return module


class _Rest(NamedTuple):
    """A trace without the module ``name``, whose input is in its place."""

    name: str
    transposed: bool
    trace: fx.GraphModule


def _without(module: Any) -> _Rest:
    """The trace ``module`` without the module whose result it returns."""
    (output,) = module.graph.find_nodes(op="output")
    node, transposed = output.args[0], False
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if _is_call(node, "transpose", torch.transpose) and set(node.args[1:]) == {1, 2} and not transposed:
            transposed = True
        elif transposed or not _flattens(node):
            break
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1 or len(node.args) != 1:
        raise ConfigError("the model does not return what a layer returns")
    graph, copies = fx.Graph(), dict[fx.Node, Any]()
    graph.output(graph.graph_copy(module.graph, copies))
    copies[node].replace_all_uses_with(copies[node].args[0])
    graph.erase_node(copies[node])
    graph.lint()
    return _Rest(str(node.target), transposed, fx.GraphModule(module, graph))


def _is_call(node: fx.Node, method: str, function: Any) -> bool:
    return (node.op, node.target) in (("call_method", method), ("call_function", function))


def _flattens(node: fx.Node) -> bool:
    """Whether it makes leading dimensions one: 0 and 1, or all but the last."""
    start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
    end = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
    return _is_call(node, "flatten", torch.flatten) and (start, end) in ((0, 1), (0, -2))
