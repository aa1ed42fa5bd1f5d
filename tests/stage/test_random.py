"""Keys of random numbers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipekern.stage.random import layer_key, mix, preserved, step_key, unit_keys

WORDS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5)


def test_golden() -> None:
    """The first number of splitmix64 from state 0, as its author publishes it, without its last bit."""
    assert mix(0) == 0xE220A8397B1DCDAF >> 1


@given(WORDS)
def test_a_key_seeds_a_generator(words: list[int]) -> None:
    assert mix(*words) == mix(*words)
    torch.Generator().manual_seed(mix(*words) ^ step_key(words[0], 3))  # raises for what does not fit


@given(WORDS, st.integers(0, 4), st.integers(0, 63))
def test_every_bit_of_every_word_counts(words: list[int], place: int, bit: int) -> None:
    other = list(words)
    other[place % len(words)] ^= 1 << bit
    assert mix(*words) != mix(*other)


def test_no_two_keys_of_a_large_job_are_equal() -> None:
    """Units, micro-batches and steps, with the weights' keys, under one seed."""
    keys = {layer_key(7, index) for index in range(200)}
    units = unit_keys(7, range(50), range(200))
    for step in range(20):
        keys |= {key ^ step_key(7, step) for row in units for key in row}
    assert len(keys) == 200 + 20 * 50 * 200


def test_keys_of_a_stage_are_those_of_its_units() -> None:
    """Whatever the split: units 3 to 5 have the same keys in a stage of their own as in the whole model."""
    whole, part = unit_keys(1, range(4), range(8)), unit_keys(1, range(4), range(3, 6))
    assert part == [row[3:6] for row in whole]


def test_preserved_gives_the_state_back_after_an_exception_too() -> None:
    device = torch.device("cpu")
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    try:
        with preserved([device, device]):
            torch.manual_seed(99)
            torch.rand(7)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.rand(4), want)
