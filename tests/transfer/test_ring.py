"""Slots of pinned memory: no more than are needed at once, never more than the budget, and all of them come back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue

import pytest
from tests.transfer.fake_gpu import FakePinner

from dormouse.errors import ConfigError, HostError
from dormouse.transfer import pinned
from dormouse.transfer.pinned import PinnedMemory
from dormouse.transfer.ring import Ring

SLOT = 64 << 10


@pytest.fixture
def pinner() -> Iterator[FakePinner]:
    pinned.free_pinned()
    pinner = FakePinner()
    yield pinner
    pinned.free_pinned()
    assert not pinner.pinned


def ring(pinner: FakePinner, *, slots: int = 4, most: int = 100) -> Ring:
    return Ring(slots * SLOT + 1000, SLOT, most, lambda size: pinned.borrow(size, pinner))


def leave(used: Ring) -> None:
    for slot in used.made:
        pinned.give_back(slot)


def test_what_was_free_last_is_taken_first_and_nothing_is_made_in_vain(pinner: FakePinner) -> None:
    used = ring(pinner)
    first, second = used.take(), used.take()
    assert first is not None and second is not None
    assert len(pinner.pinned) == 2
    used.give(first)
    used.give(second)
    assert used.take() is second and used.take() is first
    assert used.peak_bytes == sum(pinner.pinned.values()) == 2 * SLOT
    leave(used)
    again = ring(pinner)
    assert {again.take(), again.take()} == {first, second}
    leave(again)


@pytest.mark.parametrize(("slots", "most", "expected"), [(3, 100, 3), (9, 2, 2), (1, 0, 1)])
def test_the_budget_holds_whoever_takes(pinner: FakePinner, slots: int, most: int, expected: int) -> None:
    used = ring(pinner, slots=slots, most=most)
    turns = threading.Semaphore(200)

    def work() -> None:
        while turns.acquire(blocking=False):
            slot = used.take()
            assert slot is not None
            slot.view[0] += 0
            used.give(slot)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= len(pinner.pinned) <= expected
    leave(used)


def test_who_waits_gets_a_slot_or_the_end(pinner: FakePinner) -> None:
    used = ring(pinner, slots=1)
    slot = used.take()
    assert slot is not None
    found: SimpleQueue[PinnedMemory | None] = SimpleQueue()
    threads = [threading.Thread(target=lambda: found.put(used.take())) for _ in range(2)]
    for thread in threads:
        thread.start()
    used.give(slot)
    assert found.get(timeout=10) is slot
    used.end()
    assert found.get(timeout=10) is None
    for thread in threads:
        thread.join()
    leave(used)


def test_a_slot_that_can_not_be_made(pinner: FakePinner) -> None:
    pinner.fails = True
    used = ring(pinner)
    with pytest.raises(HostError, match="pinning failed"):
        used.take()
    assert used.made == []
    with pytest.raises(ConfigError, match="too few"):
        Ring(SLOT - 1, SLOT, 1, lambda size: pinned.borrow(size, pinner))
