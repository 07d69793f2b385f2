"""What a client gets for a good request."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dormouse.config import ModelConfig
from dormouse.errors import IncompatibleError
from tests.gateway.http import comments, events, rig
from tests.node.standin import StandInHost, on_loop, until


@on_loop
async def test_chat(tmp_path: Path) -> None:
    async with rig(tmp_path) as gateway:
        response = await gateway.chat("hello mouse")
        assert response.status_code == 200
        assert response.headers["x-dormouse-start"].startswith("cold; ")
        body = response.json()
        assert body["object"] == "chat.completion" and body["model"] == "mouse"
        assert body["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello mouse hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ]
        assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
        assert (await gateway.chat()).headers["x-dormouse-start"] == "hot; 0.000"


@on_loop
async def test_chat_takes_text_parts_and_the_developer_role(tmp_path: Path) -> None:
    async with rig(tmp_path) as gateway:
        parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
        messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
        response = await gateway.chat(messages=messages)
        assert response.json()["choices"][0]["message"]["content"] == "a b a"


@on_loop
async def test_chat_stream(tmp_path: Path) -> None:
    async with rig(tmp_path) as gateway:
        response = await gateway.chat("a b", stream=True, stream_options={"include_usage": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-dormouse-start"].startswith("cold; ")
        first, *middle, last, usage = events(response.text)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(event["choices"][0]["delta"]["content"] for event in middle) == "a b a"
        assert last["choices"][0]["finish_reason"] == "length"
        assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 5
        assert all(event["usage"] is None for event in (first, *middle, last))
        assert len({event["id"] for event in (first, *middle, last, usage)}) == 1


@on_loop
async def test_stream_without_usage_has_none(tmp_path: Path) -> None:
    async with rig(tmp_path) as gateway:
        response = await gateway.chat(stream=True)
        assert all("usage" not in event for event in events(response.text))


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a b", ["a b a"]),
        (["a", "b c"], ["a a a", "b c b"]),
        ([7, 8], ["t7 t8 t7"]),
        ([[7], [8]], ["t7 t7 t7", "t8 t8 t8"]),
    ],
)
@on_loop
async def test_completion_prompts(tmp_path: Path, prompt: object, texts: list[str]) -> None:
    async with rig(tmp_path) as gateway:
        body = (await gateway.complete(prompt, max_tokens=3)).json()
        assert body["object"] == "text_completion"
        assert [choice["text"] for choice in body["choices"]] == texts
        assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))


@on_loop
async def test_completion_defaults_to_sixteen_tokens(tmp_path: Path) -> None:
    async with rig(tmp_path) as gateway:
        assert (await gateway.complete()).json()["usage"]["completion_tokens"] == 16


@on_loop
async def test_chat_defaults_to_all_the_context_allows(tmp_path: Path) -> None:
    async with rig(tmp_path) as gateway:
        assert (await gateway.chat(max_tokens=None)).json()["usage"]["completion_tokens"] == 64


@pytest.mark.parametrize("stream", [False, True])
@on_loop
async def test_several_answers(tmp_path: Path, stream: bool) -> None:
    async with rig(tmp_path) as gateway:
        response = await gateway.chat("a b", n=3, stream=stream)
        if not stream:
            assert [choice["message"]["content"] for choice in response.json()["choices"]] == ["a b a"] * 3
            assert response.json()["usage"] == {"prompt_tokens": 2, "completion_tokens": 9, "total_tokens": 11}
            return
        texts = ["", "", ""]
        for event in events(response.text):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
        assert texts == ["a b a"] * 3


@pytest.mark.parametrize("stream", [False, True])
@on_loop
async def test_chat_logprobs(tmp_path: Path, stream: bool) -> None:
    async with rig(tmp_path) as gateway:
        response = await gateway.chat("a b", logprobs=True, top_logprobs=2, stream=stream)
        bodies = events(response.text) if stream else [response.json()]
        found = [choice["logprobs"] for body in bodies for choice in body["choices"] if choice["logprobs"]]
        content = [position for logprobs in found for position in logprobs["content"]]
        assert [position["token"] for position in content] == ["a", " b", " a"]
        assert content[0]["logprob"] == -0.5 and content[0]["bytes"] == [97]
        assert [token["token"] for token in content[0]["top_logprobs"]] == ["alt0", "alt1"]


@on_loop
async def test_completion_logprobs(tmp_path: Path) -> None:
    async with rig(tmp_path) as gateway:
        logprobs = (await gateway.complete("a b", max_tokens=2, logprobs=1)).json()["choices"][0]["logprobs"]
        assert logprobs == {
            "tokens": ["a", " b"],
            "token_logprobs": [-0.5, -0.5],
            "top_logprobs": [{"alt0": -1.0}, {"alt0": -1.0}],
            "text_offset": [3, 4],
        }


@on_loop
async def test_harmless_fields_and_neutral_values_are_accepted(tmp_path: Path) -> None:
    async with rig(tmp_path) as gateway:
        response = await gateway.chat(
            user="u1",
            metadata={"k": "v"},
            store=False,
            frequency_penalty=0,
            presence_penalty=0.0,
            logit_bias={},
            tools=[],
            tool_choice="auto",
            response_format={"type": "text"},
            stop=None,
            seed=None,
            top_k=-1,
        )
        assert response.status_code == 200, response.text


@on_loop
async def test_models(tmp_path: Path) -> None:
    async with rig(tmp_path) as gateway:
        listed = (await gateway.client.get("/v1/models")).json()
        assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["mouse"]
        one = (await gateway.client.get("/v1/models/mouse")).json()
        assert one == listed["data"][0] and one["object"] == "model" and one["owned_by"] == "dormouse"


@on_loop
async def test_answer_is_the_same_cold_hot_and_from_a_snapshot(tmp_path: Path) -> None:
    async with rig(tmp_path) as gateway:
        answers = []
        for path in ("cold", "hot", "snapshot"):
            if path == "snapshot":
                await gateway.node.sleep("mouse")
            response = await gateway.chat("a b", temperature=0)
            assert response.headers["x-dormouse-start"].startswith(f"{path}; ")
            answers.append(response.json()["choices"][0]["message"]["content"])
        assert len(set(answers)) == 1


@on_loop
async def test_bad_snapshot_is_answered_cold_and_counted(tmp_path: Path) -> None:
    async with rig(tmp_path) as gateway:
        await gateway.node.wake("mouse")
        await gateway.node.sleep("mouse")
        gateway.host.faults["restore"] = IncompatibleError("kernel: captured with 5, here is 6")
        response = await gateway.chat()
        assert response.status_code == 200 and response.headers["x-dormouse-start"].startswith("cold; ")
        assert (
            await gateway.metric(
                'dormouse_fallbacks_total{model="mouse",path="snapshot",reason="snapshot_incompatible"}'
            )
            == 1
        )


@on_loop
async def test_held_stream_gets_pings_then_the_start_then_the_answer(tmp_path: Path) -> None:
    host = StandInHost(gates={"start_worker": asyncio.Event()})
    async with rig(tmp_path, host, ping_interval=0.02) as gateway:
        asyncio.get_running_loop().call_later(0.2, host.gates["start_worker"].set)
        response = await gateway.chat("a b", stream=True)
        assert response.headers["x-dormouse-start"] == "waiting"
        *pings, start = (line for line in comments(response.text) if not line.startswith("generating"))
        assert len(pings) >= 2 and all(line.startswith("waiting for mouse (") for line in pings)
        assert start.startswith("x-dormouse-start: cold; ")
        assert response.text.index(start) < response.text.index("data:")
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events(response.text)) == "a b a"


@on_loop
async def test_slow_first_token_gets_pings_and_an_exact_header(tmp_path: Path) -> None:
    async with rig(tmp_path, StandInHost(delay=0.15), ping_interval=0.05) as gateway:
        await gateway.node.wake("mouse")
        response = await gateway.chat("a", stream=True, max_tokens=1)
        assert response.headers["x-dormouse-start"] == "hot; 0.000"
        assert comments(response.text)[0].startswith("generating with mouse (")
        assert events(response.text)


@on_loop
async def test_fifty_requests_during_a_wake_share_it(tmp_path: Path) -> None:
    async with rig(tmp_path, ping_interval=30) as gateway:  # else a stream of a slow wake begins before it
        await gateway.node.wake("mouse")
        await gateway.node.sleep("mouse")
        responses = await asyncio.gather(*(gateway.chat(f"w{n} x", stream=n % 2 == 0) for n in range(50)))
        starts = {response.headers["x-dormouse-start"] for response in responses}
        assert len(starts) == 1 and starts.pop().startswith("snapshot; ")
        for number, response in enumerate(responses):
            assert f"w{number}" in response.text
        assert gateway.host.calls.count("restore") == 1
        assert (
            await gateway.metric('dormouse_requests_total{model="mouse",route="/v1/chat/completions",status="200",')
            == 50
        )


@on_loop
async def test_idle_model_sleeps_and_the_metrics_tell_the_same_figures(tmp_path: Path) -> None:
    async with rig(tmp_path, models={"mouse": ModelConfig(keep_alive=0.05)}) as gateway:
        response = await gateway.chat()
        seconds = float(response.headers["x-dormouse-start"].split("; ")[1])
        await until(lambda: gateway.node.statuses()[0].state == "asleep")
        total = await gateway.metric('dormouse_start_seconds_sum{model="mouse",path="cold"}')
        assert f"{total:.3f}" == f"{seconds:.3f}"
        assert await gateway.metric('dormouse_start_estimate_seconds_count{model="mouse",path="cold"}') == 1
        assert await gateway.metric('dormouse_start_estimate_error_ratio_count{model="mouse",path="cold"}') == 1
        assert await gateway.metric('dormouse_start_estimate_error{path="cold",quantile="0.99"}') > 0
        assert await gateway.metric("dormouse_start_pace") == 1.0, "of a first start nothing was known"
        gateway.node.prewarms["mouse"] = 2
        assert await gateway.metric('dormouse_prewarms_total{model="mouse"}') == 2
        assert await gateway.metric('dormouse_captures_total{model="mouse",outcome="committed"}') == 1
        assert await gateway.metric('dormouse_captured_bytes_total{kind="stored",model="mouse"}') == 300
        assert await gateway.metric('dormouse_replicas{model="mouse",state="asleep"}') == 1
        assert await gateway.metric('dormouse_time_to_first_token_seconds_count{model="mouse",path="cold"}') == 1
        assert await gateway.metric('dormouse_inter_token_seconds_count{model="mouse"}') >= 0
