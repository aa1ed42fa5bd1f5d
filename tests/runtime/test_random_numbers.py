"""Dropout's masks are keyed by (seed, step, micro-batch, layer): no schedule or split changes them."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.runtime.step import PLACES, run


class Record(nn.Module):
    """Dropout that keeps a copy of every mask, by the micro-batch that its input is marked with."""

    def __init__(self, masks: list[tuple[int, int, Tensor]], position: int):
        super().__init__()
        self.masks, self.position = masks, position

    def forward(self, x: Tensor) -> Tensor:
        mask = F.dropout(torch.ones_like(x[:, 1:]), 0.5, self.training)
        self.masks.append((self.position, int(x[0, 0].item()), mask.detach().clone()))
        return torch.cat([x[:, :1], x[:, 1:] * mask * self.scale], 1)

    scale = 1.0


def _masks(ranks: int, schedule: str, seed: int) -> tuple[list[tuple[int, int, Tensor]], bool]:
    """All masks of two steps, and whether the user's own random numbers went on undisturbed."""
    masks: list[tuple[int, int, Tensor]] = []
    model = nn.Sequential(*(Record(masks, position) for position in range(8)))
    x = torch.cat([torch.arange(4.0).repeat_interleave(2)[:, None], torch.ones(8, 3)], 1)
    before = torch.get_rng_state()
    with pk.Pipeline(model, loss_fn=F.mse_loss, microbatches=4, ranks=ranks, schedule=schedule, seed=seed) as pipe:
        pipe.train_step(x, x)
        pipe.train_step(x, x)
        training = len(masks)
        pipe.eval_step(x, x)
    assert all((mask == 1).all() for _, _, mask in masks[training:]), "dropout in evaluation"
    return masks[:training], torch.equal(before, torch.get_rng_state())


def _by_key(results: list[tuple[list[tuple[int, int, Tensor]], bool]]) -> dict[tuple[int, int, int], Tensor]:
    """Masks by (step, micro-batch, layer)."""
    found: dict[tuple[int, int, int], Tensor] = {}
    for masks, _ in results:
        seen: dict[tuple[int, int], int] = {}
        for position, microbatch, mask in masks:
            step = seen.get((position, microbatch), 0)
            seen[position, microbatch] = step + 1
            found[step, microbatch, position] = mask
    return found


@PLACES
def test_masks_do_not_depend_on_ranks_schedule_or_chunks(processes: bool, seed: int) -> None:
    want = _by_key([_masks(1, "gpipe", seed)])
    assert sorted(want) == list(product(range(2), range(4), range(8)))
    different = {tuple(mask.flatten().tolist()) for mask in want.values()}
    assert len(different) > 20, "64 masks of six bits must not repeat so often"
    for ranks, schedule in ((2, "1f1b"), (2, "interleaved-1f1b"), (4, "looped-bfs"), (4, "gpipe")):
        results = run(processes, _masks, ranks, schedule, seed)
        assert all(untouched for _, untouched in results), "the user's random numbers were disturbed"
        got = _by_key(results)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want), (ranks, schedule)


def test_masks_change_with_the_seed(seed: int) -> None:
    one, two = (_by_key([_masks(2, "1f1b", s)]) for s in (seed, seed + 1))
    assert sum(not torch.equal(one[key], two[key]) for key in one) > len(one) // 2


def _dropping() -> list[pk.LayerSpec]:
    layer = [
        pk.LayerSpec(nn.Linear, 4, 4),
        pk.LayerSpec(nn.Dropout, 0.3),
        pk.LayerSpec(nn.Tanh),
        pk.LayerSpec(nn.Dropout),
    ]
    return [pk.LayerSpec(nn.Linear, 4, 4), *layer, *layer]


def _verified(ranks: int, schedule: str, seed: int) -> tuple[float, float]:
    torch.manual_seed(seed)
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    with pk.Pipeline(_dropping(), loss_fn=F.mse_loss, microbatches=4, ranks=ranks, schedule=schedule) as pipe:
        loss = pipe.train_step(x, y)
        found = pk.verify(pipe, x, y)
        assert max(found.max_error, found.loss_error) < 1e-5
        return loss.item(), pipe.train_step(x, y).item()


@PLACES
def test_training_with_dropout_gives_the_same_losses_everywhere(processes: bool, seed: int) -> None:
    """And the unsplit model with the same keys has the same gradients."""
    want = _verified(1, "gpipe", seed)
    for ranks, schedule in ((2, "1f1b"), (2, "looped-bfs"), (3, "gpipe")):
        assert run(processes, _verified, ranks, schedule, seed) == [want] * (ranks if processes else 1)
