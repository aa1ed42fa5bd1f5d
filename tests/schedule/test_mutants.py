"""One fault put into a good schedule: `check()` must find it, whatever the fault, the schedule and the place."""

from __future__ import annotations

from random import Random

import pytest

from pipekern.errors import ConfigError, ScheduleError
from pipekern.schedule import Schedule, build, comms, names
from tests.schedule.mutants import KINDS


def some_schedule(random: Random) -> Schedule:
    """Any registered schedule at a small size that it takes. On one rank a lost backward may leave an evaluation."""
    while True:
        name, ranks = random.choice(names()), random.randint(2, 4)
        try:
            return build(name, ranks=ranks, microbatches=random.choice([1, 2, 3, 4, 6, 8]))
        except ConfigError:  # not every schedule takes every size
            continue


@pytest.mark.parametrize("name", KINDS)
def test_every_mutant_is_caught(name: str) -> None:
    mutate, found_by = KINDS[name]
    seeds, caught = [*range(12), Random().randrange(1 << 32)], 0
    for seed in seeds:
        random = Random(seed)
        mutant = None
        while mutant is None:
            mutant = mutate(random, some_schedule(random))
        with pytest.raises(ScheduleError) as error:
            mutant.check()
            pytest.fail(f"seed {seed}: not caught\n{mutant}")
        assert any(found_by in fault for fault in error.value.faults), (seed, error.value.faults, str(mutant))
        caught += 1
    assert caught == len(seeds)


def test_enough_kinds() -> None:
    assert len(KINDS) >= 20


@pytest.mark.parametrize("seed", range(12))
def test_too_few_slots_are_caught(seed: int) -> None:
    """On one link fewer slots than the receiver must hold at once before it can free any: a deadlock that names it."""
    random = Random(seed)
    holds: dict[comms.Edge, int] = {}
    while not holds:
        program = some_schedule(random).program()
        holds = {link: held for link, held in held_at_once(program).items() if held > 1}
    link = random.choice(sorted(holds))
    few = {**program.slots, link: random.randrange(1, holds[link])}
    spans = program.schedule.simulate(comms.UNIT).spans
    with pytest.raises(ScheduleError, match=f"whose link has {few[link]} slots"):
        comms.bounded_order(program.schedule, program.instructions, few, spans)


def held_at_once(program: comms.Program) -> dict[comms.Edge, int]:
    """The most messages of each link that its receiver has taken and not yet used for the last time."""
    last = {(a.stage, a.microbatch): a.op for row in program.schedule.actions for a in row}
    held: dict[comms.Edge, set[int]] = {link: set() for link in program.slots}
    most = dict.fromkeys(program.slots, 0)
    for row in program.instructions:
        for one in row:
            if one.op in comms.RECEIVES:
                held[one.edge].add(one.microbatch)
                most[one.edge] = max(most[one.edge], len(held[one.edge]))
            elif one.op not in comms.SENDS and last[one.stage, one.microbatch] == one.op:
                for link in ((one.stage - 1, one.stage), (one.stage + 1, one.stage)):
                    held.get(link, set()).discard(one.microbatch)
    return most
