"""The devices of a pipeline's ranks: as given, or the GPUs in turn, else the CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from pipekern.errors import ConfigError
from pipekern.stage.sharing import Tie

Devices = Sequence[str | torch.device] | None


def devices_here(given: Devices, ranks: int) -> list[torch.device]:
    """The device of every rank, where this process has all of them. Raises ``ConfigError``."""
    if given is not None:
        return [existing(device) for device in _spread(given, ranks)]
    count = torch.cuda.device_count()
    return [torch.device("cuda", rank % count) if count else torch.device("cpu") for rank in range(ranks)]


def device_here(given: Devices, rank: int, ranks: int) -> torch.device:
    """The device of this process, ``rank`` of the job: only its own entry must be there. Raises ``ConfigError``."""
    if given is not None:
        return existing(_spread(given, ranks)[rank])
    count = torch.cuda.device_count()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count) if count else torch.device("cpu")


def refuse_ties_apart(ties: Sequence[Tie], devices: Sequence[torch.device]) -> None:
    """Raise ``ConfigError`` for a weight that ranks of this process share on several of ``devices``, by rank."""
    for tie in ties:
        places = {name: devices[rank] for rank, name in tie.names.items()}
        if len(set(places.values())) > 1:
            there = ", ".join(f"{name} on {device}" for name, device in places.items())
            raise ConfigError(
                f"one weight has places on several devices ({there}), and a process holds it once; start a process a "
                "rank with torchrun, which keeps copies equal, or move the split or devices= so that one device has all"
            )


def existing(device: str | torch.device) -> torch.device:
    """``device`` as tensors on it name it: the CPU without a number, a CUDA device with one, that of "cuda" alone being
    the current one. Raises ``ConfigError`` for what is no device, or is not there.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"devices: {device!r} is no device; give 'cpu', 'cuda:0' and the like") from error
    if found.type == "cuda":
        return torch.device("cuda", _number(found))
    if found.type == "cpu":
        if found.index:
            raise ConfigError(f"devices: {str(device)!r}, and a process has one CPU; give 'cpu'")
        return torch.device("cpu")
    try:
        torch.ones(1, device=found).cpu()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"devices: {str(device)!r} holds no tensors here ({error}); give 'cpu' or 'cuda:0'"
        ) from error
    return found


def _number(device: torch.device) -> int:
    count = torch.cuda.device_count()
    if count == 0:
        why = "finds no CUDA device" if torch.version.cuda else "is built without CUDA"
        raise ConfigError(f"devices: {str(device)!r}, and torch {torch.__version__} {why}; give 'cpu'")
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= count:
        there = ", ".join(f"'cuda:{index}'" for index in range(count))
        raise ConfigError(
            f"devices: {str(device)!r}, and the CUDA devices that this process sees are {count}; give {there} or 'cpu'"
        )
    return number


def _spread(given: Sequence[str | torch.device], ranks: int) -> Sequence[str | torch.device]:
    if isinstance(given, str):
        raise ConfigError(f"devices={given!r}; give a list, with one entry a rank, or one for all: [{given!r}]")
    if len(given) not in (1, ranks):
        raise ConfigError(f"devices has {len(given)} entries for {ranks} ranks; give one a rank, or one for all")
    return list(given) * (ranks // len(given))
