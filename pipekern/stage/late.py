"""Which tensors of a running forward depend on the model's units, and stand-ins for those that are on other ranks.

A tensor is **late** if a unit made it, if it is the model's own parameter, or if it was computed from a late one. What
is not late depends on the batch alone, and every stage computes it for itself: masks, positions. Within a stage a late
tensor of an earlier stage is a ``FakeTensor``, with shape, dtype and device but no data.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from pipekern.errors import ConfigError
from pipekern.transport.value import map_places, tensors

_MARK = "_pipekern_late"
_RANDOM = frozenset({
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli",
    "multinomial", "poisson", "bernoulli_", "uniform_", "normal_", "exponential_", "random_", "rrelu", "dropout",
    "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "gumbel_softmax",
})  # fmt: skip

_WRITES = frozenset({
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__",
    "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
})  # fmt: skip

T = TypeVar("T", Tensor, Tensor | None)


def mark(tensor: T) -> T:
    """The same tensor, late from now on."""
    if tensor is not None:
        setattr(tensor, _MARK, True)
    return tensor


def is_late(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor | nn.Parameter) or getattr(tensor, _MARK, False)


def is_known(tensor: Tensor) -> bool:
    """Whether an operation of the model's own made it."""
    return hasattr(tensor, _MARK)


def refuse_hidden(tensor: Tensor) -> NoReturn:
    """Raise the ``ConfigError`` for a tensor that is not from the model's own operations, nor a layer's result."""
    raise ConfigError(
        f"the model's own forward uses a value of shape {list(tensor.shape)} that left a layer by another way than its "
        "result (an attribute, a hook: output_hidden_states, output_attentions, output_router_logits), and only one "
        "stage has it; return it from the layer"
    )


class Tracking(TorchFunctionMode):
    """Follows late tensors through the operations of a model's own code.

    Until the stage has ``begun``, what runs has run on an earlier stage: a random number would be another one here, and
    is an error. With ``strict`` so is a tensor with a gradient that is not late: it left a layer by another way than
    its result.
    """

    def __init__(self, begun: bool, strict: bool):
        super().__init__()
        self.begun, self._strict = begun, strict
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # the stand-in is kept, so that no other gets its id

    def find(self, tensor: Tensor) -> Tensor:
        """What is known for a stand-in, else the tensor itself."""
        return self.known[id(tensor)][1] if id(tensor) in self.known else tensor

    def refuse_unknown(self, given: Iterable[Tensor]) -> None:
        """Raise ``ConfigError`` for what has a gradient and was not followed."""
        for tensor in given if self._strict else ():
            if tensor.requires_grad and not is_late(tensor):
                refuse_hidden(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors((args, kwargs))
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            args, kwargs = map_places(self.find, (args, kwargs))
            given = tensors((args, kwargs))
        name = getattr(func, "__name__", "")
        absent = any(isinstance(tensor, FakeTensor) for tensor in given)
        written = _written(name, args, kwargs or {})
        if absent and any(not isinstance(tensor, FakeTensor) for tensor in written):
            raise ConfigError(
                f"the model's own forward writes a value of a layer into a tensor by {name}, and on a later stage that "
                "value is not there; compute a new tensor"
            )
        if name != "__get__":
            self.refuse_unknown(given)
        if name in _RANDOM and not absent and not self.begun:
            raise ConfigError(
                f"the model's own forward draws random numbers ({name}) that stages would draw apart; draw them in a "
                "module with state, or on the layers"
            )
        out = func(*args, **(kwargs or {}))
        if any(map(is_late, given)):
            if name == "__iter__":
                rows = list(out)
                out = iter(rows)
                written += rows
            for tensor in tensors((out, written)):
                mark(tensor)
        else:
            for tensor in tensors(out):
                setattr(tensor, _MARK, False)
        return out


def _written(name: str, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes into."""
    in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    return tensors((args[0] if in_place and args else None, kwargs.get("out")))
