"""What two units must have in common to take the same time: module classes, settings, and shapes of all tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pipekern.stage.replay import Crossing
from pipekern.stage.unit import Unit
from pipekern.transport.value import PLAIN

_HELD = ("_parameters", "_buffers", "_modules")
_POSITION = ("layer_idx",)  # where transformers' layers keep their place, for the cache
_CONTAINERS = (nn.Module, nn.ModuleList, nn.Sequential)  # whose children's names say nothing


def form(unit: Unit, value: Any) -> Hashable:
    """Equal for units that do the same work on ``value``; what is not known to be alike is not equal."""
    look = _Look()
    around = (unit.skeleton, unit.arguments, unit.needed)
    return look.module(unit.train), look.value(value), tuple(map(look.value, around))


class _Itself:
    """Equal to itself alone, and alive, so that no other object gets its identity."""

    def __init__(self, value: object):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


class _Look:
    """Tensors are numbered by the memory they are in, so that shared memory is seen."""

    def __init__(self) -> None:
        self._memory: dict[int, int] = {}
        self._nodes: dict[fx.Node, int] = {}

    def value(self, value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) in PLAIN or isinstance(value, torch.dtype | torch.device):
            return type(value), value
        if isinstance(value, fx.Node):
            return self._nodes[value]
        if isinstance(value, Crossing):  # which calls were made so far is told apart by the units themselves
            value = (value.batch, value.late, value.places)
        if isinstance(value, Mapping):
            return type(value), tuple((self.value(key), self.value(part)) for key, part in value.items())
        if isinstance(value, tuple | list):
            return type(value), tuple(map(self.value, value))
        if isinstance(value, set | frozenset):
            return type(value), frozenset(map(self.value, value))
        if is_dataclass(value) and not isinstance(value, type):
            return type(value), tuple(self.value(getattr(value, field.name)) for field in fields(value))
        return _Itself(value)

    def module(self, module: nn.Module) -> Hashable:
        if isinstance(module, fx.GraphModule):
            return tuple(self._graph(module))
        names = type(module) not in _CONTAINERS
        settings = {k: v for k, v in vars(module).items() if k not in _HELD and k not in _POSITION}
        children = tuple((name if names else None, child) for name, child in module._modules.items())
        return (
            type(module),
            tuple((key, self.value(part)) for key, part in settings.items()),
            self.value(dict(module._parameters)),
            self.value(dict(module._buffers)),
            tuple((name, None if child is None else self.module(child)) for name, child in children),
        )

    def _graph(self, module: fx.GraphModule) -> Iterator[Hashable]:
        """By its calls, as its modules are nested under the names that they have in the model."""
        for place, node in enumerate(module.graph.nodes):
            self._nodes[node] = place
            target: Hashable = _Itself(node.target) if callable(node.target) else node.target
            if node.op == "call_module":
                target = self.module(module.get_submodule(str(node.target)))
            elif node.op == "get_attr":
                holder, _, name = str(node.target).rpartition(".")
                target = self.value(getattr(module.get_submodule(holder), name))
            yield node.op, target, self.value(node.args), self.value(node.kwargs)

    def _tensor(self, tensor: Tensor) -> Hashable:
        key = id(tensor) if tensor.is_meta else tensor.untyped_storage()._cdata
        place = self._memory.setdefault(key, len(self._memory))
        layout = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset()) if _strided(tensor) else tensor.layout
        return type(tensor), layout, tensor.dtype, tensor.device, tensor.requires_grad, place


def _strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided
