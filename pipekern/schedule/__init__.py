"""Schedules as data: built by name, checked, given their sends and receives, simulated."""

from pipekern.schedule import (  # noqa: F401  a generator registers its schedule
    chimera,
    dualpipe,
    dualpipev,
    gpipe,
    hanayo,
    interleaved,
    looped_bfs,
    one_f_one_b,
    pipedream_2bw,
    promela,
    seq1f1b,
    torch_csv,
    v_half,
    v_min,
    zb_h1,
    zb_h2,
    zb_interleaved,
    zb_v,
)
from pipekern.schedule.comms import Instruction, Program, program
from pipekern.schedule.ir import OPS, Action, Schedule
from pipekern.schedule.registry import Entry, Grid, build, describe, names, register
from pipekern.schedule.search import SearchResult, search
from pipekern.schedule.simulate import Costs, simulate
from pipekern.schedule.stream import simulate_large
from pipekern.schedule.validate import check

__all__ = [
    "OPS",
    "Action",
    "Costs",
    "Entry",
    "Grid",
    "Instruction",
    "Program",
    "Schedule",
    "SearchResult",
    "build",
    "check",
    "describe",
    "names",
    "program",
    "promela",
    "register",
    "search",
    "simulate",
    "simulate_large",
    "torch_csv",
]
