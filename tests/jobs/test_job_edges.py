"""Jobs at the edges: readers that go away, disks that are full, signals at odd moments, names that are none."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from dormouse.data_dir import DataDir
from dormouse.errors import SnapshotError
from dormouse.jobs import control, streams
from dormouse.jobs.control import ControlSocket, Request, ask, running_jobs
from dormouse.jobs.hook_calls import _read_to_end
from dormouse.jobs.streams import FileSink, LogSink, say
from dormouse.snapshot.cell import Cell
from dormouse.snapshot.criu_setup import Criu
from tests.jobs.conftest import Dormouse, eventually
from tests.jobs.test_jobs import COUNT, small_disk

# Parts


def test_a_reader_that_does_not_block_is_waited_for() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    data = os.urandom(300_000)
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: [got.append(part) for part in iter(lambda: os.read(reading, 4096), b"")])
    thread.start()
    assert FileSink(writing).write(data)
    os.close(writing)
    thread.join(10)
    os.close(reading)
    assert b"".join(got) == data


def test_a_reader_that_has_gone_is_told_and_a_full_disk_costs_only_words() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert not FileSink(writing).write(b"words")
    say(writing, "nobody hears this")
    os.close(writing)
    full = os.open("/dev/full", os.O_WRONLY)
    assert FileSink(full).write(b"words")
    say(full, "nor this")
    os.close(full)


def test_words_do_not_wait_for_a_reader_that_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_SAY_TIMEOUT", 0.1)
    reading, writing = os.pipe()
    os.write(writing, bytes(65_536))
    say(writing, "lost")
    os.close(reading)
    os.close(writing)


def test_logs_turn_over_and_the_keepers_words_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_MAX_LOG", 10)
    own = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    sink = LogSink(tmp_path / "log", also=[own])
    for number in range(4):
        assert sink.write(b"%d23456789ab" % number)
    os.write(own, b" own words")
    assert (tmp_path / "log").read_bytes() == b"323456789ab own words"
    assert (tmp_path / "log.1").read_bytes() == b"223456789ab"
    (tmp_path / "log").unlink()  # somebody tidies up
    assert sink.write(b"x") and sink.write(b"y")
    assert (tmp_path / "log").read_bytes() == b"xy" or (tmp_path / "log").read_bytes() == b"y"
    os.close(own)


def test_hooks_have_one_deadline_in_all() -> None:
    near, far = socket.socketpair()
    ended = threading.Event()

    def drip() -> None:
        while not ended.wait(0.05):
            far.send(b"o")

    threading.Thread(target=drip).start()
    begin = time.monotonic()
    with near, far:
        with pytest.raises(TimeoutError):
            _read_to_end(near, time.monotonic() + 0.3)
        ended.set()
        time.sleep(0.1)
    assert time.monotonic() - begin < 5


def test_a_keeper_with_a_full_queue_is_busy_and_others_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_ASK_TIMEOUT", 0.3)
    data_dir = DataDir(tmp_path)
    deaf, other = ControlSocket(data_dir, "deaf"), ControlSocket(data_dir, "other")
    other.serve(lambda _request, _there: {"name": "other"})
    waiting = []
    for _ in range(20):
        asker = socket.socket(socket.AF_UNIX)
        asker.setblocking(False)
        waiting.append(asker)
        try:
            asker.connect(str(data_dir.run / "jobs" / "deaf.sock"))
        except BlockingIOError:
            break
    first, second = running_jobs(data_dir)
    assert "busy" in first["error"] and second == {"name": "other"}
    for asker in waiting:
        asker.close()
    deaf.close()
    slow = ControlSocket(data_dir, "slow")
    slow.serve(lambda _request, _there: time.sleep(1) or {})
    with pytest.raises(SnapshotError, match="has not answered"):
        ask(data_dir, "slow", Request("status"), timeout=0.2)
    slow.close()
    other.close()


def test_an_answer_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    asked = ControlSocket(DataDir(tmp_path), "job")
    asked.serve(lambda _request, _there: {"argv": "\udcff"})
    with pytest.raises(SnapshotError, match="UnicodeEncodeError"):
        ask(DataDir(tmp_path), "job", Request("status"))
    asked.close()


# With processes


@pytest.mark.root
def test_an_old_exit_is_not_taken_for_a_new_process_with_its_pid(criu: Criu) -> None:
    cell = Cell.create()
    try:
        first = cell.spawn(["/bin/false"], env={}, pid_floor=5000)
        assert cell.wait(first.pid, 10) == 1
        second = cell.spawn(["/bin/sleep", "60"], env={}, pid_floor=5000)
        assert second.pid == first.pid
        assert cell.wait(second.pid, 0.1) is None
    finally:
        cell.close()


@pytest.mark.root
@pytest.mark.timeout(120)
def test_a_tmpfs_at_tmp_can_be_captured_and_one_over_the_data_folder_is_refused(
    dormouse: Dormouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    hidden = dormouse.start("run", "--tmpfs", str(tmp_path), "--", "true")
    assert hidden.code() == 2
    assert b"would hide the data folder" in hidden.err
    scratch = Path("/var/tmp")
    job = dormouse.run(sys.executable, "-u", "-c", COUNT, options=("--tmpfs", str(scratch)))
    job.until("\n3\n")
    (dormouse.data_dir.run / "criu" / "call-stale").mkdir(parents=True)
    snapshot = dormouse.checkpoint()
    assert job.code() == 0
    assert list((dormouse.data_dir.run / "criu").iterdir()) == []
    seen = len([line for line in job.lines() if line.isdigit()])
    again = dormouse.start("restore", snapshot)
    again.until(f"{seen + 3}\n")


@pytest.mark.root
def test_arguments_that_are_no_text(dormouse: Dormouse) -> None:
    environment = {**os.environ, "DORMOUSE_HOME": str(dormouse.data_dir.root)}
    words = [sys.executable, "-m", "dormouse.cli", "run", "-d", "--name", "odd", "--"]
    program = "import os, sys, time; print(os.fsencode(sys.argv[1]), flush=True); time.sleep(60)"
    argv = [os.fsencode(word) for word in [*words, sys.executable, "-c", program]]
    subprocess.run([*argv, b"a\xff"], env=environment, check=True, timeout=60)
    eventually(lambda: r"b'a\xff'" in (dormouse.data_dir.logs / "odd.log").read_text(), "the very bytes")
    (job,) = dormouse.do("jobs")
    assert job["argv"][-1] == r"a\xff"  # type: ignore[index,call-overload]
    dormouse.checkpoint("odd", "--leave-running")
    assert dormouse.do("stop", "odd", "--grace", "0")["name"] == "odd"  # it may have ended before it could be killed
    assert dormouse.do("jobs") == []


@pytest.mark.root
def test_a_keeper_survives_without_a_reader_of_its_words(dormouse: Dormouse) -> None:
    environment = {**os.environ, "DORMOUSE_HOME": str(dormouse.data_dir.root)}
    job = subprocess.Popen(
        [sys.executable, "-m", "dormouse.cli", "run", "--name", "job", "--", sys.executable, "-u", "-c", COUNT],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert job.stdout is not None and job.stderr is not None
    job.stderr.close()
    with job.stdout:
        assert job.stdout.readline() == b"0\n"
        snapshot = dormouse.checkpoint()
        job.stdout.read()
        assert job.wait(20) == 0
    both = subprocess.Popen(
        [sys.executable, "-m", "dormouse.cli", "restore", "--replicas", "2", snapshot],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert both.stdout is not None and both.stderr is not None
    both.stderr.close()
    with both.stdout:
        both.stdout.readline()
        dormouse.checkpoint("job", "--replica", "1")
        eventually(lambda: both.stdout.readline().startswith(b"2| "), "the other replica")  # type: ignore[union-attr]
        dormouse.do("stop", "job", "--grace", "0")
        both.stdout.read()
    assert both.wait(20) == 128 + signal.SIGTERM or both.returncode == 128 + signal.SIGKILL


@pytest.mark.root
def test_a_log_on_a_full_disk_costs_words_and_not_the_job(dormouse: Dormouse) -> None:
    dormouse.data_dir.logs.rmdir()
    with small_disk(dormouse.data_dir.logs, "64k"):
        talk = "import itertools, time\nfor n in itertools.count(): print('x' * 4000, flush=True); time.sleep(0.01)"
        assert dormouse.start("run", "-d", "--name", "job", "--", sys.executable, "-c", talk).code() == 0
        eventually(lambda: os.statvfs(dormouse.data_dir.logs).f_bavail == 0, "a full disk")
        time.sleep(0.3)
        assert [job["name"] for job in dormouse.do("jobs")] == ["job"]  # type: ignore[index]
        dormouse.checkpoint("job", "--leave-running")
        dormouse.do("stop", "job", "--grace", "0")
        eventually(lambda: running_jobs(dormouse.data_dir) == [], "its end")


@pytest.mark.root
def test_signals_that_were_ignored_stay_ignored(dormouse: Dormouse) -> None:
    command = f"trap '' HUP INT; exec {sys.executable} -m dormouse.cli run --name job -- {sys.executable} -uc '{COUNT}'"
    environment = {**os.environ, "DORMOUSE_HOME": str(dormouse.data_dir.root)}
    job = subprocess.Popen(["sh", "-c", command], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert job.stdout is not None
    with job.stdout:
        assert job.stdout.readline() == b"0\n"
        for number in (signal.SIGHUP, signal.SIGINT):
            job.send_signal(number)
        while job.stdout.readline() != b"30\n":
            pass
        job.terminate()
        job.stdout.read()
    assert job.wait(20) == 128 + signal.SIGTERM


@pytest.mark.root
@pytest.mark.timeout(120)
def test_a_restore_can_be_given_up(dormouse: Dormouse, tmp_path: Path) -> None:
    """An unpacking that waits for ever stands for all that may take its time."""
    job = dormouse.python(COUNT)
    job.until("\n3\n")
    snapshot = dormouse.checkpoint()
    job.code()
    patch = tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(
        "import dormouse.jobs.replica as replica\n"
        "def wait_for_ever(cell, image, store):\n"
        "  cell.wait(cell.spawn(['/bin/sleep', '1000'], env={}).pid, None)\n"
        "  raise replica.SnapshotError('it was over')\n"
        "replica.unpack_files = wait_for_ever\n"
    )
    for detached, how in itertools.product((False, True), ("INT", "TERM", "stop")):
        given_up(dormouse, snapshot, patch, how, detached=detached)


def given_up(dormouse: Dormouse, snapshot: str, patch: Path, how: str, *, detached: bool) -> None:
    path = os.pathsep.join(filter(None, [str(patch), os.environ.get("PYTHONPATH")]))
    options = ("-d",) if detached else ()
    restoring = dormouse.start("restore", "--replicas", "2", *options, snapshot, env={"PYTHONPATH": path})
    eventually(lambda: running_jobs(dormouse.data_dir), "a job that starts")
    (listed,) = dormouse.do("jobs")
    assert (listed["state"], listed["replicas"]) == ("starts", [])
    assert "still being started" in dormouse.refused("checkpoint", "job")
    here = psutil.Process(restoring.process.pid).children(recursive=True)
    begin = time.monotonic()
    if how == "stop":
        assert dormouse.do("stop", "job") == {"name": "job", "killed": False}
    else:
        restoring.process.send_signal(getattr(signal, f"SIG{how}"))
    code = restoring.code(20)
    assert time.monotonic() - begin < 15
    expected = 128 + (signal.SIGINT if how == "INT" else signal.SIGTERM)
    assert code == (6 if detached else expected), (how, detached, restoring.err)
    assert b"given up" in restoring.err
    assert psutil.wait_procs(here, timeout=10)[1] == []
    eventually(lambda: running_jobs(dormouse.data_dir) == [], "no more jobs")
    assert not list((dormouse.data_dir.run).glob("criu/*"))


@pytest.mark.root
def test_detached_commands_speak_json(dormouse: Dormouse) -> None:
    starting = dormouse.start("run", "-d", "--name", "job", "--publish", "0:80", "--json", "--", "sleep", "60")
    assert starting.code() == 0
    started = json.loads(starting.out)
    assert started["name"] == "job" and psutil.pid_exists(started["pids"][0])
    assert started["published"][0].startswith("127.0.0.1:") and started["log"].endswith("/job.log")
    snapshot = dormouse.checkpoint("job", "--leave-running")
    again = dormouse.do("restore", "-d", "--name", "other", "--publish", "0:80", snapshot)
    assert again["name"] == "other" and len(again["pids"]) == 1
    for name in ("job", "other"):
        assert dormouse.do("stop", name) == {"name": name, "killed": False}


@pytest.mark.root
@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "0<&- 1>&- 2>&-"])
def test_detached_jobs_of_a_command_without_streams(dormouse: Dormouse, closed: str) -> None:
    environment = {**os.environ, "DORMOUSE_HOME": str(dormouse.data_dir.root)}
    command = f"exec {closed}; {sys.executable} -m dormouse.cli run -d --name job -- sh -c 'echo hello; sleep 60'"
    assert subprocess.run(["sh", "-c", command], env=environment, timeout=60, check=False).returncode == 0
    eventually(lambda: "hello" in (dormouse.data_dir.logs / "job.log").read_text(), "output")
    dormouse.do("stop", "job", "--grace", "5")


@pytest.mark.root
def test_an_unexpected_end_is_told_and_logged(dormouse: Dormouse, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import dormouse.jobs.keeper as keeper\n"
        "def broken(*_): raise ZeroDivisionError('so odd')\n"
        "keeper.start = broken"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    job = dormouse.start("run", "-d", "--json", "--name", "job", "--", "true", env={"PYTHONPATH": path})
    assert job.code() == 6
    assert "ZeroDivisionError: so odd" in json.loads(job.out)["error"]["message"]
    assert "Traceback" in (dormouse.data_dir.logs / "job.log").read_text()


@pytest.mark.root
def test_names_and_pids_that_are_none(dormouse: Dormouse) -> None:
    assert "not a name" in dormouse.refused("stop", "x" * 200, expect=2)
    assert "not a name" in dormouse.refused("checkpoint", "²", expect=2)
    assert "no process" in dormouse.refused("checkpoint", "9" * 5000)
    program = "import threading, time; t = threading.Thread(target=time.sleep, args=[60]); t.start()\n"
    program += "print(t.native_id, flush=True)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        thread = started.stdout.readline().decode().strip()
        assert f"{thread} is a thread of process {started.pid}" in dormouse.refused("checkpoint", thread)
        started.kill()


def test_deleted_files_come_back_in_replicas_that_start_at_once(dormouse: Dormouse, tmp_path: Path) -> None:
    """CRIU makes such files anew under names that are the same for all."""
    program = f"""
import mmap, os, time
maps = []
for number in range(40):
    with open({str(tmp_path)!r} + f"/{{number}}", "w+b") as file:
        file.write(b"%04d" % number * 1024)
        file.flush()
        maps.append(mmap.mmap(file.fileno(), 0))
    os.unlink(file.name)
while True:
    print(all(found[:8] == b"%04d" % number * 2 for number, found in enumerate(maps)), flush=True)
    time.sleep(0.1)
"""
    job = dormouse.python(program)
    job.until("True")
    snapshot = dormouse.checkpoint()
    assert job.code() == 0
    assert list(tmp_path.glob("[0-9]*")) == []
    again = [dormouse.start("restore", "--name", f"again{number}", snapshot) for number in range(4)]
    for one in again:
        one.until("True")
    assert list(tmp_path.glob("[0-9]*")) == []
    for number in range(4):
        dormouse.do("stop", f"again{number}")
