"""Real processes through real CRIU with a driver that only says it moves GPU state: order, stops, and failures."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.jobs.conftest import eventually
from tests.snapshot.fake_cuda import FakeDriver, lives, never

from dormouse.errors import HostError, IncompatibleError, SnapshotError
from dormouse.snapshot.capture import PROCESS_KIND, CaptureResult, capture, run_on
from dormouse.snapshot.cell import Cell, worker_pid_floor
from dormouse.snapshot.criu_setup import Criu
from dormouse.snapshot.cuda_checkpoint import Cuda, Limits
from dormouse.snapshot.held_threads import thread_ids
from dormouse.snapshot.images import ImageFile, decode_body
from dormouse.snapshot.mapped_files import DigestCache
from dormouse.snapshot.restore import Restored, restore
from dormouse.snapshot.tree import ProcessTree
from dormouse.store.store import Store
from dormouse.transfer.ingest import Ingest

pytestmark = pytest.mark.root

LIMITS = Limits(lock=2, memory=2, call=2, grace=1)
# Two processes, each with three threads that count for ever in memory of their own; the child does as its parent. The
# first threads make a file again and again.
PROGRAM = """
import os, sys, threading, time
counts = [0] * 3
def count(place):
    while True:
        counts[place] += 1
        if not place: os.close(os.open(sys.argv[1], os.O_CREAT | os.O_RDWR))
        time.sleep(0.002)
os.fork()
for place in (1, 2): threading.Thread(target=count, args=(place,), daemon=True).start()
count(0)
"""


class Host:
    """Captures and restores trees on a fake driver."""

    def __init__(self, store: Store, criu: Criu, folder: Path) -> None:
        self.store, self.criu = store, criu
        self.digests, self.folders = DigestCache(folder / "digests"), folder / "criu"
        self.sign = folder / "sign"
        self.driver = FakeDriver()
        self.cuda = Cuda(driver=lambda: self.driver, uses_gpu=lambda pid: pid > 0, limits=LIMITS)
        self.cells: list[Cell] = []

    def start(self) -> ProcessTree:
        cell = Cell.create()
        self.cells.append(cell)
        spawned = cell.spawn(
            [sys.executable, "-c", PROGRAM, str(self.sign)],
            env={},
            pid_floor=worker_pid_floor(),
            cwd="/",
            io_uring=False,
        )
        tree = ProcessTree(cell, spawned.pid)
        eventually(lambda: [len(thread_ids(pid)) for pid in cell.processes()] == [3, 3], "two processes of 3 threads")
        return tree

    def capture(self, tree: ProcessTree, **more: Any) -> CaptureResult:
        return capture(
            tree,
            self.store,
            more.pop("criu", self.criu),
            kind=PROCESS_KIND,
            name="counters",
            key=more.pop("key", {"machine": "here"}),
            now=time.time,
            still_wanted=more.pop("still_wanted", lambda: True),
            timeout=60,
            digests=self.digests,
            folders=self.folders,
            cuda=self.cuda,
            **more,
        )

    def restore(self, snapshot_id: str, key: dict[str, str] | None = None) -> Restored:
        cell = Cell.create()
        self.cells.append(cell)
        return restore(
            snapshot_id,
            self.store,
            self.criu,
            key={"machine": "here"} if key is None else key,
            take_home=lambda: cell,
            timeout=60,
            digests=self.digests,
            folders=self.folders,
            inherit=(),
            cuda=self.cuda,
        )

    def close(self) -> None:
        for cell in self.cells:
            cell.close()


@pytest.fixture
def host(store: Store, criu: Criu, tmp_path: Path) -> Iterator[Host]:
    made = Host(store, criu, tmp_path)
    yield made
    made.close()


def state_of(pid: int, tid: int) -> str:
    return Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()[0]


def ticks(pid: int) -> int:
    """Context switches of all threads: of one that counts there are ever more."""
    total = 0
    for tid in thread_ids(pid):
        with contextlib.suppress(FileNotFoundError):
            text = Path(f"/proc/{pid}/task/{tid}/status").read_text()
            total += sum(int(line.split()[1]) for line in text.splitlines() if "ctxt_switches" in line)
    return total


def assert_runs(pids: Sequence[int]) -> None:
    assert len(pids) == 2
    before = [ticks(pid) for pid in pids]
    time.sleep(0.2)
    assert all(ticks(pid) > old + 20 for pid, old in zip(pids, before, strict=True))
    assert not {state_of(pid, tid) for pid in pids for tid in thread_ids(pid)} & {"T", "t"}


def test_gpu_state_is_in_memory_when_criu_dumps_and_comes_back_before_any_other_thread_runs(host: Host) -> None:
    tree = host.start()
    pids = tree.home.processes()
    dumped: list[set[str]] = []

    def attach(_ingest: Ingest) -> list[ImageFile]:
        dumped.append({host.driver.states[pid] for pid in pids})
        return []

    captured = host.capture(tree, attach=attach)
    assert dumped == [{"checkpointed"}]
    assert {"cuda lock", "cuda checkpoint", "dump"} <= captured.phases.seconds().keys()
    body = decode_body(host.store.manifest(captured.snapshot_id).body, captured.snapshot_id)
    assert body.cuda is not None and len(body.cuda.processes) == 2
    assert body.cuda.processes[0].pid == tree.pid and "cuda lock" in body.phases.seconds()
    tree.home.close()

    seen: list[tuple[str, set[str], int]] = []

    def watch(call: str, pid: int) -> None:
        if call in ("restore", "unlock"):
            states = {tid: state_of(pid, tid) for tid in thread_ids(pid)}
            held = [tid for tid, state in states.items() if state == "t"]
            before = sum_of(pid, held)
            time.sleep(0.1)
            assert sum_of(pid, held) == before
            seen.append((call, set(states.values()), len(states) - len(held)))

    host.driver = FakeDriver(first="checkpointed")
    host.driver.watch = watch
    restored = host.restore(captured.snapshot_id)
    assert [call for call, _states, _free in seen] == ["restore", "restore", "unlock", "unlock"]
    assert all(free == 1 for _call, _states, free in seen)
    assert host.driver.gpus == [{}, {}]
    assert "cuda restore" in restored.phases.seconds()
    assert_runs(restored.tree.home.processes())
    host.driver.watch = lambda _call, _pid: None
    again = host.capture(restored.tree)  # a restored one can be captured in turn
    run_on(restored.tree, again)
    assert set(host.driver.states.values()) == {"running"}
    assert_runs(restored.tree.home.processes())


def sum_of(pid: int, tids: Sequence[int]) -> int:
    total = 0
    for tid in tids:
        text = Path(f"/proc/{pid}/task/{tid}/status").read_text()
        total += sum(int(line.split()[1]) for line in text.splitlines() if "ctxt_switches" in line)
    return total


def fail_in_attach(_ingest: Ingest) -> list[ImageFile]:
    raise SnapshotError("something in the middle")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"attach": fail_in_attach}, "something in the middle"),
        ({"still_wanted": lambda: False}, "was given up"),
        ({"criu_options": ["--no-such-option"]}, "criu could not dump"),
    ],
)
def test_after_a_failure_in_the_middle_all_runs_on_with_its_gpu_state(
    host: Host, more: dict[str, Any], words: str
) -> None:
    tree = host.start()
    with pytest.raises(SnapshotError, match=words):
        host.capture(tree, **more)
    assert set(host.driver.states.values()) == {"running"}
    assert [verb for verb, _pid in host.driver.calls if verb != "state"][-2:] == ["restore", "unlock"]
    assert_runs(tree.home.processes())
    assert host.store.manifests(kind=PROCESS_KIND) == []


def test_a_device_file_that_the_driver_leaves_open_is_named_and_all_runs_on(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = host.start()
    monkeypatch.setattr("dormouse.snapshot.cuda_checkpoint.devices", lambda _pid: {"/dev/nvidiactl"})
    with pytest.raises(SnapshotError, match="still has /dev/nvidiactl open"):
        host.capture(tree)
    assert set(host.driver.states.values()) == {"running"}
    assert_runs(tree.home.processes())


def test_a_refusal_by_the_driver_is_told_and_nothing_was_stopped(host: Host) -> None:
    tree = host.start()
    second = tree.home.processes()[1]
    host.driver.fails["checkpoint", second] = "CUDA_ERROR_NOT_SUPPORTED"
    with pytest.raises(SnapshotError, match=f"could not checkpoint process {second}: it uses what"):
        host.capture(tree)
    assert_runs(tree.home.processes())


def test_a_driver_that_hangs_at_a_capture_takes_the_tree_along(host: Host) -> None:
    tree = host.start()
    host.driver.hangs["checkpoint", tree.home.processes()[0]] = never
    with pytest.raises(SnapshotError, match="did not checkpoint"):
        host.capture(tree)
    assert tree.home.processes() == []


@pytest.mark.parametrize("verb", ["restore", "unlock"])
@pytest.mark.parametrize("how", ["fails", "hangs", "killed"])
def test_after_a_failure_at_a_restore_nothing_is_left(host: Host, verb: str, how: str) -> None:
    tree = host.start()
    captured = host.capture(tree)
    tree.home.close()
    host.driver = FakeDriver(first="checkpointed")

    def at(call: str, pid: int) -> None:
        if call == verb and how == "fails":
            host.driver.fails[verb, pid] = "CUDA_ERROR_OUT_OF_MEMORY"
        elif call == verb and how == "hangs":
            host.driver.hangs[verb, pid] = never
        elif call == verb and lives(pid):
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: not lives(pid), "killed")

    host.driver.watch = at
    host.sign.unlink()
    begin = time.monotonic()
    with pytest.raises((SnapshotError, HostError), match=f"{verb}"):
        host.restore(captured.snapshot_id)
    assert not host.sign.exists(), "a thread of the program has run without its GPU state"
    assert host.cells[-1].processes() == [] and time.monotonic() - begin < 20


def test_a_snapshot_with_gpu_state_needs_the_same_gpu_and_driver(host: Host) -> None:
    tree = host.start()
    captured = host.capture(tree, key={"machine": "here", "gpu": "NVIDIA H200", "gpu_driver": "580.1"})
    tree.home.close()
    with pytest.raises(IncompatibleError, match="gpu: captured with NVIDIA H200"):
        host.restore(captured.snapshot_id)
    with pytest.raises(IncompatibleError, match=r"gpu_driver: captured with 580\.1, here is 580\.2"):
        host.restore(captured.snapshot_id, {"machine": "here", "gpu": "NVIDIA H200", "gpu_driver": "580.2"})


def test_a_snapshot_without_gpu_state_does_not_ask_for_a_gpu(host: Host) -> None:
    tree = host.start()

    def load() -> FakeDriver:
        raise AssertionError

    host.cuda = replace(host.cuda, uses_gpu=lambda _pid: False, driver=load)
    captured = host.capture(tree)
    tree.home.close()
    body = decode_body(host.store.manifest(captured.snapshot_id).body, captured.snapshot_id)
    assert body.cuda is None and "cuda lock" not in body.phases.seconds()
    assert_runs(host.restore(captured.snapshot_id).tree.home.processes())


IO_URING = """
import ctypes, pathlib, sys, time
libc = ctypes.CDLL(None, use_errno=True)
said = pathlib.Path(sys.argv[1])
while True:
    words = f"{libc.syscall(425, 8, ctypes.create_string_buffer(200))} {ctypes.get_errno()}"
    said.with_suffix(".new").write_text(words)
    said.with_suffix(".new").rename(said)
    time.sleep(0.05)
"""


def test_io_uring_is_denied_before_and_after_a_restore(host: Host, tmp_path: Path) -> None:
    host.cuda = replace(host.cuda, uses_gpu=lambda _pid: False)
    cell = Cell.create()
    host.cells.append(cell)
    said = tmp_path / "said"
    spawned = cell.spawn(
        [sys.executable, "-c", IO_URING, str(said)], env={}, pid_floor=worker_pid_floor(), io_uring=False
    )
    eventually(said.exists, "it has spoken")
    assert said.read_text() == "-1 38"
    captured = host.capture(ProcessTree(cell, spawned.pid))
    cell.close()
    said.unlink()
    restored = host.restore(captured.snapshot_id)
    eventually(said.exists, "it has spoken again")
    assert said.read_text() == "-1 38"
    (pid,) = restored.tree.home.processes()
    assert "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()


def test_a_program_is_not_denied_io_uring_where_nobody_asked_for_that() -> None:
    cell = Cell.create()
    try:
        spawned = cell.spawn(["/bin/sleep", "60"], env={})
        assert "Seccomp:\t0" in Path(f"/proc/{cell.outer_pid(spawned.pid)}/status").read_text()
    finally:
        cell.close()
