"""A model around its layer list, for stages that run its forward themselves; see ``replay.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
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
        pairs: list[tuple[nn.Module, nn.Module]] = []
        kept: list[Tensor] = []
        stood: dict[int, Tensor] = {}  # a tied parameter has one stand-in

        def stand_in(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else stood.setdefault(id(tensor), absent(tensor))

        def own(tensor: Tensor | None, path: str) -> Tensor | None:
            if tensor is None or first is None:
                return stand_in(tensor)
            parent, _, name = path.rpartition(".")
            return mark(first.get_submodule(parent)._buffers[name])  # on the device of the unit

        def hollow(module: nn.Module) -> nn.Module:
            made = copy.copy(module)
            made.__dict__.update(
                _parameters={name: stand_in(p) for name, p in module._parameters.items()},
                _buffers={name: stand_in(b) for name, b in module._buffers.items()},
                _modules={name: None if m is None else hollow(m) for name, m in module._modules.items()},
            )
            return made

        def visit(module: nn.Module, prefix: str) -> nn.Module:
            if "forward" in module.__dict__:
                raise ConfigError(
                    f"the forward of {type(module).__name__} was replaced on the object, and every stage runs a copy "
                    "of it; replace it in the class"
                )
            made = copy.copy(module)
            pairs.append((module, made))
            passing = module._non_persistent_buffers_set
            buffers = {
                name: own(b, prefix + name) if name not in passing else None if b is None else b.to(device, copy=True)
                for name, b in module._buffers.items()
            }
            kept.extend(b for name, b in buffers.items() if b is not None and name not in passing)
            children = {
                name: None if child is None else inner(child, prefix + name) for name, child in module._modules.items()
            }
            made.__dict__.update(
                {name: copy.copy(v) for name, v in vars(module).items() if type(v) in (list, dict, set)}
            )
            made.__dict__.update(_buffers=buffers, _modules=children)
            if first is None:
                made.__dict__["_parameters"] = {name: stand_in(p) for name, p in module._parameters.items()}
            return made

        def inner(child: nn.Module, path: str) -> nn.Module:
            if path not in self.unit:
                return visit(child, path + ".")
            stub = _Stub(path, child, child if self.unit[path] in units else hollow(child), call)
            pairs.append((child, stub))
            return stub

        return Twin(visit(self.root, ""), pairs, kept)


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
            if isinstance(made, nn.Module) and type(made) is not _Stub:
                for name, buffer in made._buffers.items():
                    if buffer is not None and id(buffer) not in kept and name not in made._non_persistent_buffers_set:
                        raise ConfigError(
                            f"the forward of {type(made).__name__} assigns its buffer {name}, and no state has the new "
                            "one; write into it before the layers (copy_), or hold it in a layer"
                        )


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
