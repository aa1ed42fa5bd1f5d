from __future__ import annotations

import pytest

from pipekern.errors import ConfigError
from pipekern.schedule.rules import at_least, multiple


def test_golden() -> None:
    with pytest.raises(ConfigError, match=r"^microbatches=3: mine needs at least 4; nearest microbatches=4$"):
        at_least("mine", "microbatches", 3, 4)
    with pytest.raises(
        ConfigError, match=r"^microbatches=9: mine needs a multiple of ranks=4; nearest microbatches=8$"
    ):
        multiple("mine", "microbatches", 9, 4, "ranks")


@pytest.mark.parametrize(("value", "nearest"), [(1, 4), (2, 4), (5, 4), (6, 8), (7, 8), (9, 8), (10, 12)])
def test_nearest_multiple_is_never_zero(value: int, nearest: int) -> None:
    with pytest.raises(ConfigError, match=f"a multiple of 4; nearest ranks={nearest}$"):
        multiple("mine", "ranks", value, 4)


def test_what_keeps_the_rule_passes() -> None:
    at_least("mine", "ranks", 4, 4)
    multiple("mine", "ranks", 8, 4)


def test_not_a_number_keeps_no_rule() -> None:
    with pytest.raises(ConfigError, match="memory=nan"):
        at_least("mine", "memory", float("nan"), 1)
