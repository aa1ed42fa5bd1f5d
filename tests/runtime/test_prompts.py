"""Prompts in groups of one length."""

from __future__ import annotations

import random

import pytest
import torch

from pipekern.runtime.prompts import Group, divide, join


def test_golden() -> None:
    """Three prompts of length 5 and one of length 2, for two ranks, and for three."""
    assert divide([5, 2, 5, 5], wanted=2) == [[0, 2, 3], [1]]
    assert divide([5, 2, 5, 5], wanted=3) == [[0, 2], [3], [1]]
    assert divide([5, 2, 5, 5], wanted=9) == [[0], [2], [3], [1]]


@pytest.mark.parametrize("wanted", [1, 2, 3, 5, 8])
def test_every_prompt_is_in_one_group_of_its_length(wanted: int, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(50):
        lengths = [draw.randint(1, 4) for _ in range(draw.randint(1, 12))]
        groups = divide(lengths, wanted)
        assert sorted(prompt for group in groups for prompt in group) == list(range(len(lengths)))
        assert all(len({lengths[prompt] for prompt in group}) == 1 for group in groups)
        assert len(groups) == max(min(wanted, len(lengths)), len(set(lengths)))


def test_an_end_fills_the_row() -> None:
    """After its end (9) the second row takes no more tokens; the group has finished when all rows have ended."""
    rows = [torch.tensor([1, 2]), torch.tensor([9, 4])]
    group = Group(0, [1, 0], rows, 3, 9)
    group.add(torch.tensor([5, 9]))
    group.add(torch.tensor([9, 7]))
    assert group.finished
    assert group.tokens[:, : group.length].tolist() == [[1, 2, 5, 9], [9, 4, 9, 9]]
    assert [text.tolist() for text in join([group], rows, 9)] == [[9, 4, 9], [1, 2, 5, 9]]
    assert join([group], torch.stack(rows), 9).tolist() == [[9, 4, 9, 9], [1, 2, 5, 9]]
