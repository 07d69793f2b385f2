"""Jobs as their user meets them: exit codes, signals, refusals, hooks, and what is left when something dies."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from dormouse.data_dir import DataDir
from dormouse.jobs.control import running_jobs
from dormouse.store.store import Store
from tests.jobs.conftest import Command, Dormouse, eventually, free_port

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

COUNT = "import time, itertools\nfor n in itertools.count(): print(n); time.sleep(0.02)"


def counts_on(job: Command) -> None:
    """The job runs and has lost nothing."""
    seen = len(job.lines())
    job.until(f"\n{seen + 5}\n")
    lines = [line for line in job.lines() if line.isdigit()]
    assert lines == [str(n) for n in range(len(lines))]


def snapshots(dormouse: Dormouse) -> list[str]:
    with Store.open(dormouse.data_dir.store) as store:
        return [row.id for row in store.manifests()]


def test_exit_codes_signals_and_streams_are_the_jobs_own(dormouse: Dormouse, tmp_path: Path) -> None:
    job = dormouse.run("sh", "-c", "pwd; cat; echo problem >&2; echo $MARK; exit 7", cwd=tmp_path, env={"MARK": "x1"})
    job.say("hello\n")
    job.process.stdin.close()  # type: ignore[union-attr]
    assert job.code() == 7
    assert job.lines() == [str(tmp_path), "hello", "x1"]
    assert "problem" in job.err.decode().splitlines()

    job = dormouse.python("import signal, time\nprint('ready')\ntime.sleep(60)")
    job.until("ready")
    job.process.send_signal(signal.SIGTERM)
    assert job.code() == 128 + signal.SIGTERM

    trap = "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.1; done"
    job = dormouse.run("sh", "-c", trap)
    job.until("ready")
    job.process.send_signal(signal.SIGINT)
    assert job.code() == 3
    assert "caught" in job.lines()

    assert dormouse.run("/no/such/program").code() == 127
    assert not list((dormouse.data_dir.run / "jobs").glob("*.sock"))


@pytest.mark.parametrize("closed", ["0<&-", "0<&- 1>&- 2>&-"])
def test_streams_that_are_closed_are_not_mistaken(dormouse: Dormouse, closed: str) -> None:
    command = f"exec {closed}; {sys.executable} -m dormouse.cli run -q -- sh -c 'cat; echo end; exit 4'"
    environment = {**os.environ, "DORMOUSE_HOME": str(dormouse.data_dir.root)}
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 4
    assert done.stdout == (b"" if "1>" in closed else b"end\n")


def test_detached_jobs_are_listed_log_and_stop(dormouse: Dormouse) -> None:
    assert dormouse.start("run", "-d", "--name", "web", "--", sys.executable, "-u", "-c", COUNT).code() == 0
    (job,) = dormouse.do("jobs")
    assert job["name"] == "web"  # type: ignore[index]
    log = dormouse.data_dir.logs / "web.log"
    eventually(lambda: "\n5\n" in log.read_text(), "output in the log")
    assert log.stat().st_mode & 0o777 == 0o600
    second = dormouse.start("run", "--name", "web", "-d", "--", "true")
    assert second.code() == 2
    assert "a job called web runs already" in second.err.decode()
    snapshot = dormouse.checkpoint("web", "--leave-running")
    # A name is free again once its job is over; until then a restore takes another.
    assert dormouse.start("restore", "-d", snapshot).code() == 0
    assert sorted(job["name"] for job in dormouse.do("jobs")) == ["web", "web-2"]  # type: ignore[index]
    for name in ("web", "web-2"):
        assert dormouse.start("stop", name).code() == 0
    eventually(lambda: running_jobs(dormouse.data_dir) == [], "no more jobs")
    assert "no job called web runs" in dormouse.refused("checkpoint", "web", expect=3)


def test_replicas_are_told_apart_and_captured_one_by_one(dormouse: Dormouse) -> None:
    job = dormouse.python(COUNT)
    job.until("\n3\n")
    snapshot = dormouse.checkpoint()
    start = len(job.lines())
    assert job.code() == 0
    both = dormouse.start("restore", snapshot, "--replicas", "2")
    both.until(f"1| {start + 3}\n")
    both.until(f"2| {start + 3}\n")
    assert "--replica" in dormouse.refused("checkpoint", "job", expect=2)
    dormouse.checkpoint("job", "--replica", "1")
    both.out = b""
    both.until("\n2| ")
    time.sleep(0.2)
    assert not any(line.startswith("1|") for line in both.lines()[1:])
    dormouse.checkpoint("job")
    assert both.code() == 0


def test_captures_and_restores_are_told_step_by_step(dormouse: Dormouse, tmp_path: Path) -> None:
    job = dormouse.python(COUNT)
    job.until("\n3\n")
    captured = dormouse.do("checkpoint", "job")
    assert isinstance(captured, dict)
    dump = next(step for step in captured["phases"] if step["name"] == "dump")
    assert dump["bytes"] == captured["raw_bytes"] and dump["seconds"] > 0
    restored = dormouse.do("restore", "-d", captured["id"], "--replicas", "2")
    assert isinstance(restored, dict)
    for replica in restored["restores"]:
        filled = next(step for step in replica["phases"] if step["name"] == "fill")
        assert filled["bytes"] > 0 and 0 <= filled["start"] <= replica["seconds"]
    file = tmp_path / "trace.json"
    assert len(dormouse.do("trace", "job", "--output", str(file))) == 2
    events = json.loads(file.read_text())["traceEvents"]
    assert {"criu", "fill"} <= {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert dormouse.start("stop", "job").code() == 0
    eventually(lambda: running_jobs(dormouse.data_dir) == [], "no more jobs")
    # Of a snapshot, its own capture.
    (capture,) = dormouse.do("trace", captured["id"])
    assert capture["phases"][0]["name"] == "dump"  # type: ignore[index]
    shown = dormouse.start("inspect", captured["id"])
    assert shown.code() == 0
    assert "steps of the capture" in shown.out.decode() and "dump.memory" in shown.out.decode()


def test_a_job_that_is_killed_in_the_middle_of_its_capture(dormouse: Dormouse) -> None:
    """Whatever the moment: a whole snapshot or none, a clear answer, and nothing left over."""
    memory = "held = bytearray(__import__('random').randbytes(60_000_000))\n" + COUNT
    packs = dormouse.data_dir.store / "packs"
    for delay in (0, 0.03, 0.1, 0.2):
        job = dormouse.python(memory)
        job.until("\n3\n")
        pid = dormouse.do("jobs")[0]["replicas"][0]["pid"]  # type: ignore[index,call-overload]
        asking = dormouse.start("checkpoint", "job", "--json")
        eventually(lambda: list(packs.glob("*.tmp")), "a capture under way")
        time.sleep(delay)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        code = asking.code(60)
        assert job.code() in ((0,) if code == 0 else (128 + signal.SIGKILL,)), (asking.out, job.err)
        assert code in (0, 6), asking.out
        assert b'"unexpected' not in asking.out, asking.out
        assert not psutil.pid_exists(pid)
    with Store.open(dormouse.data_dir.store) as store:
        assert store.verify().ok


def test_nothing_outlives_a_killed_keeper(dormouse: Dormouse) -> None:
    job = dormouse.python("import os, time\nif os.fork() == 0: time.sleep(100)\nprint('ready'); time.sleep(100)")
    job.until("ready")
    mine = psutil.Process(job.process.pid).children(recursive=True)
    assert len(mine) >= 3
    job.process.kill()
    job.code()
    assert psutil.wait_procs(mine, timeout=20)[1] == []
    assert dormouse.do("jobs") == []
    assert dormouse.run("true").code() == 0


def test_a_keeper_killed_while_it_captures_leaves_no_snapshot_and_no_process(dormouse: Dormouse) -> None:
    job = dormouse.python("held = bytearray(__import__('random').randbytes(100_000_000))\n" + COUNT)
    job.until("\n3\n")
    mine = psutil.Process(job.process.pid).children(recursive=True)
    asking = dormouse.start("checkpoint", "job", "--json")
    packs = dormouse.data_dir.store / "packs"
    eventually(lambda: list(packs.glob("*.tmp")), "a capture under way")
    job.process.kill()
    assert asking.code() == 6
    assert b"ended without an answer" in asking.out
    assert psutil.wait_procs(mine, timeout=20)[1] == []
    assert snapshots(dormouse) == []
    assert not list(packs.glob("*.tmp"))


def test_a_capture_nobody_waits_for_is_given_up(dormouse: Dormouse) -> None:
    job = dormouse.python("held = bytearray(__import__('random').randbytes(100_000_000))\n" + COUNT)
    job.until("\n3\n")
    asking = dormouse.start("checkpoint", "job")
    eventually(lambda: list((dormouse.data_dir.store / "packs").glob("*.tmp")), "a capture under way")
    asking.process.kill()
    counts_on(job)
    assert snapshots(dormouse) == []


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_job_running(dormouse: Dormouse, tmp_path: Path) -> None:
    store = dormouse.data_dir.store
    with small_disk(store, "20m"):
        job = dormouse.python("held = bytearray(__import__('random').randbytes(60_000_000))\n" + COUNT)
        job.until("\n3\n")
        assert "the disk is full" in dormouse.refused("checkpoint", "job", expect=5)
        counts_on(job)
        dormouse.do("stop", "job")
        job.code()


@pytest.mark.usefixtures("tcp")
def test_refusals_name_the_descriptor_and_leave_the_job_alone(dormouse: Dormouse, tmp_path: Path) -> None:
    path = tmp_path / "outside.sock"
    with socket.socket(socket.AF_UNIX) as outside:
        outside.bind(str(path))
        outside.listen()
        job = dormouse.python(f"import socket\ns = socket.socket(socket.AF_UNIX); s.connect({str(path)!r})\n{COUNT}")
        job.until("\n3\n")
        accepted = outside.accept()[0]
        words = dormouse.refused("checkpoint", "job")
        accepted.close()
        assert "descriptor 3 of process" in words and "unix socket connected to a process outside" in words
        counts_on(job)
        dormouse.do("stop", "job")
    client = (
        "import socket\nl = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(l.getsockname())\n"
        "a, _ = l.accept()\nprint(l.getsockname()[1])\nprint(repr(a.recv(10)))"
    )
    job = dormouse.python(client, name="tcp", options=("--net", "host"))
    job.until("\n")
    port = job.lines()[0]
    words = dormouse.refused("checkpoint", "tcp")
    assert "open TCP connection" in words and f":{port}" in words and "--close-connections" in words
    # Both ends are closed in the snapshot: the program finds the end of the stream.
    snapshot = dormouse.checkpoint("tcp", "--close-connections")
    assert job.code() == 0
    again = dormouse.start("restore", snapshot)
    assert again.code() == 0
    assert again.lines() == ["b''"]


def test_files_that_changed_or_went_away(dormouse: Dormouse, tmp_path: Path) -> None:
    book = tmp_path / "book"
    book.write_text("1\n2\n")
    job = dormouse.python(f"f = open({str(book)!r}); f.readline()\nprint('ready')\ninput()\nprint(f.readline())")
    job.until("ready")
    snapshot = dormouse.checkpoint()
    book.write_text("1\n2\n3\n")
    words = dormouse.refused("restore", snapshot)
    assert f"the file {book} was 4 bytes long at the capture and is 6 now" in words, words
    book.unlink()
    assert f"the file {book} is not there any more" in dormouse.refused("restore", snapshot)
    book.write_text("1\n2\n")
    again = dormouse.start("restore", snapshot)
    again.until("runs", "err")
    again.say("\n")
    assert again.code() == 0
    assert again.lines() == ["2", ""]


HOOKED = """
import sys, time
from dormouse import hooks
hooks.on_capture(lambda: print("before"))
hooks.on_restore(lambda: print("after"))
def maybe():
    if refuse:
        raise RuntimeError("not now")
refuse = True
hooks.on_capture(maybe)
print("ready")
for line in sys.stdin:
    refuse = False
    print("willing")
"""


def test_hooks_run_before_and_after_and_may_refuse(dormouse: Dormouse) -> None:
    job = dormouse.python(HOOKED)
    job.until("ready")
    assert "refused before-capture: RuntimeError: not now" in dormouse.refused("checkpoint", "job")
    job.until("after")
    assert job.lines() == ["ready", "before", "after"]
    job.say("\n")
    job.until("willing")
    dormouse.checkpoint("job", "--leave-running")
    job.until("willing\nbefore\nafter\n")
    snapshot = dormouse.checkpoint()
    assert job.code() == 0
    assert job.lines()[-1] == "before"
    again = dormouse.start("restore", snapshot)
    again.until("after\n")
    assert again.lines() == ["after"]


def test_a_hook_that_hangs_is_given_up(dormouse: Dormouse) -> None:
    job = dormouse.python("import time\nfrom dormouse import hooks\nhooks.on_capture(lambda: time.sleep(60))\n" + COUNT)
    job.until("\n3\n")
    assert "did not answer before-capture within 1 s" in dormouse.refused("checkpoint", "job", "--hook-timeout", "1")
    counts_on(job)


NODE_HOOKS = """
const net = require('net')
net.createServer(socket => {
  socket.setEncoding('utf8')
  socket.on('data', line => {
    console.log(line.trim())
    socket.end('ok\\n')
  })
}).listen('\\0dormouse-hooks-' + process.pid)
console.log('ready')
"""


def test_hooks_in_node(dormouse: Dormouse) -> None:
    if (node := shutil.which("node")) is None:
        pytest.skip("node is not installed")
    job = dormouse.run(node, "-e", NODE_HOOKS)
    job.until("ready")
    snapshot = dormouse.checkpoint()
    assert job.code() == 0
    assert job.lines() == ["ready", "before-capture"]
    again = dormouse.start("restore", snapshot)
    again.until("after-restore\n")


# Trees that were started without us


@contextmanager
def process(*argv: str, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen(argv, start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        started.wait()
        for pipe in (started.stdin, started.stdout):
            if pipe is not None:
                pipe.close()


@pytest.mark.usefixtures("tcp")
def test_any_process_can_be_captured_by_its_pid(dormouse: Dormouse, tmp_path: Path) -> None:
    port = free_port()
    program = (
        "import os, socket, time\n"
        f"l = socket.create_server(('127.0.0.1', {port}))\n"
        "if os.fork() == 0:\n"
        "  n = 0\n"
        "  while True:\n"
        "    c, _ = l.accept(); n += 1; c.sendall(b'%d' % n); c.close()\n"
        "time.sleep(100)"
    )

    def ask() -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            return connection.recv(10)

    log = (tmp_path / "log").open("w")
    with log, process(sys.executable, "-c", program, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as started:
        eventually(lambda: psutil.Process(started.pid).net_connections() if port else None, "a listener")
        assert ask() == b"1"
        dormouse.checkpoint(str(started.pid), "--leave-running")
        assert ask() == b"2"
        children = psutil.Process(started.pid).children()
        snapshot = dormouse.checkpoint(str(started.pid))
        started.wait(10)
        assert psutil.wait_procs(children, timeout=10)[1] == []
    again = dormouse.start("restore", snapshot)
    again.until("runs", "err")
    assert ask() == b"3"


def test_pipes_of_a_foreign_process_lead_to_the_keeper_after_the_restore(dormouse: Dormouse) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with process(sys.executable, "-uc", "for line in open(0): print('got', line.strip())", **pipes) as started:
        assert started.stdin is not None and started.stdout is not None
        started.stdin.write(b"one\n")
        started.stdin.flush()
        assert started.stdout.readline() == b"got one\n"
        snapshot = dormouse.checkpoint(str(started.pid))
        started.wait(10)
    again = dormouse.start("restore", snapshot)
    again.until("runs", "err")
    again.say("two\n")
    again.until("got two\n")


def test_a_foreign_process_does_not_stay_stopped_when_its_capture_is_killed(dormouse: Dormouse, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = (
        "import time, random\nheld = bytearray(random.randbytes(60_000_000))\n"
        f"while True:\n  time.sleep(0.01); open({str(log)!r}, 'a').write('x')"
    )
    packs = dormouse.data_dir.store / "packs"
    with process(sys.executable, "-c", program, stdin=subprocess.DEVNULL) as started:
        eventually(log.exists, "a log")
        for delay in (0.0, 0.1, 0.2, 0.4):
            asking = dormouse.start("checkpoint", str(started.pid))
            eventually(lambda: list(packs.glob("*.tmp")), "a capture under way")
            time.sleep(delay)
            asking.process.kill()
            asking.code()
            size = log.stat().st_size
            eventually(lambda size=size: log.stat().st_size > size + 20, "life")  # type: ignore[misc]
            eventually(lambda: psutil.Process(started.pid).status() != psutil.STATUS_STOPPED, "no stop")
    with Store.open(dormouse.data_dir.store) as store:
        assert store.verify().ok


def test_foreign_processes_that_are_refused(dormouse: Dormouse) -> None:
    assert "init" in dormouse.refused("checkpoint", "1")
    assert "kernel thread" in dormouse.refused("checkpoint", "2")
    assert "ancestor of this command" in dormouse.refused("checkpoint", str(os.getpid()))
    assert "there is no process" in dormouse.refused("checkpoint", "4194303")
    job = dormouse.python(COUNT)
    job.until("\n3\n")
    pid = dormouse.do("jobs")[0]["replicas"][0]["pid"]  # type: ignore[index,call-overload]
    assert "namespace" in dormouse.refused("checkpoint", str(pid))
    keeper, terminal = pty.openpty()
    reading, writing = os.pipe()
    near, far = socket.socketpair()
    try:
        with process("sleep", "100", stdin=terminal) as started:
            assert f"descriptor 0 of process {started.pid} (sleep) is the terminal" in dormouse.refused(
                "checkpoint", str(started.pid)
            )
        with process("sleep", "100", pass_fds=[reading]) as started:
            assert f"descriptor {reading} of process {started.pid} (sleep) is a pipe" in dormouse.refused(
                "checkpoint", str(started.pid)
            )
            assert started.poll() is None
        with process("sleep", "100", stdout=far) as started:
            assert f"descriptor 1 of process {started.pid} (sleep) is a unix socket" in dormouse.refused(
                "checkpoint", str(started.pid)
            )
    finally:
        for descriptor in (keeper, terminal, reading, writing):
            os.close(descriptor)
        near.close()
        far.close()


def test_traced_processes_and_sandboxes_are_refused(dormouse: Dormouse) -> None:
    job = dormouse.run("unshare", "--mount", "sleep", "100")
    job.until("runs", "err")
    eventually(lambda: "a mnt namespace of its own" in dormouse.refused("checkpoint", "job"), "the new namespace")
    with process("sleep", "100") as started:
        attach = f"import ctypes, time; ctypes.CDLL(None).ptrace(0x4206, {started.pid}, 0, 0); time.sleep(100)"
        with process(sys.executable, "-c", attach) as tracer:
            eventually(lambda: str(tracer.pid) in Path(f"/proc/{started.pid}/status").read_text(), "a tracer")
            assert f"is being traced by process {tracer.pid}" in dormouse.refused("checkpoint", str(started.pid))


def test_snapshots_of_jobs_are_listed_inspected_and_removed(dormouse: Dormouse, data_dir: DataDir) -> None:
    job = dormouse.python(COUNT)
    job.until("\n3\n")
    snapshot = dormouse.checkpoint()
    (row,) = dormouse.do("ls")["snapshots"]
    assert (row["id"], row["model"], row["kind"]) == (snapshot, "job", "process")
    assert dormouse.do("inspect", snapshot)["id"] == snapshot
    dormouse.do("rm", snapshot)
    assert "no snapshot" in dormouse.refused("restore", snapshot, expect=3)
    assert running_jobs(data_dir) == []


def test_images_that_criu_made_without_us_can_be_imported_and_restored(dormouse: Dormouse, tmp_path: Path) -> None:
    """The way out and in again: a job's snapshot, exported, is an ordinary folder of images."""
    log = tmp_path / "log"
    program = (
        "import itertools, time\n"
        f"for n in itertools.count():\n  time.sleep(0.05); open({str(log)!r}, 'a').write(f'{{n}}\\n')"
    )
    job = dormouse.python(program)
    eventually(lambda: log.exists() and len(log.read_text().splitlines()) > 5, "a log")
    exported = tmp_path / "exported"
    dormouse.do("export", dormouse.checkpoint(), str(exported))
    assert job.code() == 0
    seen = len(log.read_text().splitlines())
    dormouse.do("rm", str(dormouse.do("ls")["snapshots"][0]["id"]))
    for own in exported.glob("dormouse-*"):
        own.unlink()
    imported = dormouse.do("import-images", str(exported), "--name", "From elsewhere!")
    again = dormouse.start("restore", str(imported["id"]))
    again.until("runs", "err")
    eventually(lambda: len(log.read_text().splitlines()) > seen + 5, "more of the log")
    assert log.read_text().splitlines() == [str(n) for n in range(len(log.read_text().splitlines()))]
