"""Real processes with threads: held ones do not run while the chosen one does, and go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.jobs.conftest import eventually

from dormouse.errors import SnapshotError
from dormouse.snapshot.held_threads import held_threads, inner_id, outer_thread, thread_ids

pytestmark = pytest.mark.root

# Each thread counts in shared memory without the others: plain reads of it tell whether a thread runs.
PROGRAM = """
import mmap, os, signal, struct, sys, threading, time
counts = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 4096)
def count(place):
    n = 0
    while True:
        n += 1
        struct.pack_into("q", counts, 8 * place, n)
        time.sleep(0.001)
def at_signal(number, frame):
    struct.pack_into("q", counts, 8 * 20, struct.unpack_from("q", counts, 8 * 20)[0] + 1)
signal.signal(signal.SIGUSR1, at_signal)
threads = [threading.Thread(target=count, args=(place,), daemon=True) for place in range(1, int(sys.argv[2]))]
for thread in threads: thread.start()
print(*[thread.native_id for thread in threads], flush=True)
count(0)
"""


class Counters:
    """A process that counts in several threads; thread 0 is its first."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._file = folder / "counts"
        self._file.write_bytes(bytes(4096))
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self._file), str(threads)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.pid = self.process.pid
        self.threads = [self.pid, *map(int, self.process.stdout.readline().split())]

    def counts(self) -> list[int]:
        data = self._file.read_bytes()
        return [int.from_bytes(data[8 * n : 8 * n + 8], "little") for n in range(len(self.threads))]

    def signals_taken(self) -> int:
        return int.from_bytes(self._file.read_bytes()[160:168], "little")

    def running(self, seconds: float = 0.3) -> list[bool]:
        before = self.counts()
        time.sleep(seconds)
        return [new > old for old, new in zip(before, self.counts(), strict=True)]

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        eventually(lambda: states(self.pid) == {"T"}, "stopped")


def states(pid: int) -> set[str]:
    return {Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()[0] for tid in thread_ids(pid)}


def traced(pid: int) -> bool:
    return any("TracerPid:\t0\n" not in Path(f"/proc/{pid}/task/{tid}/status").read_text() for tid in thread_ids(pid))


@pytest.fixture
def counters(tmp_path: Path) -> Iterator[Counters]:
    made = Counters(tmp_path, 6)
    yield made
    made.process.kill()
    made.process.wait()
    assert made.process.stdout is not None
    made.process.stdout.close()


def test_only_the_chosen_thread_runs_and_all_go_on(counters: Counters) -> None:
    counters.stop()
    assert counters.running() == [False] * 6
    # Not a thread of Python's whose run needs the interpreter's lock from a held one: it was free when all stopped, or
    # the chosen thread could not run. So try until it is.
    for _ in range(20):
        with held_threads({counters.pid: counters.threads[3]}, timeout=5):
            os.kill(counters.pid, signal.SIGCONT)
            running = counters.running()
            assert traced(counters.pid)
        assert not traced(counters.pid)
        assert counters.running() == [True] * 6
        assert running[:3] + running[4:] == [False] * 5
        if running[3]:
            return
        counters.stop()
    raise AssertionError("the chosen thread has never run")


def test_a_process_that_runs_can_be_held_too(counters: Counters) -> None:
    with held_threads({counters.pid: counters.threads[0]}, timeout=5):
        assert counters.running()[1:] == [False] * 5
    assert counters.running() == [True] * 6


def test_without_a_continue_the_process_stays_stopped_afterwards(counters: Counters) -> None:
    counters.stop()
    with held_threads({counters.pid: counters.threads[1]}, timeout=5):
        before = counters.counts()
    eventually(lambda: states(counters.pid) == {"T"}, "stopped again")
    assert counters.counts() == before and not traced(counters.pid)
    os.kill(counters.pid, signal.SIGCONT)
    assert counters.running() == [True] * 6


def test_signals_wait_and_are_taken_afterwards(counters: Counters) -> None:
    counters.stop()
    with held_threads({counters.pid: counters.threads[2]}, timeout=5):
        os.kill(counters.pid, signal.SIGCONT)
        os.kill(counters.pid, signal.SIGUSR1)
        time.sleep(0.3)
        assert counters.signals_taken() == 0
        pending = Path(f"/proc/{counters.pid}/status").read_text().partition("ShdPnd:")[2].split()[0]
        assert int(pending, 16) & 1 << (signal.SIGUSR1 - 1)  # no thread has taken it
    eventually(lambda: counters.signals_taken() == 1, "the signal's handler ran")
    blocked = Path(f"/proc/{counters.pid}/task/{counters.threads[2]}/status").read_text()
    assert "SigBlk:\t0000000000000000" in blocked  # the mask is the thread's own again


def test_a_process_killed_while_it_is_held_is_gone_at_once(counters: Counters) -> None:
    counters.stop()
    with held_threads({counters.pid: counters.threads[1]}, timeout=5):
        os.kill(counters.pid, signal.SIGCONT)
        os.kill(counters.pid, signal.SIGKILL)
        counters.process.wait(5)  # the tracer, which is its parent as well, has taken the exit status


def test_several_processes_are_held_together(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    both = [Counters(tmp_path / "a", 3), Counters(tmp_path / "b", 40)]
    try:
        for one in both:
            one.stop()
        with held_threads({one.pid: one.threads[1] for one in both}, timeout=10):
            for one in both:
                os.kill(one.pid, signal.SIGCONT)
            for one in both:
                running = one.running(0.1)
                assert not any(running[:1] + running[2:])
        assert [one.running(0.5) for one in both] == [[True] * 3, [True] * 40]
    finally:
        for one in both:
            one.process.kill()
            one.process.communicate()


def test_a_process_whose_first_thread_has_ended_can_be_held() -> None:
    program = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=lambda: time.sleep(60)).start()\n"
        "print('up', flush=True)\nctypes.CDLL(None).pthread_exit(None)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        eventually(lambda: "Z" in states(process.pid), "the first thread has ended")
        (other,) = set(thread_ids(process.pid)) - {process.pid}
        with held_threads({process.pid: other}, timeout=5):
            pass
    finally:
        process.kill()
        process.communicate()


def test_a_traced_process_is_a_clear_error_and_nothing_stays_held(counters: Counters) -> None:
    held, done = threading.Event(), threading.Event()

    def other() -> None:
        with held_threads({counters.pid: counters.threads[1]}, timeout=5):
            held.set()
            done.wait(10)

    tracer = threading.Thread(target=other)
    tracer.start()
    held.wait(10)
    with (
        pytest.raises(SnapshotError, match="could not hold the threads"),
        held_threads({counters.pid: counters.threads[2]}, timeout=5),
    ):
        raise AssertionError("held twice")
    done.set()
    tracer.join()
    assert counters.running() == [True] * 6


@pytest.mark.parametrize("die_with_us", [False, True])
def test_when_the_tracer_is_killed_nothing_stays_stopped(counters: Counters, die_with_us: bool) -> None:
    program = (
        "import time, sys\nfrom dormouse.snapshot.held_threads import held_threads\n"
        f"with held_threads({{{counters.pid}: {counters.threads[1]}}}, timeout=5, die_with_us={die_with_us}):\n"
        "    print('held', flush=True)\n    time.sleep(60)"
    )
    tracer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert tracer.stdout is not None
    assert tracer.stdout.readline() == b"held\n"
    assert counters.running()[2:] == [False] * 4
    tracer.kill()
    tracer.communicate()
    if die_with_us:
        assert counters.process.wait(5) == -signal.SIGKILL
    else:
        assert counters.running() == [True] * 6


def test_whatever_goes_wrong_threads_are_not_taken_for_held(
    counters: Counters, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_pid: int) -> list[int]:
        raise ValueError("what nobody thought of")

    monkeypatch.setattr("dormouse.snapshot.held_threads.thread_ids", fails)
    entered = False
    with pytest.raises(SnapshotError, match="nobody thought of"):
        with held_threads({counters.pid: counters.pid}, timeout=5):
            entered = True
    assert not entered


def test_threads_are_found_by_their_ids() -> None:
    me = os.getpid()
    assert me in thread_ids(me) and inner_id(me, me) == me
    assert outer_thread(me, threading.get_native_id()) == threading.get_native_id()
    with pytest.raises(SnapshotError, match="has no thread 1 any more"):
        outer_thread(me, 1)
    with contextlib.closing(Path("/proc/self/status").open()):
        assert thread_ids(2**22 + 1) == []
