"""Parameters that no forward of a step has used.

Their gradient is None, so that an optimizer leaves them as they are. Among replicas gradients are sums in one memory,
which is zeroed at first, and each process knows only what itself has written there.
"""

from __future__ import annotations

from collections import Counter

from pipekern.runtime.assembly import Assembly


def unused(parts: Assembly) -> list[str]:
    """Those of this process that no process has used which holds them; collective."""
    place = parts.blueprint.parameters
    own = {} if parts.store is None else {name: place[name] for name in parts.store.idle}
    told = Counter(index for pipeline in parts.star.everywhere(list(own.values())) for row in pipeline for index in row)
    ranks = {place[name]: len(tie.names) for tie in parts.blueprint.ties for name in tie.names.values()}
    return [name for name, index in own.items() if told[index] == ranks.get(index, 1) * parts.star.pipelines]
