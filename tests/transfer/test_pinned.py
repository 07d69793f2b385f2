"""Pinned memory between loads: so much is kept and no more, and the end of a process is quiet."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.transfer.fake_gpu import FakePinner

from dormouse.transfer import pinned

MB = 1 << 20


@pytest.fixture
def pinner(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePinner]:
    pinned.free_pinned()
    monkeypatch.setattr(pinned, "KEPT_BYTES", 8 * MB)
    pinner = FakePinner()
    yield pinner
    pinned.free_pinned()
    assert not pinner.pinned


def test_what_was_longest_unused_makes_room_whatever_its_size(pinner: FakePinner) -> None:
    small, medium, large = [pinned.borrow(size * MB, pinner) for size in (1, 3, 5)]
    for memory in (medium, small, large):
        pinned.give_back(memory)
    assert pinned.idle_bytes() == sum(pinner.pinned.values()) == 6 * MB
    assert {pinned.borrow(MB, pinner), pinned.borrow(5 * MB, pinner)} == {small, large}
    pinned.give_back(large)
    pinned.give_back(small)


def test_a_block_that_is_larger_than_what_is_kept_goes_at_once(pinner: FakePinner) -> None:
    pinned.give_back(pinned.borrow(9 * MB, pinner))
    assert pinned.idle_bytes() == 0 and not pinner.pinned


FORKS = """
import os, sys
from dormouse.transfer import pinned

class Pinner:
    parent = os.getpid()

    def pin(self, address, size):
        pass

    def unpin(self, address):
        if os.getpid() != self.parent:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        print("unpinned")

pinned.give_back(pinned.borrow(1 << 20, Pinner()))
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
else:
    assert pinned.idle_bytes() == 0
"""


def test_a_forked_child_ends_without_a_word() -> None:
    ended = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "unpinned\n", "")
