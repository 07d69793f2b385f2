"""The index: an SQLite table of what the packs and manifests hold, for fast answers. It is never the truth: it can be
thrown away at any time and is filled again from the files (store.py does that, under the store's change lock).

It is not believed either: rows of manifests are signed, and those of chunks carry the signature of what they point to.
An index that another key signed is of no use, and is built anew.

A chunk has one row. `damaged` is set when its bytes were found wrong or missing; such a chunk still answers to its
manifests (with an error that names it), but a new capture stores it afresh, which heals the row.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from dormouse.errors import BusyError, DamagedError, DiskFullError, StoreError, UntrustedError
from dormouse.store.chunk import DIGEST_SIZE, Digest
from dormouse.store.files import check_ours, create_file, disk_full, system_errors
from dormouse.store.key import Key, same
from dormouse.store.manifest import Manifest
from dormouse.store.marks import NO_MARKS, Marks
from dormouse.store.pack import MAC_SIZE, StoredChunk

VERSION = 1

_REBUILD_REMEDY = "If this persists, stop dormouse and delete that file: it is built anew, no snapshot is lost"
_FileId = tuple[int, int]
_CACHED_STATEMENTS = 8  # queries for many chunks differ in length, and each that is kept takes tens of kB
_MOST_IDLE = 20  # more than threads that ask at once
_BATCH = 500
_COLUMNS = "digest, mac, pack, offset, stored_length, plain_length, codec"
_SCHEMA = f"""
BEGIN;
CREATE TABLE packs (id INTEGER PRIMARY KEY) STRICT;
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,
    mac BLOB NOT NULL,
    pack INTEGER REFERENCES packs (id),  -- NULL: a manifest names it, no pack has it
    offset INTEGER NOT NULL,
    stored_length INTEGER NOT NULL,
    plain_length INTEGER NOT NULL,
    codec INTEGER NOT NULL,
    damaged INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX chunks_of_pack ON chunks (pack);
CREATE TABLE manifests (
    id TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    created REAL NOT NULL,
    raw_bytes INTEGER NOT NULL,
    mac BLOB NOT NULL
) STRICT;
CREATE TABLE manifest_chunks (
    manifest TEXT NOT NULL REFERENCES manifests (id) ON DELETE CASCADE,
    chunk INTEGER NOT NULL REFERENCES chunks (id),
    PRIMARY KEY (manifest, chunk)
) STRICT, WITHOUT ROWID;
CREATE INDEX manifests_of_chunk ON manifest_chunks (chunk);
CREATE TABLE notes (text TEXT NOT NULL) STRICT;
CREATE TABLE signer (key_id BLOB NOT NULL) STRICT;
PRAGMA user_version = {VERSION};
COMMIT;
"""
_LIST_SCHEMA = "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name"
_IS_LIVE = "EXISTS (SELECT 1 FROM manifest_chunks r WHERE r.chunk = chunks.id)"


@dataclass(frozen=True)
class ManifestRow:
    """A manifest in a list. `raw_bytes` are plain, `stored_bytes` what its chunks take in the packs, `shared_bytes`
    the part of those that other manifests use too; `marks` come from beside the manifest, not from the index."""

    id: str
    kind: str
    name: str
    created: float
    raw_bytes: int
    stored_bytes: int
    shared_bytes: int
    marks: Marks = NO_MARKS


class Index:
    """Used by any number of threads; each call takes a connection of a pool for as long as it lasts."""

    def __init__(self, path: Path, key: Key) -> None:
        self._path = path
        self._key = key
        self._lock = threading.Lock()
        self._idle: list[tuple[_FileId, sqlite3.Connection]] = []
        self._closed = False

    def close(self) -> None:
        """Close all connections; the index is not used again."""
        with self._lock:
            self._closed = True
        self._drop_idle()

    # whole database

    def problem(self) -> str | None:
        """What makes this file unusable as index, None when nothing."""
        if not self._path.exists():
            return "it is missing"
        try:
            version = self._version()
            if version != VERSION:
                return f"it is of format version {version}, not {VERSION}"
            if self._query(_LIST_SCHEMA) != _expected_schema():
                return "its tables are not what they should be"
            verdicts = self._query("PRAGMA integrity_check(1)")
            for row in self._query("SELECT id, kind, name, created, raw_bytes, mac FROM manifests"):
                self._check_row(*row)
            with self.change() as connection:  # a damaged header can make it read-only
                connection.execute(f"PRAGMA user_version = {VERSION}")
        except DiskFullError:
            raise
        except StoreError as error:
            return str(error.__cause__ or error.message)
        return None if verdicts == [("ok",)] else f"{verdicts[0][0]}"

    def is_current(self) -> bool:
        """Whether it is of our format: its header and its tables say so, rows are not looked at."""
        return self._version() == VERSION and self._query(_LIST_SCHEMA) == _expected_schema()

    def _version(self) -> object:
        ((version,),) = self._query("PRAGMA user_version")
        return version

    def create(self, note: str) -> None:
        """Throw the database away and make an empty one that remembers why."""
        self._drop_idle()
        with system_errors(self._path, "creating the index"):
            # The log first: SQLite would replay an old one into the new database.
            for path in (f"{self._path}-wal", f"{self._path}-shm", self._path):
                Path(path).unlink(missing_ok=True)
            os.close(create_file(self._path))
        with self._own_errors(), contextlib.closing(self._connect()) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)
            connection.execute("INSERT INTO notes VALUES (?)", (note,))
            connection.execute("INSERT INTO signer VALUES (?)", (self._key.id,))

    def notes(self) -> list[str]:
        """Why this index was built anew, if it was."""
        return [text for (text,) in self._query("SELECT text FROM notes WHERE text <> ''")]

    # chunks and packs

    def present(self, digests: Iterable[Digest]) -> set[Digest]:
        """Those of which an undamaged chunk is stored. All in one row of the answer, for each row takes the GIL anew,
        and who asks here has many threads."""
        found: set[Digest] = set()
        for batch in _batches(digests):
            marks = ",".join("?" * len(batch))
            ((names,),) = self._query(
                f"SELECT group_concat(hex(digest), '') FROM chunks WHERE digest IN ({marks}) AND NOT damaged", batch
            )
            packed = bytes.fromhex(names or "")
            found.update(Digest(packed[at : at + DIGEST_SIZE]) for at in range(0, len(packed), DIGEST_SIZE))
        return found

    def locate(self, digests: Iterable[Digest], manifest_id: str | None = None) -> dict[Digest, StoredChunk]:
        """Where chunks are stored; those in no pack are left out. When most are a manifest's, it is faster to say so:
        all of that are answered at once, and there may be more in the answer than was asked."""
        found: dict[Digest, StoredChunk] = {}
        with self._connection() as connection:
            if manifest_id is not None:
                rows = connection.execute(
                    f"SELECT {_COLUMNS} FROM manifest_chunks r JOIN chunks c ON c.id = r.chunk "
                    "WHERE r.manifest = ? AND pack IS NOT NULL",
                    (manifest_id,),
                )
                found.update((row[0], StoredChunk._make(row)) for row in rows)
            for batch in _batches(digest for digest in digests if digest not in found):
                marks = ",".join("?" * len(batch))
                rows = connection.execute(
                    f"SELECT {_COLUMNS} FROM chunks WHERE pack IS NOT NULL AND digest IN ({marks})", batch
                )
                found.update((row[0], StoredChunk._make(row)) for row in rows)
        return found

    def packs(self) -> set[int]:
        """The numbers of all packs that the index knows."""
        return {number for (number,) in self._query("SELECT id FROM packs")}

    def unplaced(self) -> list[Digest]:
        """The chunks that manifests name and no pack has."""
        return [digest for (digest,) in self._query("SELECT digest FROM chunks WHERE pack IS NULL")]

    def missing(self) -> bool:
        """Whether manifests need chunks that are in no pack, or were found damaged."""
        return bool(self._query(f"SELECT 1 FROM chunks WHERE (pack IS NULL OR damaged) AND {_IS_LIVE} LIMIT 1"))

    def chunks_of(self, pack: int, *, live_only: bool = False) -> list[StoredChunk]:
        """The chunks whose row points to a pack, in the order of its file."""
        live = f"AND {_IS_LIVE}" if live_only else ""
        rows = self._query(f"SELECT {_COLUMNS} FROM chunks WHERE pack = ? {live} ORDER BY offset", (pack,))
        return [StoredChunk(*row) for row in rows]

    def users_of(self, digests: Iterable[Digest]) -> list[str]:
        """The manifests that need any of these chunks."""
        users: set[str] = set()
        with self._connection() as connection:
            for batch in _batches(digests):
                rows = connection.execute(
                    "SELECT DISTINCT r.manifest FROM chunks c JOIN manifest_chunks r ON r.chunk = c.id "
                    f"WHERE c.digest IN ({','.join('?' * len(batch))})",
                    batch,
                )
                users.update(manifest for (manifest,) in rows)
        return sorted(users)

    def mark(self, digests: Iterable[Digest], *, damaged: bool) -> None:
        """Note that the bytes of chunks were found wrong, or right again."""
        rows = [(damaged, digest, damaged) for digest in digests]
        if rows:
            with self.change() as connection:
                connection.executemany("UPDATE chunks SET damaged = ? WHERE digest = ? AND damaged <> ?", rows)

    # manifests

    def manifest_ids(self) -> set[str]:
        """The ids of all manifests."""
        return {manifest for (manifest,) in self._query("SELECT id FROM manifests")}

    def manifests(self, kind: str | None, name: str | None) -> list[ManifestRow]:
        """All manifests, or those of a kind or name, oldest first. Raises DamagedError for a row that was altered."""
        rows = self._query(
            """
            SELECT m.id, m.kind, m.name, m.created, m.raw_bytes, m.mac,
                CAST(total(c.stored_length) AS INTEGER), CAST(total(
                CASE WHEN EXISTS (SELECT 1 FROM manifest_chunks o WHERE o.chunk = c.id AND o.manifest <> m.id)
                THEN c.stored_length END) AS INTEGER)
            FROM manifests m
            LEFT JOIN manifest_chunks r ON r.manifest = m.id
            LEFT JOIN chunks c ON c.id = r.chunk
            WHERE (? IS NULL OR m.kind = ?) AND (? IS NULL OR m.name = ?)
            GROUP BY m.id ORDER BY m.created, m.id
            """,
            (kind, kind, name, name),
        )
        for row in rows:
            self._check_row(*row[:6])
        return [ManifestRow(*row[:5], *row[6:]) for row in rows]

    def _check_row(self, *row: object) -> None:
        types = (str, str, str, float, int, bytes)  # a flipped bit can change a value's type, or make it NULL
        *signed, mac = row
        if not all(map(isinstance, row, types)) or not same(mac, _row_mac(self._key, *signed)):  # type: ignore[arg-type]
            raise DamagedError(
                f"the index {self._path} has an altered row for manifest {row[0]}", remedy=_REBUILD_REMEDY
            )

    def refs_of(self, manifest_id: str) -> set[Digest]:
        """The chunks that the index believes a manifest needs."""
        rows = self._query(
            "SELECT c.digest FROM manifest_chunks r JOIN chunks c ON c.id = r.chunk WHERE r.manifest = ?",
            (manifest_id,),
        )
        return {digest for (digest,) in rows}

    @contextlib.contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """One SQLite transaction: committed at the end of the block, rolled back on any error."""
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # on a full disk SQLite has rolled back by itself
                    connection.execute("ROLLBACK")
                raise

    # connections

    def _query(self, sql: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._connection() as connection:
            return connection.execute(sql, parameters).fetchall()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection for the block alone. Foreign errors become errors of ours here and nowhere else."""
        with system_errors(self._path, "opening the index"):
            status = self._path.lstat()
        check_ours(self._path, status)
        file = (status.st_dev, status.st_ino)
        with self._own_errors():
            connection = self._take(file) or self._connect_checked()
            try:
                yield connection
            finally:
                self._put_back(file, connection)

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # sqlite3 can't even tell of a schema of broken text
            raise self._translated(error) from error

    def _take(self, file: _FileId) -> sqlite3.Connection | None:
        with self._lock:
            if self._closed:
                raise StoreError(f"the store at {self._path.parent} is closed")
            if not self._idle or self._idle[-1][0] == file:
                return self._idle.pop()[1] if self._idle else None
        self._drop_idle()  # another process has built the index anew: those are connections to the old one
        return None

    def _connect_checked(self) -> sqlite3.Connection:
        """A connection to an index of our own key: whoever changes the key has the index built anew."""
        connection = self._connect()
        try:
            signers = connection.execute("SELECT key_id FROM signer").fetchall()
            if signers != [(self._key.id,)]:
                raise UntrustedError(
                    f"the index {self._path} was made with another key than {self._key.id.hex()}",
                    remedy="The store's key was changed while it was open: start dormouse again",
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect(self) -> sqlite3.Connection:
        uri = f"{self._path.absolute().as_uri()}?mode=rw"
        connection = sqlite3.connect(
            *(uri, 60),
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=_CACHED_STATEMENTS,
        )
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    def _put_back(self, file: _FileId, connection: sqlite3.Connection) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _MOST_IDLE:
                self._idle.append((file, connection))
                return
        connection.close()

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for _file, connection in idle:
            connection.close()

    def _translated(self, error: Exception) -> StoreError | BusyError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return disk_full(self._path, "writing to the index")
        if code == sqlite3.SQLITE_BUSY:
            return BusyError(f"the index {self._path} is in use: {error}", retry_after=1.0, remedy="Try again later")
        kind = DamagedError if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) else StoreError
        return kind(
            f"the index {self._path} failed: {error}",
            remedy=_REBUILD_REMEDY,
        )


@cache
def _expected_schema() -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(_SCHEMA)
        return connection.execute(_LIST_SCHEMA).fetchall()


# Changes: they belong into one `Index.change` block, by the holder of the store's change lock.


def add_pack(connection: sqlite3.Connection, pack: int, chunks: Iterable[StoredChunk]) -> None:
    """A new pack with its chunks; a chunk that has a good row elsewhere keeps it."""
    connection.execute("INSERT INTO packs VALUES (?)", (pack,))
    connection.executemany(
        f"""
        INSERT INTO chunks ({_COLUMNS}) VALUES (?, ?, {pack:d}, ?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE SET
        mac = excluded.mac, pack = excluded.pack, offset = excluded.offset, codec = excluded.codec,
        stored_length = excluded.stored_length, plain_length = excluded.plain_length, damaged = 0 WHERE damaged
        """,
        ((c.digest, c.mac, c.offset, c.stored_length, c.plain_length, c.codec) for c in chunks),
    )


def move_chunks(connection: sqlite3.Connection, old: int, new: int, chunks: Iterable[StoredChunk]) -> None:
    """The chunks of a pack were copied to a new one; what was not copied is forgotten, and so is the old pack."""
    connection.execute("INSERT INTO packs VALUES (?)", (new,))
    connection.executemany(
        f"UPDATE chunks SET pack = {new:d}, offset = ?, damaged = 0 WHERE digest = ? AND pack = {old:d}",
        ((c.offset, c.digest) for c in chunks),
    )
    drop_pack(connection, old)


def drop_pack(connection: sqlite3.Connection, pack: int) -> None:
    """Forget a pack and its chunks, none of which is needed."""
    connection.execute("DELETE FROM chunks WHERE pack = ?", (pack,))
    connection.execute("DELETE FROM packs WHERE id = ?", (pack,))


def dead_packs(connection: sqlite3.Connection) -> list[int]:
    """The packs of which no chunk is needed."""
    query = f"SELECT id FROM packs WHERE NOT EXISTS (SELECT 1 FROM chunks WHERE pack = packs.id AND {_IS_LIVE})"
    return [number for (number,) in connection.execute(query)]


def drop_unplaced(connection: sqlite3.Connection) -> None:
    """Forget the chunks that no pack has and nobody needs any more."""
    connection.execute(f"DELETE FROM chunks WHERE pack IS NULL AND NOT {_IS_LIVE}")


def add_manifest(connection: sqlite3.Connection, manifest: Manifest, raw_bytes: int, key: Key) -> None:
    """A new manifest; chunks it names that are in no known pack get a row that says so."""
    row = (manifest.id, manifest.kind, manifest.name, manifest.created, raw_bytes)
    connection.execute("INSERT INTO manifests VALUES (?, ?, ?, ?, ?, ?)", (*row, _row_mac(key, *row)))
    refs = [(digest,) for digest in set(manifest.refs)]
    connection.executemany(
        f"INSERT INTO chunks ({_COLUMNS}, damaged) VALUES (?, x'', NULL, 0, 0, 0, 0, 1) ON CONFLICT DO NOTHING", refs
    )
    connection.executemany(
        "INSERT INTO manifest_chunks SELECT ?, id FROM chunks WHERE digest = ?",
        ((manifest.id, digest) for (digest,) in refs),
    )


def drop_manifest(connection: sqlite3.Connection, manifest_id: str) -> None:
    """Forget a manifest; its chunks stay until garbage is collected."""
    connection.execute("DELETE FROM manifests WHERE id = ?", (manifest_id,))


def _row_mac(key: Key, manifest_id: str, kind: str, name: str, created: float, raw_bytes: int) -> bytes:
    texts = [text.encode() for text in (manifest_id, kind, name)]
    lengths = struct.pack("<3Qdq", *map(len, texts), created, raw_bytes)
    return key.rows.mac(MAC_SIZE, b"".join(texts), lengths)


def _batches(digests: Iterable[Digest]) -> Iterator[list[Digest]]:
    rest = iter(dict.fromkeys(digests))
    while batch := list(islice(rest, _BATCH)):
        yield batch
