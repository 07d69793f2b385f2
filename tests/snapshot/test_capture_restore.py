"""Real workers through real CRIU: what comes back is what fell asleep, and no failure loses it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.snapshot.attached import AttachedWorker
from tests.snapshot.conftest import make_null_model

from dormouse.checkpoint.loader import Loader, loader_command
from dormouse.data_dir import DataDir
from dormouse.engine.frames import pack_frame
from dormouse.engine.messages import Segments
from dormouse.errors import (
    DamagedError,
    DiskFullError,
    DormouseError,
    HostError,
    IncompatibleError,
    NotFoundError,
    SnapshotError,
)
from dormouse.snapshot import service_main
from dormouse.snapshot import service_messages as messages
from dormouse.snapshot.capture import capture
from dormouse.snapshot.cell import Cell, Spawned
from dormouse.snapshot.criu_setup import Criu
from dormouse.snapshot.hands import NO_HANDS
from dormouse.snapshot.mapped_files import DigestCache
from dormouse.snapshot.service_main import Service, rotate_log, worker_environment
from dormouse.store.store import Store

pytestmark = pytest.mark.root

KEY = {"kernel": "this one"}
STEPS = ["begin", "pack written", "pack named", "manifest written", "manifest named", "index written"]
COMMITTED = ("manifest named", "index written")


class Host:
    """The service's calls, made directly. With the `data` folder that the store is in there is a real loader, which
    runs once something is on a GPU."""

    def __init__(self, store: Store, criu: Criu, log: Path, data: Path | None = None) -> None:
        self.loader = Loader(loader_command(data or log.parent, 0))
        digests = DigestCache(log.parent / "digests")
        self.service = Service(
            *(store, criu, digests, log.parent / "criu"), keep_bytes=0, loader=self.loader, hands=NO_HANDS
        )
        self.log = log
        self.cells: list[str] = []
        self.workers: list[AttachedWorker] = []

    def start(self, model: Path) -> tuple[messages.Started, AttachedWorker]:
        started, fds = self.service.answer(messages.StartWorker(call=1, log_path=str(self.log)))
        assert isinstance(started, messages.Started)
        worker = self.attach(started, fds, fresh=True)
        worker.load(model, engine="null")
        return started, worker

    def capture(self, started: messages.Started) -> messages.Captured:
        request = messages.CaptureWorker(call=2, cell_id=started.cell_id, kind="snapshot", model="m", key=KEY)
        captured, _none = self.service.answer(request)
        assert isinstance(captured, messages.Captured)
        return captured

    def restore(
        self, snapshot_id: str, key: dict[str, str] = KEY, **weights: str
    ) -> tuple[messages.Started, AttachedWorker]:
        """`weights`: checkpoint and device."""
        request = messages.RestoreSnapshot(call=3, snapshot_id=snapshot_id, key=key, **weights)
        started, fds = self.service.answer(request)
        assert isinstance(started, messages.Started)
        worker = self.attach(started, fds, fresh=False)
        worker.resume()
        return started, worker

    def attach(self, started: messages.Started, fds: list[int], *, fresh: bool) -> AttachedWorker:
        self.cells.append(started.cell_id)
        control, *of_segments = fds
        worker = AttachedWorker(socket.socket(fileno=control), self.log, fresh=fresh)
        self.workers.append(worker)
        if started.segments:
            frame = pack_frame(Segments(segments=started.segments))
            socket.send_fds(worker.socket, [frame], of_segments)
            for descriptor in of_segments:
                os.close(descriptor)
        return worker

    def stop(self, started: messages.Started) -> None:
        self.service.answer(messages.StopCell(call=4, cell_id=started.cell_id))

    def close(self) -> None:
        for cell_id in self.cells:
            self.service.answer(messages.StopCell(call=5, cell_id=cell_id))
        for worker in self.workers:
            worker.close()
        self.service.close()
        self.loader.close()


@pytest.fixture
def store(data_dir: DataDir) -> Iterator[Store]:
    with Store.open(data_dir.store) as opened:
        yield opened


@pytest.fixture
def host(store: Store, criu: Criu, tmp_path: Path) -> Iterator[Host]:
    made = Host(store, criu, tmp_path / "worker.log")
    yield made
    made.close()


def test_a_worker_wakes_with_the_same_answer_and_sleeps_again(host: Host, store: Store, null_model: Path) -> None:
    started, worker = host.start(null_model)
    text = worker.answer()
    worker.quiesce()
    captured = host.capture(started)
    assert not Path(f"/proc/{started.pid}").exists()
    assert captured.raw_bytes > 24 << 20
    assert 0 < captured.stored_bytes < captured.raw_bytes
    for _ in range(2):
        restored, worker = host.restore(captured.snapshot_id)
        assert worker.answer() == text
        worker.quiesce()
        captured = host.capture(restored)
    assert len(store.manifests(kind="snapshot", name="m")) == 3
    assert store.verify().ok


def test_io_uring_is_denied_to_workers_before_and_after_a_restore(host: Host, null_model: Path) -> None:
    started, worker = host.start(null_model)
    assert "Seccomp:\t2" in Path(f"/proc/{started.pid}/status").read_text()
    worker.quiesce()
    restored, _worker = host.restore(host.capture(started).snapshot_id)
    assert "Seccomp:\t2" in Path(f"/proc/{restored.pid}/status").read_text()


def test_two_replicas_of_one_snapshot_run_at_once(host: Host, null_model: Path) -> None:
    started, worker = host.start(null_model)
    text = worker.answer()
    worker.quiesce()
    captured = host.capture(started)
    first, one = host.restore(captured.snapshot_id)
    second, two = host.restore(captured.snapshot_id)
    assert first.pid != second.pid
    assert one.answer() == two.answer() == text
    host.stop(first)
    assert two.answer() == text


def test_secrets_of_the_environment_do_not_reach_a_worker() -> None:
    seen = worker_environment({"DORMOUSE_API_KEYS": "secret", "PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "x"}, 7)
    assert "secret" not in seen.values() and "x" not in seen.values()
    assert seen["PATH"] == "/bin"


@pytest.mark.parametrize("step", STEPS[:5])
def test_a_capture_that_fails_at_any_step_leaves_the_worker_as_it_was(
    data_dir: DataDir, criu: Criu, tmp_path: Path, null_model: Path, step: str
) -> None:
    def fail(reached: str) -> None:
        if reached == step and armed:
            raise SnapshotError(f"injected at {step}")

    armed: list[bool] = []
    with Store.open(data_dir.store, checkpoint=fail) as store:
        host = Host(store, criu, tmp_path / "worker.log")
        started, worker = host.start(null_model)
        text = worker.answer()
        worker.quiesce()
        armed.append(True)
        with pytest.raises(SnapshotError, match="injected"):
            host.capture(started)
        armed.clear()
        worker.resume()
        assert worker.answer() == text
        assert store.manifests() == []
        worker.quiesce()
        _restored, worker = host.restore(host.capture(started).snapshot_id)
        assert worker.answer() == text
        host.close()


def test_a_full_disk_ends_the_capture_with_a_clear_error_and_nothing_else(
    data_dir: DataDir, criu: Criu, tmp_path: Path, null_model: Path
) -> None:
    data_dir.store.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m,mode=700", "tmpfs", str(data_dir.store)], check=True)
    try:
        with Store.open(data_dir.store) as store:
            host = Host(store, criu, tmp_path / "worker.log")
            started, worker = host.start(null_model)
            text = worker.answer()
            worker.quiesce()
            with pytest.raises(DiskFullError, match="free"):
                host.capture(started)
            worker.resume()
            assert worker.answer() == text
            assert store.manifests() == []
            assert store.verify().ok
            host.close()
    finally:
        subprocess.run(["umount", str(data_dir.store)], check=True)


@pytest.mark.parametrize("step", STEPS)
def test_kill_9_of_the_service_at_any_step_loses_at_most_the_uncommitted_snapshot(
    data_dir: DataDir, criu: Criu, tmp_path: Path, null_model: Path, step: str
) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from dormouse.snapshot.criu_setup import find_criu; from dormouse.store.store import Store\n"
        "from tests.snapshot.test_capture_restore import Host\n"
        "store_path, root, log, model, step = sys.argv[1:]\n"
        "armed = []\n"
        "def die(reached):\n"
        "    if armed and reached == step: os.kill(os.getpid(), signal.SIGKILL)\n"
        "host = Host(Store.open(Path(store_path), checkpoint=die), find_criu(Path(root)), Path(log))\n"
        "started, worker = host.start(Path(model)); print(started.pid, worker.answer(), flush=True); worker.quiesce()\n"
        "armed.append(True); host.capture(started)\n"
    )
    arguments = [str(data_dir.store), str(data_dir.root), str(tmp_path / "log"), str(null_model), step]
    done = subprocess.run([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    pid, text = done.stdout.strip().split(maxsplit=1)
    gone_within(10, lambda: not Path(f"/proc/{pid}").exists())
    with Store.open(data_dir.store) as store:
        assert store.verify().ok
        rows = store.manifests()
        assert len(rows) == (step in COMMITTED)
        assert not list(data_dir.store.rglob("*.tmp"))
        if rows:
            host = Host(store, criu, tmp_path / "log")
            _restored, worker = host.restore(rows[0].id)
            assert worker.answer().strip() == text
            host.close()


def gone_within(seconds: float, gone: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not gone():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_snapshots_of_one_engine_with_different_models_share_pages(host: Host, tmp_path: Path) -> None:
    stored = []
    for name, megabytes in (("one", 6), ("two", 3)):
        started, worker = host.start(make_null_model(tmp_path / name, memory_mb=megabytes))
        worker.quiesce()
        stored.append(host.capture(started).stored_bytes)
    own = 1 << 20  # of the second model's three MiB one is noise, the others compress
    assert stored[1] - own < stored[0] / 4


def test_kill_9_of_criu_in_a_restore_is_a_clear_error_and_leaves_nothing(host: Host, tmp_path: Path) -> None:
    started, worker = host.start(make_null_model(tmp_path / "big", memory_mb=400))
    worker.quiesce()
    captured = host.capture(started)
    before = our_processes()
    error = killed_in("criu restore", 0.02, lambda: host.restore(captured.snapshot_id))
    assert isinstance(error, HostError), "it says nothing about the snapshot"
    assert "killed by SIGKILL" in error.message
    assert our_processes() == before
    _restored, worker = host.restore(captured.snapshot_id)
    assert worker.answer()


@pytest.mark.parametrize("delay", [0, 0.03, 0.06])
def test_kill_9_of_criu_in_a_dump_ends_the_worker_it_was_at_work_in(
    host: Host, store: Store, tmp_path: Path, delay: float
) -> None:
    started, worker = host.start(make_null_model(tmp_path / "big", memory_mb=400))
    worker.quiesce()
    error = killed_in("criu dump", delay, lambda: host.capture(started))
    assert "killed by SIGKILL" in error.message
    assert not Path(f"/proc/{started.pid}").exists()
    assert store.manifests() == []


def test_a_capture_nobody_wants_any_more_is_not_committed(
    host: Host, store: Store, criu: Criu, null_model: Path, tmp_path: Path
) -> None:
    started, worker = host.start(null_model)
    text = worker.answer()
    worker.quiesce()
    cell_worker = host.service._workers[started.cell_id]
    with pytest.raises(SnapshotError, match="given up"):
        capture(
            *(cell_worker, store, criu),
            **{"kind": "snapshot", "name": "m", "key": KEY, "now": time.time, "timeout": 60},
            digests=DigestCache(tmp_path / "digests"),
            folders=tmp_path / "criu",
            still_wanted=lambda: False,
        )
    assert store.manifests() == []
    worker.resume()
    assert worker.answer() == text


@pytest.mark.parametrize("verb", ["dump", "restore"])
def test_a_criu_that_hangs_is_given_up_in_time(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    started, worker = host.start(make_null_model(tmp_path / "big", memory_mb=200))
    text = worker.answer()
    worker.quiesce()
    snapshot_id = host.capture(started).snapshot_id
    started, worker = host.restore(snapshot_id)
    worker.quiesce()
    before = our_processes()
    monkeypatch.setattr(service_main, "_CRIU_TIMEOUT", 2.0)
    call = {"dump": lambda: host.capture(started), "restore": lambda: host.restore(snapshot_id)}[verb]
    error = killed_in(f"criu {verb}", 0.02, call, signal.SIGSTOP)
    assert "did not end within 2 s" in error.message
    monkeypatch.undo()
    if verb == "dump":
        assert not Path(f"/proc/{started.pid}").exists()
    else:
        assert our_processes() == before
        worker.resume()
        assert worker.answer() == text


def killed_in(
    words: str, delay: float, call: Callable[[], object], how: signal.Signals = signal.SIGKILL
) -> DormouseError:
    """The error of a call whose CRIU is killed (or stopped) so many seconds after its start."""
    spawn = Cell.spawn

    def spawn_and_kill(cell: Cell, command: list[str], **options: Any) -> Spawned:
        spawned = spawn(cell, command, **options)
        if words in " ".join(command):
            first = cell.outer_pid(spawned.pid)
            time.sleep(delay)
            os.kill(first, how)  # at once: it does not end while the others are looked for
            for pid in criu_pids(words):
                with contextlib.suppress(ProcessLookupError):  # one of several may have been short-lived
                    os.kill(pid, how)
        return spawned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cell, "spawn", spawn_and_kill)
        with pytest.raises(DormouseError) as caught:
            call()
    return caught.value


def criu_pids(words: str) -> list[int]:
    """The processes below this one with these words in their command line."""
    return [pid for pid, command in our_commands().items() if words in command]


def our_processes() -> set[int]:
    """All descendants of this process but the empty spare cell's."""
    skip = ("cell_init.py", "resource_tracker")
    return {pid for pid, words in our_commands().items() if not any(word in words for word in skip)}


def our_commands() -> dict[int, str]:
    """The command lines of all descendants of this process."""
    with subprocess.Popen(["ps", "-wweo", "pid,ppid,args"], stdout=subprocess.PIPE, text=True) as ps:
        table = ps.communicate()[0]
    parents, words = {}, {}
    for line in table.splitlines()[1:]:
        pid, parent, args = line.split(maxsplit=2)
        parents[int(pid)], words[int(pid)] = int(parent), args
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: words[pid] for pid in found - {os.getpid(), ps.pid}}


def test_a_snapshot_that_does_not_fit_names_the_field(host: Host, null_model: Path) -> None:
    started, worker = host.start(null_model)
    worker.quiesce()
    captured = host.capture(started)
    with pytest.raises(IncompatibleError, match="kernel: captured with this one, here is another"):
        host.restore(captured.snapshot_id, {"kernel": "another"})
    with pytest.raises(NotFoundError, match="no-such-id"):
        host.restore("no-such-id")


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_pack_is_a_named_error(host: Host, data_dir: DataDir, null_model: Path, damage: str) -> None:
    started, worker = host.start(null_model)
    worker.quiesce()
    captured = host.capture(started)
    before = our_processes()
    (pack,) = data_dir.store.rglob("*.pack")
    data = bytearray(pack.read_bytes())
    if damage == "delete":
        pack.unlink()
    elif damage == "truncate":
        os.truncate(pack, len(data) // 2)
    else:
        for at in range(4096, len(data) // 2, 64 << 10):
            data[at] ^= 0x20
        pack.write_bytes(data)
    with pytest.raises(DamagedError, match=pack.name):
        host.restore(captured.snapshot_id)
    assert our_processes() == before


def test_memory_stays_bounded_whatever_the_image_size(host: Host, tmp_path: Path) -> None:
    started, worker = host.start(make_null_model(tmp_path / "big", memory_mb=900))
    worker.quiesce()
    Path("/proc/self/clear_refs").write_text("5")  # earlier peaks of this process must not hide a new one
    before = peak_rss()
    captured = host.capture(started)
    assert captured.raw_bytes > 900 << 20
    host.restore(captured.snapshot_id)
    assert peak_rss() - before < 256 << 20


def peak_rss() -> int:
    """This process's largest resident size so far, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def test_a_long_worker_log_is_put_aside_and_a_short_one_kept(tmp_path: Path) -> None:
    log = tmp_path / "m.log"
    log.write_text("short")
    rotate_log(log)
    assert log.read_text() == "short"
    os.truncate(log, (16 << 20) + 1)
    rotate_log(log)
    assert not log.exists() and (tmp_path / "m.log.1").stat().st_size > 16 << 20
