"""The parts of jobs that need no processes: parsers, names, words."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.data_dir import DataDir
from dormouse.errors import ConfigError, DamagedError, DormouseError, IncompatibleError, NotFoundError, SnapshotError
from dormouse.jobs import launch
from dormouse.jobs.control import ControlSocket, Request, ask, free_name, running_jobs
from dormouse.jobs.explain import explained
from dormouse.jobs.hook_calls import parse_unix
from dormouse.jobs.record import (
    RECORD_IMAGE,
    JobRecord,
    Publish,
    check_name,
    encode_record,
    made_up_name,
    parse_publish,
    record_of,
)
from dormouse.jobs.streams import Input, NumberedSink, unread
from dormouse.jobs.survey import Descriptor, Survey, parse_tcp, refusal, unix_peers
from dormouse.phases import Phases
from dormouse.snapshot.images import BODY_VERSION, ImageFile, SnapshotBody
from dormouse.snapshot.tree import External
from tests.jobs.conftest import eventually


def body(*images: ImageFile, externals: tuple[External, ...] = (), name: str = "job") -> SnapshotBody:
    return SnapshotBody(
        version=BODY_VERSION, name=name, key={}, pid=9, externals=list(externals), images=list(images), memory=[],
        mapped=[], phases=Phases(),
    )  # fmt: skip


@given(
    st.lists(st.text()),
    st.lists(st.lists(st.sampled_from(["stdin", "stdout", "stderr"]))),
    st.binary(),
    st.booleans(),
)
def test_records_round_trip(argv: list[str], streams: list[list[str]], pending: bytes, flag: bool) -> None:
    record = JobRecord(
        "job", argv, "host", streams, pending_input=pending, shell_job=flag, publish=[Publish("h", 1, 2)]
    )  # type: ignore[arg-type]
    assert record_of(body(encode_record(record)), "id") == record


@given(st.binary())
def test_hostile_records_are_damage(data: bytes) -> None:
    with contextlib.suppress(DamagedError):
        record_of(body(ImageFile(name=RECORD_IMAGE, size=len(data), inline=data)), "id")


def test_newer_records_and_imports() -> None:
    data = json.dumps({"version": 99, "more": 1}).encode()
    with pytest.raises(IncompatibleError, match="version 99"):
        record_of(body(ImageFile(name=RECORD_IMAGE, size=len(data), inline=data)), "id")
    pipes = tuple(External("pipe", inode) for inode in (5, 6))
    assert record_of(body(externals=pipes, name="Some Folder"), "id").streams == [["stdin"], ["stdout"]]
    assert check_name(record_of(body(name="4711"), "id").name)
    with pytest.raises(SnapshotError, match="other ties"):
        record_of(body(externals=(External("socket", 5),)), "id")


@pytest.mark.parametrize(
    ("text", "publish"),
    [
        ("80", Publish("127.0.0.1", 80, 80)),
        ("8080:80", Publish("127.0.0.1", 8080, 80)),
        ("0.0.0.0:8080:80", Publish("0.0.0.0", 8080, 80)),
        ("localhost:80", Publish("localhost", 80, 80)),
        ("[::1]:80", Publish("::1", 80, 80)),
        ("0:80", Publish("127.0.0.1", 0, 80)),
    ],
)
def test_ports(text: str, publish: Publish) -> None:
    assert parse_publish(text) == publish


@given(st.text(alphabet="0123456789:[]. a-") | st.text())
def test_ports_that_are_none(text: str) -> None:
    with contextlib.suppress(ConfigError):
        port = parse_publish(text)
        assert 0 <= port.port <= 65535 and 1 <= port.inner <= 65535


@given(st.text(min_size=1))
def test_made_up_names_are_names(program: str) -> None:
    assert check_name(made_up_name(program))


@pytest.mark.parametrize("name", ["", "123", "A", "../x", "a/b", "a" * 65, "-a"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError):
        check_name(name)


def test_addresses_as_the_kernel_prints_them() -> None:
    text = (
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4242 1 x 100\n"
        "   1: 0100007F:1F90 0100007F:C001 06 00000000:00000000 00:00000000 00000000     0        0 0 1 x 100\n"
    )
    (connection,) = parse_tcp(text).values()
    assert (connection.local, connection.inode, connection.open) == ("127.0.0.1:8080", 4242, False)
    six = text.replace("0100007F:1F90 00000000:0000", "0000000000000000FFFF00000100007F:1F90 " + "0" * 32 + ":0000")
    assert parse_tcp(six)[4242].local == "127.0.0.1:8080"


@given(st.text())
def test_tables_of_the_kernel_that_are_cut_short_say_less(text: str) -> None:
    for parse in (parse_tcp, parse_unix):
        with contextlib.suppress(ValueError):
            parse("head\n" + text)


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_hostile_answers_of_the_diagnosis_socket_end(answers: list[bytes]) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        for answer in answers:
            if answer:
                far.send(answer)
        far.send(struct.pack("=IHHII", 16, 3, 0, 1, 0))
        with contextlib.suppress(struct.error):
            list(unix_peers(near))


def test_what_the_diagnosis_socket_says_of_a_real_pair() -> None:
    near, far = socket.socketpair()
    with near, far, socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as diagnosis:
        peers = dict(unix_peers(diagnosis))
        one, two = (os.fstat(end.fileno()).st_ino for end in (near, far))
        assert (peers[one], peers[two]) == (two, one)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("anon_inode:[io_uring]", "an io_uring"),
        ("/dev/nvidia0", "the GPU device /dev/nvidia0, held open without CUDA"),
        ("/dev/dri/renderD128", "the GPU device /dev/dri/renderD128"),
        ("/dev/pts/3", "the terminal /dev/pts/3"),
    ],
)
def test_refusals(target: str, words: str) -> None:
    found = Survey([os.getpid()], descriptors=[Descriptor(os.getpid(), 9, target)])
    refused = refusal(found, external=set(), close_connections=False)
    assert refused is not None and refused.remedy
    assert refused.message.startswith(f"descriptor 9 of process {os.getpid()} (") and words in refused.message


def test_devices_that_the_cuda_driver_will_close_are_no_hindrance() -> None:
    me = os.getpid()
    found = Survey([me], descriptors=[Descriptor(me, 9, "/dev/nvidia0"), Descriptor(me, 10, "/dev/nvidia-uvm")])
    assert refusal(found, external=set(), close_connections=False, cuda={me}) is None
    found.descriptors.append(Descriptor(me, 11, "/dev/dri/card0"))
    assert "/dev/dri/card0" in str(refusal(found, external=set(), close_connections=False, cuda={me}))


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        ("Task 5 with SysVIPC shmem map @7f doesn't live in IPC ns; Dumping FAILED.", "System V"),
        ("inet: Connected TCP socket, consider using --tcp-established option.", "open TCP connections"),
        ("unix: Dangling connection 409258; Dump files (pid: 1) failed", "waits to be accepted"),
        ("Can't create link remap for /a. Use link-remap option.", "still has another name"),
        ("sockets: Can't get 1:16 opt: Operation not supported", "can't capture TCP sockets on this kernel"),
        (
            "File srv/my data has bad size 6 (expect 4)",
            "the file /srv/my data was 4 bytes long at the capture and is 6",
        ),
        ("Can't get rlimit 0: Operation not permitted", "another user"),
        ("some new trouble", "(criu: some new trouble)"),
    ],
)
def test_crius_words_become_sentences(words: str, meaning: str) -> None:
    error = explained(SnapshotError(f"criu could not dump the process: {words}"))
    assert meaning in error.message and words in error.message and error.remedy
    other = SnapshotError("something else: it broke")
    assert explained(other) is other


# The control socket


def test_a_hostile_asker_does_no_harm(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path / ("long" * 40))
    control = ControlSocket(data_dir, "job")
    control.serve(lambda request, _there: {"name": request.verb})
    try:
        path = data_dir.run / "jobs" / "job.sock"
        assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
        for words in (b"", b"\n", b"{}\n", b"[1,2\n", b"x" * 200_000, b'{"verb": 5}\n'):
            with socket.socket(socket.AF_UNIX) as asker, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                folder = os.open(path.parent, os.O_PATH)
                asker.connect(f"/proc/self/fd/{folder}/job.sock")
                os.close(folder)
                asker.sendall(words)
        assert ask(data_dir, "job", Request("status")) == {"name": "status"}
        with pytest.raises(ConfigError, match="runs already"):
            ControlSocket(data_dir, "job")
        assert free_name(data_dir, "job") == "job-2"
    finally:
        control.close()
    with pytest.raises(NotFoundError):
        ask(data_dir, "job", Request("status"))


def test_errors_keep_their_kind_and_dead_sockets_go(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path)

    def refuse(_request: Request, _there: object) -> dict[str, object]:
        raise DamagedError("it broke", remedy="mend it")

    control = ControlSocket(data_dir, "job")
    control.serve(refuse)
    with pytest.raises(DamagedError, match="it broke") as caught:
        ask(data_dir, "job", Request("status"))
    assert caught.value.remedy == "mend it"
    control.close()
    dead = socket.socket(socket.AF_UNIX)
    with dead:
        dead.bind(str(data_dir.run / "jobs" / "dead.sock"))
    assert running_jobs(data_dir) == []
    assert not (data_dir.run / "jobs" / "dead.sock").exists()


def test_requests_are_strict() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"verb": "x", "shell": "rm"}', type=Request)
    assert issubclass(DamagedError, DormouseError)


# Streams


class _Kept:
    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> bool:
        self.data += data
        return True


@given(st.lists(st.binary(max_size=20)))
def test_numbered_lines_are_whole(parts: list[bytes]) -> None:
    kept = _Kept()
    sink = NumberedSink(3, kept)
    for part in parts:
        sink.write(part)
    sink.finish()
    plain = b"".join(parts)
    lines = plain.split(b"\n")
    if not lines[-1]:
        lines.pop()
    assert kept.data == b"".join(b"3| " + line + b"\n" for line in lines)


def test_unread_input_is_seen_and_stays() -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, b"words" * 10_000)
        assert unread(f"/proc/self/fd/{reading}") == b"words" * 10_000
        assert os.read(reading, 1 << 16) == b"words" * 10_000
        assert unread(f"/proc/self/fd/{reading}") == b""
    finally:
        os.close(reading)
        os.close(writing)


def test_input_takes_no_more_than_the_job_has_room_for() -> None:
    """What was taken and not passed on would be lost in a capture."""
    source, feeding = os.pipe()
    reading, writing = os.pipe()
    try:
        os.write(feeding, b"x" * 60_000)
        os.set_blocking(writing, False)
        os.write(writing, b"y" * 65_536)
        os.set_blocking(writing, True)
        feed = Input(writing, source)
        with feed.paused():
            pass
        assert len(unread(f"/proc/self/fd/{source}")) == 60_000
        os.read(reading, 1 << 16)
        eventually(lambda: len(unread(f"/proc/self/fd/{reading}")) == 60_000, "the rest")
    finally:
        os.close(feeding)
        os.close(reading)
        os.close(source)


def test_a_job_that_ends_while_it_is_killed_was_not_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its keeper takes the question, and is gone before it answers."""
    asked: list[str] = []

    def answer(_data_dir: DataDir, name: str, request: Request, **_more: object) -> dict[str, object]:
        asked.append(request.verb)
        if request.verb == "kill":
            raise SnapshotError(f"the keeper of job {name} ended without an answer")
        if asked.count("status") == 2:
            raise NotFoundError(f"no job {name} runs")
        return {}

    monkeypatch.setattr(launch, "ask", answer)
    assert launch.stop_job(DataDir(tmp_path), "job", 0.0) == {"name": "job", "killed": False}
    assert asked == ["stop", "kill", "status", "status"]
