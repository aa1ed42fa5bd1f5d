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
from pipekern.stage.late import mark
from pipekern.stage.state import adopt, container, layer_list

Call = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Skeleton:
    """``unit[path]`` is the index of the unit that a module's calls belong to; ``names`` are those of the units.

    Called modules are the layers of the layer list, and the modules with state that are registered before them (unit
    "before") and after them (unit "after"). All else is the model's own code, which every stage runs.
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
        self, units: Collection[int], call: Call, absent: Callable[[Tensor], Tensor], device: torch.device
    ) -> Twin:
        """A copy of the model around its units, whose calls go to ``call``: path, module, arguments.

        Where the first unit is not among ``units``, parameters and persistent buffers that the model itself holds are
        ``absent``; where it is, they are late (``late.py``).
        """
        pairs: list[tuple[nn.Module, nn.Module]] = []

        def own(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or 0 in units else absent(tensor)

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
                name: own(mark(b)) if name not in passing else None if b is None else b.to(device)
                for name, b in module._buffers.items()
            }
            children = {
                name: None if child is None else inner(child, prefix + name) for name, child in module._modules.items()
            }
            parameters = {name: own(p) for name, p in module._parameters.items()}
            made.__dict__.update(_buffers=buffers, _modules=children)
            if 0 not in units:
                made.__dict__.update(_parameters=parameters)
            return made

        def inner(child: nn.Module, path: str) -> nn.Module:
            return _Stub(path, child, call) if path in self.unit else visit(child, path + ".")

        return Twin(visit(self.root, ""), pairs)


@dataclass(frozen=True)
class Twin:
    """A copy of a model's skeleton, with the modules that it was copied from."""

    root: nn.Module
    _pairs: list[tuple[nn.Module, nn.Module]]

    def follow(self) -> nn.Module:
        """The copy, in the mode (training or evaluation) of the model."""
        training = self._pairs[0][0].training
        for module, made in self._pairs:
            made.training = training and module.training
        return self.root


class _Stub(nn.Module):
    """Stands where a module stands in the model, and looks like it; ``call`` gets its calls."""

    def __init__(self, path: str, module: nn.Module, call: Call):
        super().__init__()
        self.__dict__.update(_path=path, _module=module, _call=call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

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
        elif next(child.parameters(), None) is not None or child.state_dict():
            yield whole
