"""Manifests: the roots of the store. A manifest is one small file (docs/formats.md) that holds its owner's opaque body
and names every chunk it needs; the presence of the file is what makes it committed, its removal what makes it gone.
It is signed with the store's key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from dormouse.errors import DamagedError, StoreError
from dormouse.store.chunk import DIGEST_SIZE, Digest
from dormouse.store.files import PREAMBLE_SIZE, check_preamble, preamble
from dormouse.store.key import Key, same

MAGIC = b"DORMMNFT"
VERSION = 1

_MAC_SIZE = 32
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Manifest:
    """What is committed together. `created` is in seconds since 1970; `refs` are kept in order, repetitions too."""

    id: str
    kind: str
    name: str
    created: float
    body: bytes
    refs: Sequence[Digest]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    kind: str
    name: str
    created: float
    raw_bytes: int
    body: bytes
    refs: bytes


def is_manifest_id(text: str) -> bool:
    """Whether `text` can be the id of a manifest."""
    return _ID.fullmatch(text) is not None


def manifest_name(manifest_id: str) -> str:
    """The file name of a manifest. Raises StoreError for an id that cannot be one."""
    if not is_manifest_id(manifest_id):
        raise StoreError(
            f"{manifest_id!r} cannot name a manifest", remedy="Use up to 100 letters, digits, dots, dashes, underscores"
        )
    return f"{manifest_id}.manifest"


def encode_manifest(manifest: Manifest, raw_bytes: int, key: Key) -> bytes:
    """The manifest as a file. `raw_bytes` are the plain bytes of all its refs."""
    record = msgspec.msgpack.encode(
        _Record(
            id=manifest.id,
            kind=manifest.kind,
            name=manifest.name,
            created=manifest.created,
            raw_bytes=raw_bytes,
            body=manifest.body,
            refs=b"".join(manifest.refs),
        )
    )
    head = preamble(MAGIC, VERSION, key.id)
    return head + key.manifests.mac(_MAC_SIZE, record, head) + record


def decode_manifest(data: bytes, manifest_id: str, key: Key) -> tuple[Manifest, int]:
    """The manifest and its raw bytes. Raises DamagedError, UntrustedError when another key signed it, or StoreError for
    a newer version. Not a byte of the record is looked at before its signature was found right."""
    what = f"the manifest {manifest_id}"
    check_preamble(data, MAGIC, VERSION, key.id, what)
    head, mac = data[:PREAMBLE_SIZE], data[PREAMBLE_SIZE : PREAMBLE_SIZE + _MAC_SIZE]
    body = memoryview(data)[PREAMBLE_SIZE + _MAC_SIZE :]
    if not same(mac, key.manifests.mac(_MAC_SIZE, body, head)):
        raise _damaged(what, "it does not match its signature")
    try:
        record = msgspec.msgpack.decode(body, type=_Record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(what, str(error)) from error
    if record.id != manifest_id or len(record.refs) % DIGEST_SIZE or record.raw_bytes < 0:
        raise _damaged(what, "its fields contradict each other")
    refs = [Digest(record.refs[at : at + DIGEST_SIZE]) for at in range(0, len(record.refs), DIGEST_SIZE)]
    return Manifest(record.id, record.kind, record.name, record.created, record.body, refs), record.raw_bytes


def _damaged(what: str, why: str) -> DamagedError:
    return DamagedError(
        f"{what} is damaged: {why}",
        remedy="Remove it with `dormouse rm`; the model then starts cold and is captured anew",
    )
