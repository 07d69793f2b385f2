"""Over a real port: the official client, clients that go away, and a process that is told to stop."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from dormouse.config import load_config
from dormouse.errors import ConfigError
from dormouse.gateway import access
from dormouse.gateway.server import address_of, check_exposure, listen, run_server
from tests.gateway.http import assert_problem, assert_problem_body, events, live_rig
from tests.node.standin import StandInHost, configure, on_loop, until


@on_loop
async def test_official_client(tmp_path: Path) -> None:
    async with live_rig(tmp_path, StandInHost(delay=0.001), keys={"secret": ""}) as gateway:
        base_url = f"{gateway.client.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="secret", max_retries=0) as client:
            assert [model.id async for model in await client.models.list()] == ["mouse"]
            message = {"role": "user", "content": "a b"}
            answer = await client.chat.completions.create(
                model="mouse", messages=[message], max_tokens=3, logprobs=True
            )
            assert answer.choices[0].message.content == "a b a"
            assert answer.choices[0].logprobs is not None and answer.usage is not None
            stream = await client.chat.completions.create(
                model="mouse", messages=[message], max_tokens=3, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "a b a"
            assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 5
            completion = await client.completions.create(model="mouse", prompt="x", max_tokens=2, logprobs=1)
            assert completion.choices[0].text == "x x"
            with pytest.raises(openai.NotFoundError, match="not served here"):
                await client.chat.completions.create(model="mose", messages=[message])
            with pytest.raises(openai.BadRequestError, match="temperature"):
                await client.chat.completions.create(model="mouse", messages=[message], temperature=9)
            with pytest.raises(openai.APIError, match="ended unexpectedly"):
                dying = {"role": "user", "content": "a a a die"}
                async for _chunk in await client.chat.completions.create(model="mouse", messages=[dying], stream=True):
                    pass
        async with openai.AsyncOpenAI(base_url=base_url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()


@on_loop
async def test_official_client_waits_through_pings(tmp_path: Path) -> None:
    host = StandInHost(gates={"start_worker": asyncio.Event()})
    async with live_rig(tmp_path, host, ping_interval=0.02) as gateway:
        asyncio.get_running_loop().call_later(0.2, host.gates["start_worker"].set)
        async with openai.AsyncOpenAI(base_url=f"{gateway.client.base_url}/v1", api_key="-", max_retries=0) as client:
            stream = await client.completions.create(model="mouse", prompt="x", max_tokens=2, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == "x x"


@pytest.mark.parametrize("stream", [False, True])
@on_loop
async def test_client_that_leaves_cancels_its_generation(tmp_path: Path, stream: bool) -> None:
    async with live_rig(tmp_path, StandInHost(delay=0.05)) as gateway:
        request = asyncio.create_task(gateway.chat("a", stream=stream, max_tokens=60))
        await until(lambda: gateway.node.statuses()[0].in_flight == 1)
        request.cancel()
        await asyncio.wait([request])
        await until(lambda: gateway.node.statuses()[0].in_flight == 0)
        await gateway.node.sleep("mouse")  # the worker refuses to park while it generates
        assert await gateway.metric('dormouse_requests_total{model="mouse",route="/v1/chat/completions",status="') == 1


@pytest.mark.parametrize("stream", [False, True])
@on_loop
async def test_client_that_leaves_while_it_waits_is_forgotten(tmp_path: Path, stream: bool) -> None:
    host = StandInHost(gates={"start_worker": asyncio.Event()})
    async with live_rig(tmp_path, host, ping_interval=0.02) as gateway:
        request = asyncio.create_task(gateway.chat(stream=stream))
        await until(lambda: gateway.node.statuses()[0].waiting == 1)
        request.cancel()
        await asyncio.wait([request])
        await until(lambda: gateway.node.statuses()[0].waiting == 0)
        host.gates["start_worker"].set()


@on_loop
async def test_tokens_stream_one_by_one(tmp_path: Path) -> None:
    async with live_rig(tmp_path, StandInHost(delay=0.05)) as gateway:
        body = {"model": "mouse", "prompt": "a", "max_tokens": 5, "stream": True}
        async with gateway.client.stream("POST", "/v1/completions", json=body) as response:
            pieces = [piece async for piece in response.aiter_text()]
        assert len(pieces) >= 5
        assert "".join(event["choices"][0]["text"] for event in events("".join(pieces))) == "a a a a a"


@contextmanager
def server_process(data_dir: Path, delay: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "tests.gateway.server_process", str(data_dir), str(delay)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on http://127.0.0.1:")
            yield process, line.removeprefix("listening on ").strip()
        finally:
            process.kill()


def test_sigterm_finishes_what_runs_refuses_the_rest_and_exits_0(tmp_path: Path) -> None:
    with server_process(tmp_path, 0.02) as (process, url), httpx.Client(base_url=url, timeout=30) as client:
        body = {"model": "mouse", "prompt": "a", "max_tokens": 50, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            pieces = response.iter_text()
            text = next(pieces)
            process.send_signal(signal.SIGTERM)
            refused = httpx.get(f"{url}/readyz")
            while refused.status_code == 200:
                refused = httpx.get(f"{url}/readyz")
            assert refused.status_code == 503
            late = httpx.post(f"{url}/v1/completions", json=body)
            assert late.status_code == 503 and late.headers["retry-after"]
            text += "".join(pieces)
        assert len([event for event in events(text) if event["choices"][0]["text"]]) > 1
        assert process.wait(20) == 0


def test_second_signal_cuts_off_what_runs(tmp_path: Path) -> None:
    with server_process(tmp_path, 5.0) as (process, url):
        body = {"model": "mouse", "prompt": "a", "max_tokens": 50}

        def ask() -> None:
            with pytest.raises(httpx.HTTPError):
                httpx.post(f"{url}/v1/completions", json=body, timeout=30).raise_for_status()

        asking = threading.Thread(target=ask)
        asking.start()
        while 'dormouse_in_flight{model="mouse"} 1.0' not in httpx.get(f"{url}/metrics").text:
            pass
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/readyz").status_code == 200:
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        asking.join()


def test_port_in_use_is_one_clear_sentence() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert address_of(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="192"):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_public_bind_needs_keys(tmp_path: Path, host: str) -> None:
    config = configure(tmp_path, host=host)
    with pytest.raises(ConfigError, match="no API keys"):
        check_exposure(config, [])
    with pytest.raises(ConfigError, match="no API keys"):
        run_server(config, environ={})
    check_exposure(config, ["key"])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_needs_none(tmp_path: Path, host: str) -> None:
    check_exposure(configure(tmp_path, host=host), [])


def test_nothing_to_serve_is_one_clear_sentence(tmp_path: Path) -> None:
    config = load_config(environ={"DORMOUSE_HOME": str(tmp_path)}, flags={"port": 0})
    with pytest.raises(ConfigError, match="no model to serve"):
        run_server(config, environ={})


def stop_at_once(process: subprocess.Popen[str], url: str) -> None:
    """Two signals, the second once the first was seen."""
    process.send_signal(signal.SIGTERM)
    while httpx.get(f"{url}/readyz").status_code == 200:
        pass
    process.send_signal(signal.SIGTERM)


def test_stream_that_is_cut_off_ends_with_an_error(tmp_path: Path) -> None:
    with server_process(tmp_path, 0.1) as (process, url), httpx.Client(base_url=url, timeout=30) as client:
        body = {"model": "mouse", "prompt": "a", "max_tokens": 60, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            pieces = response.iter_text()
            text = next(pieces)
            stop_at_once(process, url)
            text += "".join(pieces)
        assert_problem_body(events(text)[-1], "shutting_down", mentions="before the answer was complete")
        assert process.wait(20) == 0


def test_answer_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    with server_process(tmp_path, 5.0) as (process, url), ThreadPoolExecutor() as pool:
        asking = pool.submit(httpx.post, f"{url}/v1/completions", json={"model": "mouse", "prompt": "a"}, timeout=30)
        while 'dormouse_in_flight{model="mouse"} 1.0' not in httpx.get(f"{url}/metrics").text:
            pass
        stop_at_once(process, url)
        assert_problem(asking.result(), 503, "shutting_down", mentions="before the answer was complete")
        assert process.wait(20) == 0


@on_loop
async def test_client_that_leaves_in_the_middle_of_a_stream_is_counted(tmp_path: Path) -> None:
    async with live_rig(tmp_path, StandInHost(delay=0.05)) as gateway:
        body = {"model": "mouse", "prompt": "a", "max_tokens": 60, "stream": True}
        async with gateway.client.stream("POST", "/v1/completions", json=body) as response:
            await anext(response.aiter_text())
        line = 'dormouse_requests_total{model="mouse",route="/v1/completions",status="499",'
        async with asyncio.timeout(20):
            while not await gateway.metric(line):  # noqa: ASYNC110 - nobody tells when a request is written down
                await asyncio.sleep(0.01)


@on_loop
async def test_body_that_does_not_come_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "BODY_SECONDS", 0.1)
    async with live_rig(tmp_path) as gateway:
        port = gateway.client.base_url.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"request_timeout" in answer
        writer.close()
