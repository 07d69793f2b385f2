"""What a snapshot knows of the job it was made of, beside its processes: one small image among CRIU's.

The record is JSON, so that a person who exports a snapshot can read it. It is trusted as far as the manifest that
holds it is, and still parsed strictly.
"""

from __future__ import annotations

import os
import re
import secrets
from typing import Literal

import msgspec

from dormouse.errors import ConfigError, DamagedError, IncompatibleError, SnapshotError
from dormouse.snapshot.images import ImageFile, SnapshotBody

RECORD_IMAGE = "dormouse-job.json"
FILES_IMAGE = "dormouse-files.tar"

RECORD_VERSION = 1

Network = Literal["own", "host"]
Stream = Literal["stdin", "stdout", "stderr"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


Connections = Literal["none", "kept", "closed"]
"""What was done with the TCP connections that were open at the capture."""


class Publish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Connections to `host`:`port` here go to `inner` in the job's own network."""

    host: str
    port: int
    inner: int


class JobRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`streams` says for each external pipe of the tree, in order, which standard streams it is. `pending_input` was
    written to the job's input and not yet read. `listening` are the TCP addresses it listened on, `tmpfs` the folders
    whose contents are in the snapshot."""

    name: str
    argv: list[str]
    network: Network
    streams: list[list[Stream]]
    tmpfs: list[str] = []
    publish: list[Publish] = []
    listening: list[str] = []
    shell_job: bool = False
    connections: Connections = "none"
    pending_input: bytes = b""
    version: int = RECORD_VERSION


def encode_record(record: JobRecord) -> ImageFile:
    """The record as an image of the snapshot."""
    data = msgspec.json.encode(record)
    return ImageFile(name=RECORD_IMAGE, size=len(data), inline=data)


def record_of(body: SnapshotBody, snapshot_id: str) -> JobRecord:
    """The record in a snapshot. Raises DamagedError, IncompatibleError, SnapshotError."""
    image = body.image(RECORD_IMAGE)
    if image is None or image.inline is None:
        return _record_of_import(body, snapshot_id)
    try:
        version = msgspec.json.decode(image.inline, type=dict[str, object]).get("version")
        if isinstance(version, int) and version > RECORD_VERSION:
            raise IncompatibleError(
                f"the job record of snapshot {snapshot_id} has version {version}; this program reads up to "
                f"{RECORD_VERSION}",
                remedy="Update dormouse",
            )
        return msgspec.json.decode(image.inline, type=JobRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedError(
            f"the job record of snapshot {snapshot_id} is malformed: {error}", remedy="Remove it with `dormouse rm`"
        ) from error


def _record_of_import(body: SnapshotBody, snapshot_id: str) -> JobRecord:
    """For images that CRIU made without us: their pipes are taken for the standard streams, in order."""
    names: tuple[Stream, ...] = ("stdin", "stdout", "stderr")
    if len(body.externals) > len(names) or any(external.kind != "pipe" for external in body.externals):
        raise SnapshotError(
            f"snapshot {snapshot_id} was imported with other ties to the outside than pipes for its standard streams",
            remedy="`dormouse export` it and restore it with criu itself",
        )
    name = re.sub(r"[^a-z0-9._-]+", "-", body.name.lower()).strip("-._")[:60]
    streams = [[stream] for stream in names[: len(body.externals)]]
    return JobRecord(name=f"{name}-x" if name.isdigit() or not name else name, argv=[], network="own", streams=streams)


def shown(text: str) -> str:
    """Text from the system in a form that JSON can hold and a terminal can show: odd bytes become `\\xff`."""
    return os.fsencode(text).decode(errors="backslashreplace")


def check_name(name: str) -> str:
    """The name, when it can be one. Raises ConfigError."""
    if not _NAME.fullmatch(name) or name.isdigit():
        raise ConfigError(
            f"{name!r} is not a name for a job",
            remedy="Use up to 64 of a-z, 0-9, '.', '_' and '-', the first a letter or digit, not only digits",
        )
    return name


def made_up_name(program: str) -> str:
    """A name for a job nobody has named."""
    word = re.sub(r"[^a-z0-9]+", "-", program.rsplit("/", 1)[-1].lower()).strip("-")[:40] or "job"
    return f"{word}-{secrets.token_hex(2)}x"


def parse_publish(text: str) -> Publish:
    """From `PORT`, `HOST:PORT`, `PORT:INNER` or `HOST:PORT:INNER`. Raises ConfigError."""
    match = re.fullmatch(
        r"(?:(?P<host>\[[0-9a-fA-F:.]+\]|[^:\[\]]*[^:\[\]\d][^:\[\]]*):)?(?P<port>\d+)(?::(?P<inner>\d+))?", text
    )
    ports = [int(match[group] or match["port"]) for group in ("port", "inner")] if match else []
    if match is None or not (0 <= ports[0] <= 65535 and 1 <= ports[1] <= 65535):
        raise ConfigError(f"{text!r} is not a port to publish", remedy="Write [HOST:]PORT or [HOST:]PORT:PORT_INSIDE")
    return Publish((match["host"] or "127.0.0.1").strip("[]"), ports[0], ports[1])
