"""Single pages of a snapshot: any bytes, only the chunks they are in, and words for what is not there."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fake_dump import MACHINE, Vma, fake_dump
from hypothesis import given, settings
from hypothesis import strategies as st

from dormouse.cli import cli
from dormouse.errors import DamagedError, DormouseError, NotFoundError, RequestError
from dormouse.snapshot import pages as pages_module
from dormouse.snapshot.criu_images import PAGE, Mapping
from dormouse.snapshot.images import decode_body
from dormouse.snapshot.import_images import import_images
from dormouse.snapshot.memory_capture import address_space
from dormouse.snapshot.memory_map import WINDOW, Span
from dormouse.snapshot.pages import ProcessMap, extents, hex_lines, read, usage
from dormouse.snapshot.window_store import store_spans
from dormouse.store.chunk import Buffer, Digest
from dormouse.store.reader import Reader
from dormouse.store.store import Store

BASE = 0x7F00_0000_0000

HEAP = Vma(BASE, BASE + 8 * WINDOW)
FILE = Vma(BASE + 8 * WINDOW, BASE + 9 * WINDOW, flags=2, status=1 | 1 << 6, file=3, offset=0x5000, protection=5)
SHARED = Vma(BASE + 9 * WINDOW, BASE + 9 * WINDOW + PAGE, flags=0x21, status=1 | 1 << 8)
KERNEL = Vma(
    BASE + 9 * WINDOW + PAGE, BASE + 9 * WINDOW + 2 * PAGE, flags=0x22, status=1 | 1 << 9 | 1 << 12, protection=1
)


def noise(seed: int) -> bytes:
    return bytes((seed * 7 + i * (seed + 1)) % 251 for i in range(PAGE))


MEMORY = {BASE + i * WINDOW + PAGE: noise(i) for i in range(8)} | {
    BASE + 2 * PAGE: bytes(PAGE),
    BASE + 3 * PAGE: noise(99),
    FILE.start: noise(50),
    FILE.start + PAGE: bytes(PAGE),
}


@pytest.fixture
def snapshot(store: Store, tmp_path: Path) -> str:
    folder = fake_dump(tmp_path / "dump", MEMORY, [HEAP, FILE, SHARED, KERNEL], {3: "/lib/x.so"})
    return taken_in(folder, store)


def taken_in(folder: Path, store: Store) -> str:
    options = {"name": "p", "key": {}, "machine": MACHINE, "externals": (), "now": time.time}
    return import_images(folder, store, **options).snapshot_id  # type: ignore[arg-type]


def dormouse(store: Store, tmp_path: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, [*words, "--data-dir", str(tmp_path / "data")])


def test_bytes_of_the_memory_as_a_hex_dump_raw_and_as_json(store: Store, snapshot: str, tmp_path: Path) -> None:
    address = BASE + WINDOW + PAGE + 5
    expected = noise(1)[5:45]
    where = ("inspect", snapshot[:6], "--address", hex(address), "--length", "40")
    assert dormouse(store, tmp_path, *where, "--raw").stdout_bytes == expected
    found = json.loads(dormouse(store, tmp_path, *where, "--json").stdout)
    assert (found["address"], base64.b64decode(found["base64"])) == (address, expected)
    lines = dormouse(store, tmp_path, *where).stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{address + at:016x}" for at in (0, 16, 32)]
    assert b"".join(bytes.fromhex(line.split(": ")[1].split("  ")[0]) for line in lines) == expected


def test_a_hex_dump_reads_like_xxd() -> None:
    parts = [b"Hello, wor", b"ld!\n\x00\xff...", b"tail"]
    assert list(hex_lines(0x1000, parts)) == [
        "0000000000001000: 4865 6c6c 6f2c 2077 6f72 6c64 210a 00ff  Hello, world!...",
        "0000000000001010: 2e2e 2e74 6169 6c                        ...tail",
    ]


def test_only_the_chunks_asked_for_are_read(
    store: Store, snapshot: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    stored = Reader.stored

    def counted(self: Reader, chunk: object) -> Buffer:
        reads.append(1)
        return stored(self, chunk)  # type: ignore[arg-type]

    monkeypatch.setattr(Reader, "stored", counted)
    for address, length, chunks in (
        (BASE + PAGE, PAGE, 1),
        (BASE + 3 * WINDOW + PAGE, 1, 1),
        (BASE + WINDOW + PAGE, WINDOW, 1),
        (BASE + WINDOW + PAGE, WINDOW + 1, 2),
        (BASE + 2 * PAGE, 1, 0),  # zero
        (BASE, 8 * WINDOW, 8),
    ):
        reads.clear()
        done = dormouse(
            store, tmp_path, "inspect", snapshot, "--address", hex(address), "--length", str(length), "--raw"
        )
        assert (done.exit_code, len(done.stdout_bytes), len(reads)) == (0, length, chunks)


@pytest.mark.parametrize(
    ("address", "length", "error", "words"),
    [
        (BASE - PAGE, 10, NotFoundError, "nothing is mapped at 0x7efffffff000 to 0x7efffffff00a"),
        (KERNEL.end, 1, NotFoundError, "nothing is mapped"),
        (FILE.start + 2 * PAGE, 1, NotFoundError, "/lib/x.so from offset 0x7000 on, unchanged"),
        (FILE.start, 3 * PAGE, NotFoundError, "0x7f0000802000 to 0x7f0000803000"),
        (SHARED.start, 1, NotFoundError, "shared memory, mapped shared"),
        (KERNEL.start, 1, NotFoundError, "the kernel's own"),
        (BASE, 1 << 46, NotFoundError, "0x7f0000802000 to 0x7f0000900000"),
        (0, 1 << 63, NotFoundError, "nothing is mapped at 0x0 to 0x7f0000000000"),
        (-1, 1, RequestError, "no range"),
        (BASE, 0, RequestError, "no range"),
        (1 << 64, 1, RequestError, "no range"),
    ],
)
def test_what_is_not_in_the_snapshot_is_told_before_anything_is_read(
    store: Store, snapshot: str, tmp_path: Path, address: int, length: int, error: type[DormouseError], words: str
) -> None:
    done = dormouse(store, tmp_path, "inspect", snapshot, f"--address={address}", "--length", str(length), "--raw")
    assert isinstance(done.exception, error)
    assert words in str(done.exception)
    assert done.stdout_bytes == b""


def test_zero_pages_and_changed_pages_of_a_file_are_there(store: Store, snapshot: str, tmp_path: Path) -> None:
    for address, expected in (
        (BASE + 2 * PAGE, bytes(PAGE)),
        (FILE.start, noise(50)),
        (FILE.start + PAGE, bytes(PAGE)),
    ):
        done = dormouse(store, tmp_path, "inspect", snapshot, f"--address={address}", "--length=0x1000", "--raw")
        assert done.stdout_bytes == expected


def test_of_several_processes_one_must_be_named(store: Store, tmp_path: Path) -> None:
    identity = taken_in(fake_dump(tmp_path / "dump", pids=(7, 12)), store)
    where = ("inspect", identity, f"--address={PAGE}", "--length=3", "--raw")
    assert "the processes 7, 12" in str(dormouse(store, tmp_path, *where).exception)
    assert "no process 8" in str(dormouse(store, tmp_path, *where, "--pid=8").exception)
    assert dormouse(store, tmp_path, *where, "--pid=12").stdout_bytes == b"aaa"


def test_the_maps_tell_where_the_bytes_are(store: Store, snapshot: str, tmp_path: Path) -> None:
    rows = json.loads(dormouse(store, tmp_path, "inspect", snapshot, "--maps", "--json").stdout)
    assert [(row["what"], row["permissions"], row["pages"], row["stored_pages"]) for row in rows] == [
        ("private memory", "rw-p", 2048, 9),
        ("/lib/x.so", "r-xp", 256, 2),
        ("shared memory", "rw-s", 1, 0),
        ("kernel", "r--p", 1, 0),
    ]
    assert rows[0]["zero_pages"] == 2039 and rows[1]["offset"] == 0x5000
    body = decode_body(store.manifest(snapshot).body, snapshot)
    chunks = store.locate(set(body.memory[0].chunk_list()))
    assert sum(row["stored_bytes"] for row in rows) == sum(chunk.stored_length for chunk in chunks)
    assert "/lib/x.so" in dormouse(store, tmp_path, "inspect", snapshot, "--maps").stdout


def test_options_that_do_not_go_together_are_refused(store: Store, snapshot: str, tmp_path: Path) -> None:
    for words in (("--raw",), ("--maps", "--address=1"), ("--address=x",)):
        assert dormouse(store, tmp_path, "inspect", snapshot, *words).exit_code == 2


def test_damage_in_a_page_is_an_error(store: Store, snapshot: str, tmp_path: Path) -> None:
    (pack,) = (tmp_path / "data" / "store").rglob("*.pack")
    data = bytearray(pack.read_bytes())
    data[4096:8192] = os.urandom(4096)
    pack.write_bytes(data)
    done = dormouse(store, tmp_path, "inspect", snapshot, f"--address={BASE}", f"--length={8 * WINDOW}", "--raw")
    assert isinstance(done.exception, DamagedError)


# Pages against a dictionary, without a store

indices = st.dictionaries(st.integers(0, 3 * 256 - 1), st.sampled_from([bytes(PAGE), noise(1), noise(2)]), max_size=30)


class Keep:
    """Keeps what is put."""

    def __init__(self, held: dict[Digest, bytes]) -> None:
        self._held = held

    def __call__(self, chunks: Sequence[tuple[Digest, Buffer]]) -> None:
        self._held.update((digest, bytes(plain)) for digest, plain in chunks)

    def known(self, chunks: Sequence[tuple[Digest, Buffer]]) -> list[bool]:
        return [digest in self._held for digest, _plain in chunks]


def built(memory: dict[int, bytes]) -> tuple[ProcessMap, dict[Digest, bytes]]:
    chunks: dict[Digest, bytes] = {}

    spans = []
    for number in sorted({page // 256 for page in memory}):
        inside = {page % 256: content for page, content in sorted(memory.items()) if page // 256 == number}
        mask = sum(1 << bit for bit in inside)
        buffer = memoryview(bytearray(b"".join(inside.values())))
        spans.append((Span(number + BASE // WINDOW, mask), mask, buffer))
    windows = store_spans(spans, 1, None, Keep(chunks))
    mapping = Mapping(BASE, BASE + 3 * WINDOW, plain=True, sparse=True)
    return ProcessMap(address_space(1, 1, len(memory), windows), [mapping], {}), chunks


@settings(max_examples=200)
@given(indices, st.integers(0, 3 * WINDOW - 1), st.integers(1, 3 * WINDOW), st.booleans())
def test_any_range_is_what_was_there(memory: dict[int, bytes], at: int, length: int, short: bool) -> None:
    process, chunks = built(memory)
    length = min(length % 5000 + 1 if short else length, 3 * WINDOW - at)
    found = b"".join(read(process, extents(process, BASE + at, length), chunks.__getitem__))
    first, last = at // PAGE, (at + length - 1) // PAGE
    whole = b"".join(memory.get(page, bytes(PAGE)) for page in range(first, last + 1))
    assert found == whole[at % PAGE : at % PAGE + length]
    (row,) = usage(process, lambda digest: len(chunks[digest]))
    assert row.stored_pages * PAGE == row.stored_bytes == sum(any(page) for page in memory.values()) * PAGE


def test_memory_that_was_only_reserved_costs_nothing(store: Store, tmp_path: Path) -> None:
    """Many programs reserve terabytes of addresses."""
    reserved = Vma(1 << 44, 1 << 46, protection=0)
    identity = taken_in(fake_dump(tmp_path / "dump", {(1 << 44) + PAGE: noise(3)}, [reserved]), store)
    process = pages_module.process_map(decode_body(store.manifest(identity).body, identity), None, store.read)
    found = read(process, extents(process, 1 << 44, (1 << 46) - (1 << 44)), store.read)
    assert next(found)[PAGE : 2 * PAGE] == noise(3)
    assert usage(process, lambda _digest: 5)[0].stored_pages == 1


def test_a_huge_range_is_read_in_small_parts(store: Store, snapshot: str) -> None:
    body = decode_body(store.manifest(snapshot).body, snapshot)
    process = pages_module.process_map(body, None, store.read)
    parts: Sequence[int] = [len(part) for part in read(process, extents(process, BASE, 8 * WINDOW), store.read)]
    assert parts == [WINDOW] * 8
