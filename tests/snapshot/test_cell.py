"""Cells: what is inside sees its own world, and nothing is left of it afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dormouse.errors import SnapshotError
from dormouse.snapshot.cell import Cell, Spawned, descendants, worker_pid_floor

pytestmark = pytest.mark.root

SAY = "import socket; control = socket.socket(fileno=3); control.send(repr({}).encode()); control.recv(1)"


@pytest.fixture
def cell() -> Iterator[Cell]:
    made = Cell.create()
    yield made
    made.close()


def ask(cell: Cell, expression: str, imports: str = "import os") -> tuple[Spawned, str]:
    """What an expression is worth inside the cell."""
    spawned = cell.spawn(
        [sys.executable, "-c", f"{imports}; {SAY.format(expression)}"], env={}, control=3, pid_floor=worker_pid_floor()
    )
    assert spawned.control is not None
    with spawned.control:
        return spawned, spawned.control.recv(10_000).decode()


def test_a_worker_has_a_high_pid_its_own_session_and_only_its_descriptors(cell: Cell) -> None:
    spawned, seen = ask(cell, "(os.getpid(), os.getsid(0), sorted(os.listdir('/proc/self/fd'))[:4])")
    assert spawned.pid > 10_000
    assert seen == repr((spawned.pid, spawned.pid, ["0", "1", "2", "3"]))


def test_loopback_answers_and_the_host_network_is_not_there(cell: Cell) -> None:
    listen = "s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname())"
    _spawned, seen = ask(
        cell, "[os.path.basename(n) for _, n in socket.if_nameindex()]", f"import os, socket; {listen}"
    )
    assert seen == "['lo']"


def test_exit_codes_and_signals_are_told_apart(cell: Cell) -> None:
    assert cell.wait(cell.spawn(["/bin/sh", "-c", "exit 7"], env={}).pid, 10) == 7
    sleeper = cell.spawn(["/bin/sleep", "60"], env={})
    assert cell.wait(sleeper.pid, 0.05) is None
    os.kill(cell.outer_pid(sleeper.pid), signal.SIGKILL)
    assert cell.wait(sleeper.pid, 10) == -signal.SIGKILL


def test_a_program_that_is_not_there_exits_with_127(cell: Cell) -> None:
    assert cell.wait(cell.spawn(["/no/such/program"], env={}).pid, 10) == 127


def test_closing_kills_everything_and_is_idempotent() -> None:
    cell = Cell.create()
    sleeper = cell.spawn(["/bin/sh", "-c", "/bin/sleep 60 & /bin/sleep 60"], env={})
    pids = [cell.outer_pid(sleeper.pid), *cell.processes()]
    cell.close()
    cell.close()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    with pytest.raises(SnapshotError, match="the cell failed"):
        cell.spawn(["/bin/true"], env={})


def test_the_cell_ends_when_its_owner_is_killed() -> None:
    program = (
        "import sys, time; from dormouse.snapshot.cell import Cell; c = Cell.create();"
        "s = c.spawn(['/bin/sleep', '60'], env={}); print(c.outer_pid(s.pid), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        sleeper = int(owner.stdout.readline())
        owner.kill()
    for _ in range(200):
        if not Path(f"/proc/{sleeper}").exists():
            return
        time.sleep(0.02)
    pytest.fail("the sleeper outlived its owner")


def test_descendants_are_found_while_others_come_and_go() -> None:
    churn = subprocess.Popen(["bash", "-c", "while :; do /bin/true & /bin/true & wait; done"])
    try:
        assert all(churn.pid in descendants(os.getpid()) for _ in range(2000))
    finally:
        churn.kill()
        churn.wait()
