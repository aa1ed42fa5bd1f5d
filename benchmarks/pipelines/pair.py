"""Two processes of one library, a rank each, that block until they are asked for something."""

from __future__ import annotations

import os
import traceback
from multiprocessing import connection, get_context
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported at run time only

from benchmarks.two_ranks import take_core


class Pair:
    """The ranks of ``library``, whose processes have what a program of that library has, and nothing of the others.

    All pairs share two cores, so only one of them may be at work.
    """

    def __init__(self, library: str):
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = get_context("spawn")
        self._ends = []
        for rank in range(2):
            end, other = context.Pipe()
            context.Process(target=_serve, args=(other, library, rank, self._store.port), daemon=True).start()
            other.close()  # or its process could end without being noticed
            self._ends.append(end)

    def ask(self, what: str, *arguments: Any) -> Any:
        """What rank 0 returns from this method of its ``Rank``, once both have. Raises ``RuntimeError``."""
        for end in self._ends:
            end.send((what, arguments))
        answers: dict[Any, Any] = {}
        while len(answers) < len(self._ends):
            ready: list[Any] = connection.wait([end for end in self._ends if end not in answers])
            for end in ready:  # not one after the other: a rank that fails leaves the other one waiting for it
                answers[end] = end.recv()
                if isinstance(answers[end], RuntimeError):
                    raise answers[end]
        return answers[self._ends[0]]


def _serve(end: Any, library: str, rank: int, port: int) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}  # the store is not rank 0's
    os.environ.update({name: str(value) for name, value in {**where, **agent}.items()})
    take_core(rank)
    from benchmarks.pipelines.rank import Rank

    served = Rank(library)
    while True:
        try:
            what, arguments = end.recv()
        except EOFError:  # the benchmark has ended
            break
        try:
            end.send(getattr(served, what)(*arguments))
        except Exception:
            end.send(RuntimeError(f"rank {rank} of {library}:\n{traceback.format_exc()}"))
    dist.destroy_process_group()
