"""Bad input gets a ConfigError before anything starts, naming the value, the rule and the mend."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from pipekern.runtime import blueprint
from tests.launch import launch, values
from tests.runtime.step import PLACES, run


def _net(layers: int = 4, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4, dtype=dtype) for _ in range(layers)))


def _options(**changed: Any) -> dict[str, Any]:
    return {"loss_fn": nn.MSELoss(), "microbatches": 4, "ranks": 2} | changed


class Shared(nn.Module):
    """The same BatchNorm in two layers."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), norm) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Reversed(nn.Sequential):
    """Runs its layers from the last to the first."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self):
            x = layer(x)
        return x


class Listless(nn.Module):
    """No layer list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Uncalled(Listless):
    """A layer list that the forward does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.a, self.b])

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def _hooked() -> nn.Sequential:
    net = _net()
    net.register_forward_hook(lambda *_: None)
    return net


def _number() -> Any:
    return 3


BAD = [
    ("more stages than layers", _net(3), {"ranks": 4}, ["3 units", "4 stages", "fewer ranks"]),
    ("more chunks than layers", _net(3), {"chunks": 2, "schedule": "looped-bfs"}, ["3 units", "4 stages", "2 chunks"]),
    ("no layers", nn.Sequential(), {}, ["no layers"]),
    ("no micro-batches", _net(), {"microbatches": 0}, ["microbatches=0", "at least 1"]),
    ("fewer than none", _net(), {"microbatches": -1}, ["microbatches=-1", "at least 1"]),
    ("micro-batches and a half", _net(), {"microbatches": 1.5}, ["microbatches=1.5", "whole number"]),
    ("micro-batches as bool", _net(), {"microbatches": True}, ["microbatches=True", "whole number"]),
    ("unknown schedule", _net(), {"schedule": "1f2b"}, ["'1f2b'", "1f1b"]),
    ("unknown schedule 2", _net(), {"schedule": "interleaved"}, ["'interleaved'", "interleaved-1f1b"]),
    ("chunks of a schedule with one", _net(), {"chunks": 2}, ["chunks=2", "1f1b", "nearest chunks=1"]),
    ("one chunk", _net(), {"chunks": 1, "schedule": "looped-bfs"}, ["chunks=1", "looped-bfs", "nearest chunks=2"]),
    ("no chunk", _net(), {"chunks": 0}, ["chunks=0"]),
    ("micro-batches not divided", _net(), {"microbatches": 5, "schedule": "interleaved-1f1b"}, ["=5", "nearest", "=6"]),
    ("no ranks", _net(), {"ranks": 0}, ["ranks=0", "at least"]),
    ("split of too many", _net(), {"split": [2, 3]}, ["[2, 3]", "all 4 units"]),
    ("split of too few stages", _net(), {"split": [4]}, ["[4]", "2 stages"]),
    ("split with an empty stage", _net(), {"split": [4, 0]}, ["[4, 0]", "at least one"]),
    ("split without stages", _net(), {"split": []}, ["[]", "2 stages"]),
    ("policy", _net(), {"on_nonfinite": "stop"}, ["'stop'", "'raise'", "'skip'"]),
    ("transport", _net(), {"transport": "smh"}, ["'smh'", "'shm'"]),
    ("devices", _net(), {"devices": ["cpu"] * 3}, ["3 entries", "2 ranks"]),
    ("shared state", Shared(), {}, ["BatchNorm1d", "stages 0 and 1", "layers.0.1"]),
    ("a Sequential of its own", Reversed(nn.Linear(4, 4), nn.Linear(4, 4)), {}, ["Reversed", "forward of its own"]),
    ("no layer list", Listless(), {}, ["Listless", "nn.ModuleList"]),
    ("list that is not called", Uncalled(), {}, ["Uncalled", "layers"]),
    ("hooks on the whole", _hooked(), {}, ["hooks", "layers"]),
    ("not a module", lambda x: x, {}, ["function", "nn.Module"]),
    ("specs that build nothing", [pk.LayerSpec(_number)] * 2, {}, ["LayerSpec(_number)", "nn.Module"]),
    ("a list of modules", [nn.Linear(4, 4)] * 2, {}, ["list", "pk.LayerSpec"]),
    ("time", _net(), {"timeout": 0.0}, ["timeout=0.0"]),
    ("two directions", _net(), {"schedule": "chimera"}, ["'chimera'", "one chain", "'1f1b'"]),
    ("slices", _net(), {"schedule": "seq1f1b"}, ["'seq1f1b'", "slices", "'zb-v'"]),
    ("schedule of another size", _net(), {"schedule": pk.schedule.build("1f1b", ranks=2, microbatches=3)}, ["3", "4"]),
]  # fmt: skip


@pytest.mark.parametrize(("module", "options", "parts"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_refused(module: Any, options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(pk.ConfigError) as refusal:
        pk.Pipeline(module, **_options(**options))
    assert [part for part in parts if part not in str(refusal.value)] == [], str(refusal.value)


def test_refused_arguments_of_a_spec() -> None:
    with pytest.raises(pk.ConfigError, match=r"LayerSpec\(3\).*module class"):
        pk.LayerSpec(3)  # type: ignore[arg-type]


def _bad_batches(ranks: int) -> list[str]:
    """What each bad batch raises, each with a pipeline of its own, since among processes an exception closes it."""
    good, texts = torch.randn(8, 4), []
    for x, y in (
        (torch.randn(3, 4), torch.randn(3, 4)),
        (good, torch.randn(7, 4)),
        ((good, torch.randn(2, 4)), good),
        (None, good),
        (good, None),
        (torch.tensor(1.0), good),
        ({"a": 1}, good),
    ):
        with pk.Pipeline(_net(), **_options(ranks=ranks)) as pipe:
            try:
                pipe.train_step(x, y)
                texts.append("")
            except (pk.ConfigError, pk.TransportError) as error:
                texts.append(str(error))
    return texts


@PLACES
def test_bad_batches(processes: bool) -> None:
    """Every rank raises; what is wrong is in the text."""
    parts = [
        ["3 samples", "4 micro-batches", "microbatches=3"],
        ["x has 8", "y has 7"],
        ["x has", "2 and 8"],
        ["x is None"],
        ["y is None"],
        ["x has no tensor"],
        ["x has no tensor"],
    ]
    for texts in run(processes, _bad_batches, 2):
        for text, wanted in zip(texts, parts, strict=True):
            assert [part for part in wanted if part not in text] == [], text


def _disagree(per_rank: list[dict[str, Any]], version: str = "") -> str:
    """The refusal of a rank that has options of its own."""
    rank = int(os.environ["RANK"])
    if version and rank == 1:
        vars(blueprint)["__version__"] = version
    options = dict(per_rank[rank])
    net = _net(options.pop("layers", 4), options.pop("dtype", torch.float32))
    try:
        pk.Pipeline(net, **_options(ranks=None, timeout=20.0) | options)
    except pk.ConfigError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("per_rank", "parts"),
    [
        ([{"schedule": "1f1b"}, {"schedule": "gpipe"}], ["schedule", "1f1b", "gpipe"]),
        ([{"microbatches": 2}, {"microbatches": 3}], ["micro-batches", "2", "3"]),
        ([{}, {"dtype": torch.float64}], ["dtype", "torch.float32", "torch.float64"]),
        ([{"split": [1, 3]}, {"split": [2, 2]}], ["split", "[1, 3]", "[2, 2]"]),
        ([{}, {"layers": 5}], ["parameters"]),
        ([{}, {"seed": 1}], ["seed", "0", "1"]),
        ([{"microbatches": 4}, {"microbatches": 0}], ["microbatches=0"]),
        (
            [{}, {"microbatches": 3, "schedule": "gpipe"}, {"dtype": torch.float64}],
            ["schedule", "1f1b", "gpipe", "micro-batches", "4", "3", "dtype", "torch.float32", "torch.float64"],
        ),
    ],
    ids=["schedule", "microbatches", "dtype", "split", "layers", "seed", "one bad", "three ranks"],
)
def test_ranks_that_disagree(per_rank: list[dict[str, Any]], parts: list[str]) -> None:
    """Every rank raises, with every difference and both values."""
    for text in values(launch(_disagree, len(per_rank), per_rank)):
        assert [part for part in parts if part not in text] == [], text


def test_ranks_of_different_versions() -> None:
    for text in values(launch(_disagree, 2, [{}, {}], "0.0.0")):
        assert "version" in text
        assert "0.0.0" in text
        assert pk.__version__ in text


def _too_many(ranks: int) -> str:
    try:
        pk.Pipeline(_net(), **_options(ranks=ranks))
    except pk.ConfigError as error:
        return str(error)
    return "no error"


def test_ranks_that_the_launcher_did_not_start() -> None:
    for text in values(launch(_too_many, 2, 3)):
        assert "ranks=3" in text
        assert "2 processes" in text


def _different_batches(ranks: int, on: str) -> str:
    torch.manual_seed(int(os.environ["RANK"]))
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    same = torch.ones(8, 4)
    with pk.Pipeline(_net(), **_options(ranks=ranks)) as pipe:
        try:
            pipe.train_step(*((x, same) if on == "x" else (same, y)))
        except pk.TransportError as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("on", ["x", "y"])
def test_ranks_that_are_given_different_batches(on: str) -> None:
    """Labels of another batch at the loss: one rank sees it, both raise."""
    texts = values(launch(_different_batches, 2, 2, on))
    assert any("MessageMismatch" in text for text in texts), texts
    assert all("different batches" in text for text in texts), texts
