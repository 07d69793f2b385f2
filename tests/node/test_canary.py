"""The canary: a restored worker that answers a known question otherwise is never let near a request."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from dormouse.config import ModelConfig
from dormouse.engine.messages import Delta, Finished, TokenLogprob
from dormouse.errors import EngineError
from dormouse.node import canary
from dormouse.node.canary import Answer
from dormouse.node.link import WorkerLink
from tests.node.standin import StandInHost, configure, on_loop, run_node, until
from tests.node.test_node import ask


@on_loop
async def test_a_worker_that_answers_as_before_is_served(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.snapshot("mouse")
        assert json.loads(host.snapshots["snap1"]["canary"])["tokens"] == [0]
        assert await ask(node) == ("a b a", "snapshot")


@pytest.mark.parametrize("answer", [Answer([7], -0.5), Answer([0], -3.0), Answer([])])
@on_loop
async def test_a_worker_that_answers_otherwise_is_never_served_and_its_snapshot_is_quarantined(
    tmp_path: Path, answer: Answer
) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.snapshot("mouse")
    host.snapshots["snap1"]["canary"] = json.dumps({"tokens": answer.tokens, "logprob": answer.logprob})
    async with run_node(configure(tmp_path), host) as node:
        assert await ask(node) == ("a b a", "cold")
        await until(lambda: "known question" in host.quarantined.get("snap1", ""))
        assert host.calls.count("restore") == 2


@on_loop
async def test_snapshots_without_an_answer_are_served_unasked(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.snapshot("mouse")
    del host.snapshots["snap1"]["canary"]
    async with run_node(configure(tmp_path), host) as node:
        assert await ask(node) == ("a b a", "snapshot")


@on_loop
async def test_an_answer_that_cannot_be_read_counts_against_the_snapshot(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.snapshot("mouse")
    host.snapshots["snap1"]["canary"] = "nonsense"
    async with run_node(configure(tmp_path), host) as node:
        assert await ask(node) == ("a b a", "cold")


class SureOfNothing:
    """A worker whose logits overflow."""

    def __init__(self, logprob: float) -> None:
        self.logprob = logprob

    async def generate(self, *_question: Any) -> AsyncIterator[Delta | Finished]:
        yield Delta(id="1", token_ids=[0], text="!", logprobs=[[TokenLogprob(0, "!", self.logprob)]])
        yield Finished(id="1", reason="length", prompt_tokens=1, completion_tokens=1)


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 1), ("cuda", 3)])
@on_loop
async def test_on_a_gpu_the_answer_has_tokens_of_captured_graphs(tmp_path: Path, device: str, tokens: int) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path, {"mouse": ModelConfig(device=device)}), host) as node:
        await node.snapshot("mouse")
        assert len(json.loads(host.snapshots["snap1"]["canary"])["tokens"]) == tokens
        assert await ask(node) == ("a b a", "snapshot")


@pytest.mark.parametrize("logprob", [math.nan, math.inf, -math.inf])
@on_loop
async def test_an_answer_without_a_number_is_none(logprob: float) -> None:
    assert await canary.ask(cast(WorkerLink, SureOfNothing(logprob))) is None
    assert await canary.ask(cast(WorkerLink, SureOfNothing(-0.5))) == '{"tokens":[0],"logprob":-0.5}'


@on_loop
async def test_a_worker_that_dies_after_its_canary_does_not_cost_the_snapshot(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.snapshot("mouse")
        for _ in range(3):
            with pytest.raises(EngineError, match="ended unexpectedly"):
                await ask(node, "die")
        assert await ask(node) == ("a b a", "snapshot")
        assert host.quarantined == {}


@pytest.mark.parametrize("kills", [True, False])
@on_loop
async def test_a_worker_that_the_kernel_killed_for_its_memory_does_not_cost_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: bool
) -> None:
    counts = itertools.count()
    monkeypatch.setattr("dormouse.node.runner.oom_kills", lambda: next(counts) if kills else 7)
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.snapshot("mouse")
        del host.snapshots["snap1"]["canary"]
    async with run_node(configure(tmp_path), host) as node:
        for _ in range(2):
            with pytest.raises(EngineError, match="ended unexpectedly"):
                await ask(node, "die")
        await ask(node)
        host.worker_fault = "resume-exit"
        await node.sleep("mouse")
        await ask(node)
        assert ("snap1" in host.quarantined) is not kills


def test_sums_may_be_rounded_otherwise() -> None:
    assert Answer([5], -0.5).fits(Answer([5], -0.5001))
    assert not Answer([5], -0.5).fits(Answer([5, 6], -0.5))
