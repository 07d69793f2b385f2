"""The admin API over its real socket, and the verbs of the command line that use it."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from dormouse import cli
from dormouse.admin_client import ask_node
from dormouse.config import ModelConfig
from dormouse.data_dir import DataDir
from dormouse.errors import (
    BusyError,
    ConfigError,
    DamagedError,
    DiskFullError,
    DormouseError,
    HostError,
    NotFoundError,
    StoppingError,
)
from dormouse.gateway.admin import listen_privately, serve_admin
from dormouse.node.catalog import StoreCatalog
from dormouse.node.history import KEPT
from dormouse.node.node import Node
from dormouse.node.presence import ADMIN_SOCKET
from dormouse.snapshot.capture import SNAPSHOT_KIND
from dormouse.store.store import Manifest, Store
from dormouse.trace import Operation
from tests.gateway.http import assert_problem_body
from tests.node.standin import StandInHost, configure, on_loop, run_node, until


@asynccontextmanager
async def admin(tmp_path: Path, host: StandInHost | None = None, **settings: Any) -> AsyncIterator[Node]:
    models = {"mouse": ModelConfig(), "never": ModelConfig(snapshot=False)}
    async with run_node(configure(tmp_path, models, **settings), host or StandInHost()) as node:
        async with serve_admin(node, tmp_path / "run"):
            await until((tmp_path / "run" / ADMIN_SOCKET).exists)
            yield node


async def ask(tmp_path: Path, method: str, *parts: str, query: str = "") -> Any:
    return await asyncio.to_thread(ask_node, tmp_path / "run", method, *parts, query=query)


@on_loop
async def test_models_are_woken_captured_and_put_to_sleep(tmp_path: Path) -> None:
    async with admin(tmp_path):
        woken = await ask(tmp_path, "POST", "models", "mouse", "wake")
        assert woken["state"] == "ready" and woken["start"].startswith("cold; ")
        captured = await ask(tmp_path, "POST", "models", "mouse", "snapshot")
        assert (captured["state"], captured["snapshot_id"]) == ("asleep", "snap1")
        assert (await ask(tmp_path, "POST", "models", "mouse", "wake"))["start"].startswith("snapshot; ")
        assert (await ask(tmp_path, "POST", "models", "mouse", "sleep"))["state"] == "asleep"
        listing = await ask(tmp_path, "GET", "models")
        assert [model["name"] for model in listing["data"]] == ["mouse", "never"]


@on_loop
async def test_starts_and_captures_are_told_step_by_step(tmp_path: Path) -> None:
    async with admin(tmp_path):
        assert (await ask(tmp_path, "GET", "models", "mouse", "trace"))["data"] == []
        for _ in range(KEPT):
            await ask(tmp_path, "POST", "models", "mouse", "wake")
            await ask(tmp_path, "POST", "models", "mouse", "sleep")
        await ask(tmp_path, "POST", "models", "mouse", "snapshot")
        found = (await ask(tmp_path, "GET", "models", "mouse", "trace"))["data"]
        operations = msgspec.convert(found, list[Operation])
    assert len(operations) == KEPT
    start, capture = operations[-2:]
    assert (start.kind, capture.kind, capture.how) == ("start", "capture", "snap2")
    steps = {step.name: step for step in start.phases.steps}
    assert {"room", "host", "host.cell"} <= steps.keys()
    assert steps["host.cell"].start >= steps["host"].start >= 0
    assert steps["host.cell"].track == "host"
    names = [step.name for step in capture.phases.in_order()]
    assert names.index("quiesce") < names.index("host")
    assert {"quiesce.park", "host.dump"} <= set(names)


@on_loop
async def test_snapshots_are_listed_pinned_released_and_deleted(tmp_path: Path) -> None:
    host = StandInHost()
    async with admin(tmp_path, host) as node:
        await ask(tmp_path, "POST", "models", "mouse", "snapshot")
        assert (await ask(tmp_path, "POST", "snapshots", "snap1", "pin"))["pinned"] is True
        with pytest.raises(ConfigError, match="pinned"):
            await ask(tmp_path, "DELETE", "snapshots", "snap1")
        assert (await ask(tmp_path, "POST", "snapshots", "snap1", "unpin"))["pinned"] is False
        host.faults["restore"] = DamagedError("flipped")
        await node.wake("mouse")
        await until(lambda: "snap1" in host.quarantined)
        (row,) = (await ask(tmp_path, "GET", "snapshots"))["data"]
        assert (row["id"], row["quarantine"]) == ("snap1", "flipped")
        assert (await ask(tmp_path, "POST", "snapshots", "snap1", "release"))["quarantine"] is None
        await ask(tmp_path, "POST", "snapshots", "snap1", "pin")
        assert (await ask(tmp_path, "DELETE", "snapshots", "snap1", query="force=true"))["deleted"]
        assert (await ask(tmp_path, "GET", "snapshots"))["data"] == []


@pytest.mark.parametrize(
    ("method", "parts", "kind"),
    [
        ("POST", ("models", "mose", "wake"), NotFoundError),
        ("GET", ("models", "mose", "trace"), NotFoundError),
        ("POST", ("models", "../x", "wake"), NotFoundError),
        ("POST", ("snapshots", "gone", "pin"), NotFoundError),
        ("DELETE", ("snapshots", "gone"), NotFoundError),
        ("POST", ("models", "mouse", "explode"), NotFoundError),
        ("GET", ("nothing",), NotFoundError),
        ("DELETE", ("models",), DormouseError),
        ("POST", ("models", "never", "snapshot"), ConfigError),
    ],
)
@on_loop
async def test_what_cannot_be_done_is_a_clear_error(
    tmp_path: Path, method: str, parts: tuple[str, ...], kind: type[DormouseError]
) -> None:
    async with admin(tmp_path):
        with pytest.raises(kind):
            await ask(tmp_path, method, *parts)
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "run" / ADMIN_SOCKET))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            response = await client.request(method, "/admin/" + "/".join(part.replace("/", "%2f") for part in parts))
            assert response.status_code in (400, 404, 405)
            assert_problem_body(response.json(), response.json()["error"]["code"])


@on_loop
async def test_failures_of_the_node_keep_their_kind(tmp_path: Path) -> None:
    host = StandInHost(faults={"capture": DiskFullError("no room")}, gates={"start_worker": asyncio.Event()})
    async with admin(tmp_path, host, max_queue=1) as node:
        waiting = asyncio.create_task(node.wake("mouse"))
        await until(lambda: node.statuses()[0].waiting == 1)
        with pytest.raises(BusyError):
            await ask(tmp_path, "POST", "models", "mouse", "wake")
        host.gates["start_worker"].set()
        await waiting
        with pytest.raises(DiskFullError, match="no room"):
            await ask(tmp_path, "POST", "models", "mouse", "snapshot")


@on_loop
async def test_the_socket_is_private_replaces_a_dead_nodes_and_goes_with_the_node(tmp_path: Path) -> None:
    run = DataDir(tmp_path).create().run
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(run / ADMIN_SOCKET))
    with pytest.raises(HostError, match="no node runs"):
        await ask(tmp_path, "GET", "models")
    async with admin(tmp_path):
        assert stat.S_IMODE((run / ADMIN_SOCKET).stat().st_mode) == 0o600
        assert len((await ask(tmp_path, "GET", "models"))["data"]) == 2
    assert not (run / ADMIN_SOCKET).exists()
    with pytest.raises(HostError, match="no node runs"):
        await ask(tmp_path, "GET", "models")


@on_loop
async def test_a_data_folder_with_a_long_name_has_a_socket_too(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100) / ("y" * 100)
    async with admin(folder):
        assert len((await ask(folder, "GET", "models"))["data"]) == 2


@on_loop
async def test_a_node_that_dies_meanwhile_is_told(tmp_path: Path) -> None:
    run = DataDir(tmp_path).create().run
    with listen_privately(run) as listener:
        asking = asyncio.create_task(ask(tmp_path, "POST", "models", "mouse", "sleep"))
        connection, _address = await asyncio.to_thread(listener.accept)
        connection.close()
        with pytest.raises(StoppingError, match="before it had answered"):
            await asking


# The command line


def dormouse(data_dir: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> Any:
    cli.cli.main([*arguments, "--data-dir", str(data_dir), "--json"], standalone_mode=False)
    return json.loads(capsys.readouterr().out)


def commit(data_dir: Path, identity: str, data: bytes, created: float) -> None:
    with Store.open(DataDir(data_dir).create().store) as store, store.begin() as transaction:
        refs = [transaction.put(b"common" * 5000), transaction.put(data)]
        transaction.commit(
            Manifest(id=identity, kind=SNAPSHOT_KIND, name="mouse", created=created, body=b"", refs=refs)
        )


def test_pins_and_releases_work_without_a_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit(tmp_path, "aaa1", b"x" * 9000, 1.0)
    commit(tmp_path, "bbb2", b"y" * 9000, 2.0)
    assert dormouse(tmp_path, "pin", "aa", capsys=capsys) == {"id": "aaa1", "pinned": True}
    with pytest.raises(ConfigError, match="pinned"):
        dormouse(tmp_path, "rm", "bbb2", "aaa1", capsys=capsys)
    rows = {row["id"]: row for row in dormouse(tmp_path, "ls", capsys=capsys)["snapshots"]}
    assert rows["aaa1"]["pinned"] and not rows["bbb2"]["pinned"]
    for row in rows.values():
        assert row["own_bytes"] + row["shared_bytes"] == row["stored_bytes"] and row["shared_bytes"] > 0
    StoreCatalog(DataDir(tmp_path).store).quarantine("bbb2", "criu said [no]")
    (bad,) = [row for row in dormouse(tmp_path, "ls", capsys=capsys)["snapshots"] if row["quarantine"]]
    assert bad["quarantine"] == "criu said [no]"
    cli.cli.main(["ls", "--data-dir", str(tmp_path)], standalone_mode=False)
    assert "bbb2 is quarantined: criu said [no]" in (shown := capsys.readouterr().out) and "pinned" in shown
    assert dormouse(tmp_path, "release", "bbb2", capsys=capsys) == {"id": "bbb2", "quarantine": None}
    dormouse(tmp_path, "unpin", "aaa1", capsys=capsys)
    assert dormouse(tmp_path, "rm", "aaa1", capsys=capsys)["removed"] == ["aaa1"]
    dormouse(tmp_path, "pin", "bbb2", capsys=capsys)
    assert dormouse(tmp_path, "rm", "bbb2", "--force", capsys=capsys)["removed"] == ["bbb2"]


@on_loop
async def run_verbs_beside_a_node(tmp_path: Path, run: Callable[..., Any]) -> None:
    async with admin(tmp_path) as node:
        await ask(tmp_path, "POST", "models", "mouse", "wake")
        await ask(tmp_path, "POST", "models", "mouse", "sleep")
        listing = await asyncio.to_thread(run, "ls", "--why", "--json")
        assert {row["name"]: row["path"] for row in listing["outlook"]} == {"mouse": "snapshot", "never": "cold"}
        shown = await asyncio.to_thread(run, "ls", "--why")
        assert "next starts" in shown and "policy" in shown
        found = await asyncio.to_thread(run, "explain", "mouse", "--json")
        assert found == json.loads(json.dumps(await node.explain("mouse"))) | {"decision": found["decision"]}
        shown = await asyncio.to_thread(run, "explain", "mouse")
        assert "mouse is asleep; policy fixed" in shown and "taken start snapshot" in shown and "latest starts" in shown
        with pytest.raises(NotFoundError, match="not served"):
            await asyncio.to_thread(run, "explain", "mice")


def test_ls_why_and_explain_tell_what_the_node_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> Any:
        cli.cli.main([*arguments, "--data-dir", str(tmp_path)], standalone_mode=False)
        shown = capsys.readouterr().out
        return json.loads(shown) if "--json" in arguments else shown

    run_verbs_beside_a_node(tmp_path, run)
    with pytest.raises(HostError, match="no node runs"):
        run("ls", "--why")


@pytest.mark.parametrize("verb", ["explain", "snapshot", "sleep", "wake"])
def test_verbs_that_need_a_node_say_so(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path / "missing", DataDir(tmp_path / "there").create().root):
        with pytest.raises(HostError, match="no node runs"):
            dormouse(folder, verb, "mouse", capsys=capsys)


@on_loop
async def test_verbs_reach_the_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with admin(tmp_path):
        answer = await asyncio.to_thread(dormouse, tmp_path, "snapshot", "mouse", capsys=capsys)
        assert answer["snapshot_id"] == "snap1"
        for verb in ("wake", "sleep"):
            answer = await asyncio.to_thread(dormouse, tmp_path, verb, "mouse", capsys=capsys)
        assert answer["state"] == "asleep"


@on_loop
async def test_the_owner_loads_and_unloads_adapters_without_opening_the_routes(tmp_path: Path) -> None:
    async with admin(tmp_path) as node:
        assert await ask(tmp_path, "POST", "adapters", "mouse-tail", "load") == {"adapters": {"mouse-tail": "mouse"}}
        assert [served.name for served in node.adapters()] == ["mouse-tail"]
        with pytest.raises(NotFoundError, match="'mouse-tail' is not served here"):
            await ask(tmp_path, "POST", "models", "mouse-tail", "wake")
        with pytest.raises(DormouseError, match="already been loaded"):
            await ask(tmp_path, "POST", "adapters", "mouse-tail", "load")
        assert await ask(tmp_path, "POST", "adapters", "mouse-tail", "unload") == {"adapters": {}}
        with pytest.raises(NotFoundError):
            await ask(tmp_path, "POST", "adapters", "nothing", "load")
