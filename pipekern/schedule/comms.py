"""From actions to instructions: sends and receives, the slots of every link, and an order for one thread."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Collection
from typing import NamedTuple

from pipekern.errors import ScheduleError
from pipekern.schedule.collectives import Collectives, first_forwards, last_weights
from pipekern.schedule.ir import Action, Schedule
from pipekern.schedule.simulate import Costs, simulate
from pipekern.schedule.validate import check_order, deadlock
from pipekern.trace.timeline import COMPUTE, Span

SENDS = ("SEND_F", "SEND_B")
RECEIVES = ("RECV_F", "RECV_B")
UNIT = Costs(forward=1, backward=1, weight=1)

Edge = tuple[int, int]


class Instruction(NamedTuple):
    """One thing that the rank of ``stage`` does.

    ``op`` is F, B, W or BW, one of ``collectives.py``, or: RECV_F receives an activation from ``peer``, the stage
    before or one that skips to this one, SEND_F sends it to a stage after, RECV_B receives the gradient from there,
    SEND_B sends it back. AWAY: the stage's activation has left for host memory; BACK: it begins to come back
    (:mod:`pipekern.plan.offload`).
    """

    op: str
    stage: int
    microbatch: int
    peer: int = -1

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch}"

    @property
    def edge(self) -> Edge:
        """Of a send or receive: source and target stage of its link."""
        return (self.stage, self.peer) if self.op in SENDS else (self.peer, self.stage)


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


def program(
    schedule: Schedule,
    skips: Collection[Edge] = (),
    collectives: Collectives | None = None,
) -> Program:
    """Check ``schedule`` and insert its sends and receives; raises ``ScheduleError`` that lists every fault.

    A message is sent as soon as it is made, and received just before its use; messages that come earlier on the same
    link are received before it, for a link is first in, first out. ``skips`` are pairs of stages of one chain, others
    between them: an activation goes from the first to the second on a link of its own, and its gradient comes back so.
    """
    check_order(schedule)
    for a, b in skips:
        if not (0 <= a < b - 1 < schedule.stages - 1 and a // schedule.depth == b // schedule.depth):
            raise ScheduleError(
                f"a skip from stage {a} to stage {b} of {schedule.stages}: give a stage, and one at least two after it "
                "in the same chain; neighbours have their link already"
            )
    rows = _insert(schedule, skips)
    if collectives is not None:
        rows = _with_collectives(schedule, rows, collectives)
    spans = simulate(schedule, UNIT).spans
    slots = _slots(schedule, spans, skips)
    return Program(schedule, rows, slots, bounded_order(schedule, rows, slots, spans))


def _sources(schedule: Schedule, action: Action, skips: Collection[Edge]) -> list[int]:
    """The stages on other ranks from which ``action`` gets a message."""
    return _others(schedule, action, skips, forward=action.op != "F")


def _targets(schedule: Schedule, action: Action, skips: Collection[Edge]) -> list[int]:
    """The stages on other ranks to which ``action`` gives a message."""
    return _others(schedule, action, skips, forward=action.op == "F")


def _others(schedule: Schedule, action: Action, skips: Collection[Edge], forward: bool) -> list[int]:
    """The stages on other ranks that are joined to ``action``'s: those after it if ``forward``, else those before."""
    if action.op == "W":
        return []
    stage = action.stage
    neighbour = schedule.next_stage(stage) if forward else schedule.previous_stage(stage)
    found = [] if neighbour is None else [neighbour]
    found += sorted(b if forward else a for a, b in skips if stage == (a if forward else b))
    return [other for other in found if schedule.stage_rank[other] != schedule.stage_rank[stage]]


def _insert(schedule: Schedule, skips: Collection[Edge]) -> tuple[tuple[Instruction, ...], ...]:
    sent: dict[Edge, deque[int]] = {}
    for row in schedule.actions:
        for action in row:
            for target in _targets(schedule, action, skips):
                sent.setdefault((action.stage, target), deque()).append(action.microbatch)
    received: set[tuple[int, int, int]] = set()
    rows = []
    for actions in schedule.actions:
        out: list[Instruction] = []
        for action in actions:
            kind, stage = "F" if action.op == "F" else "B", action.stage
            for source in _sources(schedule, action, skips):
                while (source, stage, action.microbatch) not in received:
                    microbatch = sent[source, stage].popleft()
                    received.add((source, stage, microbatch))
                    out.append(Instruction(f"RECV_{kind}", stage, microbatch, source))
            out.append(Instruction(*action))
            targets = _targets(schedule, action, skips)
            out += [Instruction(f"SEND_{kind}", stage, action.microbatch, target) for target in targets]
        rows.append(tuple(out))
    return tuple(rows)


def _with_collectives(
    schedule: Schedule, rows: tuple[tuple[Instruction, ...], ...], collectives: Collectives
) -> tuple[tuple[Instruction, ...], ...]:
    found = []
    for actions, row in zip(schedule.actions, rows, strict=True):
        first, last = first_forwards(actions), last_weights(actions)
        out = [Instruction("GATHER", s, i) for s in first for i in range(collectives.gathers.get(s, 0))]
        begun: list[Instruction] = []
        for instruction in row:
            if begun and instruction.op not in SENDS:
                out, begun = out + begun, []
            action = Action(*instruction[:3])
            if first.get(action.stage) == action and any(collectives.gathers.get(s) for s in first):
                out.append(Instruction("JOIN", action.stage, 0))
            out.append(instruction)
            if last.get(action.stage) == action:
                begun = [
                    Instruction("REDUCE", action.stage, i) for i in range(collectives.reduces.get(action.stage, 0))
                ]
        found.append((*out, *begun))
    return tuple(found)


def _last_uses(schedule: Schedule) -> dict[tuple[int, int], Action]:
    """The action after which nothing of a stage and micro-batch is needed."""
    return {(action.stage, action.microbatch): action for row in schedule.actions for action in row}


def _slots(schedule: Schedule, spans: tuple[Span, ...], skips: Collection[Edge]) -> dict[Edge, int]:
    last = _last_uses(schedule)
    freed = {(s.stage, s.microbatch): s.end for s in spans if last[s.stage, s.microbatch].op == s.op}
    changes: dict[Edge, list[tuple[float, int]]] = {}
    passed: dict[Edge, float] = {}
    for span in spans:
        action = Action(span.op, span.stage, span.microbatch)
        for target in _targets(schedule, action, skips):
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
        now = max(now, when.get(instruction[:3], now))
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
        self._into = [[link for link in slots if link[1] == stage] for stage in range(schedule.stages)]
        self._next: Counter[Edge] = Counter()
        self._queued: dict[Edge, deque[int]] = {link: deque() for link in slots}
        self._arrived: Counter[Edge] = Counter()
        self._last = _last_uses(schedule)
        self.delivered: list[Edge] = []

    def execute(self, instruction: Instruction) -> bool:
        """Run ``instruction``; False for a RECV whose message is not there."""
        op, stage, microbatch, _ = instruction
        if op in SENDS:
            self._queued[instruction.edge].append(microbatch)
            self._deliver(instruction.edge)
        elif op in RECEIVES:
            if not self._arrived[instruction.edge]:
                return False
            self._arrived[instruction.edge] -= 1
        elif op in COMPUTE and self._last[stage, microbatch].op == op:
            for link in self._into[stage]:
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
