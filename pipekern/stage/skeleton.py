"""A model around its layer list, for stages that run its forward themselves; see ``replay.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipekern.errors import ConfigError
from pipekern.stage.arguments import Arguments
from pipekern.stage.cache import takes_cache
from pipekern.stage.late import mark
from pipekern.stage.state import adopt, container, layer_list

Call = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Skeleton:
    """``unit[path]`` is the index of the unit that a module's calls belong to; ``names`` are those of the units.

    Called modules are the layers of the layer list, and the modules with state (or a cache, ``cache.py``) that are
    registered before them (unit "before") and after them (unit "after"). All else is the model's own code, which every
    stage runs.
    """

    root: nn.Module
    arguments: Arguments
    unit: dict[str, int]
    names: tuple[str, ...]

    @classmethod
    def of(cls, root: nn.Module, arguments: Arguments) -> Skeleton:
        """The skeleton of a module with a layer list. Raises ``ConfigError``."""
        path, layers = layer_list(root)
        called = list(_called(root, "", path, layers))
        first = called.index(layers[0])
        before, after = called[:first], called[first + len(layers) :]
        units = ([("before", before)] if before else []) + [(name, [name]) for name in layers]
        units += [("after", after)] if after else []
        unit = {path: index for index, (_, paths) in enumerate(units) for path in paths}
        return cls(root, arguments, unit, tuple(name for name, _ in units))

    def holders(self) -> list[nn.Module]:
        """A module a unit that holds its modules under their paths; the first has what the model itself holds, too."""
        holders = [nn.Module() for _ in self.names]
        for path, index in self.unit.items():
            parent, _, name = path.rpartition(".")
            container(holders[index], parent).add_module(name, self.root.get_submodule(path))
        held = {name for holder in holders for name in holder.state_dict()}
        adopt(self.root, holders[0], [name for name in self.root.state_dict() if name not in held])
        return holders

    def twin(
        self,
        units: Collection[int],
        call: Call,
        absent: Callable[[Tensor], Tensor],
        device: torch.device,
        first: nn.Module | None,
    ) -> Twin:
        """A copy of the model around its units, whose calls go to ``call``: path, module, arguments.

        Parameters and persistent buffers that the model itself holds are those of the ``first`` unit's module, and late
        (``late.py``); where this is None they are ``absent``, as are all those of modules of other units.
        """
        copies = _Copies(self.unit, units, call, absent, device, first)
        return Twin(copies.visit(self.root, ""), copies.pairs, copies.kept)


@dataclass(frozen=True)
class Twin:
    """A copy of a model's skeleton, with the modules that it was copied from.

    ``kept`` are the persistent buffers that the model itself holds, or their stand-ins.
    """

    root: nn.Module
    _pairs: list[tuple[nn.Module, nn.Module]]
    kept: list[Tensor]

    def follow(self) -> nn.Module:
        """The copy, in the mode (training or evaluation) of the model."""
        training = self._pairs[0][0].training
        for module, made in self._pairs:
            made.training = training and module.training
        return self.root

    def refuse_assigned(self) -> None:
        """Raise ``ConfigError`` where a forward has put another tensor in a kept buffer's place."""
        kept = {id(buffer) for buffer in self.kept}
        for _, made in self._pairs:
            if type(made) is not _Stub:
                for name, buffer in made._buffers.items():
                    if buffer is not None and id(buffer) not in kept and name not in made._non_persistent_buffers_set:
                        raise ConfigError(
                            f"the forward of {type(made).__name__} assigns its buffer {name}, and no state has the new "
                            "one; write into it before the layers (copy_), or hold it in a layer"
                        )


class _Copies:
    """Copies modules for :meth:`Skeleton.twin`, which says what the arguments are."""

    def __init__(
        self,
        unit: Mapping[str, int],
        units: Collection[int],
        call: Call,
        absent: Callable[[Tensor], Tensor],
        device: torch.device,
        first: nn.Module | None,
    ):
        self._unit, self._units, self._call = unit, units, call
        self._absent, self._device, self._first = absent, device, first
        self._stood: dict[int, Tensor] = {}  # a tied parameter has one stand-in
        self.pairs: list[tuple[nn.Module, nn.Module]] = []
        self.kept: list[Tensor] = []

    def visit(self, module: nn.Module, prefix: str) -> nn.Module:
        """A copy of a module of the skeleton, whose paths begin with ``prefix``."""
        if "forward" in module.__dict__:
            raise ConfigError(
                f"the forward of {type(module).__name__} was replaced on the object, and every stage runs a copy of "
                "it; replace it in the class"
            )
        made = copy.copy(module)
        self.pairs.append((module, made))
        made.__dict__.update({name: copy.copy(v) for name, v in vars(module).items() if type(v) in (list, dict, set)})
        made.__dict__.update(
            _buffers={name: self._buffer(module, name, prefix + name) for name in module._buffers},
            _modules={
                name: None if child is None else self._child(child, prefix + name)
                for name, child in module._modules.items()
            },
        )
        if self._first is None:
            made.__dict__["_parameters"] = {name: self._stand_in(p) for name, p in module._parameters.items()}
        return made

    def _child(self, child: nn.Module, path: str) -> nn.Module:
        if path not in self._unit:
            return self.visit(child, path + ".")
        stub = _Stub(path, child, child if self._unit[path] in self._units else self._hollow(child), self._call)
        self.pairs.append((child, stub))
        return stub

    def _buffer(self, module: nn.Module, name: str, path: str) -> Tensor | None:
        buffer = module._buffers[name]
        if buffer is None:
            return None
        if name in module._non_persistent_buffers_set:
            return buffer.to(self._device, copy=True)
        if self._first is None:
            own = self._stand_in(buffer)
        else:
            parent, _, leaf = path.rpartition(".")
            own = mark(self._first.get_submodule(parent)._buffers[leaf])  # on the device of the unit
        assert own is not None
        self.kept.append(own)
        return own

    def _hollow(self, module: nn.Module) -> nn.Module:
        """A module of another stage: its class, attributes and names, without data."""
        made = copy.copy(module)
        made.__dict__.update(
            _parameters={name: self._stand_in(p) for name, p in module._parameters.items()},
            _buffers={name: self._stand_in(b) for name, b in module._buffers.items()},
            _modules={name: None if m is None else self._hollow(m) for name, m in module._modules.items()},
        )
        return made

    def _stand_in(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self._stood.setdefault(id(tensor), self._absent(tensor))


class _Stub(nn.Module):
    """Stands where ``module`` stands in the model, and looks like ``seen``, which is it or hollow; ``call`` gets its
    calls.
    """

    def __init__(self, path: str, module: nn.Module, seen: nn.Module, call: Call):
        self.__dict__.update(_path=path, _module=module, _seen=seen, _call=call)
        super().__init__()
        self.__dict__.update(_parameters=seen._parameters, _buffers=seen._buffers, _modules=seen._modules)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._seen)  # for isinstance; type() tells the truth

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_seen"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._path, self._module, args, kwargs)


def _called(module: nn.Module, prefix: str, path: str, layers: Collection[str]) -> Iterator[str]:
    for name, child in module._modules.items():
        whole = prefix + name
        if child is None:
            continue
        if whole in layers:
            yield whole
        elif path == whole or path.startswith(whole + "."):
            yield from _called(child, whole + ".", path, layers)
        elif next(child.parameters(), None) is not None or child.state_dict() or any(map(takes_cache, child.modules())):
            yield whole
