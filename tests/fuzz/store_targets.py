"""What the store does with hostile bytes, as functions of bytes: each raises what is a bug and returns otherwise.

Signatures would stop a fuzzer at the door. So each parser is also given what somebody with the key could have signed:
the code behind the door must hold too. `corpus` are good inputs to begin from. Used by fuzz_store.py and
test_fuzz_store.py.
"""

from __future__ import annotations

import atexit
import contextlib
import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from dormouse.errors import DamagedError, DormouseError, StoreError
from dormouse.store import manifest as manifests
from dormouse.store import pack as packs
from dormouse.store.chunk import MAX_CHUNK, Digest, digest_of
from dormouse.store.codec import Codec, decode, encode
from dormouse.store.files import preamble
from dormouse.store.key import Key, open_key, parse_key
from dormouse.store.marks import Marks, decode_marks, encode_marks
from dormouse.store.store import Manifest, Store, StoredChunk

KEY = Key(bytes(range(32)))
PLAINS = [b"A small chunk.", bytes(5000), b"text that compresses " * 500]
_ROW = struct.Struct("<BBqqqqqqq")
_TRAILER_SIZE = 40


@cache
def scratch() -> Path:
    """A folder for this process. atheris ends without cleaning up: then its caller does, by TMPDIR."""
    folder = tempfile.mkdtemp(prefix="dormouse-fuzz-")
    atexit.register(shutil.rmtree, folder)
    return Path(folder)


@cache
def sample_store() -> tuple[Store, list[Digest]]:
    """A store with one manifest of PLAINS, kept open."""
    store = Store.open(scratch() / "sample" / "store")
    with store.begin() as transaction:
        refs = [transaction.put(plain, codec=Codec.ZSTD) for plain in PLAINS]
        transaction.commit(Manifest("a", "snapshot", "m", 1.5, b"body", refs))
    atexit.register(store.close)
    return store, refs


def fuzz_manifest(data: bytes) -> None:
    head = preamble(manifests.MAGIC, manifests.VERSION, KEY.id)
    for whole in (data, head + data, head + KEY.manifests.mac(32, data, head) + data):
        with contextlib.suppress(StoreError):
            found, raw_bytes = manifests.decode_manifest(whole, "a", KEY)
            assert (found.id, raw_bytes >= 0) == ("a", True)
            assert all(len(digest) == 32 for digest in found.refs)


def fuzz_pack(data: bytes) -> None:
    """A file; and payload and table with right ends and signature, the first two bytes being the payload's length."""
    head = preamble(packs.MAGIC, packs.VERSION, KEY.id).ljust(packs.ALIGNMENT, b"\0")
    offset = packs.ALIGNMENT + packs.aligned(int.from_bytes(data[:2], "little"))
    table = data[2 : 2 + (len(data) - 2) // 72 * 72] if len(data) > 2 else b""
    ends = struct.pack("<QQ", offset, len(table) // 72)
    signed = head.ljust(offset, b"\0") + table + ends + KEY.tables.mac(16, table, ends) + packs.END_MAGIC
    for whole in (data, head + data, head + data[:-_TRAILER_SIZE] + ends + bytes(16) + packs.END_MAGIC, signed):
        path = scratch() / "00000001.pack"
        path.write_bytes(whole)
        path.chmod(0o600)
        with contextlib.suppress(StoreError):
            for chunk in packs.read_table(path, 1, KEY):
                assert packs.makes_sense(chunk)
                assert chunk.offset + chunk.stored_length <= len(whole)


def fuzz_chunk(data: bytes) -> None:
    """Codec, announced length (4 bytes), stored bytes."""
    if len(data) < 5:
        return
    length = int.from_bytes(data[1:5], "little")
    with contextlib.suppress(DamagedError):
        plain = decode(data[0] % 10, data[5:], length)
        assert len(plain) == length <= MAX_CHUNK


def fuzz_marks(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        marks = decode_marks(data)
        assert decode_marks(encode_marks(marks)).pinned == marks.pinned


def fuzz_key(data: bytes) -> None:
    with contextlib.suppress(StoreError):
        assert parse_key(data, "it").text() == data


def fuzz_row(data: bytes) -> None:
    """A row of the index: right bytes or an error, whatever it says. The fields are differences from a good row."""
    if len(data) < _ROW.size:
        return
    store, refs = sample_store()
    which, other, pack, offset, stored, plain, codec, mac, _rest = _ROW.unpack_from(data)
    with store.reader() as reader:
        located = reader.locate(refs)
        good, donor = located[which % 3], located[other % 3]
        signature = donor.mac if mac % 2 else good.mac
        row = StoredChunk(
            good.digest,
            signature,
            good.pack + pack % 3,
            donor.offset + offset,
            donor.stored_length + stored,
            donor.plain_length + plain,
            donor.codec + codec,
        )
        with contextlib.suppress(DamagedError):
            assert bytes(reader.plain(row)) == PLAINS[which % 3]


def fuzz_index(data: bytes) -> None:
    """Bytes of the index's file changed: two for where, one for what, again and again. Right bytes or an error."""
    sample_store()
    source = scratch() / "sample" / "store" / "index.sqlite"
    with contextlib.closing(sqlite3.connect(source)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    good = source.read_bytes()
    bad = bytearray(good)
    for at in range(0, min(len(data), 60) - 2, 3):
        bad[int.from_bytes(data[at : at + 2], "little") * 7 % len(bad)] = data[at + 2]
    source.write_bytes(bad)
    try:
        with Store.open(scratch() / "sample" / "store") as again:
            assert {(row.name, row.raw_bytes) for row in again.manifests()} <= {("m", sum(map(len, PLAINS)))}
            for digest, plain in zip(again.manifest("a").refs, PLAINS, strict=True):
                with contextlib.suppress(DormouseError):
                    assert bytes(again.read(digest)) == plain
            again.verify()
    except DormouseError as error:
        assert error.remedy
    finally:
        source.unlink(missing_ok=True)
        Store.open(scratch() / "sample" / "store").close()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": fuzz_manifest,
    "pack": fuzz_pack,
    "chunk": fuzz_chunk,
    "marks": fuzz_marks,
    "key": fuzz_key,
    "row": fuzz_row,
    "index": fuzz_index,
}


def corpus(target: str) -> list[bytes]:
    """Good inputs of a target."""
    store, refs = sample_store()
    folder = scratch() / "sample" / "store"
    key = open_key(scratch() / "sample" / "key", needed=True)
    record = manifests.encode_manifest(store.manifest("a"), 9, key)[64:]
    whole = manifests.encode_manifest(store.manifest("a"), 9, KEY)
    table = (folder / "packs" / "00000001.pack").read_bytes()[-40 - 72 * 3 : -40]
    coded = [encode(plain, codec) for plain in PLAINS for codec in Codec]
    powers_of_two = bytes(exponent << 2 for exponent in b"\x14\x13\x14\x15\x0f\x10\x13\x0a\x09\x03" * 800)
    coded.append(encode(powers_of_two, Codec.FP8_E5M2))
    good: dict[str, list[bytes]] = {
        "manifest": [record, whole],
        "pack": [struct.pack("<H", 8000) + table, (folder / "packs" / "00000001.pack").read_bytes()],
        "chunk": [
            bytes([used]) + struct.pack("<I", length) + bytes(stored)
            for used, stored in coded
            for length in (10_500, 8000)
        ],
        "marks": [encode_marks(Marks(True, "reason", 1.5)), encode_marks(Marks())],
        "key": [KEY.text()],
        "row": [bytes(_ROW.size), _ROW.pack(1, 2, 0, 4096, -1, 1, 1, 1, 0)],
        "index": [b"\x10\x00\xff\x90\x01\x00", bytes(30)],
    }
    assert digest_of(PLAINS[0]) == refs[0]
    return good[target]
