"""The pure parts of a snapshot: manifest body, prefetch ranges, CRIU's command line and log."""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import struct
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.errors import DamagedError, HostError, IncompatibleError, SnapshotError
from dormouse.phases import Phase, Phases
from dormouse.snapshot.criu import failure_reason, failures
from dormouse.snapshot.images import BODY_VERSION, ImageFile, MappedFile, SnapshotBody, decode_body, encode_body
from dormouse.snapshot.memory_map import AddressSpace, Piece, Window
from dormouse.snapshot.prefetch import mapped_ranges, merge, prefetch, present_ranges
from dormouse.snapshot.process_memory import ProcessMemory
from dormouse.snapshot.shortage import is_shortage, system_failure, tells_of_shortage
from dormouse.snapshot.tree import External

PAGE = mmap.PAGESIZE


def body() -> SnapshotBody:
    return SnapshotBody(
        version=BODY_VERSION,
        name="m",
        key={"kernel": "6.1"},
        pid=100000,
        externals=[External("socket", 77)],
        images=[
            ImageFile(name="core-1.img", size=3, inline=b"abc"),
            ImageFile(name="pages-1.img", size=10, digests=bytes(range(64))),
        ],
        memory=[
            AddressSpace(
                pid=7,
                pages_id=2,
                pages=3,
                windows=[Window(5, [Piece(0, b"\x07" + bytes(31)), Piece(1, b"\xff" * 32, b"\x08" + bytes(31))])],
                digests=bytes(range(64, 128)),
            )
        ],
        mapped=[MappedFile(path="/lib/x.so", ranges=[(0, 4096)])],
        phases=Phases(0.0, [Phase("dump", 0.0, 0.5)]),
    )


def test_a_body_comes_back_whole() -> None:
    again = decode_body(encode_body(body()), "a")
    assert again == body()
    assert again.raw_bytes() == 13 + 3 * PAGE
    assert again.references() == [bytes(range(at, at + 32)) for at in range(0, 128, 32)]


@given(st.binary(max_size=400))
def test_any_bytes_as_a_body_give_a_named_error(data: bytes) -> None:
    with pytest.raises((DamagedError, IncompatibleError)):
        decode_body(data, "a")


@given(st.data())
def test_a_body_with_changed_bytes_is_a_body_or_a_named_error(data: st.DataObject) -> None:
    encoded = bytearray(encode_body(body()))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DamagedError, IncompatibleError):
        decode_body(bytes(encoded), "a")


def test_a_newer_body_is_refused_by_its_version() -> None:
    newer = msgspec.msgpack.encode({"version": BODY_VERSION + 1, "something": "else"})
    with pytest.raises(IncompatibleError, match="Update dormouse"):
        decode_body(newer, "a")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60), st.integers(0, 5))
def test_present_ranges_are_exactly_the_present_file_pages(pages: list[tuple[bool, bool]], first: int) -> None:
    entries = b"".join(struct.pack("=Q", present << 63 | file << 61 | 0x1234) for present, file in pages)
    found = {
        page
        for offset, length in present_ranges(entries, first * PAGE)
        for page in range(offset // PAGE, (offset + length) // PAGE)
    }
    assert found == {first + at for at, (present, file) in enumerate(pages) if present and file}


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 50)), max_size=30), st.integers(0, 20))
def test_merged_ranges_cover_the_same_and_keep_their_distance(ranges: list[tuple[int, int]], gap: int) -> None:
    merged = merge(ranges, gap)
    covered = {at for offset, length in merged for at in range(offset, offset + length)}
    assert covered >= {at for offset, length in ranges for at in range(offset, offset + length)}
    assert all(a + length + gap < b for (a, length), (b, _) in itertools.pairwise(merged))


def test_mapped_ranges_name_what_this_process_has_touched(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(64 * PAGE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as view:
        view.madvise(mmap.MADV_RANDOM)
        assert view[40 * PAGE] is not None
        found = mapped_ranges([os.getpid()])[str(path)]
        mapped = MappedFile(path=str(path), ranges=merge(found.ranges))
        assert found.private and found.inode == path.stat().st_ino
        assert any(offset <= 40 * PAGE < offset + length for offset, length in mapped.ranges)
    assert prefetch([mapped]) >= PAGE


ODD_NAMES = [b"a\x0cb", b"a\xc2\x85b", b"with blanks ", b"x\x0cdead0000-dead2000 rw-p 00000000 00:00 0"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_of_mapped_files_are_names_and_nothing_else(tmp_path: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)  # noqa: PTH118 - a name as bytes
    with open(path, "wb+") as file:  # noqa: PTH123
        file.write(bytes(4 * PAGE))
        file.flush()
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as view:
            assert view[PAGE] == 0
            assert os.fsdecode(path) in mapped_ranges([os.getpid()])
            with ProcessMemory(os.getpid()) as memory:
                assert (0xDEAD0000, 0xDEAD2000) not in list(memory.anonymous())


def test_a_name_that_is_not_utf_8_is_told_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.dat")  # noqa: PTH118
    with open(path, "wb+") as file:  # noqa: PTH123
        file.write(bytes(PAGE))
        file.flush()
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE):
            assert not [found for found in mapped_ranges([os.getpid()]) if "caf" in found]
    assert "not UTF-8" in caplog.text


def test_prefetch_does_not_wait_for_a_pipe_or_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    places = [MappedFile(path=str(place), ranges=[(0, 4096)]) for place in (tmp_path / "pipe", tmp_path)]
    assert prefetch(places) == 0


def test_prefetch_leaves_a_missing_file_to_criu(caplog: pytest.LogCaptureFixture) -> None:
    assert prefetch([MappedFile(path="/no/such/file", ranges=[(0, 4096)])]) == 0
    assert "/no/such/file" in caplog.text


def test_the_first_errors_of_a_criu_log_are_the_reason() -> None:
    text = (
        "(00.000001) Version: 4.1.1\n"
        "(00.012) Warn  (criu/kerndat.c:1285): Can't keep kdat cache\n"
        "(00.100) 100000: Error (criu/files-reg.c:2080): File lib/x.so has bad size 12 (expect 13)\n"
        "(00.101) Error (criu/cr-restore.c:1): Restoring FAILED.\n"
    )
    assert failure_reason(text) == "File lib/x.so has bad size 12 (expect 13); Restoring FAILED."
    assert failure_reason("nothing") == "its log has no error line"


@pytest.mark.parametrize(
    ("lines", "short"),
    [
        (["Can't mmap memory: Cannot allocate memory", "Restoring FAILED."], True),
        (["Can't open log: Too many open files"], True),
        (["Can't write: No space left on device"], True),
        (["Can't fork for 12: Resource temporarily unavailable"], True),
        (["12 killed by signal 9: Killed", "Restoring FAILED."], True),
        (["File lib/x.so has bad size 12 (expect 13)", "12 killed by signal 9: Killed"], False),
        (["12 killed by signal 11: Segmentation fault"], False),
        (["Can't read socket: Resource temporarily unavailable"], False),
        ([], False),
    ],
)
def test_a_shortage_is_told_from_a_bad_snapshot_by_the_words_of_criu(lines: list[str], short: bool) -> None:
    text = "".join(f"(00.100) 12: Error (criu/x.c:1): {line}\n" for line in lines)
    assert tells_of_shortage(failures(text)) is short


def test_what_a_system_call_lacks_is_the_hosts_fault() -> None:
    assert isinstance(system_failure("x", OSError(errno.EMFILE, "too many")), HostError)
    assert isinstance(system_failure("x", OSError(errno.EIO, "bad disk")), SnapshotError)
    assert is_shortage(MemoryError()) and is_shortage(RuntimeError("can't start new thread"))
    assert not is_shortage(RuntimeError("odd"))
