"""``pipekern doctor``: what this machine and this installation can do. Works without torch."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import socket
from pathlib import Path
from typing import Any

from pipekern._version import __version__
from pipekern.cli import gpus
from pipekern.cli.output import emit


def add(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser("doctor", help="versions, devices, and what the transports can use here")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    report = examine()
    faults = report["faults"]
    lines = [f"{key:<12} {_shown(value)}" for key, value in report.items() if key != "faults"]
    emit(args.json, report, "\n".join([*lines, *(f"fault: {fault}" for fault in faults)]))
    return 1 if faults else 0


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(part)}" for key, part in value.items())
    if isinstance(value, list):
        return "; ".join(map(_shown, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "missing" if value is None else str(value)


def examine() -> dict[str, Any]:
    """All findings as plain values; ``faults`` lists what keeps pipekern from training here."""
    torch, torch_error = _load("torch")
    extension, extension_error = _load("pipekern._C")
    system = {"memfd": _memfd(), "pidfd": _pidfd(), "unix_sockets": _fd_passing()}
    note = _build_note()
    fast = extension is not None and all(system.values())
    faults = []
    if torch is None:
        faults.append(f"torch does not load ({torch_error}); pip install 'torch>=2.10'")
    if extension is None and note["tier"] != "python":
        faults.append(f"pipekern._C was built but does not load ({extension_error}); install pipekern again")
    cards = [] if torch is None else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cuda = gpus.examine(extension if fast else None)
    over_cuda = bool(fast and cards and cuda["driver"])
    links, failure = gpus.self_test(len(cards)) if over_cuda else ([], "")
    if failure:
        faults.append(failure)
    return {
        "pipekern": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": None if torch is None else str(torch.__version__),
        "packages": {name: _version(name) for name in ("triton", "matplotlib", "safetensors", "tokenizers", "tqdm")},
        "gpus": cards,
        "extension": f"loaded ({note['compiler']})" if extension is not None else note["reason"] or extension_error,
        "kernel": system,
        "tier": f"{note['tier']} ({note['kernels']})" if "kernels" in note else note["tier"],
        "cuda": cuda,
        "links": links,
        "transport": "cuda" if over_cuda else "shm" if fast else "dist (torch.distributed)",
        "why": _why(fast, over_cuda, cards, cuda),
        "faults": faults,
    }


def _why(fast: bool, over_cuda: bool, cards: list[str], cuda: dict[str, Any]) -> str:
    """The reason for the transport that a job on this machine gets."""
    if over_cuda:
        return "GPUs and a driver; tensors of the CPU go over shared memory"
    if not fast:
        return "shared memory needs the extension, memfd, pidfd and descriptors over sockets"
    if cards:
        return f"torch sees GPUs, and pipekern cannot use them: {cuda['why']}"
    return f"torch sees no GPU ({cuda.get('why') or 'is it a build for the CPU?'})"


def _load(name: str) -> tuple[Any, str]:
    """The module, or None and why it does not load."""
    try:
        return importlib.import_module(name), ""
    except (ImportError, OSError) as error:  # OSError: a shared library that a module opens itself
        return None, f"{type(error).__name__}: {error}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build_note() -> dict[str, str]:
    """What the build left: its tier (python where nothing was compiled), compiler, and the reason if there is one."""
    note = Path(__file__).parents[1] / "_build.json"
    if not note.exists():
        return {"tier": "python", "compiler": "", "reason": "not built: this is a bare source tree; pip install it"}
    return dict(json.loads(note.read_text()))


def _memfd() -> bool:
    try:
        os.close(os.memfd_create("pipekern-doctor", os.MFD_ALLOW_SEALING))
    except (AttributeError, OSError):
        return False
    return True


def _pidfd() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def _fd_passing() -> bool:
    """Whether a file descriptor can be sent through an AF_UNIX socket."""
    try:
        one, other = socket.socketpair(socket.AF_UNIX)
        with one, other, open(os.devnull, "rb") as file:
            socket.send_fds(one, [b"x"], [file.fileno()])
            _, descriptors, _, _ = socket.recv_fds(other, 1, 1)
            for descriptor in descriptors:
                os.close(descriptor)
    except (AttributeError, OSError):
        return False
    return bool(descriptors)
