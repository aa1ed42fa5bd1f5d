"""From actions to instructions: sends and receives, the slots of every link, and an order for one thread."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from typing import NamedTuple

from pipekern.schedule.ir import Action, Schedule
from pipekern.schedule.simulate import Costs, simulate
from pipekern.schedule.validate import check_order, deadlock
from pipekern.trace.timeline import Span

SENDS = ("SEND_F", "SEND_B")
RECEIVES = ("RECV_F", "RECV_B")
UNIT = Costs(forward=1, backward=1, weight=1)

Edge = tuple[int, int]


class Instruction(NamedTuple):
    """One thing that the rank of ``stage`` does.

    ``op`` is F, B, W or BW, or: RECV_F receives the activation from the stage before, SEND_F sends it to the stage
    after, RECV_B receives the gradient from the stage after, SEND_B sends it to the stage before.
    """

    op: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch}"

    @property
    def edge(self) -> Edge:
        """Of a send or receive: source and target stage of its link."""
        stage = self.stage
        return {
            "SEND_F": (stage, stage + 1),
            "RECV_F": (stage - 1, stage),
            "SEND_B": (stage, stage - 1),
            "RECV_B": (stage + 1, stage),
        }[self.op]


class Program(NamedTuple):
    """A schedule that has been checked, with its sends and receives.

    ``instructions[r]`` is what rank ``r`` does in turn. ``slots[source, target]`` is, for every link between stages
    of different ranks, the most of its messages that are between arrival and last use in the simulation at unit
    costs, plus one; a link is a ring, so that a message is counted until all before it have been used for the last
    time. ``order`` lists (rank, index) of all instructions in one valid sequential run with those slots: a
    SEND without a free slot is queued and retried between instructions, and a RECV never waits.
    """

    schedule: Schedule
    instructions: tuple[tuple[Instruction, ...], ...]
    slots: dict[Edge, int]
    order: tuple[tuple[int, int], ...]


def program(schedule: Schedule) -> Program:
    """Check ``schedule`` and insert its sends and receives; raises ``ScheduleError`` that lists every fault.

    A message is sent as soon as it is made, and received just before its use; messages that come earlier on the same
    link are received before it, for a link is first in, first out.
    """
    check_order(schedule)
    rows = _insert(schedule)
    spans = simulate(schedule, UNIT).spans
    slots = _slots(schedule, spans)
    return Program(schedule, rows, slots, bounded_order(schedule, rows, slots, spans))


def _source(schedule: Schedule, action: Action) -> int | None:
    """The stage on another rank from which ``action`` gets a message."""
    if action.op == "W":
        return None
    stage = action.stage
    source = schedule.previous_stage(stage) if action.op == "F" else schedule.next_stage(stage)
    return source if source is not None and _remote(schedule, source, stage) else None


def _target(schedule: Schedule, action: Action) -> int | None:
    """The stage on another rank to which ``action`` gives a message."""
    if action.op == "W":
        return None
    stage = action.stage
    target = schedule.next_stage(stage) if action.op == "F" else schedule.previous_stage(stage)
    return target if target is not None and _remote(schedule, stage, target) else None


def _remote(schedule: Schedule, one: int, other: int) -> bool:
    return schedule.stage_rank[one] != schedule.stage_rank[other]


def _insert(schedule: Schedule) -> tuple[tuple[Instruction, ...], ...]:
    sent: dict[Edge, deque[int]] = {}
    for row in schedule.actions:
        for action in row:
            target = _target(schedule, action)
            if target is not None:
                sent.setdefault((action.stage, target), deque()).append(action.microbatch)
    received: set[tuple[str, int, int]] = set()
    rows = []
    for actions in schedule.actions:
        out: list[Instruction] = []
        for action in actions:
            kind = "F" if action.op == "F" else "B"
            source = _source(schedule, action)
            if source is not None:
                queue = sent[source, action.stage]
                while (kind, action.stage, action.microbatch) not in received:
                    microbatch = queue.popleft()
                    received.add((kind, action.stage, microbatch))
                    out.append(Instruction(f"RECV_{kind}", action.stage, microbatch))
            out.append(Instruction(*action))
            if _target(schedule, action) is not None:
                out.append(Instruction(f"SEND_{kind}", action.stage, action.microbatch))
        rows.append(tuple(out))
    return tuple(rows)


def _last_uses(schedule: Schedule) -> dict[tuple[int, int], Action]:
    """The action after which nothing of a stage and micro-batch is needed."""
    return {(action.stage, action.microbatch): action for row in schedule.actions for action in row}


def _slots(schedule: Schedule, spans: tuple[Span, ...]) -> dict[Edge, int]:
    last = _last_uses(schedule)
    freed = {(s.stage, s.microbatch): s.end for s in spans if last[s.stage, s.microbatch].op == s.op}
    changes: dict[Edge, list[tuple[float, int]]] = {}
    passed: dict[Edge, float] = {}
    for span in spans:
        action = Action(span.op, span.stage, span.microbatch)
        target = _target(schedule, action)
        if target is not None:
            link = span.stage, target
            passed[link] = max(passed.get(link, 0), freed[target, span.microbatch])
            changes.setdefault(link, []).extend([(span.end, 1), (passed[link], -1)])
    slots = {}
    for link, steps in sorted(changes.items()):
        held = peak = 0
        for _, change in sorted(steps):
            held += change
            peak = max(peak, held)
        slots[link] = peak + 1
    return slots


def bounded_order(
    schedule: Schedule, rows: tuple[tuple[Instruction, ...], ...], slots: dict[Edge, int], spans: tuple[Span, ...]
) -> tuple[tuple[int, int], ...]:
    """An order near to that of the simulation; raises ``ScheduleError`` where the slots are too few."""
    run = _BoundedRun(schedule, slots)
    when = {(span.op, span.stage, span.microbatch): span.start for span in spans}
    order: list[tuple[int, int]] = []
    ready = [(0.0, rank, 0) for rank in range(schedule.ranks)]
    blocked: dict[Edge, tuple[int, int]] = {}
    while ready:
        now, rank, index = heapq.heappop(ready)
        if index == len(rows[rank]):
            continue
        instruction = rows[rank][index]
        if not run.execute(instruction):
            blocked[instruction.edge] = (rank, index)
            continue
        order.append((rank, index))
        now = max(now, when.get(instruction, now))
        heapq.heappush(ready, (now, rank, index + 1))
        for link in run.delivered:
            if link in blocked:
                heapq.heappush(ready, (now, *blocked.pop(link)))
        run.delivered.clear()
    if blocked:
        raise deadlock([_blocked(rows, slots, link, *place) for link, place in blocked.items()])
    return tuple(order)


def _blocked(
    rows: tuple[tuple[Instruction, ...], ...], slots: dict[Edge, int], link: Edge, rank: int, index: int
) -> str:
    after = next(one for one in rows[rank][index:] if one.op not in RECEIVES)
    return (
        f"rank {rank} stuck at {after} (instruction {index} of its program): waits for the message of stage {link[0]}, "
        f"whose link has {slots[link]} slots"
    )


class _BoundedRun:
    """Links as rings with a bounded number of slots, as one thread sees them."""

    def __init__(self, schedule: Schedule, slots: dict[Edge, int]):
        # The micro-batch in each slot; -1 in a free one.
        self._ring = {link: [-1] * count for link, count in slots.items()}
        self._next: Counter[Edge] = Counter()
        self._queued: dict[Edge, deque[int]] = {link: deque() for link in slots}
        self._arrived: Counter[Edge] = Counter()
        self._last = _last_uses(schedule)
        self.delivered: list[Edge] = []

    def execute(self, instruction: Instruction) -> bool:
        """Run ``instruction``; False for a RECV whose message is not there."""
        op, stage, microbatch = instruction
        if op in SENDS:
            self._queued[instruction.edge].append(microbatch)
            self._deliver(instruction.edge)
        elif op in RECEIVES:
            if not self._arrived[instruction.edge]:
                return False
            self._arrived[instruction.edge] -= 1
        elif self._last[stage, microbatch].op == op:
            for link in ((stage - 1, stage), (stage + 1, stage)):
                if link in self._ring:
                    ring = self._ring[link]
                    ring[ring.index(microbatch)] = -1
                    self._deliver(link)
        return True

    def _deliver(self, link: Edge) -> None:
        ring, queued = self._ring[link], self._queued[link]
        while queued and ring[self._next[link] % len(ring)] < 0:
            ring[self._next[link] % len(ring)] = queued.popleft()
            self._next[link] += 1
            self._arrived[link] += 1
            self.delivered.append(link)
