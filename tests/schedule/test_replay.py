from __future__ import annotations

import random
from dataclasses import replace

import pytest

from pipekern.errors import ScheduleError
from pipekern.schedule.registry import build, names
from pipekern.schedule.replay import Replay
from pipekern.schedule.simulate import Costs


def test_golden_replay() -> None:
    """Two stages, one micro-batch: forward 2 and 3, a message of 1 each way, backward (1 + 1) and (4 + 5)."""
    schedule = build("1f1b", ranks=2, microbatches=1)
    assert Replay(schedule).makespan([2, 3], [1, 4], [1, 5], [1]) == 2 + 1 + 3 + 9 + 1 + 2


@pytest.mark.parametrize("name", names())
def test_as_the_simulation_has_it(name: str) -> None:
    rng = random.Random()
    schedule = build(name, ranks=4, microbatches=8)
    replay = Replay(schedule)
    for _ in range(3):  # the state of one run is not seen by the next
        f, b, w = ([rng.uniform(0, 9) for _ in range(schedule.stages)] for _ in range(3))
        comm = [rng.uniform(0, 3) for _ in range(schedule.stages - 1)]
        exact = schedule.simulate(Costs(f, b, w, comm)).makespan
        assert replay.makespan(f, b, w, comm) == pytest.approx(exact, rel=1e-12)


def test_forwards_alone() -> None:
    schedule = build("zb-v", ranks=2, microbatches=4).forward_only()
    forward, none = [1.0, 2.0, 3.0, 4.0], [0.0] * 4
    exact = schedule.simulate(Costs(forward, none, none, 1)).makespan
    assert Replay(schedule).makespan(forward, none, none, [1.0] * 3) == exact


def test_a_deadlock_is_an_error() -> None:
    schedule = build("1f1b", ranks=2, microbatches=2)
    with pytest.raises(ScheduleError, match="rank 0 stuck at 0BW1"):
        Replay(replace(schedule, actions=(schedule.actions[0][::-1], schedule.actions[1])))
