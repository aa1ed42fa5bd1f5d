"""The codec of each link: what the user says, or what a measured bandwidth asks for."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import pipekern as pk
from pipekern.runtime import codecs
from pipekern.transport import probe
from tests.launch import launch, values
from tests.transport import fake_cuda


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))


def _costs(time: float) -> pk.LayerCosts:
    """Of four layers, each ``time`` µs and with 1 MB of output."""
    each, nothing = (time / 3,) * 4, (0.0,) * 4
    names = tuple(map(str, range(4)))
    kept, added = ((0.0,) * 3,) * 4, ((0.0,) * 3,) * 4
    return pk.LayerCosts(names, each, each, each, kept=kept, added=added, waiting=nothing, outputs=(1e6,) * 4)


def _pipeline(**options: Any) -> pk.Pipeline:
    return pk.Pipeline(_net(), loss_fn=nn.MSELoss(), microbatches=4, **options)


@pytest.mark.parametrize("time", [50.0, 150.0, 300.0])
def test_golden(time: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message of 1 MB takes 100 µs at 10 GB/s, 50 in bf16, 26 in fp8; at 2.5 GB/s four times that.

    Gradients travel over the slower link here, and are to be hidden by the two layers of a stage.
    """
    monkeypatch.setattr(codecs, "choose", lambda *_: "cuda")
    speeds = {"0>1": 10e9, "1>0": 2.5e9}

    def between(pairs: dict[tuple[int, int], float], *_: Any) -> list[probe.Measured]:
        assert pairs == {(0, 1): 1e6, (1, 0): 1e6}
        return [probe.Measured(name, "ipc", 0.0, speed) for name, speed in speeds.items()]

    monkeypatch.setattr(probe, "between", between)
    with _pipeline(ranks=2) as pipe:
        options: Any = SimpleNamespace(codec="auto", split=_costs(time), transport="auto")
        found = codecs.link_codecs(options, pipe._parts.blueprint, [[0, 1]], [], None)
    expected = {50.0: ("none", "fp8"), 150.0: ("none", "bf16"), 300.0: ("none", "none")}
    assert found == dict(zip(speeds, expected[time], strict=True))


def test_the_slowest_of_several_pipelines_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas wait for each other; in bf16 a message has half of the bytes that were measured."""
    monkeypatch.setattr(codecs, "choose", lambda *_: "cuda")
    speeds = {"0>2": 10e9, "2>0": 10e9, "1>3": 10e9, "3>1": 2e9}
    rows = [probe.Measured(name, "ipc", 0.0, speed) for name, speed in speeds.items()]
    monkeypatch.setattr(probe, "between", lambda pairs, *_: rows)
    for precision, slow in (None, "bf16"), ("bf16", "none"):
        with _pipeline(ranks=2, precision=precision) as pipe:
            options: Any = SimpleNamespace(codec="auto", split=_costs(126.0), transport="auto")
            found = codecs.link_codecs(options, pipe._parts.blueprint, [[0, 2], [1, 3]], [], None)
        assert found == {"0>1": "none", "1>0": slow}


def _auto(processes: int, time: float) -> tuple[dict[str, str], dict[str, str], str]:
    """All codecs, those of this process's senders, and what the driver has not got back."""
    leaks = fake_cuda.load("fake-cuda")
    if processes == 1:
        del os.environ["RANK"]
    time *= 1 + int(os.environ.get("RANK", "0"))  # what ranks measure differs, and they take the first one's
    where = {"transport": "cuda", "devices": ["cpu"], "ranks": 2}
    with _pipeline(codec="auto", split=_costs(time), **where) as pipe:
        pipe.train_step(torch.randn(8, 256), torch.randn(8, 256))
        found, used = (
            pipe.codecs,
            {name: end.link.codec for name, end in pipe._parts.senders.items() if name in pipe.codecs},
        )
    del pipe
    return dict(found), used, leaks()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("time", "codec"), [(0.0, "fp8"), (1e9, "none")])
def test_ranks_measure_and_agree(processes: int, time: float, codec: str) -> None:
    fake_cuda.library()
    senders: dict[str, str] = {}
    for found, used, leaks in values(launch(_auto, processes, processes, time)):
        assert found == {"0>1": codec, "1>0": codec} and leaks == ""
        senders |= used
    assert senders == found


def _by_link() -> dict[str, str]:
    fake_cuda.load("fake-cuda")
    del os.environ["RANK"]
    with _pipeline(codec={"0>1": "bf16"}, transport="cuda", devices=["cpu"], ranks=2) as pipe:
        pipe.train_step(torch.randn(8, 256), torch.randn(8, 256))
        return {name: pipe._parts.senders[name].link.codec for name in pipe.codecs}


def test_link_by_link() -> None:
    fake_cuda.library()
    assert values(launch(_by_link, 1)) == [{"0>1": "bf16", "1>0": "none"}]


def _on_the_cpu(transport: str) -> dict[str, str]:
    with _pipeline(codec="auto", transport=transport) as pipe:
        pipe.train_step(torch.randn(8, 256), torch.randn(8, 256))
        return dict(pipe.codecs)


def test_on_the_cpu_nothing_is_cast() -> None:
    with _pipeline(codec="auto", ranks=3) as pipe:
        assert pipe.codecs == dict.fromkeys(["0>1", "1>0", "1>2", "2>1"], "none")
    assert values(launch(_on_the_cpu, 2, "shm")) == [{"0>1": "none", "1>0": "none"}] * 2


@pytest.mark.parametrize(
    ("codec", "text"),
    [
        ({"0>2": "bf16"}, "codec names 0>2; the links between stages are 0>1, 1>0"),
        ({"0>1": "auto"}, "codec='auto'; choose one of 'none', 'bf16', 'fp8'$"),
        ({"0>1": "bf16"}, "the transport here is 'local', and only 'cuda' casts"),
    ],
)
def test_refused(codec: dict[str, str], text: str) -> None:
    with pytest.raises(pk.ConfigError, match=text):
        _pipeline(codec=codec, ranks=2)


def test_without_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "choose", lambda *_: "cuda")
    monkeypatch.setattr(codecs, "hosts", lambda _: frozenset())
    with pytest.raises(pk.ConfigError, match=r"give split=pk.profile\(module, x\)"):
        _pipeline(codec="auto", ranks=2)


def _apart() -> str:
    try:
        _pipeline(codec="auto" if os.environ["RANK"] == "0" else "none").close()
    except pk.ConfigError as error:
        return str(error)
    return "nothing"


def test_ranks_with_different_codecs() -> None:
    for text in values(launch(_apart, 2)):
        assert 'codec: "auto" on rank 0, but "none" on rank 1' in text
