"""The worker process and its protocol, with the null engine: every behaviour that does not need a model."""

from __future__ import annotations

import itertools
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.checkpoint.tensors import CheckpointBody
from dormouse.engine.frames import MAX_FRAME, Inbox, pack_frame
from dormouse.engine.messages import (
    PROTOCOL_VERSION,
    AdapterSegment,
    Cancel,
    ChatPrompt,
    Failed,
    Finished,
    FromWorker,
    Generate,
    Load,
    LoadAdapter,
    Ping,
    Pong,
    Prepare,
    Quiesce,
    Resume,
    Sampling,
    Segments,
    TextPrompt,
    ToWorker,
    WorkerError,
)
from dormouse.engine.worker import Worker
from dormouse.errors import EngineError
from dormouse.transfer.handles import SegmentInfo

from .conftest import write_null_model
from .worker_client import WorkerClient

PROMPT = TextPrompt("once upon a time")


@pytest.fixture
def worker(tmp_path: Path, null_model: Path) -> Iterator[WorkerClient]:
    with WorkerClient(tmp_path / "log") as client:
        client.load(null_model, "null")
        yield client


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_it_says_hello_first(worker: WorkerClient) -> None:
    assert (worker.hello.version, worker.hello.pid) == (PROTOCOL_VERSION, worker.process.pid)


def test_it_gives_a_sign_of_life(worker: WorkerClient) -> None:
    worker.send(Ping())
    assert isinstance(worker.receive(), Pong)


def test_answers_depend_on_prompt_and_seed_only(worker: WorkerClient) -> None:
    first = worker.ask(PROMPT, Sampling(max_tokens=12, seed=1))
    beside = worker.run({str(i): (PROMPT, Sampling(max_tokens=12, seed=i)) for i in range(8)})
    assert beside["1"].token_ids == first.token_ids
    assert len({answer.text for answer in beside.values()}) == 8
    assert isinstance(first.end, Finished)
    assert (first.end.reason, first.end.prompt_tokens, first.end.completion_tokens) == ("length", 4, 12)


def test_a_stop_string_over_two_words_ends_the_answer(worker: WorkerClient) -> None:
    whole = worker.ask(PROMPT, Sampling(max_tokens=12)).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 6]
    cut = worker.ask(PROMPT, Sampling(max_tokens=12, stop=(stop,)))
    assert cut.text == whole[: whole.index(stop)]
    assert isinstance(cut.end, Finished)
    assert cut.end.reason == "stop"


def test_logprobs_come_with_as_many_alternatives_as_asked(worker: WorkerClient) -> None:
    answer = worker.ask(PROMPT, Sampling(max_tokens=3, logprobs=2))
    for delta in answer.deltas:
        assert delta.logprobs is not None
        assert [len(listed) for listed in delta.logprobs] == [3]
        assert delta.logprobs[0][0].token_id == delta.token_ids[0]


def test_cancel_ends_an_endless_answer(tmp_path: Path) -> None:
    model = write_null_model(tmp_path / "slow", delay_s=0.005, answer_tokens=1 << 30, context=1 << 31)
    with WorkerClient(tmp_path / "log") as client:
        client.load(model, "null")
        client.send(Generate(id="a", prompt=PROMPT, sampling=Sampling(max_tokens=1 << 30)))
        client.receive()
        client.send(Cancel(id="a"))
        client.send(Cancel(id="unknown"))
        end = client.collect(["a"])["a"].end
        assert isinstance(end, Finished)
        assert end.reason == "cancel"
        assert client.ask(PROMPT, Sampling(max_tokens=1)).text


def test_a_prompt_that_is_too_long_is_told_in_numbers(worker: WorkerClient) -> None:
    end = worker.ask(TextPrompt("word " * 9000), Sampling(max_tokens=1)).end
    assert isinstance(end, Failed)
    assert (end.reason, end.bad_request, end.param) == ("context_length_exceeded", True, "prompt")
    assert "maximum context length is 8192 tokens" in end.message
    assert "9000 tokens" in end.message


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        (PROMPT, Sampling(max_tokens=0), "max_tokens"),
        (ChatPrompt(messages=[{"role": "user"}]), Sampling(max_tokens=1), "messages"),
    ],
)
def test_bad_requests_fail_alone(worker: WorkerClient, prompt: TextPrompt, sampling: Sampling, param: str) -> None:
    end = worker.ask(prompt, sampling).end
    assert isinstance(end, Failed)
    assert (end.bad_request, end.param) == (True, param)
    assert worker.ask(PROMPT, Sampling(max_tokens=1)).text


def test_a_request_before_load_fails(tmp_path: Path) -> None:
    with WorkerClient(tmp_path / "log") as client:
        end = client.ask(PROMPT, Sampling(max_tokens=1)).end
        assert isinstance(end, Failed)
        assert (end.message, end.bad_request) == ("no model is loaded", False)


def test_parked_it_holds_nothing_and_does_nothing(worker: WorkerClient) -> None:
    worker.ask(PROMPT, Sampling(max_tokens=2))
    worker.quiesce()
    fds = Path(f"/proc/{worker.process.pid}/fd")
    targets = sorted(str(fd.readlink()) for fd in fds.iterdir())
    assert targets[:3] == ["/dev/null"] * 3
    assert [target.split(":")[0] for target in targets[3:]] == ["socket"]
    before = cpu_ticks(worker.process.pid)
    worker.socket.settimeout(0.3)
    with pytest.raises(TimeoutError):
        worker.socket.recv(1)
    assert cpu_ticks(worker.process.pid) == before
    worker.socket.settimeout(60)
    end = worker.ask(PROMPT, Sampling(max_tokens=1)).end
    assert isinstance(end, Failed)
    assert end.message == "the worker is parked"


def test_answers_are_the_same_after_resume(worker: WorkerClient) -> None:
    before = worker.ask(PROMPT, Sampling(max_tokens=9))
    for _ in range(3):
        worker.quiesce()
        worker.resume()
    assert worker.ask(PROMPT, Sampling(max_tokens=9)).text == before.text


def test_after_resume_the_log_is_appended_to_and_private(worker: WorkerClient, tmp_path: Path) -> None:
    worker.quiesce()
    new_log = tmp_path / "new.log"
    worker.send(Resume(log_path=str(new_log)))
    worker.receive()
    assert stat.S_IMODE(new_log.stat().st_mode) == 0o600
    assert Path(f"/proc/{worker.process.pid}/fd/2").readlink() == new_log


def test_a_log_that_cannot_be_opened_is_reported_and_the_worker_waits(worker: WorkerClient, tmp_path: Path) -> None:
    worker.quiesce()
    worker.send(Resume(log_path=str(tmp_path / "missing" / "log")))
    assert "can't be opened: No such file" in worker.expect(WorkerError).message
    worker.resume()
    assert worker.ask(PROMPT, Sampling(max_tokens=1)).text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Load(engine="steam", path="/nowhere"), "there is no engine named 'steam'"),
        (Load(engine="null", path="/nowhere"), "/nowhere/config.json can't be used"),
    ],
)
def test_a_load_that_fails_says_why(tmp_path: Path, spec: Load, message: str) -> None:
    with WorkerClient(tmp_path / "log") as client:
        client.send(spec)
        error = client.expect(WorkerError)
        assert message in error.message
        assert error.remedy


def test_a_second_load_is_refused(worker: WorkerClient, null_model: Path) -> None:
    worker.send(Load(engine="null", path=str(null_model)))
    assert "has a model already" in worker.expect(WorkerError).message


def test_quiesce_without_a_model_is_refused(tmp_path: Path) -> None:
    with WorkerClient(tmp_path / "log") as client:
        client.send(Quiesce())
        assert client.expect(WorkerError).message == "no engine is loaded"


def test_a_prepared_worker_sleeps_and_wakes_without_a_model_and_loads_only_what_it_was_prepared_for(
    tmp_path: Path, null_model: Path
) -> None:
    with WorkerClient(tmp_path / "log") as client:
        client.prepare("null", threads=2)
        client.quiesce()
        client.resume()
        client.send(Generate(id="a", prompt=PROMPT, sampling=Sampling(max_tokens=1)))
        assert client.expect(Failed).message == "no model is loaded"
        client.send(Prepare(engine="null"))
        assert "has an engine already" in client.expect(WorkerError).message
        client.send(Load(engine="null", path=str(null_model)))  # other threads
        assert "this worker was prepared for" in client.expect(WorkerError).message
        client.load(null_model, "null", threads=2)
        assert client.ask(PROMPT, Sampling(max_tokens=4)).text


def test_segments_without_their_descriptors_are_refused_and_strays_are_closed(tmp_path: Path, null_model: Path) -> None:
    with WorkerClient(tmp_path / "log") as client:
        descriptors = Path(f"/proc/{client.process.pid}/fd")
        before = len(list(descriptors.iterdir()))
        client.send(Segments(segments=[SegmentInfo("memfd", 4096, False)]))
        assert "announced without its descriptor" in client.expect(WorkerError).message
        frame = pack_frame(Segments(segments=[SegmentInfo("other", 4096, False)]))
        socket.send_fds(client.socket, [frame], [0, 0, 0])
        client.send(Load(engine="null", path=str(null_model)))
        assert "can't map a segment of kind 'other'" in client.expect(WorkerError).message
        assert len(list(descriptors.iterdir())) == before
        with WorkerClient(tmp_path / "log") as other:
            other.load(null_model, "null")
            assert other.ask(PROMPT, Sampling(max_tokens=4)).text


def test_an_adapters_segment_that_arrives_in_two_parts_keeps_off_the_next_ones(tmp_path: Path) -> None:
    own, control = socket.socketpair()
    with own, control, tempfile.TemporaryFile() as memory:
        segment = pack_frame(AdapterSegment(segment=SegmentInfo(kind="memfd", size=1, pending=False)))
        table = CheckpointBody(version=1, size=1, chunk_size=1, tensors=[])
        first, second = (pack_frame(LoadAdapter(name=name, table=table, scalings={})) for name in ("a", "b"))
        socket.send_fds(own, [segment[:10]], [memory.fileno()])
        own.sendall(segment[10:] + first)
        socket.send_fds(own, [segment], [memory.fileno()])
        own.sendall(second)
        own.shutdown(socket.SHUT_WR)
        assert Worker(control).run() == 0
        control.close()
        inbox: Inbox[FromWorker] = Inbox(FromWorker)  # type: ignore[arg-type]
        replies = list(inbox.feed(own.recv(1 << 16)))
    assert [getattr(reply, "name", "") for reply in replies] == ["", "a", "b"], replies


def test_shutdown_and_the_end_of_the_stream_end_the_process(tmp_path: Path, null_model: Path) -> None:
    with WorkerClient(tmp_path / "log") as client:
        client.load(null_model, "null")
        client.socket.shutdown(1)
        assert client.process.wait(timeout=30) == 0
    with WorkerClient(tmp_path / "log") as client:
        client.load(null_model, "null")
        client.send(Generate(id="a", prompt=PROMPT, sampling=Sampling(max_tokens=50)))
    assert client.process.returncode == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<I", MAX_FRAME + 1), f"a frame of {MAX_FRAME + 1} bytes"),
        (struct.pack("<I", 3) + b"\xc1\xc1\xc1", "malformed message"),
        (struct.pack("<I", 1) + b"\xc0", "malformed message"),
        (pack_frame(Cancel(id="x")).replace(b"cancel", b"cancer"), "malformed message"),
    ],
)
def test_a_peer_that_breaks_the_protocol_is_told_and_left(worker: WorkerClient, data: bytes, message: str) -> None:
    worker.socket.sendall(data)
    assert message in worker.expect(WorkerError).message
    assert worker.process.wait(timeout=30) == 1


def test_a_node_that_reads_slowly_slows_the_engine_down(tmp_path: Path) -> None:
    model = write_null_model(tmp_path / "endless", answer_tokens=1 << 30, context=1 << 31)
    with WorkerClient(tmp_path / "log") as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        client.load(model, "null")
        client.send(Generate(id="a", prompt=PROMPT, sampling=Sampling(max_tokens=1 << 30)))
        ticks = [-1, 0]
        while ticks[-1] != ticks[-2]:  # until it is stuck in its send: it would run for hours otherwise
            time.sleep(0.3)
            ticks.append(cpu_ticks(client.process.pid))


@given(data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=5))
def test_arbitrary_bytes_give_messages_or_the_named_error(data: bytes, cuts: list[int]) -> None:
    inbox: Inbox[ToWorker] = Inbox(ToWorker)  # type: ignore[arg-type]
    at = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    try:
        for a, b in itertools.pairwise(at):
            list(inbox.feed(data[a:b]))
    except EngineError as error:
        assert "the peer" in error.message


@given(
    messages=st.lists(
        st.one_of(st.builds(Cancel, id=st.text(max_size=9)), st.builds(Resume, log_path=st.text(max_size=9)))
    ),
    size=st.integers(1, 50),
)
def test_messages_arrive_whole_however_the_stream_is_cut(messages: list[Cancel | Resume], size: int) -> None:
    stream = b"".join(pack_frame(message) for message in messages)
    inbox: Inbox[ToWorker] = Inbox(ToWorker)  # type: ignore[arg-type]
    received = [m for at in range(0, len(stream), size) for m in inbox.feed(stream[at : at + size])]
    assert received == messages
