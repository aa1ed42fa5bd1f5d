"""The bytes of messages that measured costs predict, beside those of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipekern as pk
from pipekern.plan.memory import slot_bytes
from pipekern.runtime.messages import message_bytes
from pipekern.transport.value import distinct, tensors

save, join = pk.Skip.save, pk.Skip.join


def _mix(value: Tensor, saved: Tensor) -> Tensor:
    return value + saved.mean(-1, keepdim=True)


def _net() -> pk.Skip:
    """Four wide values, two of which are saved: one at the end of a stage, one in its middle and joined twice."""
    wide, narrow = nn.Linear(4, 96), nn.Linear(96, 4)
    first = [wide, save("end")]
    second = [narrow, nn.Linear(4, 32), save("middle"), nn.Linear(32, 4)]
    rest = [nn.Linear(4, 4), join("middle", _mix), nn.Linear(4, 4), join("end", _mix), join("middle", _mix)]
    return pk.Skip(*first, *second, *rest)


def _costs(direct: bool) -> pk.LayerCosts:
    costs = pk.profile(_net(), torch.randn(2, 4), repeats=1)
    return replace(costs, copy=(1e6,) * len(costs.names) if direct else ())


def _pipeline(costs: pk.LayerCosts, monkeypatch: pytest.MonkeyPatch, **options: Any) -> pk.Pipeline:
    """Of five stages, cut where the test says."""
    monkeypatch.setattr("pipekern.runtime.blueprint._split", lambda split, units, order: [2, 4, 2, 1, 2])
    return pk.Pipeline(_net(), loss_fn=F.mse_loss, microbatches=3, ranks=5, split=costs, **options)


def test_golden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples of float32: 96 values are 768 bytes, 32 are 256, 4 are 32."""
    for direct in (False, True):
        costs = _costs(direct)
        assert list(costs.saved) == [0, 768, 0, 0, 256, 0, 0, 0, 0, 0, 0]
        with _pipeline(costs, monkeypatch) as pipe:
            blueprint = pipe._parts.blueprint
            found = message_bytes(blueprint.stages, blueprint.skips, costs)
        if direct:  # "end" to stage 4, "middle" to stage 4 from stage 2, which joins it first
            assert found == {(0, 1): 768, (1, 2): 32 + 256, (2, 3): 32, (3, 4): 32, (0, 4): 768, (2, 4): 256}
        else:
            assert found == {(0, 1): 768, (1, 2): 32 + 256 + 768, (2, 3): 1056, (3, 4): 1056}


@pytest.mark.parametrize("direct", [False, True])
def test_what_is_sent_has_the_predicted_bytes(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    costs, sent = _costs(direct), {}
    with _pipeline(costs, monkeypatch) as pipe:
        queue = pipe._parts.outgoing.send

        def count(sender: Any, tag: int, value: Any, digest: int = 0, given: bool = False) -> None:
            sent[sender.link.name] = sum(t.nbytes for t in distinct(tensors(value)))
            queue(sender, tag, value, digest, given)

        pipe._parts.outgoing.send = count  # type: ignore[method-assign]
        pipe.train_step(torch.randn(6, 4), torch.randn(6, 4))
        blueprint = pipe._parts.blueprint
    found = message_bytes(blueprint.stages, blueprint.skips, costs)
    assert len(found) == (6 if direct else 4)
    for (a, b), size in found.items():
        assert sent[f"{a}>{b}"] == sent[f"{b}>{a}"] == size, (a, b)


def test_rings_of_direct_skips_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """``recompute="auto"`` fits into what weights, activations and all rings take, and not into a byte less."""
    costs = _costs(direct=True)
    costs = replace(costs, kept=((0,) * 3,) * len(costs.names), ends=(0,) * len(costs.names))
    with _pipeline(costs, monkeypatch) as pipe:
        blueprint = pipe._parts.blueprint
        sizes = message_bytes(blueprint.stages, blueprint.skips, costs)
        rings = slot_bytes(blueprint.train, lambda a, b: sizes[min(a, b), max(a, b)])
        weights = [
            4 * sum(p.nbytes for unit in stage for _, p in unit.named_parameters()) for stage in blueprint.stages
        ]
    assert rings[4] == 32 * blueprint.train.slots[3, 4] + 768 * blueprint.train.slots[0, 4] + (
        256 * blueprint.train.slots[2, 4]
    )
    least = [ring + weight for ring, weight in zip(rings, weights, strict=True)]
    _pipeline(costs, monkeypatch, recompute="auto", memory=least).close()
    with pytest.raises(pk.ConfigError, match="rank 4"):
        _pipeline(costs, monkeypatch, recompute="auto", memory=[*least[:4], least[4] - 1])
