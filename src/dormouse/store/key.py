"""The store's key: 32 secret bytes that sign manifests, chunks, tables of packs and rows of the index. Who can write to
the store's folder but does not have the key can delete, but can't make the store hand out bytes that it did not store.

The key lies in a file of its own beside the store (docs/formats.md), made on first use. Its id, which is no secret,
stands in every signed file, so that an error can say whose signature was found.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from blake3 import blake3

from dormouse.errors import DamagedError, StoreError, UntrustedError
from dormouse.store.chunk import Buffer
from dormouse.store.files import check_ours, open_ours, read_all, replace_file, system_errors

SIZE = 32
ID_SIZE = 8
VERSION = 1

_TEXT = re.compile(rb"dormouse-key ([1-9][0-9]{0,8})\nsecret ([0-9a-f]{64})\nid ([0-9a-f]{16})\n")
_MAX_TEXT = 1024
_ANY_RIGHT_OF_OTHERS = 0o077


@dataclass(frozen=True, repr=False)
class Signer:
    """Signs one sort of thing, with a key of its own that is derived from the store's: what is signed as one sort is
    never taken for another. `secret` is for code that computes the same elsewhere, such as on a GPU."""

    secret: bytes

    def mac(self, size: int, body: Buffer, tail: bytes) -> bytes:
        """Keyed BLAKE3 of `body` and `tail`, which has one fixed length per sort. Releases the GIL for long bodies."""
        # The short part comes last: after it, the hash could no longer take the long one in whole vectors.
        return blake3(body, key=self.secret).update(tail).digest(length=size)


@dataclass(frozen=True, repr=False)
class Key:
    """A store's key. `id` names it in files and errors; nothing prints the secret but `text`."""

    secret: bytes
    id: bytes = field(init=False)
    manifests: Signer = field(init=False)
    chunks: Signer = field(init=False)
    tables: Signer = field(init=False)
    rows: Signer = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", self._derived("id")[:ID_SIZE])
        for name in ("manifests", "chunks", "tables", "rows"):
            object.__setattr__(self, name, Signer(self._derived(name)))

    @classmethod
    def new(cls) -> Self:
        """A random one."""
        return cls(secrets.token_bytes(SIZE))

    def text(self) -> bytes:
        """The key as a file."""
        return b"dormouse-key %d\nsecret %s\nid %s\n" % (VERSION, self.secret.hex().encode(), self.id.hex().encode())

    def number(self, purpose: str) -> int:
        """A number of 32 bits that is the same on this host every time and that nobody else can guess."""
        return int.from_bytes(self._derived(f"number {purpose}")[:4], "little")

    def __repr__(self) -> str:
        return f"Key({self.id.hex()})"

    def _derived(self, purpose: str) -> bytes:
        return blake3(self.secret, derive_key_context=f"dormouse store key v1: {purpose}").digest()


def same(left: bytes, right: bytes) -> bool:
    """Whether two signatures are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(left, right)


def parse_key(text: bytes, what: str) -> Key:
    """The key in a key file. Raises DamagedError, or StoreError for a newer version."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise _malformed(what)
    if int(match[1]) > VERSION:
        raise StoreError(
            f"{what} has format version {int(match[1])}; this program reads up to {VERSION}", remedy="Update dormouse"
        )
    key = Key(bytes.fromhex(match[2].decode()))
    if key.id.hex().encode() != match[3]:
        raise _malformed(what)
    return key


def read_key(path: Path) -> Key | None:
    """The key in a file, None when there is no file. Raises UntrustedError for a file that is not ours alone."""
    with system_errors(path, "reading the key"):
        try:
            fd = open_ours(path)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(fd)
            check_ours(path, status, _ANY_RIGHT_OF_OTHERS)
            if status.st_uid != os.geteuid():
                raise UntrustedError(
                    f"the key {path} belongs to user {status.st_uid}, not to user {os.geteuid()} who runs this",
                    remedy=f"Run dormouse as that user, or, if the key is yours, `chown {os.geteuid()} {path}`",
                )
            text = read_all(fd, _MAX_TEXT, 0)
        finally:
            os.close(fd)
    return parse_key(text, f"the key {path}")


def open_key(path: Path, *, needed: bool) -> Key:
    """The key of a store, made when there is none. When it is `needed`, because something was signed with it already,
    none is made: a new one would make all of that look forged. Raises UntrustedError, DamagedError, StoreError."""
    key = read_key(path)
    if key is None:
        if needed:
            raise missing_key(path)
        return _create_key(path)
    return key


def missing_key(path: Path) -> UntrustedError:
    """The error for a store that has lost its key."""
    return UntrustedError(
        f"the key {path} is missing, and the store holds snapshots that were signed with it",
        remedy="Put it back with `dormouse key import FILE`, or delete the store's folder to begin anew",
    )


def replace_key(path: Path, key: Key) -> None:
    """Put a key in place of the one that is there."""
    with _key_folder(path), system_errors(path, "writing the key"):
        replace_file(path, key.text())


def _create_key(path: Path) -> Key:
    with _key_folder(path):
        found = read_key(path)  # another process may have made it just now
        if found is not None:
            return found
        key = Key.new()
        with system_errors(path, "writing the key"):
            replace_file(path, key.text())
        return key


@contextlib.contextmanager
def _key_folder(path: Path) -> Iterator[None]:
    """The folder of the key, locked against others who write a key there."""
    with system_errors(path, "locking the folder of the key"):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except BaseException:
            os.close(fd)
            raise
    try:
        yield
    finally:
        os.close(fd)


def _malformed(what: str) -> DamagedError:
    return DamagedError(f"{what} is malformed", remedy="Put back a copy of it with `dormouse key import FILE --force`")
