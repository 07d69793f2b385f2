"""Whose a request is: by its key alone, and all the way to the node, the log and the metrics."""

from __future__ import annotations

import hmac
import logging
from pathlib import Path
from typing import Any

import pytest

from dormouse.gateway.access import Keys
from tests.gateway.http import Rig, assert_problem, rig
from tests.node.standin import on_loop

TENANTS = {"acme": {"cap": 2, "priority": 3}, "zoo": {}}
KEYS = {"one": "acme", "two": "acme", "three": "zoo", "four": ""}


def listen_in(gateway: Rig) -> list[dict[str, Any]]:
    """What the node is told of each request from now on."""
    told: list[dict[str, Any]] = []
    replica = gateway.node.replica

    def listening(name: str, **whose: Any) -> Any:
        told.append(whose)
        return replica(name, **whose)

    gateway.node.replica = listening  # type: ignore[method-assign]
    return told


def use(gateway: Rig, key: str) -> None:
    gateway.client.headers["authorization"] = f"Bearer {key}"


@on_loop
async def test_the_key_says_whose_a_request_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dormouse.gateway.access")
    async with rig(tmp_path, keys=KEYS, tenants=TENANTS) as gateway:
        told = listen_in(gateway)
        for key in KEYS:
            use(gateway, key)
            assert (await gateway.chat(stream=key == "two")).status_code == 200
        acme = {"tenant": "acme", "priority": 3}
        assert told == [acme, acme, {"tenant": "zoo", "priority": 0}, {"tenant": "", "priority": 0}]
        assert [line.split(" tenant=")[1].split()[0] for line in caplog.messages if "chat" in line] == [
            "acme", "acme", "zoo", "-",
        ]  # fmt: skip
        counted = 'dormouse_requests_total{model="mouse",route="/v1/chat/completions",status="200",tenant="%s"}'
        assert [await gateway.metric(counted % who) for who in ("acme", "zoo", "")] == [2, 1, 1]
        assert await gateway.metric('dormouse_queue_seconds_count{tenant="acme"}') == 2
        assert await gateway.metric('dormouse_queue_seconds_sum{tenant="acme"}') > 0


@on_loop
async def test_nobody_raises_its_own_priority(tmp_path: Path) -> None:
    async with rig(tmp_path, keys=KEYS, tenants=TENANTS) as gateway:
        told = listen_in(gateway)
        use(gateway, "three")
        gateway.client.headers.update({"x-tenant": "acme", "tenant": "acme", "x-priority": "9", "priority": "u=0"})
        assert (await gateway.chat(user="acme", metadata={"tenant": "acme"})).status_code == 200
        assert told == [{"tenant": "zoo", "priority": 0}]
        for field in ("priority", "tenant"):
            assert_problem(await gateway.chat(**{field: 9}), 400, "unknown_parameter", param=field)
        assert_problem(await gateway.chat(service_tier="priority"), 400, "unsupported_parameter", param="service_tier")


@on_loop
async def test_without_keys_everybody_is_the_same(tmp_path: Path) -> None:
    async with rig(tmp_path, tenants=TENANTS) as gateway:
        told = listen_in(gateway)
        for authorization in ("", "Bearer one", "Bearer acme", "nonsense"):
            gateway.client.headers["authorization"] = authorization
            assert (await gateway.chat()).status_code == 200
        assert told == [{"tenant": "", "priority": 0}] * 4


@on_loop
async def test_who_is_refused_has_no_tenant(tmp_path: Path) -> None:
    async with rig(tmp_path, keys=KEYS, tenants=TENANTS, metrics_open=True) as gateway:
        told = listen_in(gateway)
        for authorization in ("Bearer acme", "Basic one", "one", "Bearer one two", "Bearer", "", "Bearer \xe9"):
            gateway.client.headers["authorization"] = authorization
            assert_problem(await gateway.chat(), 401, "invalid_api_key")
        assert told == []
        refused = 'dormouse_requests_total{model="",route="/v1/chat/completions",status="401",tenant=""}'
        assert await gateway.metric(refused) == 7


@pytest.mark.parametrize(("key", "tenant"), [("one", "acme"), ("four", ""), ("five", None), ("", None)])
def test_every_key_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch, key: str, tenant: str | None) -> None:
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or compare(a, b))
    assert Keys(KEYS).tenant_of(f"Bearer {key}") == tenant
    assert compared == [(32, 32)] * len(KEYS)  # digests, all of them
