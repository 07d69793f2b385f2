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


def taken(used: Ring, *, needed: int = 100) -> PinnedMemory | None:
    """A slot, made if need be."""
    if used.reserve(needed):
        used.make()
    return used.take()


def leave(used: Ring) -> None:
    for slot in used.made:
        pinned.give_back(slot)


def test_what_was_free_last_is_taken_first_and_nothing_is_made_in_vain(pinner: FakePinner) -> None:
    used = ring(pinner)
    first, second = taken(used), taken(used)
    assert first is not None and second is not None
    assert len(pinner.pinned) == 2
    used.give(first)
    used.give(second)
    assert taken(used) is second and taken(used) is first
    assert used.peak_bytes == sum(pinner.pinned.values()) == 2 * SLOT
    leave(used)
    again = ring(pinner)
    assert {taken(again), taken(again)} == {first, second}
    leave(again)


@pytest.mark.parametrize(("slots", "most", "expected"), [(3, 100, 3), (9, 2, 2), (1, 0, 1)])
def test_the_budget_holds_whoever_takes(pinner: FakePinner, slots: int, most: int, expected: int) -> None:
    used = ring(pinner, slots=slots, most=most)
    turns = threading.Semaphore(200)

    def work() -> None:
        while turns.acquire(blocking=False):
            slot = taken(used)
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
    slot = taken(used)
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
    assert used.reserve(1)
    with pytest.raises(HostError, match="pinning failed"):
        used.make()
    assert used.made == []
    with pytest.raises(ConfigError, match="too few"):
        Ring(SLOT - 1, SLOT, 1, lambda size: pinned.borrow(size, pinner))


def test_beyond_what_is_needed_slots_are_made_one_at_a_time(pinner: FakePinner) -> None:
    used = ring(pinner, slots=5)
    assert [used.reserve(2) for _ in range(4)] == [True, True, False, False]
    used.make()
    used.make()
    assert not used.reserve(2)  # two are free
    used.take()
    used.take()
    assert [used.reserve(2) for _ in range(2)] == [True, False]
    used.make()
    assert used.most == 5 and len(used.made) == 3
    used.take()
    used.end()
    assert not used.reserve(2)
    leave(used)
