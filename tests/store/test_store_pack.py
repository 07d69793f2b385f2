"""The bytes of packs and manifests: fixed, round-tripping, and read without harm whatever they are."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dormouse.errors import DamagedError, StoreError
from dormouse.store.chunk import Digest, digest_of
from dormouse.store.codec import Codec, encode
from dormouse.store.files import preamble
from dormouse.store.key import Key
from dormouse.store.manifest import Manifest, decode_manifest, encode_manifest
from dormouse.store.pack import PackWriter, StoredChunk, pack_size, read_table

RAW = b"A small chunk."
KEY = Key(bytes(range(32)))
GOLDEN_PREAMBLE = "444f524d5041434b01000000000000001b59e460c4bfd31839b72a62047fb95d"
GOLDEN_RAW_ENTRY = (
    "ab60c0bcc8ba62538584d81d775654275947fd25ffff3e55543b1383a16dce44f54a6d6d0eaa05004c4c6686adef11ae0010"
    "0000000000000e0000000e0000000000000000000000"
)
GOLDEN_ZERO_ENTRY = (
    "b6fb73fc46938c981e2b0b4b1ef282adcfc89854d01bfe3972fdc4785b41b2c7d66a351b7b9fd634718cfafdc62996e20000"
    "00000000000000000000001000000100000000000000"
)
GOLDEN_TRAILER = "00200000000000000200000000000000515349c2d46ca42b3c9873b2a9333eec444f524d50454e44"
GOLDEN_MANIFEST = (
    "444f524d4d4e465401000000000000001b59e460c4bfd3187df3d681777241dfa110c3d05dd767f0664e7f473c3cf9382d78"
    "368a5ea8986277c5ceb00b5e6e3a87a26964a161a46b696e64a8736e617073686f74a46e616d65a16da763726561746564cb"
    "3ff8000000000000a97261775f62797465734da4626f6479c404626f6479a472656673c420000102030405060708090a0b0c"
    "0d0e0f101112131415161718191a1b1c1d1e1f"
)


def write_pack(folder: Path, plains: list[bytes], codec: Codec = Codec.RAW) -> Path:
    writer = PackWriter(folder / "growing.tmp", KEY)
    for plain in plains:
        used, stored = encode(plain, codec)
        writer.append(digest_of(plain), used, len(plain), stored)
    writer.finish()
    target = folder / "00000001.pack"
    writer.path.rename(target)
    writer.close()
    return target


def test_the_bytes_of_a_pack_never_change(tmp_path: Path) -> None:
    data = write_pack(tmp_path, [RAW, bytes(4096)]).read_bytes()
    assert len(data) == 4096 + 4096 + 2 * 72 + 40
    assert data[:32].hex() == GOLDEN_PREAMBLE
    assert data[32:4096] == bytes(4096 - 32)
    assert data[4096:8192] == RAW.ljust(4096, b"\0")
    assert data[8192 : 8192 + 72].hex() == GOLDEN_RAW_ENTRY
    assert data[8192 + 72 : 8192 + 144].hex() == GOLDEN_ZERO_ENTRY
    assert data[8192 + 144 :].hex() == GOLDEN_TRAILER


def test_a_pack_written_by_version_1_is_read(tmp_path: Path) -> None:
    parts = [bytes.fromhex(part) for part in (GOLDEN_RAW_ENTRY, GOLDEN_ZERO_ENTRY, GOLDEN_TRAILER)]
    path = tmp_path / "00000007.pack"
    path.write_bytes(bytes.fromhex(GOLDEN_PREAMBLE).ljust(4096, b"\0") + RAW.ljust(4096, b"\0") + b"".join(parts))
    raw, zero = read_table(path, 7, KEY)
    assert raw[:1] + raw[2:] == (digest_of(RAW), 7, 4096, len(RAW), len(RAW), Codec.RAW)
    assert zero[:1] + zero[2:] == (digest_of(bytes(4096)), 7, 0, 0, 4096, Codec.ZERO)


def test_the_bytes_of_a_manifest_never_change() -> None:
    manifest = Manifest("a", "snapshot", "m", 1.5, b"body", [Digest(bytes(range(32)))])
    assert encode_manifest(manifest, 77, KEY).hex() == GOLDEN_MANIFEST
    assert decode_manifest(bytes.fromhex(GOLDEN_MANIFEST), "a", KEY) == (manifest, 77)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=9000), max_size=8), st.sampled_from(Codec))
def test_a_pack_gives_back_its_table(tmp_path: Path, plains: list[bytes], codec: Codec) -> None:
    path = write_pack(tmp_path, plains, codec)
    table = read_table(path, 1, KEY)
    assert [entry.digest for entry in table] == [digest_of(plain) for plain in dict.fromkeys(plains)]
    assert all(entry.offset % 4096 == 0 for entry in table)
    assert path.stat().st_size == pack_size(table)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_in_place_of_the_end_are_refused(tmp_path: Path, tail: bytes) -> None:
    path = write_pack(tmp_path, [RAW, bytes(4096)])
    good = path.read_bytes()
    for changed in (good[:8192] + tail, good[: len(good) - len(tail)], tail, good + tail):
        path.write_bytes(changed)
        if changed != good:
            with pytest.raises(DamagedError, match="00000001"):
                read_table(path, 1, KEY)


entries = st.tuples(
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=16, max_size=16),
    *[st.integers(0, 2**64 - 1) | st.sampled_from([0, 4096, 8192])],
    *[st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 4096])] * 2,
    st.integers(0, 255) | st.sampled_from([0, 1, 2, 3]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(entries, max_size=3), st.integers(0, 2**64 - 1) | st.just(8192), st.integers(0, 4))
def test_a_hostile_table_with_a_right_signature_yields_only_entries_inside_the_pack(
    tmp_path: Path, rows: list[tuple[bytes, bytes, int, int, int, int]], offset: int, count: int
) -> None:
    table = b"".join(struct.pack("<32s16sQIIB7x", *row) for row in rows)
    ends = struct.pack("<QQ", offset, count)
    path = tmp_path / "00000001.pack"
    trailer = ends + KEY.tables.mac(16, table, ends) + b"DORMPEND"
    path.write_bytes(bytes.fromhex(GOLDEN_PREAMBLE).ljust(8192, b"\0") + table + trailer)
    try:
        found = read_table(path, 1, KEY)
    except DamagedError:
        return
    for chunk in found:
        assert chunk.codec in set(Codec)
        assert chunk.stored_length == 0 or 4096 <= chunk.offset <= 8192 - chunk.stored_length
        assert chunk.stored_length <= chunk.plain_length <= 16 << 20


@given(st.binary(max_size=300), st.integers(0, 200))
def test_any_bytes_in_a_manifest_are_refused(junk: bytes, cut: int) -> None:
    good = bytes.fromhex(GOLDEN_MANIFEST)
    for changed in (junk, good[:cut] + junk, good[:40] + junk):
        if changed != good:
            with pytest.raises(DamagedError):
                decode_manifest(changed, "a", KEY)


@given(st.binary(max_size=300))
def test_a_manifest_with_a_right_signature_and_wrong_content_is_refused(junk: bytes) -> None:
    head = bytes.fromhex(GOLDEN_MANIFEST)[:32]
    with pytest.raises(DamagedError, match="damaged"):
        decode_manifest(head + KEY.manifests.mac(32, junk, head) + junk, "a", KEY)


def newer(data: bytes) -> bytes:
    return preamble(data[:8], 2, KEY.id)


def test_newer_versions_are_refused_as_such(tmp_path: Path) -> None:
    path = write_pack(tmp_path, [RAW])
    data = path.read_bytes()
    path.write_bytes(newer(data) + data[32:])
    with pytest.raises(StoreError, match=r"version 2.*up to 1.*Update dormouse") as caught:
        read_table(path, 1, KEY)
    assert not isinstance(caught.value, DamagedError)
    manifest = bytes.fromhex(GOLDEN_MANIFEST)
    with pytest.raises(StoreError, match="version 2"):
        decode_manifest(newer(manifest) + manifest[32:], "a", KEY)


def test_a_file_of_another_kind_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "00000001.pack"
    path.write_bytes(bytes.fromhex(GOLDEN_MANIFEST).ljust(8192, b"\0"))
    with pytest.raises(DamagedError, match="another kind"):
        read_table(path, 1, KEY)


def test_the_same_chunk_is_stored_once_per_pack(tmp_path: Path) -> None:
    writer = PackWriter(tmp_path / "growing.tmp", KEY)
    digest = digest_of(RAW)
    assert writer.append(digest, Codec.RAW, len(RAW), RAW)
    assert not writer.append(digest, Codec.RAW, len(RAW), RAW)
    assert isinstance(writer.entries[digest], StoredChunk)
    writer.close()
    assert not list(tmp_path.iterdir())
