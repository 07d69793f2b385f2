"""What is on this machine, as plain data and as tables: the models, the snapshots, and the node if one runs.

`listing` and `details` gather JSON-ready data from the model folder, the store and the node's published state;
`render…` turn that same data into tables. The command line shows one or the other.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dormouse.admin_client import ask_node
from dormouse.checkpoint.models import ImportedModel, list_models
from dormouse.checkpoint.writer import CHECKPOINT_KIND
from dormouse.data_dir import DataDir
from dormouse.errors import ConfigError, NotFoundError, StoreError
from dormouse.jobs.control import Request, ask, jobs_folder
from dormouse.node.catalog import StoreCatalog, refuse_if_pinned, snapshot_rows, snapshots_of
from dormouse.node.presence import ModelStatus, read_node
from dormouse.phases import Phase
from dormouse.snapshot.criu_images import PAGE
from dormouse.snapshot.images import SnapshotBody, decode_body
from dormouse.snapshot.pages import extents, permissions, process_map, read, usage
from dormouse.store.chunk import Buffer, Digest
from dormouse.store.pack import StoredChunk
from dormouse.store.store import Store, VerifyReport
from dormouse.trace import Operation, gigabytes_per_second, steps_json

log = logging.getLogger(__name__)

NOT_SERVED = "not served"
_SHOWN = 0.0005  # seconds; shorter parts of an estimate are left out


def human(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def model_json(model: ImportedModel) -> dict[str, Any]:
    """One imported model."""
    return {
        "name": model.name,
        "engine": model.engine,
        "parameters": model.parameters,
        "weight_bytes": model.weight_bytes,
        "context": model.context,
        "digest": model.digest,
        "path": str(model.path),
        "base": model.base,
    }


def listing(data_dir: DataDir) -> dict[str, Any]:
    """Everything `dormouse ls` shows."""
    node = read_node(data_dir.run)
    serving = {status.name: status for status in node.models} if node is not None else {}
    models = []
    for model in list_models(data_dir.models):
        status = serving.get(model.name)
        if model.base is not None:
            state = "served" if _serves(serving.values(), model.name) else NOT_SERVED
        else:
            state = status.state if status is not None else NOT_SERVED
        models.append(
            model_json(model)
            | {
                "state": state,
                "replicas": status.replicas if status is not None else {},
                "since": status.since if status is not None else None,
                "in_flight": status.in_flight if status is not None else 0,
                "waiting": status.waiting if status is not None else 0,
                "rss_bytes": status.rss_bytes if status is not None else 0,
                "last_error": status.last_error if status is not None else None,
            }
        )
    return {
        "node": {"pid": node.pid, "address": node.address, "started": node.started} if node is not None else None,
        "models": models,
        "snapshots": _snapshots(data_dir),
    }


def _serves(statuses: Iterable[ModelStatus], adapter: str) -> bool:
    """Whether one of these models has the adapter served."""
    return any(adapter in status.adapters for status in statuses)


def _snapshots(data_dir: DataDir) -> list[dict[str, Any]]:
    if not data_dir.store.is_dir():
        return []
    with Store.open(data_dir.store) as store:
        return snapshot_rows(store)


def render(listing: dict[str, Any]) -> Group:
    """The listing as two tables."""
    models = Table(title="models", title_justify="left")
    for column in ("name", "engine", "parameters", "weights", "state", "memory", "last error"):
        models.add_column(column, justify="right" if column in ("parameters", "weights", "memory") else "left")
    for model in listing["models"]:
        models.add_row(
            model["name"],
            model["engine"] if model["base"] is None else f"adapter of {model['base']}",
            f"{model['parameters'] / 1e6:.{0 if model['base'] is None else 1}f} M",
            human(model["weight_bytes"]),
            _state(model),
            human(model["rss_bytes"]) if model["rss_bytes"] else "",
            model["last_error"] or "",
        )
    outlook = [render_outlook(listing["outlook"])] if "outlook" in listing else []
    snapshots = Table(title="snapshots", title_justify="left")
    for column in ("id", "kind", "of", "created", "raw", "own", "shared", ""):
        right = column in ("raw", "own", "shared")
        snapshots.add_column(column, justify="right" if right else "left", no_wrap=right or column in ("id", "kind"))
    for row in listing["snapshots"]:
        snapshots.add_row(
            row["id"],
            row["kind"],
            row["model"],
            time.strftime("%m-%d %H:%M", time.localtime(row["created"])),
            *(human(row[f"{part}_bytes"]) for part in ("raw", "own", "shared")),
            "[red]quarantined[/]" if row["quarantine"] is not None else "pinned" if row["pinned"] else "",
        )
    return Group(models, *outlook, snapshots, *_reasons(listing["snapshots"]))


def render_outlook(rows: Sequence[dict[str, Any]]) -> Table:
    """How served models would start next, and what they step down to."""
    table = Table(title="next starts", title_justify="left")
    for column in ("model", "path", "seconds", "95 %", "made of", "steps down", "why"):
        right = column in ("seconds", "95 %")
        table.add_column(column, justify="right" if right else "left", no_wrap=right or column == "path")
    for row in rows:
        step = row["step"]
        down = f"to {step['to']} in {_duration(step['at'] - time.time())}" if step is not None else ""
        table.add_row(row["name"], row["path"], *_estimated(row), down, row["why"])
    return table


def render_explanation(details: dict[str, Any]) -> Group:
    """What a request would get now, the paths that are open, and the latest starts."""
    paths = Table(title="start paths, in the order in which they are tried", title_justify="left")
    for column in ("path", "seconds", "95 %", "made of"):
        paths.add_column(column, justify="left" if column in ("path", "made of") else "right")
    for row in details["paths"]:
        paths.add_row(row["path"], *_estimated(row))
    latest = Table(title="latest starts", title_justify="left")
    for column in ("when", "path", "estimated", "took", "off", "outcome", "why"):
        latest.add_column(column, justify="right" if column in ("estimated", "took", "off") else "left")
    for row in details["latest"]:
        estimate, took = row["estimate"], row["took"]
        off = f"{abs(estimate - took) / took:.0%}" if estimate is not None and took else ""
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(row["at"]))
        number = row["replica"].partition("#")[2]
        path = f"{row['path']} #{number}" if number else row["path"]
        latest.add_row(when, path, _seconds(estimate), _seconds(took), off, row["outcome"], row["why"])
    tables = ([paths] if details["paths"] else []) + ([latest] if details["latest"] else [])
    return Group(
        Text(f"{details['name']} is {details['state']}; {details['why']}"), Text(details["decision"]["why"]), *tables
    )


def _state(model: dict[str, Any]) -> str:
    """With the number of replicas that are in it, if there are several."""
    count = list(model["replicas"].values()).count(model["state"])
    return f"{model['state']} ({count})" if count > 1 else str(model["state"])


def _estimated(row: dict[str, Any]) -> tuple[str, str, str]:
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row["parts"].items() if seconds >= _SHOWN)
    return _seconds(row["estimate"]), _seconds(row["p95"]), parts


def _seconds(value: float | None) -> str:
    return f"{value:.3f}" if value is not None else ""


def _duration(seconds: float) -> str:
    """For people."""
    if seconds < 90:
        return f"{max(seconds, 0.0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _reasons(rows: Sequence[dict[str, Any]]) -> list[Text]:
    """Why snapshots are quarantined; too long for a column."""
    return [Text(f"{row['id']} is quarantined: {row['quarantine']}") for row in rows if row["quarantine"] is not None]


def resolve(store: Store, prefix: str) -> str:
    """The one snapshot id that begins with `prefix`. Raises NotFoundError, also when there are several."""
    found = [row.id for row in snapshots_of(store) if prefix and row.id.startswith(prefix)]
    if not found and prefix in store.unreadable():
        return prefix  # it can still be named, to be told why and to be removed
    if len(found) != 1:
        what = f"{len(found)} snapshots begin with" if found else "no snapshot is called"
        raise NotFoundError(f"{what} {prefix!r}", remedy="`dormouse ls` shows all ids")
    return found[0]


def details(data_dir: DataDir, snapshot_id: str) -> dict[str, Any]:
    """Everything `dormouse inspect` shows. Raises NotFoundError, DamagedError."""
    if not data_dir.store.is_dir():
        raise NotFoundError(f"no snapshot is called {snapshot_id!r}", remedy="Nothing has been captured here yet")
    with Store.open(data_dir.store) as store:
        identity = resolve(store, snapshot_id)
        body = decode_body(store.manifest(identity).body, identity)
        row = next(row for row in snapshot_rows(store) if row["id"] == identity)
        chunks = {chunk.digest: chunk for chunk in store.locate(body.references())}
        places = _places(store, identity, chunks)
    stored = {digest: chunk.stored_length for digest, chunk in chunks.items()}
    return row | {
        "raw_bytes": body.raw_bytes(),
        "key": body.key,
        "places": places,
        "capture_phases": steps_json(body.phases),
        "images": _images(body, stored),
        "mapped_files": [
            {"path": file.path, "bytes": sum(length for _offset, length in file.ranges)} for file in body.mapped
        ],
    }


def _places(store: Store, identity: str, chunks: dict[Digest, StoredChunk]) -> dict[str, Any]:
    """Where the stored bytes of a snapshot are: with whom it shares them, and in which packs."""
    sharing = []
    for row in store.manifests():
        if row.id == identity:
            continue
        try:
            refs = set(store.manifest(row.id).refs)
        except StoreError as error:
            log.warning("manifest %s can't be read, it is left out: %s", row.id, error)
            continue
        if common := refs & chunks.keys():
            size = sum(chunks[digest].stored_length for digest in common)
            sharing.append({"id": row.id, "kind": row.kind, "name": row.name, "bytes": size, "chunks": len(common)})
    packs: dict[int, list[int]] = {}
    for chunk in chunks.values():
        packs.setdefault(chunk.pack, []).append(chunk.stored_length)
    return {
        "shared_with": sorted(sharing, key=lambda share: -share["bytes"]),
        "packs": [{"pack": pack, "bytes": sum(found), "chunks": len(found)} for pack, found in sorted(packs.items())],
    }


def _images(body: SnapshotBody, stored: dict[Digest, int]) -> list[dict[str, Any]]:
    rows = []
    for image in body.images:
        row = _image(image.name, image.size, image.chunk_list(), stored)
        rows.append(row | {"stored_bytes": row["stored_bytes"] + len(image.inline or b"")})
    return rows + [
        _image(f"memory of process {space.pid}", PAGE * space.pages, space.chunk_list(), stored)
        for space in body.memory
    ]


def _image(name: str, raw_bytes: int, chunks: list[Digest], stored: dict[Digest, int]) -> dict[str, Any]:
    size = sum(stored[digest] for digest in set(chunks))
    return {"name": name, "raw_bytes": raw_bytes, "stored_bytes": size, "chunks": len(chunks)}


def memory(data_dir: DataDir, snapshot_id: str, pid: int | None, address: int, length: int) -> Iterator[bytes]:
    """Bytes of the memory of a process in a snapshot, part after part; errors come before the first, but for damage.
    Raises NotFoundError, RequestError, DamagedError."""
    with _body(data_dir, snapshot_id) as (body, store), store.reader() as reader:

        def plain(digest: Digest) -> Buffer:
            return reader.plain(reader.locate([digest])[0])

        process = process_map(body, pid, plain)
        yield from read(process, extents(process, address, length), plain)


def mappings(data_dir: DataDir, snapshot_id: str, pid: int | None) -> list[dict[str, Any]]:
    """The mappings of the processes of a snapshot, or of one, and how much of each is stored."""
    rows = []
    with _body(data_dir, snapshot_id) as (body, store):
        stored = {chunk.digest: chunk.stored_length for chunk in store.locate(body.references())}
        for space in body.memory if pid is None else (None,):
            process = process_map(body, space.pid if space is not None else pid, store.read)
            rows += [
                {
                    "pid": process.space.pid,
                    "start": use.mapping.start,
                    "end": use.mapping.end,
                    "permissions": permissions(use.mapping),
                    "what": use.what,
                    "offset": use.mapping.offset if use.mapping.file is not None else 0,
                    "pages": use.pages,
                    "stored_pages": use.stored_pages,
                    "zero_pages": use.pages - use.stored_pages if use.mapping.sparse else 0,
                    "stored_bytes": use.stored_bytes,
                }
                for use in usage(process, stored.__getitem__)
            ]
    return rows


@contextmanager
def _body(data_dir: DataDir, snapshot_id: str) -> Iterator[tuple[SnapshotBody, Store]]:
    if not data_dir.store.is_dir():
        raise NotFoundError(f"no snapshot is called {snapshot_id!r}", remedy="Nothing has been captured here yet")
    with Store.open(data_dir.store) as store:
        identity = resolve(store, snapshot_id)
        yield decode_body(store.manifest(identity).body, identity), store


def render_mappings(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The mappings as lines (paths are long, and lines can be searched), in the order of /proc/PID/maps."""
    line = "{:>7} {:>25} {:4} {:>9} {:>9} {:>9} {:>9}  {}"
    yield line.format("pid", "addresses", "", "pages", "stored", "zero", "bytes", "what")
    counted = ("pages", "stored_pages", "zero_pages")
    for row in rows:
        addresses = f"{row['start']:x}-{row['end']:x}"
        counts = (row[field] for field in counted)
        yield line.format(row["pid"], addresses, row["permissions"], *counts, human(row["stored_bytes"]), row["what"])
    sums = (sum(row[field] for row in rows) for field in (*counted, "stored_bytes"))
    pages, stored, zero, size = sums
    yield line.format("all", "", "", pages, stored, zero, human(size), "").rstrip()


def render_details(details: dict[str, Any]) -> Group:
    """The details as tables."""
    images = Table(title=f"snapshot {details['id']} of {details['model']}", title_justify="left")
    for column in ("image", "raw", "stored", "chunks"):
        images.add_column(column, justify="left" if column == "image" else "right")
    for image in details["images"]:
        raw, stored = human(image["raw_bytes"]), human(image["stored_bytes"])
        images.add_row(image["name"], raw, stored, str(image["chunks"]))
    images.add_section()
    images.add_row("all", human(details["raw_bytes"]), human(details["stored_bytes"]), "")
    places = Table(title="where its stored bytes are", title_justify="left")
    for column in ("place", "bytes", "chunks"):
        places.add_column(column, justify="left" if column == "place" else "right")
    places.add_row("its own", human(details["own_bytes"]), "")
    for share in details["places"]["shared_with"]:
        name = f"shared with {share['kind']} {share['id']} of {share['name']}"
        places.add_row(escape(name), human(share["bytes"]), str(share["chunks"]))
    places.add_section()
    for pack in details["places"]["packs"]:
        places.add_row(f"in pack {pack['pack']:08}", human(pack["bytes"]), str(pack["chunks"]))
    mapped = Table(title="read ahead from files at restore", title_justify="left")
    mapped.add_column("file")
    mapped.add_column("bytes", justify="right")
    for file in sorted(details["mapped_files"], key=lambda file: -file["bytes"])[:10]:
        mapped.add_row(file["path"], human(file["bytes"]))
    key = Table(title="compatibility key", title_justify="left")
    key.add_column("field")
    key.add_column("value", overflow="fold")
    for field, value in details["key"].items():
        key.add_row(field, value)
    steps = phase_table("steps of the capture", details["capture_phases"])
    return Group(*_reasons([details]), images, steps, places, mapped, key)


def phase_table(title: str, steps: Sequence[dict[str, Any]]) -> Table:
    """Steps as a table: when each began, how long it took, what it moved and how fast."""
    table = Table(title=title, title_justify="left")
    for column in ("step", "track", "start", "seconds", "bytes", "stored", "GB/s"):
        table.add_column(column, justify="left" if column in ("step", "track") else "right", no_wrap=True)
    for fields in steps:
        step = Phase(**fields)
        rate = gigabytes_per_second(step)
        moved = ["" if count is None else human(count) for count in (step.bytes, step.stored)]
        table.add_row(
            *(escape(step.name), escape(step.track), f"{step.start:.3f}", f"{step.seconds:.3f}"),
            *(*moved, "" if rate is None else f"{rate:.2f}"),
        )
    return table


def operations(data_dir: DataDir, target: str) -> list[Operation]:
    """What is known of how `target` was started, restored or captured, oldest first: a job that runs, a model of the
    node that runs, or a snapshot. Raises NotFoundError."""
    if target in (path.stem for path in jobs_folder(data_dir).glob("*.sock")):
        with contextlib.suppress(NotFoundError):  # its keeper has died
            found = ask(data_dir, target, Request("trace"))["operations"]
            return msgspec.convert(found, list[Operation])
    if any(model.name == target for model in list_models(data_dir.models)):
        found = ask_node(data_dir.run, "GET", "models", target, "trace")["data"]
        return msgspec.convert(found, list[Operation])
    with _body(data_dir, target) as (body, store):
        identity = resolve(store, target)
        row = next(row for row in snapshots_of(store) if row.id == identity)
    return [Operation("capture", body.name, identity, row.created, body.phases)]


def render_operations(operations: Sequence[Operation]) -> Group:
    """Each as a table."""
    return Group(*(phase_table(escape(operation.title), operation.as_json()["phases"]) for operation in operations))


def pin(data_dir: DataDir, snapshot_id: str, pinned: bool) -> str:
    """Pin a snapshot or not any more, whether a node runs or not; returns its whole id. Raises NotFoundError."""
    identity = _resolved(data_dir, snapshot_id)
    StoreCatalog(data_dir.store).pin(identity, pinned)
    return identity


def release(data_dir: DataDir, snapshot_id: str) -> str:
    """Lift a quarantine, through the node if one runs: it then uses the snapshot again. Raises NotFoundError."""
    identity = _resolved(data_dir, snapshot_id)
    if read_node(data_dir.run) is not None:
        ask_node(data_dir.run, "POST", "snapshots", identity, "release")
    else:
        StoreCatalog(data_dir.store).release(identity)
    return identity


def refuse_pinned(store: Store, snapshot_ids: Sequence[str]) -> None:
    """Raises ConfigError when one of the snapshots is pinned."""
    for row in snapshots_of(store):
        if row.id in snapshot_ids:
            refuse_if_pinned(row)


def _resolved(data_dir: DataDir, prefix: str) -> str:
    if not data_dir.store.is_dir():
        raise NotFoundError(f"no snapshot is called {prefix!r}", remedy="Nothing has been captured here yet")
    with Store.open(data_dir.store) as store:
        return resolve(store, prefix)


def models_with_damaged_weights(store: Store, report: VerifyReport) -> list[str]:
    """The models that can't start because of what a verification has found."""
    hit = {identity for damage in report.damages for identity in damage.manifests}
    return sorted({row.name for row in store.manifests(kind=CHECKPOINT_KIND) if row.id in hit})


def refuse_if_served(data_dir: DataDir, model: str) -> None:
    """Raises ConfigError when a running node serves the model."""
    node = read_node(data_dir.run)
    if node is not None and (any(model == status.name for status in node.models) or _serves(node.models, model)):
        raise ConfigError(
            f"model {model} is being served by the node with pid {node.pid}",
            remedy="Stop that node, or take the model out of its configuration, then remove it",
        )
