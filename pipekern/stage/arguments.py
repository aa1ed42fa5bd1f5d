"""The arguments of a model's forward: which of them a batch gives, and how it gives them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipekern.errors import ConfigError

_SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_COMPARED = (bool, int, float, str)


@dataclass(frozen=True)
class Arguments:
    """``given`` are the parameters that a batch fills; the others, ``optional``, keep their defaults.

    The first ``positional`` of ``given`` have no name for the caller. ``*args`` and ``**kwargs`` stay empty.
    """

    model: str
    given: tuple[str, ...]
    optional: dict[str, Any]
    positional: int = 0

    @classmethod
    def of(cls, root: nn.Module, inputs: Sequence[str] | None = None) -> Arguments:
        """Those of ``root``'s forward: ``inputs``, else the ones without a default, else the first.

        Raises ``ConfigError`` if ``inputs`` names what the forward does not have, or leaves out what it needs.
        """
        name = type(root).__name__
        parameters = [p for p in inspect.signature(root.forward).parameters.values() if p.kind not in _SEVERAL]
        needed = [p.name for p in parameters if p.default is p.empty]
        given = (needed or [p.name for p in parameters[:1]]) if inputs is None else list(inputs)
        unknown = [one for one in given if one not in [p.name for p in parameters]]
        missing = [one for one in needed if one not in given]
        if unknown or missing or len(set(given)) != len(given):
            raise ConfigError(
                f"inputs={given}; the forward of {name} has no {unknown} and needs {needed}: give the names of its "
                f"parameters that a batch fills, each once, out of {[p.name for p in parameters]}"
            )
        bare = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in given]
        given = bare + [one for one in given if one not in bare]
        return cls(name, tuple(given), {p.name: p.default for p in parameters if p.name not in given}, len(bare))

    @property
    def several(self) -> bool:
        """Whether a batch could be given by name."""
        return len(self.given) + len(self.optional) > 1

    def spread(self, value: Any) -> tuple[Sequence[Any], dict[str, Any]]:
        """A batch as the arguments of a call.

        A tuple fills several parameters in order, a dict whose keys are parameters fills them by name; anything else
        is the first. Raises ``ConfigError`` for an optional parameter that the model was cut without, other than by
        its default.
        """
        if isinstance(value, tuple) and len(self.given) > 1:
            return self.order(value)
        if (
            not self.several
            or not isinstance(value, dict)
            or not value
            or not value.keys() <= {*self.given, *self.optional}
        ):
            return [value], {}
        missing = [name for name in self.given if name not in value]
        fixed = [name for name in value if name in self.optional and not _same(value[name], self.optional[name])]
        if missing or fixed:
            wanted = [*self.given, *fixed]
            raise ConfigError(
                f"the batch gives {list(value)} by name, and {self.model} was cut for {list(self.given)}: give those, "
                f"or make the pipeline with inputs={wanted}"
            )
        return self.order([value[name] for name in self.given])

    def order(self, values: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """``values`` of all that is given as the arguments of a call."""
        if len(values) != len(self.given):
            raise ConfigError(
                f"the batch is a tuple of {len(values)}, and the forward of {self.model} takes "
                f"{', '.join(self.given)}: give one value for each of them"
            )
        named = zip(self.given[self.positional :], values[self.positional :], strict=True)
        return values[: self.positional], dict(named)


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and type(value) in _COMPARED and value == default)
