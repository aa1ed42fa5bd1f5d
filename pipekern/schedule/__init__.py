"""Schedules as data: built by name, checked, given their sends and receives, simulated."""

from pipekern.schedule import gpipe, interleaved, looped_bfs, one_f_one_b  # each registers its schedule
from pipekern.schedule.comms import Instruction, Program, program
from pipekern.schedule.ir import OPS, Action, Schedule
from pipekern.schedule.registry import Grid, build, names, register
from pipekern.schedule.simulate import Costs, simulate
from pipekern.schedule.validate import check

__all__ = [
    "OPS",
    "Action",
    "Costs",
    "Grid",
    "Instruction",
    "Program",
    "Schedule",
    "build",
    "check",
    "gpipe",
    "interleaved",
    "looped_bfs",
    "names",
    "one_f_one_b",
    "program",
    "register",
    "simulate",
]
