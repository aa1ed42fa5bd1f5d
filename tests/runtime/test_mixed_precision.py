"""bf16 and fp16 with float32 masters and main gradients, against the unsplit model in the same precision."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipekern as pk
from tests.launch import launch, values
from tests.runtime import huggingface
from tests.runtime.low_precision import DTYPES, Low, difference
from tests.runtime.models import Batch, Block, Gpt, normalised, token_loss, tokens
from tests.runtime.step import union

MICROBATCHES, SCALE = 4, 256.0


def plain() -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.GELU())), nn.Linear(8, 4))


def dim8(samples: int) -> Batch:
    return Batch(torch.randn(samples, 8), torch.randn(samples, 4))


def dim5(samples: int) -> Batch:
    return Batch(torch.randn(samples, 5), torch.randn(samples, 4))


class Narrow(Block):
    """With a mask that float16 holds."""

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.attend(self.norm(h)).chunk(3, dim=-1)
        h = h + (q @ k.transpose(-1, -2)).masked_fill(~keep, -1e4).softmax(-1) @ v
        return h + self.mix(h)


def gpt(tied: bool) -> Gpt:
    model = Gpt(tied)
    model.blocks = nn.ModuleList(Narrow() for _ in range(6))
    return model


class Kind(NamedTuple):
    """A model, its loss and batches; ``near``: how near the unsplit model's numbers are, divided by the largest.

    Both are the same bits, but where autograd adds up in low precision what a pipeline adds up in float32: the parts of
    a weight that two layers have.
    """

    build: Callable[[], nn.Module]
    loss_fn: Any
    batch: Callable[[int], Batch]
    near: float = 1e-6
    inputs: list[str] | None = None


def gpt2() -> nn.Module:
    model = huggingface.MODELS["gpt-2"].build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


KINDS = {
    "plain": Kind(plain, F.mse_loss, dim8),
    "batchnorm": Kind(normalised, F.mse_loss, dim5),
    "gpt": Kind(lambda: gpt(tied=False), token_loss, tokens),
    "tied": Kind(lambda: gpt(tied=True), token_loss, tokens, near=3e-2),
    "hugging face": Kind(gpt2, huggingface.loss_fn, huggingface.text, near=3e-2),
}


class Case(NamedTuple):
    kind: str
    precision: str = "bf16"
    optimizer: str = "torch"
    schedule: str = "1f1b"
    pp: int = 2
    dp: int = 1
    zero: int = 0
    recompute: str = "none"
    processes: bool = False
    steps: int = 20

    def make_optimizer(self, make: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
        return make(torch.optim.AdamW if self.optimizer == "torch" else pk.optim.AdamW, lr=1e-3)

    def data(self, seed: int) -> list[list[Batch]]:
        """Of each step the batch of each replica, of other sizes."""
        torch.manual_seed(seed + 1)
        sizes = torch.randint(2 * MICROBATCHES, 2 * MICROBATCHES + 3, (self.steps + 2, self.dp)).tolist()
        return [[KINDS[self.kind].batch(size) for size in row] for row in sizes]


class Trained(NamedTuple):
    losses: list[float]
    summed: dict[str, Any]  # gradients after two steps
    final: dict[str, Any]  # parameters after the optimizer's


def _train(case: Case, seed: int) -> Trained:
    kind, replica = KINDS[case.kind], int(os.environ.get("RANK", "0")) // case.pp if case.processes else 0
    torch.manual_seed(seed)
    data = [row[replica] for row in case.data(seed)]
    torch.manual_seed(seed)
    with pk.Pipeline(
        kind.build(), loss_fn=kind.loss_fn, microbatches=MICROBATCHES, ranks=case.pp, precision=case.precision,
        schedule=case.schedule, zero=case.zero, recompute=case.recompute, timeout=30.0,
        loss_scale=pk.optim.LossScale(initial=SCALE) if case.precision == "fp16" else None,
        mesh={"dp": case.dp, "pp": case.pp} if case.processes else None,
    ) as pipe:  # fmt: skip
        losses = [float(pipe.train_step(*batch)) for batch in data[:2]]
        summed = {name: p.grad.clone() for name, p in pipe.named_parameters() if p.grad is not None}
        assert all(grad.dtype is torch.float32 for grad in summed.values())
        assert all(p.dtype is torch.float32 for p in pipe.parameters())
        optimizer = case.make_optimizer(pipe.optimizer)
        for batch in data[2:]:
            optimizer.zero_grad()
            losses.append(float(pipe.train_step(*batch)))
            optimizer.step()
        buffers = {name for name, _ in kind.build().named_buffers()}
        state = pipe.state_dict()
        assert all(value.dtype is torch.float32 for name, value in state.items() if name not in buffers)
        return Trained(losses, summed, {n: v.clone() for n, v in state.items() if n not in buffers})


def _unsplit(case: Case, seed: int) -> Trained:
    kind, data = KINDS[case.kind], case.data(seed)
    torch.manual_seed(seed)
    scale = SCALE if case.precision == "fp16" else 1.0
    low = Low(kind.build(), kind.loss_fn, DTYPES[case.precision], MICROBATCHES, scale)
    losses = [float(low.step(batches)) for batches in data[:2]]
    summed = low.gradients()
    optimizer = case.make_optimizer(lambda cls, **options: cls(low.masters.parameters(), **options))
    for batches in data[2:]:
        optimizer.zero_grad()
        losses.append(float(low.step(batches)))
        optimizer.step()
    return Trained(losses, summed, low.weights())


def _train_all(cases: list[Case], seed: int) -> list[Trained]:
    return [_train(case, seed) for case in cases]


def _prove(cases: list[Case], seed: int) -> None:
    """All of the same place."""
    first = cases[0]
    if first.processes:
        runs = values(launch(_train_all, first.pp * first.dp, cases, seed, timeout=300))
    else:
        runs = [_train_all(cases, seed)]
    for case, *of_case in zip(cases, *runs, strict=True):
        want, near = _unsplit(case, seed), KINDS[case.kind].near
        assert all(run.losses == of_case[0].losses for run in of_case), f"{case}: the ranks' losses differ"
        error = max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(of_case[0].losses, want.losses, strict=True))
        assert error <= near, f"{case}: losses differ by {error:.1e}"
        if not case.zero or not case.processes:
            error = difference(union([run.summed for run in of_case]), want.summed)
            assert error <= near, f"{case}: gradients differ by {error:.1e}"
        error = difference(union([run.final for run in of_case]), want.final)
        assert error <= near, f"{case}: parameters differ by {error:.1e}"


SMALL = ("plain", "batchnorm", "gpt", "tied")
TWENTY = [Case("plain", precision, optimizer) for precision, optimizer in product(DTYPES, ("torch", "pk"))]
ALONE = [
    *(Case(kind, precision, optimizer) for kind, precision, optimizer in product(SMALL[1:], DTYPES, ("torch", "pk"))),
    *(Case(kind, pp=pp) for kind, pp in product(SMALL, (1, 3))),
    *(Case("plain", zero=zero) for zero in (1, 2, 3)),
    *(Case("plain", schedule=s) for s in ("interleaved-1f1b", "gpipe")),
    *(Case(kind, recompute="full") for kind in ("plain", "batchnorm", "tied")),
]


def test_twenty_steps(seed: int) -> None:
    _prove(TWENTY, seed)


def test_in_one_process(seed: int) -> None:
    _prove([case._replace(steps=3) for case in ALONE], seed)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_twenty_steps_of_everything(seed: int) -> None:
    _prove(ALONE, seed)


@pytest.mark.parametrize("precision", DTYPES)
def test_a_model_of_hugging_face(precision: str, seed: int) -> None:
    _prove([Case("hugging face", precision, steps=5)], seed)


@pytest.mark.parametrize("pp", [1, 2, 3])
def test_among_processes(pp: int, seed: int) -> None:
    kinds = ("plain", "batchnorm", "tied") if pp == 2 else ("plain",)
    _prove([Case(kind, p, pp=pp, processes=True, steps=5) for kind, p in product(kinds, DTYPES)], seed)


@pytest.mark.parametrize(("pp", "dp"), [(1, 2), (2, 2)])
def test_replicas(pp: int, dp: int, seed: int) -> None:
    """Every zero; sums over replicas are added to each other last."""
    kinds = [(("plain", "batchnorm"), ("tied", "plain"))[zero % 2] for zero in range(4)]
    cases = [
        Case(kind, pp=pp, dp=dp, zero=zero, processes=True, optimizer=optimizer, steps=10)
        for zero, (pair, optimizer) in enumerate(zip(kinds, ("pk", "torch", "pk", "pk"), strict=True))
        for kind in pair
    ]
    _prove(cases, seed)


def test_put_off_weight_work_is_added_up_in_float32(seed: int) -> None:
    """A product in float32 in place of one rounded to bf16: nearer to the float32 gradient than the unsplit model."""
    case = Case("plain", schedule="zb-h1", steps=0)
    got, low = _train(case, seed), _unsplit(case, seed)
    assert difference(got.summed, low.summed) <= 2e-2


def test_main_gradients_are_float32(seed: int) -> None:
    """1 + 1024 × 1e-3; in bf16 the sum stalls at 1, where a half of its last bit is 4e-3."""
    net = nn.Linear(1, 1, bias=False)
    x = torch.full((1025, 1), 1e-3)
    x[0] = 1.0
    loss_fn = nn.L1Loss(reduction="sum")
    with torch.no_grad():
        net.weight.fill_(1.0)
    with pk.Pipeline(nn.Sequential(net), loss_fn=loss_fn, microbatches=1025, ranks=1, precision="bf16") as pipe:
        pipe.train_step(x, torch.zeros_like(x))
        (grad,) = [p.grad for p in pipe.parameters()]
        assert grad is not None and grad.dtype is torch.float32
        assert abs(float(grad) - 2.024) <= 1e-3
    stalled = torch.ones((), dtype=torch.bfloat16)
    for _ in range(1024):
        stalled += 1e-3
    assert stalled == 1.0


def test_what_is_no_precision() -> None:
    options: dict[str, Any] = {"loss_fn": F.mse_loss, "microbatches": 2, "ranks": 1}
    with pytest.raises(pk.ConfigError, match="precision='fp8'; choose one of None, 'bf16', 'fp16'"):
        pk.Pipeline(plain(), precision="fp8", **options)
    with pytest.raises(pk.ConfigError, match=r"float64; call \.float\(\) on the model"):
        pk.Pipeline(plain().double(), precision="bf16", **options)
    with pytest.raises(pk.ConfigError, match="loss_scale with precision='bf16'"):
        pk.Pipeline(plain(), precision="bf16", loss_scale=pk.optim.LossScale(), **options)
    with pytest.raises(pk.ConfigError, match="zero=4; choose one of 0, 1, 2, 3"):
        pk.Pipeline(plain(), zero=4, **options)
