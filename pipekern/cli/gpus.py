"""What ``pipekern doctor`` says of GPUs: driver, kernels, who reaches whom, and every link's self-test."""

from __future__ import annotations

from typing import Any

from pipekern.errors import TransportError


def examine(extension: Any) -> dict[str, Any]:
    """Findings as plain values. ``extension`` is ``pipekern._C``, None where it does not load."""
    if extension is None:
        return {"driver": None, "why": "the C++ extension is not built"}
    from pipekern.transport import nvrtc

    nvrtc.preload()
    obstacle = extension.cuda_obstacle()
    if obstacle:
        return {"driver": None, "why": obstacle, "kernels": extension.cuda_kernels()}
    found = extension.cuda_driver()
    devices = found["devices"]
    return {
        "driver": found["version"],
        "kernels": extension.cuda_kernels(),
        "devices": [name for name, _ in devices],
        "waits": ["on the device" if streams else "on the host" for _, streams in devices],
        "peers": [[extension.peer_obstacle(a, b) or "yes" for b in range(len(devices))] for a in range(len(devices))],
    }


def self_test(gpus: int) -> tuple[list[str], str]:
    """A line a link, and what went wrong, if so."""
    from pipekern.transport import probe

    try:
        rows = probe.run(gpus)
    except TransportError as error:
        return [], str(error)
    return [f"{row.link} {row.way}, {row.latency:.1f} µs, {row.bandwidth / 1e9:.1f} GB/s" for row in rows], ""
