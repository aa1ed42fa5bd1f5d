"""What layers cost: measured on a device, or estimated from their floating-point operations and bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from pipekern.errors import ConfigError
from pipekern.plan.cluster import Device

_PROFILED = frozenset({"copy", "waiting", "end", "saved", "selective", "full"})  # in a profile, and no matter here


@dataclass(frozen=True)
class Layer:
    """One layer on one micro-batch.

    ``forward``, ``backward`` (input gradient) and ``weight`` (weight gradient) are microseconds on the cluster's first
    device. ``activations`` are the bytes that it keeps from its forward to its weight gradient, its output among them
    and its input not; ``output`` those that it hands to the next layer. ``parameters`` counts numbers, not bytes.
    """

    name: str
    forward: float
    backward: float
    weight: float
    parameters: float = 0
    activations: float = 0
    output: float = 0

    def __post_init__(self) -> None:
        _check(self, self.name)


class Model(Protocol):
    """Layers as a function of the size of a micro-batch."""

    def layers(self, samples: float, device: Device) -> list[Layer]:
        """The layers on a micro-batch of ``samples`` on ``device``."""


@dataclass(frozen=True)
class Measured:
    """Layers measured on micro-batches of ``samples``: times and bytes of another size are taken in proportion."""

    rows: Sequence[Layer]
    samples: float = 1

    def layers(self, samples: float, device: Device) -> list[Layer]:
        """See :class:`Model`."""
        if not (self.samples > 0 and math.isfinite(self.samples)):
            raise ConfigError(f"samples={self.samples}: say how many samples the measured micro-batch had")
        ratio = samples / self.samples
        return [
            Layer(
                row.name,
                row.forward * ratio,
                row.backward * ratio,
                row.weight * ratio,
                row.parameters,
                row.activations * ratio,
                row.output * ratio,
            )
            for row in self.rows
        ]


class LayerTimes(Protocol):
    """What ``pipekern.runtime.profile.LayerCosts`` has: microseconds a layer, as in :class:`Layer`."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def forward(self) -> Sequence[float]: ...
    @property
    def backward(self) -> Sequence[float]: ...
    @property
    def weight(self) -> Sequence[float]: ...


def measured(
    times: LayerTimes,
    *,
    samples: float = 1,
    parameters: Sequence[float] | None = None,
    activations: Sequence[float] | None = None,
    outputs: Sequence[float] | None = None,
) -> Measured:
    """The model of measured times; bytes as in :class:`Layer`.

    Raises ``ConfigError`` for lists of different lengths and for values that are negative or not finite.
    """
    count = len(times.names)
    zero = [0.0] * count
    lists = {
        "forward": times.forward,
        "backward": times.backward,
        "weight": times.weight,
        "parameters": parameters or zero,
        "activations": activations or zero,
        "outputs": outputs or zero,
    }
    for name, values in lists.items():
        if len(values) != count:
            raise ConfigError(f"{name} has {len(values)} values; there are {count} layers: give one each")
    return Measured([Layer(*row) for row in zip(times.names, *lists.values(), strict=True)], samples)


@dataclass(frozen=True)
class Work:
    """What a layer's forward does for one sample: ``flops`` operations, and ``moved`` bytes besides its weights.

    ``parameters``, ``activations`` and ``output`` as in :class:`Layer`, of one sample.
    """

    name: str
    flops: float
    moved: float = 0
    parameters: float = 0
    activations: float = 0
    output: float = 0

    def __post_init__(self) -> None:
        _check(self, self.name)


@dataclass(frozen=True)
class Estimated:
    """Layers by the roofline: a forward takes as long as its operations or its bytes, whichever takes longer.

    Each of the two gradients of a layer with parameters is as much work as its forward; without parameters there is no
    weight gradient. ``width`` is the bytes of a weight as it is read.
    """

    rows: Sequence[Work]
    width: float = 2

    def layers(self, samples: float, device: Device) -> list[Layer]:
        """See :class:`Model`."""
        return [self._layer(row, samples, device) for row in self.rows]

    def _layer(self, row: Work, samples: float, device: Device) -> Layer:
        moved = row.moved * samples + row.parameters * self.width
        time = 1e6 * max(row.flops * samples / device.flops, moved / device.bandwidth)
        weight = time if row.parameters else 0.0
        return Layer(row.name, time, time, weight, row.parameters, row.activations * samples, row.output * samples)


def transformer(
    *, layers: int, dim: int, heads: int, vocab: int, sequence: int, hidden: int | None = None, width: int = 2
) -> Estimated:
    """A decoder-only transformer: an embedding, ``layers`` blocks, and the last norm with the output layer.

    Operations a token: 2 for each weight of a matrix, and 4 · sequence · dim for attention, which a causal mask
    halves. Kept a token, in numbers of ``width`` bytes: 8 · dim + 2 · hidden in a block (inputs of its matrices, norms
    and activation function; attention keeps no scores). ``hidden`` defaults to 4 · dim. Raises ``ConfigError`` for a
    size below 1 or heads that do not divide ``dim``.
    """
    sizes = {"layers": layers, "dim": dim, "heads": heads, "vocab": vocab, "sequence": sequence}
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name}={value}: a transformer needs at least 1")
    if dim % heads:
        raise ConfigError(f"heads={heads} do not divide dim={dim}; nearest heads={math.gcd(dim, heads)}")
    hidden = 4 * dim if hidden is None else hidden
    token = dim * width
    matrices = 4 * dim * dim + 2 * dim * hidden
    block = Work(
        "block",
        flops=sequence * (2 * matrices + 2 * sequence * dim),
        moved=sequence * (16 * token + 4 * hidden * width),
        parameters=matrices + 4 * dim,
        activations=sequence * (8 * token + 2 * hidden * width),
        output=sequence * token,
    )
    blocks = [Work(f"block {i}", **{f.name: getattr(block, f.name) for f in fields(block)[1:]}) for i in range(layers)]
    embedding = Work(
        "embedding", 0, sequence * 2 * token, vocab * dim, activations=sequence * token, output=sequence * token
    )
    scores = sequence * vocab * 4  # the loss is taken in float32
    head = Work("head", 2 * sequence * vocab * dim, sequence * token + 3 * scores, vocab * dim, scores, sequence * 4)
    return Estimated([embedding, *blocks, head], width)


def read(data: Mapping[str, Any]) -> Measured | Estimated:
    """A model from plain values, in one of four forms; raises ``ConfigError``.

    ``{"transformer": {layers, dim, heads, vocab, sequence}}``; ``{"layers": [...]}`` with the fields of :class:`Work`
    and ``width``, or with those of :class:`Layer` and the ``samples`` they were measured on, as in the file that
    ``LayerCosts.save`` writes; or the lists ``names``, ``forward``, ``backward`` and ``weight`` that
    ``pipekern.profile`` gives, with ``samples``, ``parameters``, ``activations`` and ``outputs``.
    """
    try:
        if "transformer" in data:
            return transformer(**data["transformer"])
        if "layers" not in data:
            times = _Times(data["names"], data["forward"], data["backward"], data["weight"])
            known = ("samples", "parameters", "activations", "outputs")
            return measured(times, **{name: data[name] for name in known if name in data})
        if all("flops" in row for row in data["layers"]):
            return Estimated([Work(**row) for row in data["layers"]], data.get("width", 2))
        rows = [{name: value for name, value in row.items() if name not in _PROFILED} for row in data["layers"]]
        return Measured([Layer(**row) for row in rows], data.get("samples", 1))
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"the model cannot be read ({type(error).__name__}: {error}); it needs 'transformer', 'layers', or 'names' "
            "with 'forward', 'backward' and 'weight'"
        ) from error


@dataclass(frozen=True)
class _Times:
    names: Sequence[str]
    forward: Sequence[float]
    backward: Sequence[float]
    weight: Sequence[float]


def _check(row: Layer | Work, name: str) -> None:
    for field in fields(row)[1:]:
        value = getattr(row, field.name)
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(
                f"layer {name!r}: {field.name}={value} is not a finite number of at least 0; measure or estimate it"
            )
