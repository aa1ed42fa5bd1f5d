"""Which of a model's parameters lie together, where a ``Store`` has them."""

from __future__ import annotations

from collections.abc import Sequence

from pipekern.errors import ConfigError
from pipekern.optim.store import Dtypes, Layout, lay_out
from pipekern.parallel.mesh import Place
from pipekern.parallel.plan import Styles
from pipekern.plan.memory import FLOAT32, MIXED, size
from pipekern.runtime.options import Options
from pipekern.runtime.recomputation import limits
from pipekern.schedule.collectives import last_weights
from pipekern.schedule.ir import Schedule
from pipekern.stage.unit import Unit


def refuse_unheld(
    options: Options, order: Schedule, stages: Sequence[Sequence[Unit]], dtypes: Dtypes, sizes: Place, styles: Styles
) -> None:
    """Raise ``ConfigError`` for a rank whose weights, whole while a step runs, and gradients do not fit into memory.
    Of modules in ``styles`` it has one part.
    """
    for rank, room in enumerate(limits(options, order.ranks, "zero=3")):
        units = [unit for stage in order.stages_of(rank) for unit in stages[stage]]
        own = {id(p): (name, p) for unit in units for name, p in unit.named_parameters()}
        need = 0.0
        for name, p in own.values():
            kind = MIXED if name in dtypes else FLOAT32
            each = kind.over(sizes.dp, 3)
            parts = sizes.tp if name.rpartition(".")[0] in styles else 1
            need += p.numel() / parts * (each.weights + p.requires_grad * (each.gradients + each.optimizer))
        if need > room:
            raise ConfigError(
                f"zero=3: the schedule {order.name!r} has all stages of rank {rank} under way at once, whose weights "
                f"are whole meanwhile and take {size(need)} with gradients and shards, more than memory={size(room)}; "
                "use more pipeline ranks, or more memory"
            )


def layouts_of(
    order: Schedule, stages: Sequence[Sequence[Unit]], dtypes: Dtypes, bucket: int, together: bool
) -> dict[int, Layout]:
    """The layout of every stage. What several stages have lies where its rank's last weight work is."""
    named = {stage: [pair for unit in units for pair in unit.named_parameters()] for stage, units in enumerate(stages)}
    holders: dict[int, set[int]] = {}
    for stage, pairs in named.items():
        for _, p in pairs:
            holders.setdefault(id(p), set()).add(stage)
    layouts: dict[int, Layout] = {}
    shared = {key: found for key, found in holders.items() if len(found) > 1}
    for here in [range(order.stages)] if together else [order.stages_of(rank) for rank in range(order.ranks)]:
        ends = [stage for row in order.actions for stage in last_weights(row) if stage in here]
        home = {key: max(found & set(here), key=ends.index) for key, found in shared.items() if found & set(here)}
        layouts |= lay_out({stage: named[stage] for stage in here}, home, dtypes, bucket)
    return layouts
