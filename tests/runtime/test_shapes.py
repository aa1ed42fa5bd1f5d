"""Shapes and dtypes that change from stage to stage and from micro-batch to micro-batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.runtime.step import PLACES, SCHEDULES, check


class Trim(nn.Module):
    """Cuts sequences to the longest of the micro-batch: 0 is padding, at the end."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, : int((tokens != 0).sum(1).max())]


class Pool(nn.Module):
    """The mean over time."""

    def forward(self, h: Tensor) -> Tensor:
        return h.mean(1)


def _trimming() -> nn.Sequential:
    layers = [layer for _ in range(3) for layer in (nn.Linear(5, 5), nn.Tanh())]
    return nn.Sequential(Trim(), nn.Embedding(9, 5), *layers, Pool())


@PLACES
@SCHEDULES
def test_sequence_length_changes_between_micro_batches(processes: bool, schedule: str, seed: int) -> None:
    """The length depends on the data, so that no stage can know it before the message comes."""
    x = torch.randint(1, 9, (12, 30))
    for row in range(12):
        x[row, 1 + 3 * (row // 2) + row % 2 :] = 0
    y = torch.randn(12, 5, dtype=torch.float64)
    options = {"schedule": schedule, "microbatches": 6, "coupled": True}
    check(_trimming, F.mse_loss, x, y, processes=processes, seed=seed, **options)  # type: ignore[arg-type]


class To(nn.Module):
    """Goes on in another dtype."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


class Real(nn.Module):
    """The real and the imaginary part, added."""

    def forward(self, x: Tensor) -> Tensor:
        return x.real + x.imag


def _dtypes() -> nn.Sequential:
    """Between its stages go int64, complex128, float64 and bfloat16, each with gradients of its own dtype."""
    return nn.Sequential(
        nn.Linear(4, 4), To(torch.complex128), nn.Identity(), Real(), nn.Tanh(), To(torch.bfloat16),
        To(torch.float64), nn.Linear(4, 4),
    )  # fmt: skip


@PLACES
@pytest.mark.parametrize("split", [[1, 1, 1, 5], [2, 2, 2, 2], [3, 3, 1, 1], [1, 5, 1, 1]])
def test_dtypes_change_from_stage_to_stage(processes: bool, split: list[int], seed: int) -> None:
    """Activations and gradients of all dtypes are on their way at once, on four stages."""
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    check(_dtypes, F.mse_loss, x, y, processes=processes, seed=seed, ranks=4, split=split)


class Empty(nn.Module):
    """Keeps the rows above 0, of which there may be none, and makes the number of rows whole again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keep = x[:, 0] > 0
        return self.layer(x[keep]), keep


class Fill(nn.Module):
    def forward(self, parts: tuple[Tensor, Tensor]) -> Tensor:
        rows, keep = parts
        return rows.new_zeros(len(keep), 4).masked_scatter(keep[:, None], rows)


def _emptying() -> nn.Sequential:
    return nn.Sequential(Empty(), Fill(), nn.Linear(4, 4), Empty(), Fill(), nn.Tanh())


@PLACES
def test_messages_without_any_rows(processes: bool, seed: int) -> None:
    """As a routed layer gives them: the first and the last micro-batch send tensors of shape (0, 4)."""
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    x[:2, 0] = x[6:, 0] = -1.0
    check(_emptying, F.mse_loss, x, y, processes=processes, seed=seed, ranks=3, split=[1, 3, 2])
