"""The optimizer beside ``torch.optim.AdamW`` on float32 masters; ``tests/kernels/test_interpreter.py`` runs this file
over the interpreted kernels, too."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk
from pipekern import ConfigError
from tests.optim.parameters import draw, equal, give, groups, parameters


def test_golden(device: str) -> None:
    """Gradients (3, 4) have the norm 5. The first step moves each value by the learning rate against its gradient."""
    p = nn.Parameter(torch.tensor([1.0, 2.0], device=device))
    optimizer = pk.optim.AdamW([p], lr=0.1, weight_decay=0.5, max_norm=1.0)
    p.grad = grad = torch.tensor([3.0, 4.0], device=device)
    optimizer.step()
    assert p.tolist() == pytest.approx([1 * 0.95 - 0.1, 2 * 0.95 - 0.1], rel=1e-6)
    assert (optimizer.norm.item(), optimizer.norm.dim(), optimizer.norm.device) == (5.0, 0, p.device)
    optimizer.zero_grad()
    assert p.grad is grad
    assert grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("max_norm", [None, 0.5, 200.0])
def test_twenty_steps_as_torch(max_norm: float | None, device: str) -> None:
    """Groups, a schedule of the learning rate, clipping, and gradients that are None in some steps."""
    ours = parameters(device)
    theirs = copy.deepcopy(ours)
    pairs = (pk.optim.AdamW(groups(ours), lr=1e-2, max_norm=max_norm), torch.optim.AdamW(groups(theirs), lr=1e-2))
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, [1e-2, 2e-2], total_steps=25) for o in pairs]
    chance = random.Random(3)
    for _ in range(20):
        grads = [grad if chance.random() < 0.7 else None for grad in draw(ours, chance.choice((0.01, 1.0, 10.0)))]
        for own in (ours, theirs):
            give(own, grads)
        norm = nn.utils.clip_grad_norm_(theirs, max_norm or math.inf)
        for optimizer, schedule in zip(pairs, schedules, strict=True):
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(pairs[0].norm, norm, rtol=1e-6, atol=0)
        equal(ours, theirs)
    for a, b in zip(ours, theirs, strict=True):
        own, other = pairs[0].state[a], pairs[1].state[b]
        assert int(own["step"]) == int(other["step"]) < 20
        torch.testing.assert_close(own["exp_avg_sq"], other["exp_avg_sq"], rtol=1e-5, atol=1e-9)


def test_a_group_is_added(device: str) -> None:
    ours = parameters(device)
    theirs = copy.deepcopy(ours)
    pairs = (pk.optim.AdamW(ours[:3], lr=1e-2), torch.optim.AdamW(theirs[:3], lr=1e-2))
    for step in range(4):
        if step == 2:
            pairs[0].add_param_group({"params": ours[3:], "lr": 1e-3})
            pairs[1].add_param_group({"params": theirs[3:], "lr": 1e-3})
        grads = draw(ours)
        give(ours, grads)
        give(theirs, grads)
        for optimizer in pairs:
            optimizer.step()
    equal(ours, theirs)


def test_a_closure_and_hooks(device: str) -> None:
    """The closure runs with gradients on, between the hooks that torch calls around a step."""
    p = nn.Parameter(torch.ones(3, device=device))
    optimizer = pk.optim.AdamW([p])
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        seen.append("closure")
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert seen == ["before", "closure", "after"]
    assert optimizer.norm.item() == pytest.approx(math.sqrt(12))


def test_zero_grad_after_a_step_and_without_one(device: str) -> None:
    """It leaves what a step has zeroed; gradients that were made since go the way of torch's."""
    own = parameters(device)
    optimizer = pk.optim.AdamW(own)
    optimizer.zero_grad()  # nothing is there
    give(own, draw(own))
    kept = [p.grad for p in own]
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is grad for p, grad in zip(own, kept, strict=True))
    sum(p.sum() for p in own).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.eq(1).all() for p in own)
    optimizer.zero_grad()
    assert all(p.grad is None for p in own)


def test_bound_to_other_ranks_and_to_copies(device: str) -> None:
    """One norm with rows that others own, and copies that are the masters rounded, also where they are not for all."""
    own = parameters(device)
    start = [p.detach().clone() for p in own]
    copies = {p: torch.full_like(p, math.nan, dtype=torch.bfloat16) for p in own[1:]}
    optimizer = pk.optim.AdamW(own, max_norm=1.0)
    asked: list[list[nn.Parameter]] = []

    def share(stats: Tensor, having: list[nn.Parameter]) -> Tensor:
        asked.append(having)
        assert [row[0] for row in stats.tolist()] == pytest.approx(
            [p.grad.square().sum().item() for p in having if p.grad is not None], rel=1e-5
        )
        return torch.cat((torch.tensor([[1e6, 0.0]], device=device), stats))

    optimizer.bind(share, copies)
    grads = draw(own)
    give(own, [None, *grads[1:]])
    optimizer.step()
    assert asked == [own[1:]]
    total = math.sqrt(1e6 + sum(grad.square().sum().item() for grad in grads[1:]))
    assert optimizer.norm.item() == pytest.approx(total, rel=1e-6)
    moment = optimizer.state[own[3]]["exp_avg"]
    torch.testing.assert_close(moment, grads[3] * 0.1 / total, rtol=1e-5, atol=0)
    assert torch.equal(own[0], start[0])
    assert all(torch.equal(low, p.to(torch.bfloat16)) for p, low in copies.items())


def test_without_parameters_others_are_asked_all_the_same() -> None:
    """A stage may have none; the norm is that of the others."""
    optimizer = pk.optim.AdamW([{"params": []}])
    optimizer.bind(lambda stats, having: torch.cat((stats, torch.tensor([[4.0, 0.0]]))), {})
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.norm.item() == 2.0


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_not_finite_skips_all(value: float, elsewhere: bool, device: str) -> None:
    """Whether it is this rank's or another's: parameters, moments and copies stay, no step counts."""
    own = parameters(device)
    copies = {p: p.detach().half() for p in own}
    optimizer = pk.optim.AdamW(own)
    bad = torch.tensor([[value**2, 1.0]], device=device)
    optimizer.bind(lambda stats, _: torch.cat((stats, bad)) if elsewhere else stats, copies)
    grads = draw(own)
    if not elsewhere:
        grads[3][17] = value
    before = [p.detach().clone() for p in own]
    give(own, grads)
    optimizer.step()
    assert not optimizer.norm.isfinite()
    assert all(map(torch.equal, own, before))
    assert all(torch.equal(low, p.half()) for p, low in copies.items())
    for p in own:
        assert [int(optimizer.state[p]["step"]), bool(optimizer.state[p]["exp_avg"].any())] == [0, False]
        assert p.grad is not None
        assert not p.grad.any()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_scaled_gradients_of_parameters_of_any_kind(kind: torch.dtype, device: str) -> None:
    """Divided by the scale as they are read: clipped and moved as float32 masters with the same gradients."""
    own = parameters(device, kind)
    masters = [nn.Parameter(p.detach().float()) for p in own]
    ours, theirs = pk.optim.AdamW(own, lr=1e-2, max_norm=0.7), torch.optim.AdamW(masters, lr=1e-2)
    ours.grad_scale = torch.tensor([1024.0], device=device)
    grads = [grad.to(kind) for grad in draw(own, 1024.0)]
    give(own, grads)
    give(masters, [grad.float() / 1024 for grad in grads])
    norm = nn.utils.clip_grad_norm_(masters, 0.7)
    ours.step()
    theirs.step()
    torch.testing.assert_close(ours.norm, norm, rtol=1e-5, atol=0)
    for p, master in zip(own, masters, strict=True):
        assert ours.state[p]["exp_avg"].dtype == torch.float32
        torch.testing.assert_close(ours.state[p]["exp_avg"], theirs.state[master]["exp_avg"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(p.detach(), master.detach().to(kind), rtol=torch.finfo(kind).eps, atol=1e-6)


def test_parameters_of_several_kinds_have_one_norm(device: str) -> None:
    own = [nn.Parameter(torch.ones(4, device=device, dtype=kind)) for kind in (torch.bfloat16, torch.float32)]
    own.append(nn.Parameter(torch.ones(9, device=device, dtype=torch.bfloat16)))
    optimizer = pk.optim.AdamW(own, max_norm=1.0)
    order: list[float] = []

    def share(stats: Tensor, having: list[nn.Parameter]) -> Tensor:
        order.extend(stats[:, 0].tolist())
        return stats

    optimizer.bind(share, {})
    give(own, [torch.full_like(p, 2.0) for p in own])
    optimizer.step()
    assert order == [16.0, 16.0, 36.0]  # in the order of the parameters, not of the launches
    assert optimizer.norm.item() == pytest.approx(math.sqrt(68))


def test_rounded_at_random(device: str) -> None:
    """Steps of an eighth of the last place: their mean is kept, and another run has the same bits."""
    results = []
    for _ in range(2):
        p = nn.Parameter(torch.ones(6000, device=device, dtype=torch.bfloat16))
        optimizer = pk.optim.AdamW([p], lr=2.0**-11, weight_decay=0.0, stochastic_rounding=True)
        for _ in range(3):
            p.grad = torch.ones_like(p)
            optimizer.step()
        results.append(p.detach().clone())
    assert torch.equal(*results)
    deviation = 2.0**-8 * math.sqrt(3 * 1 / 8 * 7 / 8 / 6000)
    assert results[0].double().mean().item() == pytest.approx(1 - 3 * 2.0**-11, abs=5 * deviation)


def test_with_torchs_gradient_scaler(device: str) -> None:
    """``torch.amp.GradScaler`` finds an overflow, does not step, and halves its scale."""
    p = nn.Parameter(torch.ones(4, device=device))
    optimizer = pk.optim.AdamW([p], lr=0.1, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    for factor, value, scale in ((1.0, 0.9, 4.0), (math.inf, 0.9, 2.0), (1.0, 0.8, 2.0)):
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert p.tolist() == pytest.approx([value] * 4)
        assert scaler.get_scale() == scale


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": torch.tensor(1.0)}, "lr is tensor"),
        ({"lr": math.nan}, "lr is nan"),
        ({"eps": -1e-8}, "eps is"),
        ({"weight_decay": math.inf}, "weight_decay is inf"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"betas": (0.9,)}, "two numbers"),
        ({"max_norm": 0.0}, "max_norm is 0.0"),
        ({"max_norm": math.nan}, "max_norm is nan"),
        ({"stochastic_rounding": True}, "leave it out"),
    ],
)
def test_refused(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        pk.optim.AdamW([nn.Parameter(torch.ones(2))], **options)


def test_parameters_and_gradients_that_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"float64.*use torch\.optim\.AdamW"):
        pk.optim.AdamW([nn.Parameter(torch.ones(2).double())])
    optimizer = pk.optim.AdamW([p := nn.Parameter(torch.ones(2))])
    with pytest.raises(ConfigError, match="lr is -2"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -2})
    assert len(optimizer.param_groups) == 1
    p.grad = torch.ones(2).to_sparse()
    with pytest.raises(ConfigError, match="sparse=False"):
        optimizer.step()
    assert p.tolist() == [1.0, 1.0]
