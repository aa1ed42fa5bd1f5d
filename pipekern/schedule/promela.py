"""A program as a model in Promela, for the model checker Spin: ``spin -a``, compile, run.

A process a rank runs its instructions; a process a link moves messages from the sender's queue into the slots of the
ring, in order, whenever the next slot is free. So all interleavings of ranks and links are in the model, and:

* a SEND never waits; a RECV waits for the next message of its link and asserts that it is the expected one;
* a slot is free again after the last action of its stage and micro-batch;
* ranks that wait for each other are an invalid end state;
* when all ranks have ended, no message is left and no slot is in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipekern.schedule.comms import RECEIVES, SENDS, Edge, Instruction, Program

_LINK = """\
chan queue_{link} = [{messages}] of {{ short }};
chan ring_{link} = [{slots}] of {{ short }};
bool busy_{link}[{slots}];

active proctype link_{link}() {{
  short message;
  byte next;
end:
  do
  :: atomic {{ nempty(queue_{link}) && !busy_{link}[next] ->
       queue_{link}?message; ring_{link}!message; busy_{link}[next] = true; next = (next + 1) % {slots} }}
  od
}}
"""


def model(program: Program, slots: Mapping[Edge, int] | None = None) -> str:
    """The model of ``program``, with its own numbers of slots or with ``slots``, one for every link."""
    counts = program.slots if slots is None else slots
    places = _places(program)
    rows = [_rank(program, rank, counts, places) for rank in range(program.schedule.ranks)]
    links = [
        _LINK.format(link=_name(link), slots=count, messages=sum(1 for edge, *_ in places if edge == link))
        for link, count in counts.items()
    ]
    return "\n".join(["byte ended;\n", *links, *rows, _all_matched(program.schedule.ranks, counts)])


def _name(link: Edge) -> str:
    return f"{link[0]}_{link[1]}"


def _places(program: Program) -> dict[tuple[Edge, int], int]:
    """By link and micro-batch: how many messages its link carried before it."""
    sent: dict[Edge, int] = {}
    places = {}
    for row in program.instructions:
        for instruction in row:
            if instruction.op in SENDS:
                link = instruction.edge
                places[link, instruction.microbatch] = sent.get(link, 0)
                sent[link] = sent.get(link, 0) + 1
    return places


def _rank(program: Program, rank: int, slots: Mapping[Edge, int], places: Mapping[tuple[Edge, int], int]) -> str:
    row = program.instructions[rank]
    last = {(one.stage, one.microbatch): one for one in row if one.op not in SENDS + RECEIVES}
    lines = [f"active proctype rank_{rank}() {{", "  short message;"]
    for one in row:
        lines.append(f"  /* {one} */")
        if one.op in SENDS:
            lines.append(f"  queue_{_name(one.edge)}!{one.microbatch};")
        elif one.op in RECEIVES:
            lines.append(f"  ring_{_name(one.edge)}?message; assert(message == {one.microbatch});")
        elif last[one.stage, one.microbatch] == one:
            lines += _freed(one, slots, places)
    return "\n".join([*lines, "  ended++", "}\n"])


def _freed(one: Instruction, slots: Mapping[Edge, int], places: Mapping[tuple[Edge, int], int]) -> Iterator[str]:
    for link in slots:
        if link[1] == one.stage and (link, one.microbatch) in places:
            yield f"  busy_{_name(link)}[{places[link, one.microbatch] % slots[link]}] = false;"


def _all_matched(ranks: int, slots: Mapping[Edge, int]) -> str:
    lines = ["active proctype all_matched() {", f"  ended == {ranks};"]
    for link, count in slots.items():
        name = _name(link)
        lines.append(f"  assert(empty(queue_{name}) && empty(ring_{name}));")
        lines += [f"  assert(!busy_{name}[{slot}]);" for slot in range(count)]
    return "\n".join([*lines, "}\n"])
