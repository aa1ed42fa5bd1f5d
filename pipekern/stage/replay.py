"""Stages of a model whose forward cannot be traced: every stage runs that forward itself.

The model's own code runs in every stage, on the batch, with all its branches. The units of earlier stages are not run
again: their calls return stand-ins of the right shapes, and the values that the first call of this stage takes come in
its message. At the first call of a later stage the forward ends. So what crosses a cut is the batch, the shapes of what
was made so far, and what the next call takes of it.
"""

from __future__ import annotations

import random
import sys
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
from pipekern.stage.late import Tracking, is_known, is_late, mark, refuse_hidden
from pipekern.stage.random import mix
from pipekern.stage.skeleton import Skeleton
from pipekern.transport.value import distinct, map_places, map_tensors, tensors

Run = Callable[[int, Any], Any]  # of a seed and (module, args, kwargs)


class Shape(NamedTuple):
    """Stands for a tensor in what is told of a value."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = False


class Crossing(NamedTuple):
    """What goes over a cut: the batch; the calls so far, each a path and the shapes of its result; and the next call's
    path, the late tensors among its arguments, and their places there.
    """

    batch: Any
    calls: list[tuple[str, Any]]
    following: str
    late: list[Tensor]
    places: list[int]


class Replay:
    """``count`` units of a model from ``first`` on, whose module is ``module``, as a function of what crosses the cut
    before them.

    The batch itself where ``first`` is 0. Returns what crosses the cut after them, or the model's output.
    """

    def __init__(self, skeleton: Skeleton, first: int, module: nn.Module, count: int, device: torch.device):
        self._skeleton, self._first, self._count = skeleton, first, count
        self._device = device
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        units = range(first, first + count)
        self._twin = skeleton.twin(units, self._call, self._absent, device, None if first else module)
        self._turn: _Turn | None = None

    def __call__(self, runs: Sequence[Run], keys: Sequence[int], value: Any) -> Any:
        """Run the forward on ``value``; unit i by ``runs[i]``, and its call n from a seed made of ``keys[i]`` and n."""
        given = Crossing(value, [], "", [], []) if self._first == 0 else value
        whole = self._first == 0 and self._count == len(self._skeleton.names)
        self._turn = turn = _Turn(given, runs, keys, None if whole else self._twin.kept)
        root = self._twin.follow()
        written = _versions(tensors(given.batch))
        positional, named = self._skeleton.arguments.spread(map_places(lambda tensor: tensor, given.batch))
        try:
            with turn:
                output = root(*positional, **named)
        except _Cut as cut:
            if _versions(tensors(given.batch)) != written:
                raise ConfigError(
                    f"the forward of {type(root).__name__} writes into its batch in place, and the next stage would do "
                    "so again; write to a copy"
                ) from None
            turn.refuse_written()
            self._twin.refuse_assigned()
            return Crossing(given.batch, turn.calls, *cut.following)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ConfigError(
                f"the forward of {type(root).__name__} looks into a value of an earlier stage ({error.func}); move "
                "that into a layer"
            ) from error
        finally:
            self._turn = None
        turn.refuse_written()
        self._twin.refuse_assigned()
        turn.refuse_strange(tensors(output))
        return self._whole(output)

    def _whole(self, output: Any) -> Any:
        """The model's output, which this stage must have made."""
        last = len(self._skeleton.names) - 1
        if self._first + self._count <= last:
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
        if unit >= self._count:
            if turn.awaits(path):  # no layer of this stage was called: what came goes on
                args, kwargs = turn.enter(path, args, kwargs)
            raise _Cut(path, *turn.late(args, kwargs))
        if unit < 0:
            raise ConfigError(
                f"the forward calls {path} after {turn.calls[-1][0]}, which is on a later stage; a cut needs modules "
                "registered in the order of their calls"
            )
        args, kwargs = turn.enter(path, args, kwargs)
        with turn.paused():
            output = turn.runs[unit](turn.key(unit), (module, args, kwargs))
            turn.calls.append((path, map_places(_shape, output)))
            # New tensors: what a layer hands back was not late before it, and what a hook took is not what it returned.
            return map_tensors(lambda tensor: mark(tensor.view_as(tensor)), output)

    def _fake(self, shape: Shape) -> Tensor:
        with self._fakes:
            fake = torch.empty(shape.shape, dtype=getattr(torch, shape.dtype), device=self._device)
            return fake.requires_grad_().clone() if shape.requires_grad else fake  # not a leaf: it may be written into

    def _absent(self, tensor: Tensor) -> Tensor:
        fake = self._fake(Shape(*_shape(tensor)[:2]))
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


class _Turn(Tracking):
    """One micro-batch in one stage's forward. ``calls`` are those made so far, here and in earlier stages.

    ``kept`` are the buffers of the model itself, None where one stage is all.
    """

    def __init__(self, given: Crossing, runs: Sequence[Run], keys: Sequence[int], kept: Sequence[Tensor] | None):
        strict = kept is not None and not any(tensor.requires_grad for tensor in tensors(given.batch))
        super().__init__(begun=not given.following, strict=strict)
        self.runs, self.calls = runs, list(given.calls)
        self._kept = kept or () if given.following else ()
        self._versions: list[int] = []
        self._random = _random_state() if given.following else None
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

    def awaits(self, path: str) -> bool:
        """Whether the call that the message is for is still to come, and is of ``path``."""
        return not self.begun and path == self._given.following

    def enter(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The arguments of a call of this stage, stand-ins replaced by what came."""
        if not self.begun:
            found = distinct(tensors((args, kwargs)))
            places = [place for place, tensor in enumerate(found) if isinstance(tensor, FakeTensor)]
            if not self.awaits(path) or places != self._given.places:
                raise ConfigError(f"the forward calls {path} otherwise than the stage before did: {_ALIKE}")
            self._refuse_drawn()
            self._versions = _versions(self._kept)
            pairs = [(found[place], mark(late)) for place, late in zip(places, self._given.late, strict=True)]
            self.known = {id(absent): (absent, late) for absent, late in pairs}
            self.begun = True
        args, kwargs = map_places(self.find, (args, kwargs))
        _refuse_absent(path, args, kwargs)
        return args, kwargs

    def refuse_written(self) -> None:
        """Raise ``ConfigError`` where a buffer that the first stage has was written here."""
        if self.begun and _versions(self._kept) != self._versions:
            raise ConfigError(
                "the model's own forward writes into a buffer of its own that the first stage has, after that stage; "
                "write before the layers, or hold the buffer in a layer"
            )

    def refuse_strange(self, output: Sequence[Tensor]) -> None:
        """As ``refuse_unknown``, also for what has no gradient: the model's own operations made all of an output."""
        self.refuse_unknown(output)
        plain = {id(tensor) for tensor in (*tensors(self._given.batch), *self._kept)}
        for tensor in output if self._strict else ():
            if not is_late(tensor) and not is_known(tensor) and id(tensor) not in plain:
                refuse_hidden(tensor)

    def _refuse_drawn(self) -> None:
        if self._random is not None and self._random != _random_state():
            raise ConfigError(
                "the model's own forward draws random numbers of Python or numpy that stages would draw apart; draw "
                "them in a layer"
            )

    def late(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[int]]:
        """The late tensors among the arguments of a later stage's call, and their places."""
        self._refuse_drawn()
        self.refuse_unknown(tensors((args, kwargs)))
        args, kwargs = map_places(self.find, (args, kwargs))
        _refuse_absent("the next layer", args, kwargs)
        found = distinct(tensors((args, kwargs)))
        places = [place for place, tensor in enumerate(found) if is_late(tensor)]
        return [found[place] for place in places], places

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

    def __init__(self, path: str, late: list[Tensor], places: list[int]):
        super().__init__(path)
        self.following = path, late, places


def _refuse_absent(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for tensor in tensors((args, kwargs)):
        if isinstance(tensor, FakeTensor):
            raise ConfigError(
                f"{path} takes a value of shape {list(tensor.shape)} that an earlier stage made and the first layer of "
                "this stage does not take; let every layer take it, or cut elsewhere"
            )


def _versions(given: Sequence[Tensor]) -> list[int]:
    return [tensor._version for tensor in given if not tensor.is_inference()]


def _random_state() -> Any:
    """Where the generators of Python and numpy are."""
    numpy = sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    return random.getstate(), None if state is None else (state[1].tobytes(), *state[2:])


def _shape(tensor: Tensor) -> Shape:
    return Shape(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad)
