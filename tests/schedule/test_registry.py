from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from pipekern.errors import ConfigError
from pipekern.schedule import Action, Grid, build, describe, names, registry


@pytest.fixture(autouse=True)
def own_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


def test_golden_own_schedule() -> None:
    @registry.register("mine")
    def mine(grid: Grid) -> Iterator[Iterable[Action]]:
        for rank in range(grid.ranks):
            yield [Action("F", rank, i) for i in range(grid.microbatches)]

    schedule = build("mine", ranks=2, microbatches=2)
    assert str(schedule).splitlines()[1:] == ["0F0 0F1", "1F0 1F1"]
    assert "mine" in names()
    with pytest.raises(ConfigError, match="'mine' is in use"):
        registry.register("mine")(mine)


def test_two_directions_pairs_and_a_cap() -> None:
    @registry.register(
        "two",
        placement=lambda grid: [*range(grid.ranks), *reversed(range(grid.ranks))],
        chains=2,
        synchronous=False,
    )
    def two(grid: Grid) -> Iterator[Iterable[Action | tuple[Action, Action]]]:
        assert grid.memory == 2
        yield [Action("F", 0, 0), (Action("F", 1, 1), Action("BW", 0, 0)), Action("BW", 1, 1)]

    schedule = build("two", ranks=1, microbatches=2, memory=2)
    assert str(schedule).splitlines() == [
        "pipekern-schedule name=two microbatches=2 stage_rank=0,0 chains=2 asynchronous",
        "0F0 1F1&0BW0 1BW1",
    ]


@pytest.mark.parametrize("name", names())
def test_description_agrees_with_what_is_built(name: str) -> None:
    entry, schedule = describe(name), build(name, ranks=2, microbatches=4)
    for what in ("synchronous", "duplicates_weights", "runnable"):
        assert getattr(entry, what) == getattr(schedule, what), what


def test_placements() -> None:
    grid = Grid(3, 1, 2, None)
    assert registry.loop(grid) == [0, 1, 2, 0, 1, 2]
    assert registry.zigzag(grid) == registry.opposed(grid) == [0, 1, 2, 2, 1, 0]
    assert list(registry.in_order(grid)) == [0, 1, 2]


def test_zigzag() -> None:
    assert registry.zigzag(Grid(3, 1, 3, None)) == [0, 1, 2, 2, 1, 0, 0, 1, 2]


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("1f1", {}, r"schedule='1f1' is not known; nearest: 1f1b"),
        ("interleaved", {}, "nearest: zb-interleaved, interleaved-1f1b"),
        ("gpipe", {"ranks": 0}, "ranks=0: gpipe needs at least 1; nearest ranks=1"),
        ("gpipe", {"microbatches": 0}, "microbatches=0: gpipe needs at least 1; nearest microbatches=1"),
        ("1f1b", {"chunks": 2}, "chunks=2: 1f1b needs exactly 1 a rank; nearest chunks=1"),
        ("looped-bfs", {"chunks": 1}, "chunks=1: looped-bfs needs at least 2 a rank; nearest chunks=2"),
        ("1f1b", {"memory": 3}, "memory=3: 1f1b holds 4 activations .* nearest memory=4"),
        ("interleaved-1f1b", {"microbatches": 5}, "microbatches=5: .* multiple of ranks=4; nearest microbatches=4"),
        ("interleaved-1f1b", {"microbatches": 7}, "nearest microbatches=8"),
        ("interleaved-1f1b", {"microbatches": 1}, "nearest microbatches=4"),
    ],
)
def test_wrong_combination(name: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, **{"ranks": 4, "microbatches": 8} | sizes)
