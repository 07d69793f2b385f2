"""What is on this machine, as plain data and as tables: the models, the snapshots, and the node if one runs.

`listing` and `details` gather JSON-ready data from the model folder, the store and the node's published state;
`render…` turn that same data into tables. The command line shows one or the other.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group
from rich.table import Table

from dormouse.checkpoint.models import ImportedModel, list_models
from dormouse.config import DataDir
from dormouse.errors import ConfigError, NotFoundError
from dormouse.node.presence import read_node
from dormouse.snapshot.capture import SNAPSHOT_KIND
from dormouse.snapshot.images import SnapshotBody, decode_body
from dormouse.store.store import Store

NOT_SERVED = "not served"


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
    }


def listing(data_dir: DataDir) -> dict[str, Any]:
    """Everything `dormouse ls` shows."""
    node = read_node(data_dir.run)
    serving = {status.name: status for status in node.models} if node is not None else {}
    models = []
    for model in list_models(data_dir.models):
        status = serving.get(model.name)
        models.append(
            model_json(model)
            | {
                "state": status.state if status is not None else NOT_SERVED,
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


def _snapshots(data_dir: DataDir) -> list[dict[str, Any]]:
    if not data_dir.store.is_dir():
        return []
    with Store.open(data_dir.store) as store:
        return [
            {
                "id": row.id,
                "model": row.name,
                "created": row.created,
                "raw_bytes": row.raw_bytes,
                "stored_bytes": row.stored_bytes,
                "shared_bytes": row.shared_bytes,
            }
            for row in store.manifests(kind=SNAPSHOT_KIND)
        ]


def render(listing: dict[str, Any]) -> Group:
    """The listing as two tables."""
    models = Table(title="models", title_justify="left")
    for column in ("name", "engine", "parameters", "weights", "state", "memory", "last error"):
        models.add_column(column, justify="right" if column in ("parameters", "weights", "memory") else "left")
    for model in listing["models"]:
        models.add_row(
            model["name"],
            model["engine"],
            f"{model['parameters'] / 1e6:.0f} M",
            human(model["weight_bytes"]),
            model["state"],
            human(model["rss_bytes"]) if model["rss_bytes"] else "",
            model["last_error"] or "",
        )
    snapshots = Table(title="snapshots", title_justify="left")
    for column in ("id", "model", "created", "raw", "stored", "ratio", "shared"):
        snapshots.add_column(column, justify="left" if column in ("id", "model", "created") else "right")
    for row in listing["snapshots"]:
        snapshots.add_row(
            row["id"],
            row["model"],
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["created"])),
            human(row["raw_bytes"]),
            human(row["stored_bytes"]),
            f"{row['stored_bytes'] / row['raw_bytes']:.2f}" if row["raw_bytes"] else "",
            human(row["shared_bytes"]),
        )
    return Group(models, snapshots)


def resolve(store: Store, prefix: str) -> str:
    """The one snapshot id that begins with `prefix`. Raises NotFoundError, also when there are several."""
    found = [row.id for row in store.manifests(kind=SNAPSHOT_KIND) if prefix and row.id.startswith(prefix)]
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
        row = next(row for row in store.manifests(kind=SNAPSHOT_KIND) if row.id == identity)
        body = decode_body(store.manifest(identity).body, identity)
        stored = {chunk.digest: chunk.stored_length for chunk in store.locate(body.references())}
    return {
        "id": identity,
        "model": body.name,
        "created": row.created,
        "raw_bytes": body.raw_bytes(),
        "stored_bytes": row.stored_bytes,
        "shared_bytes": row.shared_bytes,
        "key": body.key,
        "capture_phases": body.phases,
        "images": _images(body, stored),
        "mapped_files": [
            {"path": file.path, "bytes": sum(length for _offset, length in file.ranges)} for file in body.mapped
        ],
    }


def _images(body: SnapshotBody, stored: dict[Any, int]) -> list[dict[str, Any]]:
    rows = []
    for image in body.images:
        chunks = image.chunk_list()
        inline = len(image.inline or b"")
        rows.append(
            {
                "name": image.name,
                "raw_bytes": image.size,
                "stored_bytes": inline + sum(stored[digest] for digest in set(chunks)),
                "chunks": len(chunks),
            }
        )
    return rows


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
    return Group(images, mapped, key)


def refuse_if_served(data_dir: DataDir, model: str) -> None:
    """Raises ConfigError when a running node serves the model."""
    node = read_node(data_dir.run)
    if node is not None and any(status.name == model for status in node.models):
        raise ConfigError(
            f"model {model} is being served by the node with pid {node.pid}",
            remedy="Stop that node, or take the model out of its configuration, then remove it",
        )
