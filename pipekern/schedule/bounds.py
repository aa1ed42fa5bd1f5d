"""What no order can beat: lower bounds on span and makespan, under a cap on memory.

Each bound holds for every schedule with the given placement, costs and cap; none is claimed to be reached. On rank
``r`` with first stage ``a`` and last stage ``z`` (the same one with one chunk a rank):

* *work*: the rank is busy for m(F+B+W).
* *head*: before the first gradient arrives, a whole chain after the rank's first F, there are only the F that fit
  the cap. With one chunk and unit costs that is 2p - 1 - min(k, m) idle.
* *tail*: after the rank's last F its gradient takes a whole chain to come back, and there is only what was held
  then to fill it.
* *chain*: after the rank's last B the gradient travels on to stage 0, whose W ends the step. Without a cap that is
  (m + p - 1)(F + B) + 2(p - 1)c + W; with one, the W of what does not fit come before that B.
* *room*: an activation is held for a whole chain, and no more than the cap is held at any time.
"""

from __future__ import annotations

import math
from fractions import Fraction

from pipekern.schedule.problem import Problem


def lower_bounds(problem: Problem) -> tuple[int, int]:
    """The least span and the least makespan that any order can have, as far as the bounds above go."""
    spans = [problem.busy(rank) + max(_idle(problem, rank), 0) for rank in range(problem.ranks)]
    spans = [max(span, _room(problem, rank)) for rank, span in enumerate(spans)]
    chain = max(_chain(problem, rank) for rank in range(problem.ranks))
    makespan = max(problem.first_forward(rank) + span for rank, span in enumerate(spans))
    # Rank 0 starts at 0 and ends the chain, so that its span is no shorter than the chain.
    return max(*spans, chain), max(makespan, chain)


def _head(problem: Problem, rank: int) -> int:
    """Idle time before the first gradient."""
    stages = problem.stages_of(rank)
    left = math.floor(problem.cap)
    work = 0
    for cost in sorted((problem.forward[s] for s in stages), reverse=True):
        count = min(left, problem.microbatches)
        work += count * cost
        left -= count
    return max(0, problem.chain(stages[0], stages[-1]) - work)


def _tail(problem: Problem, rank: int) -> int:
    """Idle time after the last F, which is one of the last stage."""
    first, last = problem.stages_of(rank)[0], problem.stages_of(rank)[-1]
    length = problem.chain(last, first) - problem.forward[last] + problem.backward[first] + problem.weight[first]
    both = max(problem.backward[s] + problem.weight[s] for s in (first, last))
    weight = max(problem.weight[s] for s in (first, last))
    total = problem.microbatches * problem.chunks
    work = 0
    for whole in range(1, min(total, math.floor(problem.cap)) + 1):
        rest = total - whole
        if problem.kept:
            rest = min(rest, math.floor((problem.cap - whole) / problem.kept))
        work = max(work, whole * both + rest * weight)
    return max(0, length - work)


def _idle(problem: Problem, rank: int) -> int:
    head, tail = _head(problem, rank), _tail(problem, rank)
    # With more F than fit at once, some come after the first gradient: the two gaps cannot overlap.
    apart = problem.microbatches * problem.chunks > math.floor(problem.cap)
    return head + tail if apart else max(head, tail)


def _chain(problem: Problem, rank: int) -> int:
    stages = problem.stages_of(rank)
    first = stages[0]
    work = problem.microbatches * sum(problem.forward[s] + problem.backward[s] for s in stages)
    if problem.kept:
        # What the rank still holds at the end of its last B waits for its W: no more than the cap.
        waiting = math.floor((problem.cap - 1) / problem.kept) + 1
        before = max(0, problem.microbatches * problem.chunks - waiting)
        work += before * min(problem.weight[s] for s in stages)
    gradients = problem.chain(first, first) + problem.microbatches * problem.backward[first]
    last = max(work + _head(problem, rank), gradients)
    return problem.first_forward(rank) + last + problem.drain(first)


def _room(problem: Problem, rank: int) -> int:
    stages = problem.stages_of(rank)
    held = (
        sum(problem.chain(s, s) + problem.backward[s] + problem.kept * problem.weight[s] for s in stages)
        * problem.microbatches
    )
    cap = min(problem.cap, Fraction(problem.microbatches * problem.chunks))
    # The cap is not filled at once: an F adds one activation, and at the end a W takes one whole activation away.
    step = min(problem.forward[s] for s in stages)
    if problem.kept == 1:
        step += min(problem.weight[s] for s in stages)
    unused = step * sum(cap - count for count in range(1, math.floor(cap)))
    return math.ceil((held + unused) / cap)


def v_law(problem: Problem) -> int | None:
    """The span that V placement reaches when F, B and W of every stage cost the same and messages nothing.

    With M stage activations of memory a rank and m at least 2p, idle are 6p - 1 - 3M from p to 2p - 2, 3 at 2p - 1
    and 0 from 2p on. A result of experience, proved optimal for small cases only: no lower bound. None elsewhere.
    """
    costs = {*problem.forward, *problem.backward, *problem.weight}
    cap, p = math.floor(problem.cap), problem.ranks
    unit = len(costs) == 1 and not any(problem.link) and problem.kept == 1
    if problem.chunks != 2 or not unit or problem.microbatches < 2 * p or p < 4 or cap < p:
        return None
    idle = 0 if cap >= 2 * p else 3 if cap == 2 * p - 1 else 6 * p - 1 - 3 * cap
    return problem.busy(0) + idle * costs.pop()
