"""How many bytes go between stages, as ``pk.profile`` has measured them."""

from __future__ import annotations

from collections.abc import Sequence

from pipekern.runtime.costs import LayerCosts
from pipekern.runtime.skips import Hop, sent_directly
from pipekern.schedule.comms import Edge
from pipekern.stage.skip import Save
from pipekern.stage.unit import Unit


def message_bytes(stages: Sequence[Sequence[Unit]], skips: Sequence[Hop], costs: LayerCosts) -> dict[Edge, float]:
    """Bytes of one micro-batch's message between two stages, the first of which comes first in the model.

    A gradient has those of the activation that it belongs to. What was measured rides along, so a skip that is sent
    directly is taken off the cuts that it does not cross: all but the one right behind where it is saved, if a stage
    ends there, since the value itself is then the same tensor.
    """
    units = [unit for stage in stages for unit in stage]
    saved = {u.train.name: size for u, size in zip(units, costs.saved, strict=False) if isinstance(u.train, Save)}
    found = {edge: sum(saved.get(name, 0.0) for name in names) for edge, names in sent_directly(skips).items()}
    end = 0
    for stage, own in enumerate(stages[:-1]):
        end += len(own)
        last = own[-1].train
        apart = [hop.name for hop in skips if hop.direct and hop.source <= stage < hop.target]
        less = sum(saved.get(name, 0.0) for name in apart if not (isinstance(last, Save) and last.name == name))
        found[stage, stage + 1] = max(0.0, costs.outputs[end - 1] - less)
    return found
