"""What ``fuse`` did to a model, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from pipekern.errors import ConfigError


@dataclass(frozen=True)
class Replaced:
    """The module ``name`` of class ``was`` runs ``op`` now."""

    name: str
    was: str
    op: str


@dataclass(frozen=True)
class Left:
    """The module ``name`` of class ``was`` has the shape of what is replaced, and was left: ``why``."""

    name: str
    was: str
    why: str


@dataclass
class Fused:
    """What was replaced and what was left."""

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    _changed: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = field(default_factory=list, repr=False)

    def become(self, name: str, module: nn.Module, op: str, kind: type[nn.Module]) -> None:
        """Make ``module`` a ``kind``, until :meth:`undo`."""
        self.replaced.append(Replaced(name, type(module).__name__, op))
        self._changed.append((module, type(module), kind))
        module.__class__ = kind

    def leave(self, name: str, module: nn.Module, why: str) -> None:
        """Write down that ``module`` stays as it is."""
        self.left.append(Left(name, type(module).__name__, why))

    def undo(self) -> None:
        """Give every module its class back: the model is what it was, with the parameters that it has now.

        Raises ``ConfigError``, before anything is changed, where a module has become something else since.
        """
        other = [type(module).__name__ for module, _, kind in self._changed if type(module) is not kind]
        if other:
            raise ConfigError(
                f"{', '.join(other)}: not what fuse made of it; undo first what was done since (a parametrisation, say)"
            )
        for module, was, _ in self._changed:
            module.__class__ = was
        self._changed.clear()

    def __str__(self) -> str:
        lines = [f"{row.name or 'the model'}: {row.was} → {row.op}" for row in self.replaced]
        lines += [f"{row.name or 'the model'}: {row.was} left: {row.why}" for row in self.left]
        return "\n".join(lines) or "nothing to replace"
