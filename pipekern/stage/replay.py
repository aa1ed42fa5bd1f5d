"""Stages of a model whose forward cannot be traced: every stage runs that forward itself.

The model's own code runs in every stage, on the batch, with all its branches. The units of earlier stages are not run
again: their calls return stand-ins of the right shapes, and the values that the first call of this stage takes come in
its message. At the first call of a later stage the forward ends. So what crosses a cut is the batch, the shapes of what
was made so far, and what the next call takes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import _get_current_function_mode

from pipekern.errors import ConfigError
from pipekern.stage.late import Tracking, is_late, mark
from pipekern.stage.random import mix
from pipekern.stage.skeleton import Skeleton
from pipekern.transport.value import distinct, map_places, tensors

Run = Callable[[int, Any], Any]  # of a seed and (module, args, kwargs)


class Shape(NamedTuple):
    """Stands for a tensor in what is told of a value."""

    shape: tuple[int, ...]
    dtype: str


class Crossing(NamedTuple):
    """What goes over a cut: the batch; the calls so far, each a path and the shapes of its result; and the next call's
    path and the late tensors among its arguments.
    """

    batch: Any
    calls: list[tuple[str, Any]]
    following: str
    late: list[Tensor]


class Replay:
    """Units ``first`` … of a model, one run each (``runs``), as a function of what crosses the cut before them.

    The batch itself where ``first`` is 0. Returns what crosses the cut after them, or the model's output.
    """

    def __init__(self, skeleton: Skeleton, first: int, runs: Sequence[Run], device: torch.device):
        self._skeleton, self._first, self._runs = skeleton, first, runs
        self._device = device
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        units = range(first, first + len(runs))
        self._twin = skeleton.twin(units, self._call, lambda t: self._fake(_shape(t)), device)
        self._turn: _Turn | None = None

    def __call__(self, keys: Sequence[int], value: Any) -> Any:
        """Run the forward on ``value``; call n of unit i starts from a seed made of ``keys[i]`` and n."""
        given = Crossing(value, [], "", []) if self._first == 0 else value
        self._turn = turn = _Turn(given, keys)
        root = self._twin.follow()
        positional, named = self._skeleton.arguments.spread(given.batch)
        try:
            with turn:
                output = root(*positional, **named)
        except _Cut as cut:
            return Crossing(given.batch, turn.calls, cut.path, cut.late)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ConfigError(
                f"the forward of {type(root).__name__} looks into a value of an earlier stage ({error.func}); move "
                "that into a layer"
            ) from error
        finally:
            self._turn = None
        return self._whole(output)

    def _whole(self, output: Any) -> Any:
        """The model's output, which this stage must have made."""
        last = len(self._skeleton.names) - 1
        if self._first + len(self._runs) <= last:
            raise ConfigError(
                f"the forward of {type(self._skeleton.root).__name__} ended without a call of "
                f"{self._skeleton.names[last]}; every layer must be called each time"
            )
        if any(isinstance(tensor, FakeTensor) for tensor in tensors(output)):
            raise ConfigError(
                f"the output of {type(self._skeleton.root).__name__} holds a value that an earlier stage made; ask the "
                "model for its last output alone (output_hidden_states=False), or hand the value on through the layers"
            )
        return output

    def _call(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that the model's forward makes of one of its units."""
        turn, unit = self._turn, self._skeleton.unit[path] - self._first
        if turn is None:
            raise ConfigError(f"{path} was called outside of the model's forward; a stage runs that alone")
        if turn.ahead:
            return map_places(self._fake, turn.made(path), Shape)
        if unit >= len(self._runs):
            raise _Cut(path, turn.late(args, kwargs))
        if unit < 0:
            raise ConfigError(
                f"the forward calls {path} after {turn.calls[-1][0]}, which is on a later stage; a cut needs modules "
                "registered in the order of their calls"
            )
        args, kwargs = turn.enter(path, args, kwargs)
        with turn.paused():
            output = self._runs[unit](turn.key(unit), (module, args, kwargs))
        turn.calls.append((path, map_places(_shape, output)))
        return map_places(mark, output)

    def _fake(self, shape: Shape) -> Tensor:
        with self._fakes:
            return torch.empty(shape.shape, dtype=getattr(torch, shape.dtype), device=self._device)


class _Turn(Tracking):
    """One micro-batch in one stage's forward. ``calls`` are those made so far, here and in earlier stages."""

    def __init__(self, given: Crossing, keys: Sequence[int]):
        super().__init__(begun=not given.following)
        self.calls = list(given.calls)
        self._given, self._keys = given, keys
        self._position = 0
        self._count = [0] * len(keys)

    @property
    def ahead(self) -> bool:
        """Whether the next call is one that an earlier stage has made."""
        return self._position < len(self._given.calls)

    def made(self, path: str) -> Any:
        """Shapes of the result of the next call of an earlier stage, which must be of ``path``."""
        wanted, result = self._given.calls[self._position]
        self._position += 1
        if path != wanted:
            raise ConfigError(f"the forward calls {path} here, and {wanted} on the stage before: {_ALIKE}")
        return result

    def enter(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The arguments of a call of this stage, stand-ins replaced by what came."""
        if not self.begun:
            absent = [tensor for tensor in distinct(tensors((args, kwargs))) if isinstance(tensor, FakeTensor)]
            if len(absent) != len(self._given.late) or self._given.following != path:
                raise ConfigError(f"the forward calls {path} otherwise than the stage before did: {_ALIKE}")
            self.known = {id(a): (a, b) for a, b in zip(absent, self._given.late, strict=True)}
            self.begun = True
        args, kwargs = map_places(self.find, (args, kwargs))
        _refuse_absent(path, args, kwargs)
        return args, kwargs

    def late(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The late tensors among the arguments of a later stage's call."""
        args, kwargs = map_places(self.find, (args, kwargs))
        _refuse_absent("the next layer", args, kwargs)
        return [tensor for tensor in distinct(tensors((args, kwargs))) if is_late(tensor)]

    def key(self, unit: int) -> int:
        """The seed of the next call of this unit."""
        self._count[unit] += 1
        return mix(self._keys[unit], self._count[unit])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within a unit nothing is followed."""
        if _get_current_function_mode() is not self:
            raise ConfigError("the model's own forward calls a layer within a mode (with torch.device); leave it out")
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()


_ALIKE = "it must go the same way on every stage, whatever values and random numbers are"


class _Cut(BaseException):
    """Ends a forward at the first call of a later stage; no ``except Exception`` of a model catches it."""

    def __init__(self, path: str, late: list[Tensor]):
        super().__init__(path)
        self.path, self.late = path, late


def _refuse_absent(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for tensor in tensors((args, kwargs)):
        if isinstance(tensor, FakeTensor):
            raise ConfigError(
                f"{path} takes a value of shape {list(tensor.shape)} that an earlier stage made and the first layer of "
                "this stage does not take; let every layer take it, or cut elsewhere"
            )


def _shape(tensor: Tensor) -> Shape:
    return Shape(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
