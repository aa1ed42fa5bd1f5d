"""The control board, with two ranks in this process; what real failures do is in test_faults.py."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest
from torch.distributed import DistNetworkError, DistStoreError, HashStore, PrefixStore  # type: ignore[attr-defined]

from pipekern.errors import Aborted, PeerDied, PeerFrozen, TransportError, TransportTimeout
from pipekern.transport import control as control_module
from pipekern.transport.control import Control

PATIENCE = 20.0


@pytest.fixture
def pair() -> Iterator[list[Control]]:
    store = HashStore()
    both = [Control(PrefixStore("job", store), rank, 2, 60.0, host=None) for rank in range(2)]
    for one in both:
        one.start({})
    yield both
    for one in both:
        one.leave()


def failure_of(control: Control) -> TransportError:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            control.check()
        except TransportError as error:
            return error
        time.sleep(0.005)
    raise AssertionError("no failure came")


def test_golden(pair: list[Control]) -> None:
    try:
        raise ValueError("seven")
    except ValueError as error:
        pair[0].abort(error, "rank 0, stage 0, micro-batch 2, instruction 5 (F)")
    for one in pair:
        found = failure_of(one)
        assert type(found) is Aborted and found.rank == 0
        assert str(found).startswith("rank 0 failed at rank 0, stage 0, micro-batch 2, instruction 5 (F)\nTraceback")
        assert str(found).endswith("ValueError: seven\n")


@pytest.mark.parametrize("cls", [PeerDied, PeerFrozen, TransportTimeout])
def test_a_judgement_on_another_rank_is_passed_on_as_it_is(pair: list[Control], cls: type[TransportError]) -> None:
    pair[1].abort(cls("rank 5 is the one", 5), "rank 1")
    for one in pair:
        error = failure_of(one)
        assert type(error) is cls and error.rank == 5 and "rank 5 is the one" in str(error)


def test_losing_a_rank_that_has_left_is_no_failure(pair: list[Control]) -> None:
    pair[1].leave()
    pair[0].lost(1, "connection closed")
    pair[0].check()
    assert pair[0].left(1)
    with pytest.raises(TransportError, match="has closed this transport"):
        pair[1].check()


def test_losing_a_rank_that_had_not_left_is_its_death(pair: list[Control]) -> None:
    pair[0].lost(1, "connection closed")
    with pytest.raises(PeerDied, match="rank 1 has died: connection closed"):
        pair[0].check()


def test_the_abort_word_explains_a_loss(pair: list[Control]) -> None:
    pair[1].abort(ValueError("the cause"), "rank 1")
    pair[0].lost(1, "connection closed")
    with pytest.raises(Aborted, match="the cause"):
        pair[0].check()


def test_a_long_wait_for_live_ranks_is_logged(
    pair: list[Control], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "_LOG_EVERY", 0.2)
    deadline = time.monotonic() + PATIENCE
    with caplog.at_level(logging.WARNING, "pipekern.transport"):
        while len(caplog.messages) < 2 and time.monotonic() < deadline:
            pair[0].blocked("link '1>0' from rank 1")
            pair[0].check()
            time.sleep(0.01)
    assert "rank 0 has waited 0 s for link '1>0' from rank 1; the other ranks are alive" in caplog.messages[0]


def test_tracebacks_are_cut_at_their_start(pair: list[Control]) -> None:
    pair[0].abort(ValueError("x" * 100_000 + "the end"), "rank 0")
    error = failure_of(pair[1])
    assert len(str(error)) < 40_000 and str(error).rstrip().endswith("the end")


class Unreachable(HashStore):
    """A store that can be written at first, and then fails."""

    error: Exception | None = None

    def multi_get(self, keys: list[str]) -> list[bytes]:
        if self.error is not None:
            raise self.error
        return super().multi_get(keys)


@pytest.mark.parametrize(
    ("host", "error", "kind"),
    [
        (0, DistNetworkError("connection reset"), PeerDied),
        (0, DistStoreError("wait timeout after 100ms"), PeerFrozen),
        (None, DistNetworkError("connection reset"), Aborted),
    ],
)
def test_a_store_that_is_gone(host: int | None, error: Exception, kind: type[TransportError]) -> None:
    board = Unreachable()
    board.set("abort", "-")
    one = Control(board, 1, 2, 60.0, host)
    board.set("state/0", '[0, 0, "", false, false]')
    one.start({})
    board.error = error
    found = failure_of(one)
    assert type(found) is kind and found.rank == (-1 if host is None else host)
    one.leave()
