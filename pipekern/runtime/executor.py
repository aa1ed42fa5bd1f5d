"""The walk through a program, one instruction at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pipekern.runtime.batch import Batch
from pipekern.runtime.outgoing import Outgoing
from pipekern.runtime.runner import Runner
from pipekern.schedule.comms import Instruction, Program


class Placed(NamedTuple):
    """An instruction and the rank that executes it."""

    rank: int
    instruction: Instruction


def place(program: Program, rank: int | None) -> list[Placed]:
    """The instructions of ``rank``, or of all ranks in an order that one thread can run."""
    if rank is None:
        return [Placed(owner, program.instructions[owner][index]) for owner, index in program.order]
    return [Placed(rank, instruction) for instruction in program.instructions[rank]]


class Executor:
    """Runs instructions of the stages of this process, in order.

    ``methods`` names the runner's method for each operation; ``after_last_loss`` is called once the last stage has run
    its last forward. After a run ``times`` holds the clock (ns) before the first instruction and after each of them.
    """

    def __init__(
        self,
        runners: Mapping[int, Runner],
        program: Program,
        rank: int | None,
        methods: Mapping[str, str],
        outgoing: Outgoing,
        after_last_loss: Callable[[Batch], None],
    ):
        self.program = program
        self.placed = place(program, rank)
        self.times: list[int] = []
        self._runners = list(runners.values())
        self._outgoing = outgoing
        self._steps = [(getattr(runners[i.stage].lane(i.peer), methods[i.op]), i.microbatch) for _, i in self.placed]
        self._after_last_loss = after_last_loss
        scored = [k for k, (_, i) in enumerate(self.placed) if i.op == "F" and runners[i.stage].scores]
        self._last_loss = scored[-1] if scored else -1

    def run(self, batch: Batch) -> None:
        """One step, until everything that leaves this process is sent."""
        outgoing, now = self._outgoing, time.perf_counter_ns
        times = self.times = [now()]
        for runner in self._runners:
            runner.begin(batch)
        for method, microbatch in self._steps:
            method(microbatch)
            if outgoing.queued:
                outgoing.flush()
            if len(times) - 1 == self._last_loss:
                self._after_last_loss(batch)
            times.append(now())
        outgoing.drain()

    def wrap(self, place: int, wrapper: Callable[[Callable[[int], None]], Callable[[int], None]]) -> None:
        """From now on the instruction at ``place`` runs what ``wrapper`` makes of its method."""
        method, microbatch = self._steps[place]
        self._steps[place] = wrapper(method), microbatch

    def where(self) -> str:
        """The instruction that was under way when :meth:`run` raised."""
        if not self.times:
            return f"rank {self.placed[0].rank}, before its first instruction"
        position = max(0, min(len(self.times), len(self.placed)) - 1)
        rank, instruction = self.placed[position]
        return (
            f"rank {rank}, stage {instruction.stage}, micro-batch {instruction.microbatch}, instruction {position} "
            f"({instruction.op})"
        )
