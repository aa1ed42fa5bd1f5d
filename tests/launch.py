"""Run one function on several processes, each with the environment that torchrun would give it.

    outcomes = launch(worker, 2, "an argument")        # worker(*args) on each rank; RANK and so on are set
    assert values(outcomes) == ["of rank 0", "of rank 1"]

Every rank is forked from a server process that has imported torch and done nothing else (multiprocessing's
forkserver). That is safe with gloo, which a rank starts only after the fork, and it spares each rank the import:
a launch of two ranks with a process group takes 0.06 s instead of about 4 s with spawned interpreters (two cores;
the first launch starts the server: 2 s). Forking the test process itself would not be safe: earlier tests may have
started threads in it.

As under torchrun, the c10d store lives outside the ranks, in the test process, so it outlives a killed rank;
``store="rank 0"`` puts it into rank 0, as a plain ``env://`` launcher does.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

_PRELOADED = [
    "torch",
    "torch.distributed",
    "torch._dynamo",  # every optimizer imports it
    "torch.fx",
    "pytest",
    "hypothesis",
    "pipekern.runtime.pipeline",
    "pipekern.runtime.verify",
]


class Outcome(NamedTuple):
    """How one rank ended: its return value, or the exception it raised, or the signal that killed it."""

    rank: int
    value: Any
    error: str | None  # traceback, or "rank 1 was killed by signal 9", or "did not end within 60 s"
    exitcode: int | None
    output: str  # what it wrote to stdout and stderr


def values(outcomes: Sequence[Outcome]) -> list[Any]:
    """The ranks' return values; fails with every rank's error and output if one has failed."""
    failed = [o for o in outcomes if o.error is not None]
    report = "\n".join(f"--- rank {o.rank}: {o.error}\n{o.output}" for o in failed)
    assert not failed, f"{len(failed)} of {len(outcomes)} ranks failed\n{report}"
    return [o.value for o in outcomes]


def launch(
    worker: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 60.0,
    environ: Mapping[str, str] | None = None,
    store: str = "outside",
) -> list[Outcome]:
    """Run ``worker(*args)``, a module-level function, on ``ranks`` processes; waits until all have ended.

    After ``timeout`` seconds what still runs is killed, with its stacks in ``output``. Arguments and results are
    pickled. One thread a process. A rank ends with ``os._exit``: what ``atexit`` holds does not run in it.
    """
    context = _server()
    processes: list[ForkServerProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder, rendezvous(store) as address:
        logs = [Path(folder, f"rank{rank}.log") for rank in range(ranks)]
        try:
            for rank in range(ranks):
                receiving, sending = context.Pipe(duplex=False)
                variables = {**address, **_variables(rank, ranks), **(environ or {})}
                process = context.Process(
                    target=_rank_main, args=(worker, args, variables, str(logs[rank]), timeout, sending)
                )
                process.start()
                sending.close()
                processes.append(process)
                pipes.append(receiving)
            replies = _collect(processes, pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()  # by its own pid; does nothing to one that has ended
                process.join()
        return [
            _outcome(rank, processes[rank], replies.get(rank), logs[rank], rank in replies, timeout)
            for rank in range(ranks)
        ]


def _server() -> ForkServerContext:
    """The fork server: one for the whole test run, started at the first launch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # the libraries read it when the server imports them
    # c10d looks up the name of ::ffff:127.0.0.1, for its log, in DNS; where none answers that takes 5 s by default.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    return context


@contextmanager
def rendezvous(store: str) -> Iterator[dict[str, str]]:
    """Where the ranks meet: MASTER_ADDR, MASTER_PORT and who holds the store."""
    if store == "outside":
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported at run time only

        server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
        yield {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        del server
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        yield {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _variables(rank: int, ranks: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }


def _collect(
    processes: Sequence[ForkServerProcess], pipes: Sequence[Connection], deadline: float
) -> dict[int, tuple[Any, str | None] | None]:
    """Each rank's reply, None for one that ended without; no entry for one that had not ended by the deadline.

    A rank counts as ended when its process has: a thread that keeps it alive is a fault.
    """
    replies: dict[int, tuple[Any, str | None]] = {}
    running = set(range(len(processes)))
    while running and (left := deadline - time.monotonic()) > 0:
        waiting = [processes[r].sentinel for r in running] + [pipes[r] for r in running if r not in replies]
        wait(waiting, timeout=left)
        for rank in sorted(running):
            ended = processes[rank].exitcode is not None  # looked at before the pipe: the last reply is not missed
            if rank not in replies and pipes[rank].poll():
                try:
                    replies[rank] = pickle.loads(pipes[rank].recv_bytes())
                except EOFError:
                    processes[rank].join()  # only its end closes the pipe
                    ended = True
            if ended:
                running.discard(rank)
    return {rank: replies.get(rank) for rank in range(len(processes)) if rank not in running}


def _outcome(
    rank: int,
    process: ForkServerProcess,
    reply: tuple[Any, str | None] | None,
    log: Path,
    ended: bool,
    timeout: float,
) -> Outcome:
    output = log.read_text(errors="replace") if log.exists() else ""
    value, error = reply or (None, None)
    code = process.exitcode
    if not ended:
        error = f"rank {rank} did not end within {timeout} s"
    elif reply is None or (code != 0 and error is None):
        error = f"rank {rank} was killed by signal {-code}" if code and code < 0 else f"rank {rank} exited with {code}"
    return Outcome(rank, value, error, code, output)


def _rank_main(
    worker: Callable[..., Any],
    args: tuple[Any, ...],
    variables: dict[str, str],
    log: str,
    timeout: float,
    pipe: Connection,
) -> None:
    """What a forked rank runs."""
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(max(timeout - 1.0, 0.1), file=2)
    os.environ.update(variables)
    import torch

    torch.set_num_threads(1)
    reply: tuple[Any, str | None]
    try:
        reply = (worker(*args), None)
    except BaseException:
        reply = (None, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(reply))
    pipe.close()
    sys.stdout.flush()
