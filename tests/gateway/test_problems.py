"""What a client gets for a bad request, or at a bad moment: always one clear sentence in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dormouse.engine.frames import MAX_FRAME
from dormouse.errors import EngineError, HostError, RequestError
from dormouse.gateway.requests import IGNORED, NEUTRAL_CHAT, NEUTRAL_COMPLETION, parse_chat, parse_completion
from tests.gateway.http import assert_problem, assert_problem_body, events, rig
from tests.node.standin import StandInHost, on_loop, until

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": None}, "messages", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            "invalid_value",
        ),
        ({"messages": ["hi"]}, "messages[0]", "invalid_value"),
        ({"model": 7}, "model", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": "ten"}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "invalid_value"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 33}, "n", "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"seed": 2**70}, "seed", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter"),
        ({"prompt": "hi"}, "prompt", "unknown_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ],
)
@on_loop
async def test_wrong_fields_are_named(tmp_path: Path, fields: dict[str, Any], param: str, code: str) -> None:
    async with rig(tmp_path) as gateway:
        assert_problem(await gateway.chat(**fields), 400, code, param=param)
        assert gateway.host.calls == []


@pytest.mark.parametrize(
    ("prompt", "fields", "param", "code"),
    [
        ([], {}, "prompt", "invalid_value"),
        (["a", 1], {}, "prompt", "invalid_value"),
        ([-1], {}, "prompt", "invalid_value"),
        ([True], {}, "prompt", "invalid_value"),
        (7, {}, "prompt", "invalid_value"),
        (["a"] * 20, {"n": 2}, "n", "invalid_value"),
        ("a", {"logprobs": 6}, "logprobs", "invalid_value"),
        ("a", {"echo": True}, "echo", "unsupported_parameter"),
        ("a", {"suffix": "x"}, "suffix", "unsupported_parameter"),
        ("a", {"best_of": 2}, "best_of", "unsupported_parameter"),
    ],
)
@on_loop
async def test_wrong_completion_fields_are_named(
    tmp_path: Path, prompt: object, fields: dict[str, Any], param: str, code: str
) -> None:
    async with rig(tmp_path) as gateway:
        assert_problem(await gateway.complete(prompt, **fields), 400, code, param=param)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"model": "mouse", "messages": NaN}', "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b"[]", "invalid_type"),
        (b'"x"', "invalid_type"),
    ],
)
@on_loop
async def test_bodies_that_are_no_objects(tmp_path: Path, body: bytes, code: str) -> None:
    async with rig(tmp_path) as gateway:
        for route in (CHAT, "/v1/completions"):
            assert_problem(await gateway.client.post(route, content=body), 400, code)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted(
    {"model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "stream", "stream_options"}
    | {
        "stop",
        "seed",
        "logprobs",
        "top_logprobs",
        "max_completion_tokens",
        *NEUTRAL_CHAT,
        *NEUTRAL_COMPLETION,
        *IGNORED,
    }
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6) | JSON, st.booleans())
def test_any_json_is_a_job_or_a_request_error(body: object, valid_base: bool) -> None:
    for parse, base in ((parse_chat, {"messages": MESSAGES}), (parse_completion, {"prompt": "hi"})):
        full = {"model": "mouse", **base, **body} if valid_base and isinstance(body, dict) else body
        try:
            job = parse(json.dumps(full).encode())
        except RequestError as error:
            assert str(error)
        else:
            assert job.sampling(None, 64).max_tokens >= 1


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_refused_in_words(body: bytes) -> None:
    with pytest.raises(RequestError):
        parse_chat(body)


@on_loop
async def test_unknown_model_and_routes(tmp_path: Path) -> None:
    async with rig(tmp_path) as gateway:
        for response in (await gateway.chat(model="mose"), await gateway.client.get("/v1/models/mose")):
            assert_problem(response, 404, "model_not_found", param="model", mentions="'mose'")
        stream = await gateway.chat(model="mose", stream=True)
        assert_problem(stream, 404, "model_not_found", param="model", mentions="Did you mean 'mouse'")
        assert_problem(await gateway.client.get("/nothing"), 404, "not_found")
        wrong_method = await gateway.client.get(CHAT)
        assert_problem(wrong_method, 405, "method_not_allowed")
        assert wrong_method.headers["allow"] == "POST"


@on_loop
async def test_keys(tmp_path: Path) -> None:
    async with rig(tmp_path, keys={"one": "", "two": ""}) as gateway:
        for headers in (
            {},
            {"authorization": "Bearer three"},
            {"authorization": "one"},
            {"authorization": "Basic one"},
        ):
            for path in ("/v1/models", "/metrics", "/nothing"):
                refused = await gateway.client.get(path, headers=headers)
                assert_problem(refused, 401, "invalid_api_key")
                assert refused.headers["www-authenticate"] == "Bearer"
        for key in ("one", "two"):
            headers = {"authorization": f"Bearer {key}"}
            assert (await gateway.client.get("/v1/models", headers=headers)).status_code == 200
            assert (await gateway.client.get("/metrics", headers=headers)).status_code == 200
        for path in ("/healthz", "/readyz"):
            assert (await gateway.client.get(path)).status_code == 200
    async with rig(tmp_path, keys={"one": ""}, metrics_open=True) as gateway:
        assert (await gateway.client.get("/metrics")).status_code == 200


@on_loop
async def test_too_long_bodies_are_refused_while_they_are_read(tmp_path: Path) -> None:
    read = 0

    async def endless() -> Any:
        nonlocal read
        while True:
            read += 1000
            yield b"x" * 1000

    async with rig(tmp_path, max_body_bytes="10KB") as gateway:
        assert_problem(await gateway.chat("x" * 20_000), 413, "request_too_large")
        assert_problem(await gateway.client.post(CHAT, content=endless()), 413, "request_too_large")
        assert read <= 12_000


@on_loop
async def test_prompt_over_the_frame_limit_is_the_clients_fault(tmp_path: Path) -> None:
    async with rig(tmp_path, max_body_bytes="64MiB") as gateway:
        assert_problem(await gateway.chat("x" * (MAX_FRAME + 1)), 400, "request_too_large")
        assert (await gateway.chat()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@on_loop
async def test_prompt_the_model_refuses(tmp_path: Path, stream: bool) -> None:
    async with rig(tmp_path, ping_interval=10) as gateway:
        response = await gateway.chat("refuse", stream=stream)
        assert_problem(response, 400, "context_length_exceeded", param="messages")


@on_loop
async def test_full_queue(tmp_path: Path) -> None:
    host = StandInHost(gates={"start_worker": asyncio.Event()})
    async with rig(tmp_path, host, max_queue=1) as gateway:
        waiting = asyncio.create_task(gateway.chat())
        await until(lambda: gateway.node.statuses()[0].waiting == 1)
        for stream in (False, True):
            refused = await gateway.chat(stream=stream)
            assert_problem(refused, 429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
        host.gates["start_worker"].set()
        assert (await waiting).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@on_loop
async def test_model_that_cannot_start(tmp_path: Path, stream: bool) -> None:
    host = StandInHost(faults={"start_worker": HostError("criu is missing", remedy="Run `dormouse setup criu`")})
    async with rig(tmp_path, host, ping_interval=10) as gateway:
        assert_problem(await gateway.chat(stream=stream), 503, "host_not_capable", mentions="dormouse setup criu")
        assert (await gateway.chat()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@on_loop
async def test_fault_of_ours_shows_no_internals(tmp_path: Path, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    host = StandInHost(faults={"start_worker": EngineError("internal error: KeyError")})
    async with rig(tmp_path, host, ping_interval=10) as gateway:
        gateway.node.replica = None  # type: ignore[method-assign, assignment]
        response = await gateway.chat(stream=stream)
        assert_problem(response, 500, "internal_error")
        assert "NoneType" not in response.text and "NoneType" in caplog.text


@pytest.mark.parametrize("word", ["die", "break"])
@on_loop
async def test_error_in_the_middle_of_a_stream_is_an_event(tmp_path: Path, word: str) -> None:
    async with rig(tmp_path, StandInHost(delay=0.02)) as gateway:
        response = await gateway.chat(f"a b {word}", stream=True, max_tokens=9)
        assert response.status_code == 200
        *answer, last = events(response.text)
        assert answer and "error" not in answer[-1]
        assert_problem_body(last, "engine_error")
        assert (
            await gateway.metric('dormouse_requests_total{model="mouse",route="/v1/chat/completions",status="500",')
            == 1
        )
        assert_problem(await gateway.chat(f"a b {word}", max_tokens=9), 500, "engine_error")


@on_loop
async def test_error_after_a_ping_is_an_event(tmp_path: Path) -> None:
    gates = {"start_worker": asyncio.Event()}
    host = StandInHost(gates=gates, faults={"start_worker": HostError("no room")})
    async with rig(tmp_path, host, ping_interval=0.02) as gateway:
        asyncio.get_running_loop().call_later(0.1, gates["start_worker"].set)
        response = await gateway.chat(stream=True)
        assert response.status_code == 200
        (only,) = events(response.text)
        assert_problem_body(only, "host_not_capable", mentions="no room")


@on_loop
async def test_one_of_several_answers_fails_them_all(tmp_path: Path) -> None:
    async with rig(tmp_path) as gateway:
        assert_problem(await gateway.complete(["a", "refuse"]), 400, "context_length_exceeded", param="messages")
        await gateway.node.sleep("mouse")


@pytest.mark.parametrize("stream", [False, True])
@on_loop
async def test_request_that_takes_too_long(tmp_path: Path, stream: bool) -> None:
    async with rig(tmp_path, StandInHost(delay=5), request_timeout=0.3, ping_interval=10) as gateway:
        assert_problem(await gateway.chat(stream=stream), 504, "deadline_exceeded", mentions="0.3 s")
        await until(lambda: gateway.node.statuses()[0].in_flight == 0)


@on_loop
async def test_draining_refuses_new_work_and_finishes_the_old(tmp_path: Path) -> None:
    host = StandInHost(gates={"start_worker": asyncio.Event()})
    async with rig(tmp_path, host) as gateway:
        waiting = asyncio.create_task(gateway.chat())
        await until(lambda: gateway.node.statuses()[0].waiting == 1)
        gateway.gate.draining = True
        refused = await gateway.chat()
        assert_problem(refused, 503, "shutting_down")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await gateway.client.get("/readyz")).status_code == 503
        assert (await gateway.client.get("/healthz")).status_code == 200
        host.gates["start_worker"].set()
        assert (await waiting).status_code == 200
