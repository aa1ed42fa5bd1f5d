"""Lazy layer specs, and what a rank keeps of a module that is whole."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.launch import launch, values
from tests.runtime.models import Gpt
from tests.runtime.step import PLACES, run, union

SAMPLES = 4


class Counted(nn.Linear):
    """Counts the copies that were built with memory."""

    built: list[int] = []  # noqa: RUF012

    def __init__(self, position: int):
        super().__init__(6, 6)
        if not self.weight.is_meta:
            Counted.built.append(position)


def _build(ranks: int, seed: int) -> tuple[list[int], dict[str, Tensor], bool]:
    Counted.built.clear()
    before = torch.get_rng_state()
    specs = [pk.LayerSpec(Counted, position) for position in range(6)]
    with pk.Pipeline(specs, loss_fn=F.mse_loss, microbatches=2, ranks=ranks, seed=seed) as pipe:
        pipe.train_step(torch.ones(SAMPLES, 6), torch.ones(SAMPLES, 6))
        state = {name: value.clone() for name, value in pipe.state_dict().items()}
    return list(Counted.built), state, torch.equal(before, torch.get_rng_state())


@PLACES
def test_a_rank_builds_only_its_own_layers(processes: bool, seed: int) -> None:
    """Each layer is built once in the whole job, with the same bits on any number of ranks."""
    first: dict[str, Tensor] = {}
    for ranks in (1, 2, 3):
        results = run(processes, _build, ranks, seed)
        built = [positions for positions, _, _ in results]
        assert sorted(position for positions in built for position in positions) == list(range(6))
        if processes:
            assert [len(positions) for positions in built] == [6 // ranks] * ranks
        assert all(untouched for _, _, untouched in results), "the user's random numbers were disturbed"
        state = union([state for _, state, _ in results])
        assert list(state) == [f"{position}.{kind}" for position in range(6) for kind in ("weight", "bias")]
        first = first or state
        assert all(torch.equal(state[name], first[name]) for name in first)


def test_weights_of_specs_depend_on_the_seed_and_the_position() -> None:
    specs = [pk.LayerSpec(nn.Linear, 6, 6) for _ in range(2)]
    with (
        pk.Pipeline(specs, loss_fn=F.mse_loss, microbatches=1, ranks=2, seed=1) as one,
        pk.Pipeline(specs, loss_fn=F.mse_loss, microbatches=1, ranks=2, seed=2) as two,
    ):
        weights = [pipe.state_dict()[f"{i}.weight"] for pipe in (one, two) for i in (0, 1)]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def _memory(ranks: int) -> tuple[set[str], set[str]]:
    """The names of the parameters whose memory lives on, and of those that this rank owns."""
    model = Gpt(tied=False)
    memory = {name: weakref.ref(p) for name, p in model.named_parameters()}
    with pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=2, ranks=ranks) as pipe:
        gc.collect()
        alive = {name for name, ref in memory.items() if (p := ref()) is not None and not p.is_meta}
        return alive, {name for name, _ in pipe.named_parameters()}


def test_the_memory_of_other_ranks_layers_is_freed() -> None:
    results = values(launch(_memory, 2, 2))
    for alive, owned in results:
        assert alive == owned
    assert results[0][1] | results[1][1] == {name for name, _ in Gpt(tied=False).named_parameters()}
    assert not results[0][1] & results[1][1]
