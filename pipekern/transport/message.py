"""What may travel between stages, and how it is taken apart: a descriptor in JSON, and tensors.

A value is any nesting of tuples, lists, dicts with text keys, named tuples and dataclasses over tensors, None, bool,
int, float, str and ``torch.Size``. :func:`pack` splits it, :func:`unpack` puts it together again. A tensor that stands
in several places travels once, and arrives as one. Types are taken exactly, so that nothing changes its class on the
way without a word: an ``OrderedDict`` or a tensor subclass is refused.

No pickle: nothing that arrives can run code. A named tuple or dataclass travels as the name of its class and its
fields; the receiver makes one only of a class that its own program has imported already, and calls nothing of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from pipekern.errors import ConfigError, TransportError
from pipekern.transport import record
from pipekern.transport.value import PLAIN

# The order is part of the message format: a tensor's header holds its dtype's place in this list.
DTYPES: tuple[torch.dtype, ...] = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
DTYPE_CODE: dict[torch.dtype, int] = {dtype: code for code, dtype in enumerate(DTYPES)}


class TensorSpec(NamedTuple):
    """What a receiver must know of a tensor before its bytes: ``shape`` in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Packed(NamedTuple):
    """A value taken apart: ``tensors`` are detached, contiguous, on the CPU, and may share memory with the value."""

    descriptor: bytes
    tensors: list[Tensor]


def pack(value: Any, convert: Callable[[Tensor, str], Tensor] | None = None) -> Packed:
    """Take ``value`` apart; raises ``ConfigError`` naming the type and the place of what cannot travel.

    ``convert(tensor, place)`` is what is done to each tensor, :func:`plain` if not given.
    """
    found: dict[int, tuple[int, Tensor, str]] = {}
    tree = _encode(value, "the value", found)
    tensors = [(convert or plain)(tensor, place) for _, tensor, place in found.values()]
    rows = [[DTYPE_CODE[tensor.dtype], list(tensor.shape), tensor.requires_grad] for _, tensor, _ in found.values()]
    return Packed(json.dumps({"tensors": rows, "value": tree}, separators=(",", ":")).encode(), tensors)


def specs(descriptor: bytes) -> list[TensorSpec]:
    """The tensors that belong to ``descriptor``, in order; raises ``TransportError`` if it is damaged."""
    return _specs(_load(descriptor))


def unpack(descriptor: bytes, tensors: Sequence[Tensor]) -> Any:
    """The value again, over ``tensors``; those that required gradients become leaves that do.

    Raises ``TransportError`` if the tensors are not those that the descriptor names.
    """
    tree = _load(descriptor)
    wanted = [spec[:2] for spec in _specs(tree)]
    given = [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
    if wanted != given:
        raise TransportError(f"a message announces the tensors {wanted} and brings {given}")
    return _assemble(tree, tensors)


def assemble(descriptor: bytes, tensor_of: Callable[[TensorSpec], Tensor]) -> Any:
    """The value again, over what ``tensor_of`` returns for each of its tensors, in order; see :func:`unpack`."""
    tree = _load(descriptor)
    return _assemble(tree, [tensor_of(spec) for spec in _specs(tree)])


def _specs(tree: Any) -> list[TensorSpec]:
    return [TensorSpec(DTYPES[code], tuple(shape), grad) for code, shape, grad in tree["tensors"]]


def _assemble(tree: Any, tensors: Sequence[Tensor]) -> Any:
    for tensor, (_, _, grad) in zip(tensors, tree["tensors"], strict=True):
        if grad:
            tensor.requires_grad_()
    return _decode(tree["value"], tensors)


def plain(tensor: Tensor, place: str = "the value") -> Tensor:
    """``tensor`` detached, contiguous, in CPU memory, without lazy conjugation; raises ``ConfigError``."""
    check_plain(tensor, place)
    whole = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return whole if whole.data_ptr() or not whole.numel() else whole.clone()  # known to be zero, and without memory


def address(tensor: Tensor) -> int:
    """Where its data begins; 0 for one without memory of its own, as sparse ones and others that no message holds."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def check_plain(tensor: Tensor, place: str) -> None:
    """Refuse, with a ``ConfigError`` that names ``place``, a tensor that no message can hold."""
    kind = type(tensor)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        raise ConfigError(
            f"{place} is a tensor subclass, {kind.__module__}.{kind.__qualname__}; only plain tensors go between "
            "stages: convert it, for example with .as_subclass(torch.Tensor)"
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        raise ConfigError(
            f"{place} is a tensor of layout {tensor.layout}, dtype {tensor.dtype}, device {tensor.device}; only dense "
            "tensors with data go between stages: convert it, for example with .to_dense()"
        )
    if tensor.dtype not in DTYPE_CODE:
        raise ConfigError(f"{place} is a tensor of dtype {tensor.dtype}, which no message can hold: cast it")


def flat_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous ``tensor`` as uint8 of shape ``(nbytes,)``, sharing its memory."""
    return tensor.detach().view(-1).view(torch.uint8)


def refuse(item: Any, place: str = "a value between stages") -> NoReturn:
    """Raise the ``ConfigError`` for what is of no kind that can travel."""
    kind = type(item)
    raise ConfigError(
        f"{place} is a {kind.__module__}.{kind.__qualname__}; between stages go tensors, None, bool, int, float "
        "and str, in tuples, lists, dicts, named tuples and dataclasses: convert it at the end of the stage"
    )


# Both walks are functions of the module: a function within another that calls itself is a cycle, which would keep a
# message's tensors, and so its slot, until the garbage collector comes by.
def _encode(item: Any, place: str, found: dict[int, tuple[int, Tensor, str]]) -> Any:
    """The JSON of ``item``. Its tensors are added to ``found`` by identity: a number, the tensor, its first place."""
    kind = type(item)
    if isinstance(item, Tensor):
        return ["tensor", found.setdefault(id(item), (len(found), item, place))[0]]
    if kind is torch.Size:
        return ["size", list(item)]
    if kind in PLAIN:
        return item
    if kind in (tuple, list):
        return [kind.__name__, [_encode(part, f"{place}[{i}]", found) for i, part in enumerate(item)]]
    if kind is dict:
        parts = {_key(key, place): _encode(part, f"{place}[{key!r}]", found) for key, part in item.items()}
        return ["dict", parts]
    names = record.field_names(kind)
    if names is None:
        refuse(item, place)
    rows = zip(names, record.fields(item, names), strict=True)
    encoded = {name: _encode(part, f"{place}.{name}", found) for name, part in rows}
    return ["record", _class_name(kind, place), encoded]


def _decode(item: Any, tensors: Sequence[Tensor]) -> Any:
    """What :func:`_encode` has encoded."""
    if not isinstance(item, list):
        return item
    kind = item[0]
    if kind == "tensor":
        return tensors[item[1]]
    if kind == "dict":
        return {key: _decode(part, tensors) for key, part in item[1].items()}
    if kind == "size":
        return torch.Size(item[1])
    if kind == "record":
        found, names = _class_of(item[1], item[2])
        return record.make(found, names, [_decode(part, tensors) for part in item[2].values()])
    parts = [_decode(part, tensors) for part in item[1]]
    return tuple(parts) if kind == "tuple" else parts


def _class_name(kind: type, place: str) -> str:
    name = record.class_name(kind)
    if record.find_class(name) is not kind:
        raise ConfigError(
            f"{place} is a {name}, which no other rank could find under that name: define the class at the top level "
            "of a module, not in a function"
        )
    return name


def _class_of(name: str, parts: dict[str, Any]) -> tuple[type, tuple[str, ...]]:
    """This process's class ``name`` and its fields, which must be those that arrived."""
    kind = record.find_class(name)
    names = () if kind is None else record.field_names(kind) or ()
    if kind is None:
        raise TransportError(
            f"a message holds a {name}, a named tuple or dataclass that this rank does not know: import "
            f"{name.partition(':')[0]} on every rank before the first step"
        )
    if names != tuple(parts):
        raise TransportError(
            f"a message holds a {name} with the fields {list(parts)}, here it has {list(names)}: run the same code on "
            "every rank"
        )
    return kind, names


def _key(key: Any, place: str) -> str:
    if type(key) is not str:
        raise ConfigError(f"{place} is a dict with the key {key!r}; keys between stages are str: rename it")
    return key


def _load(descriptor: bytes) -> Any:
    try:
        return json.loads(descriptor)
    except ValueError as error:
        raise TransportError(f"a message's descriptor is damaged: {descriptor[:80]!r}") from error
