"""The canary: a restored worker that answers a known question otherwise is never let near a request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dormouse.node.canary import Answer
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


def test_sums_may_be_rounded_otherwise() -> None:
    assert Answer([5], -0.5).fits(Answer([5], -0.5001))
    assert not Answer([5], -0.5).fits(Answer([5, 6], -0.5))
