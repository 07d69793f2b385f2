"""Marks: what its owner notes about a manifest after it was committed. A manifest never changes, so they lie beside it
in a small file that is replaced as a whole; no file means no marks. They are not signed: they say what to keep and what
to try, never what a snapshot is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dormouse.errors import DamagedError, UntrustedError
from dormouse.store.files import read_file, reading, replace_file, sync_folder, system_errors
from dormouse.store.manifest import is_manifest_id

log = logging.getLogger(__name__)

SUFFIX = ".marks"
VERSION = 1
MAX_REASON = 2000


@dataclass(frozen=True)
class Marks:
    """`pinned`: to be kept. `quarantine`: why it is not to be used, and since when (in seconds since 1970)."""

    pinned: bool = False
    quarantine: str | None = None
    quarantined_at: float | None = None


NO_MARKS = Marks()


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    pinned: bool
    quarantine: str | None
    quarantined_at: float | None


def marks_name(manifest_id: str) -> str:
    """The file name of a manifest's marks."""
    return f"{manifest_id}{SUFFIX}"


def encode_marks(marks: Marks) -> bytes:
    """The marks as a file. A reason is cut to 2000 characters, and characters that are none are replaced."""
    reason = marks.quarantine
    if reason is not None:
        reason = reason[:MAX_REASON].encode(errors="replace").decode()
    return msgspec.json.encode(_Record(VERSION, marks.pinned, reason, marks.quarantined_at)) + b"\n"


def decode_marks(data: bytes) -> Marks:
    """The marks in a file. Raises ValueError for anything `encode_marks` can't have made."""
    try:
        record = msgspec.json.decode(data, type=_Record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if record.version != VERSION:
        raise ValueError(f"they have format version {record.version}; this program reads {VERSION}")
    return Marks(record.pinned, record.quarantine, record.quarantined_at)


def read_marks(path: Path) -> Marks:
    """The marks in a file that may be missing. What can't be read is logged and quarantines the manifest: it may have
    been quarantined for a reason."""
    try:
        with reading(path):
            return decode_marks(read_file(path))
    except FileNotFoundError:
        return NO_MARKS
    except (ValueError, DamagedError, UntrustedError) as error:
        log.warning("the marks %s can't be used: %s", path, error)
        return Marks(quarantine=f"its marks can't be used: {error}")


def write_marks(path: Path, marks: Marks, written: Callable[[], None]) -> None:
    """Replace the marks in a file, all or nothing; `written` as in `replace_file`. The caller has the change lock."""
    if marks == NO_MARKS:
        drop_marks(path)
        return
    data = encode_marks(marks)
    with system_errors(path, "marking", len(data)):
        replace_file(path, data, written)


def drop_marks(path: Path) -> None:
    """Remove the file. The caller holds the change lock."""
    with system_errors(path, "removing"):
        try:
            path.unlink()
        except FileNotFoundError:
            return
        sync_folder(path.parent)


def orphans(folder: Path, manifest_ids: set[str]) -> list[Path]:
    """The marks of manifests that are gone."""
    found = (path for path in folder.glob(f"*{SUFFIX}") if is_manifest_id(path.name.removesuffix(SUFFIX)))
    return [path for path in found if path.name.removesuffix(SUFFIX) not in manifest_ids]
