"""What a model's units cost, as ``pk.profile`` measures it, and the file that it is kept in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipekern.errors import ConfigError
from pipekern.plan import toml
from pipekern.plan.cluster import Cluster
from pipekern.stage.unit import Unit

_SHOWN = 3  # units that differ
_TITLE = """\
# A profile of pipekern: each layer's costs for one micro-batch of `samples` samples on the first of `devices`.
# forward, backward (input gradient), weight (weight gradient), copy (of the output): microseconds. parameters: numbers.
# activations (from forward to backward), output, waiting (from there to the weight gradient), end (more, where a stage
# ends here), saved (of the output, for a later layer): bytes. selective, full: [bytes, microseconds more] where it is
# recomputed so.
# devices: flops are relative speeds; links between neighbours: latency in microseconds, bandwidth in bytes a second.
"""


@dataclass(frozen=True)
class DeviceTimes:
    """Microseconds a unit on another kind of device: the fields are those of :class:`LayerCosts`."""

    device: str
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]


@dataclass(frozen=True)
class LayerCosts:
    """Microseconds of one micro-batch a unit: ``forward``, ``backward``, and ``weight``, what can be put off of it.

    ``copy`` is what a copy of the unit's output takes; empty where it is not known.

    What ``recompute="auto"`` chooses by, empty where it was not measured: rows ``kept`` (bytes from a unit's forward to
    its backward) and ``added`` (microseconds more) with a value for each of ``"none"``, ``"selective"`` and ``"full"``;
    bytes that are ``waiting`` from there to put-off weight work; bytes of ``outputs`` that go to the next unit, of them
    those that a ``pk.Skip.save`` has ``saved``, and those that a stage keeps more where it ``ends`` with the unit.

    ``parameters`` counts a unit's numbers, ``samples`` those of the micro-batch. ``cluster`` has the devices asked for,
    the first of which the costs above are of, with relative speeds for ``flops``, and the links between neighbours;
    ``others`` has the times on each other kind among them.
    """

    names: tuple[str, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]
    copy: tuple[float, ...] = ()
    kept: tuple[tuple[float, ...], ...] = ()
    added: tuple[tuple[float, ...], ...] = ()
    waiting: tuple[float, ...] = ()
    outputs: tuple[float, ...] = ()
    ends: tuple[float, ...] = ()
    saved: tuple[float, ...] = ()
    parameters: tuple[int, ...] = ()
    samples: float = 1
    cluster: Cluster | None = None
    others: tuple[DeviceTimes, ...] = ()

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> LayerCosts:
        """From plain values: what ``dataclasses.asdict`` gives, with tuples as lists, as JSON has them."""
        plain = {name: _tuples(value) for name, value in row.items() if name not in ("cluster", "others")}
        others = tuple(DeviceTimes(**{k: _tuples(v) for k, v in other.items()}) for other in row["others"])
        cluster = None if row["cluster"] is None else Cluster.from_dict(row["cluster"])
        return cls(**plain, cluster=cluster, others=others)

    @classmethod
    def given(cls, costs: Sequence[float]) -> LayerCosts:
        """Costs that are known already, one number a unit in any unit of measure. Raises ``ConfigError``."""
        if not costs or min(costs) < 0:
            raise ConfigError(f"costs {list(costs)}: give one number of at least 0 a unit")
        nothing = (0.0,) * len(costs)
        return cls(tuple(map(str, range(len(costs)))), tuple(map(float, costs)), nothing, nothing)

    def total(self) -> list[float]:
        """Everything together, a unit."""
        return [sum(row) for row in zip(self.forward, self.backward, self.weight, strict=True)]

    def save(self, path: Path | str) -> None:
        """Write a TOML file with a line a unit, for :meth:`load` and for ``pipekern plan --model`` and ``--cluster``.

        Raises ``ConfigError`` for costs that were not measured by ``pk.profile``.
        """
        if self.cluster is None:
            raise ConfigError(
                "these costs were given, not measured: there is nothing to keep; save what pk.profile gives"
            )
        cluster = asdict(self.cluster)
        data = {
            "samples": self.samples,
            "layers": [self._row(index) for index in range(len(self.names))],
            "devices": cluster["devices"],
            "links": cluster["links"],
            "others": [asdict(other) for other in self.others],
        }
        Path(path).write_text(_TITLE + toml.dumps(data), encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> LayerCosts:
        """What :meth:`save` wrote. Raises ``ConfigError`` where the file is none of these."""
        data = toml.load(path)
        try:
            rows = data["layers"]
            values = {
                "names": [row["name"] for row in rows],
                **{what: [row[what] for row in rows] for what in ("forward", "backward", "weight", "copy")},
                "kept": [(row["activations"], row["selective"][0], row["full"][0]) for row in rows],
                "added": [(0.0, row["selective"][1], row["full"][1]) for row in rows],
                "waiting": [row["waiting"] for row in rows],
                "outputs": [row["output"] for row in rows],
                "ends": [row["end"] for row in rows],
                "saved": [row["saved"] for row in rows],
                "parameters": [row["parameters"] for row in rows],
                "samples": data["samples"],
                "cluster": {what: data[what] for what in ("devices", "links")},
                "others": data["others"],
            }
            return cls.read(values)
        except (KeyError, TypeError, IndexError) as error:
            raise ConfigError(
                f"{path} is no profile ({type(error).__name__}: {error}); give a file that the save of pk.profile's "
                "result wrote"
            ) from error

    def check(self, units: Sequence[Unit]) -> None:
        """Raises ``ConfigError`` where these are not the costs of ``units``, saying which differ."""
        if len(self.names) != len(units):
            raise ConfigError(
                f"split has costs of {len(self.names)} units, the model has {len(units)}: profile this model"
            )
        if not self.parameters:
            return
        rows = zip(self.names, self.parameters, units, strict=True)
        differing = [
            f"{name!r} of {count:,} parameters is {unit.name!r} of {numbers(unit):,} here"
            for name, count, unit in rows
            if (name, count) != (unit.name, numbers(unit))
        ]
        if differing:
            rest = [f"{len(differing) - _SHOWN} more"] * (len(differing) > _SHOWN)
            shown = "; ".join(differing[:_SHOWN] + rest)
            raise ConfigError(f"split is the profile of another model: {shown}; profile this model")

    def _row(self, index: int) -> dict[str, Any]:
        (none, selective, full), (_, partly, fully) = self.kept[index], self.added[index]
        return {
            "name": self.names[index],
            "forward": self.forward[index],
            "backward": self.backward[index],
            "weight": self.weight[index],
            "parameters": self.parameters[index],
            "activations": none,
            "output": self.outputs[index],
            "copy": self.copy[index],
            "waiting": self.waiting[index],
            "end": self.ends[index],
            "saved": self.saved[index],
            "selective": [selective, partly],
            "full": [full, fully],
        }


def numbers(unit: Unit) -> int:
    """How many the parameters of a unit have, a tied one counted once."""
    return sum(p.numel() for p in {id(p): p for _, p in unit.named_parameters()}.values())


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list | tuple) else value
