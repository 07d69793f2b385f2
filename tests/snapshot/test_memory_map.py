"""The memory of a process as windows and pieces, against a dictionary of address -> page; and CRIU's page maps."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.errors import DamagedError
from dormouse.snapshot import criu_images, memory_map
from dormouse.snapshot.criu_images import PAGE, Mapping, PagemapParser, Run, Task, encode_pagemap, parse_pagemap
from dormouse.snapshot.memory_capture import address_space, process_of
from dormouse.snapshot.memory_map import FULL, PAGES, WIDE, WINDOW, AddressSpace, Piece, Span, Spans, Window, mask_bytes
from dormouse.snapshot.memory_restore import fill_plan
from dormouse.snapshot.window_store import store_spans
from dormouse.store.chunk import Buffer, Digest, digest_of

masks = st.one_of(
    st.integers(0, (1 << PAGES) - 1), st.sets(st.integers(0, PAGES - 1)).map(lambda s: sum(1 << i for i in s))
)


def _ascending(steps: Sequence[tuple[int, int]]) -> list[Run]:
    at, found = 0x7F00_0000_0000, []
    for gap, pages in steps:
        at += gap * PAGE
        found.append(Run(at, pages))
        at += pages * PAGE
    return found


runs = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 1, 300]), st.one_of(st.integers(1, 700), st.integers(1, 3).map(lambda n: n * 2048))
    ),
    max_size=6,
).map(_ascending)


def pages_of(found: Sequence[Run]) -> list[int]:
    return [run.address + i * PAGE for run in found for i in range(run.pages)]


def bits(mask: int) -> list[int]:
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


@given(runs)
def test_spans_name_the_pages_of_the_runs_window_by_window(given_runs: list[Run]) -> None:
    spans = Spans()
    found = [span for run in given_runs for span in spans.add(run)] + list(spans.last())
    assert [span.number * WINDOW + bit * PAGE for span in found for bit in bits(span.mask)] == pages_of(given_runs)
    ends = [0, *(span.number + span.width for span in found)]
    assert all(end <= span.number for end, span in zip(ends, found, strict=False))


@given(runs)
def test_a_span_is_wide_where_half_its_pages_are_there_and_nowhere_else(given_runs: list[Run]) -> None:
    spans = Spans()
    found = [span for run in given_runs for span in spans.add(run)] + list(spans.last())
    there = set(pages_of(given_runs))
    step = WIDE * WINDOW
    counts = Counter(page // step for page in there)
    assert {span.number for span in found if span.width == WIDE} == {
        at * WIDE for at, count in counts.items() if count * 2 >= WIDE * PAGES
    }
    assert {span.width for span in found} <= {1, WIDE}
    narrow = [part for span in found for part in span.narrow()]
    assert [part.number * WINDOW + bit * PAGE for part in narrow for bit in bits(part.mask)] == pages_of(given_runs)


@given(masks)
def test_mask_runs_are_the_bits(mask: int) -> None:
    assert [first + i for first, count in memory_map.mask_runs(mask) for i in range(count)] == bits(mask)


@given(masks, masks)
def test_squeeze_keeps_the_pages_that_are_not_zero_or_not_in_sparse_memory(mask: int, sparse: int) -> None:
    contents = {bit: bytes([(bit * 7) % 3]) * PAGE for bit in bits(mask)}
    buffer = memoryview(bytearray(b"".join(contents.values())))
    kept = memory_map.squeeze(buffer, mask, sparse)
    expected = {bit: page for bit, page in contents.items() if any(page) or not sparse >> bit & 1}
    assert bits(kept) == list(expected)
    assert buffer[: kept.bit_count() * PAGE].tobytes() == b"".join(expected.values())


@given(st.sets(st.integers(0, WIDE * PAGES - 1), max_size=30), st.booleans(), st.integers(0, 3))
def test_large_memory_is_squeezed_by_the_same_rule(pages: set[int], mostly_full: bool, sparse_bit: int) -> None:
    filled = set(range(WIDE * PAGES)) - pages if mostly_full else pages
    memory = memoryview(bytearray(WIDE * WINDOW))
    for page in filled:
        memory[page * PAGE + page % PAGE] = 1 + page % 200
    whole = memory.tobytes()
    sparse = (1 << WIDE * PAGES) - 1 & ~(1 << sparse_bit)
    kept = memory_map.squeeze(memory, (1 << WIDE * PAGES) - 1, sparse)
    assert bits(kept) == sorted(filled | {sparse_bit})
    expected = b"".join(whole[page * PAGE : (page + 1) * PAGE] for page in bits(kept))
    assert memory[: len(expected)].tobytes() == expected


@given(st.lists(st.tuples(st.integers(0, 4 * PAGES), st.integers(0, 2 * PAGES)), max_size=12), st.integers(0, 5))
def test_places_name_the_pages_of_a_window_that_lie_in_a_range(given_ranges: list[tuple[int, int]], at: int) -> None:
    covered = {page for first, count in given_ranges for page in range(first, first + count)}
    places = memory_map.Places((first * PAGE, (first + count) * PAGE) for first, count in given_ranges)
    assert bits(places.mask(at, 3)) == [bit for bit in range(3 * PAGES) if at * PAGES + bit in covered]
    assert bits(places.mask(at)) == [bit for bit in range(PAGES) if at * PAGES + bit in covered]


class Chunks:
    """A store of chunks that remembers what was put."""

    def __init__(self) -> None:
        self.held: dict[Digest, bytes] = {}
        self.put_bytes = 0

    def __call__(self, chunks: Sequence[tuple[Digest, Buffer]]) -> None:
        for digest, plain in chunks:
            assert digest == digest_of(plain)
            if digest not in self.held:
                self.put_bytes += len(plain)
            self.held[digest] = bytes(plain)

    def known(self, chunks: Sequence[tuple[Digest, Buffer]]) -> list[bool]:
        return [digest in self.held for digest, _plain in chunks]


def captured(memory: dict[int, bytes], chunks: Chunks, parent: AddressSpace | None = None) -> AddressSpace:
    """An address space made of address -> page as a capture makes it, all windows in one batch."""
    spans = []
    for number in sorted({address // WINDOW for address in memory}):
        mask = sum(1 << (address % WINDOW // PAGE) for address in memory if address // WINDOW == number)
        buffer = memoryview(bytearray(b"".join(memory[number * WINDOW + bit * PAGE] for bit in bits(mask))))
        spans.append((Span(number, mask), FULL, buffer))
    stored = store_spans(spans, 7, Parent(parent, chunks) if parent is not None else None, chunks)
    return address_space(7, 1, len(memory), stored)


def contents(space: AddressSpace, chunks: Chunks) -> dict[int, bytes]:
    """address -> page as a restore gives it back."""
    memory_map.check(space, "it")
    digests = space.chunk_list()
    found = {}
    for window in space.windows:
        packed = memory_map.assemble(window, lambda number: chunks.held[digests[number]])
        for i, bit in enumerate(bits(memory_map.window_mask(window))):
            found[window.number * WINDOW + bit * PAGE] = packed[i * PAGE : (i + 1) * PAGE].tobytes()
    return found


page_contents = st.sampled_from([bytes(PAGE), b"a" * PAGE, b"b" * PAGE, b"c" + bytes(PAGE - 1)])
memories = st.dictionaries(st.integers(0, 3 * PAGES).map(lambda n: (1 << 30) + n * PAGE), page_contents, max_size=40)


@given(st.lists(memories, min_size=1, max_size=6))
def test_any_chain_of_incremental_captures_gives_back_each_state(states: list[dict[int, bytes]]) -> None:
    chunks = Chunks()
    parent = None
    for state in states:
        parent = captured(state, chunks, parent)
        assert contents(parent, chunks) == {address: page for address, page in state.items() if any(page)}
        listed = pages_of(list(memory_map.runs_of(parent.windows)))
        assert listed == sorted(contents(parent, chunks))


def test_what_has_not_changed_is_not_stored_again_and_a_changed_page_costs_a_page() -> None:
    chunks = Chunks()
    memory = {WINDOW + i * PAGE: i.to_bytes(4, "little") * (PAGE // 4) for i in range(1, PAGES)}
    first = captured(memory, chunks)
    before = chunks.put_bytes
    assert captured(memory, chunks, first) == first
    assert chunks.put_bytes == before
    memory[WINDOW + 9 * PAGE] = b"x" * PAGE
    second = captured(memory, chunks, first)
    assert chunks.put_bytes == before + PAGE
    assert len(second.windows[0].pieces) == 2


def test_a_window_that_has_changed_often_is_stored_whole_again() -> None:
    chunks = Chunks()
    memory = {WINDOW + i * PAGE: bytes([i % 255 + 1]) * PAGE for i in range(PAGES)}
    space = captured(memory, chunks)
    for i in range(12):
        memory[WINDOW + i * PAGE] = bytes([i + 1]) + b"changed" + bytes(PAGE - 8)
        space = captured(memory, chunks, space)
        assert len(space.windows[0].pieces) <= 5
    assert contents(space, chunks) == memory


@given(st.integers(0, 5), runs, st.integers(1, 40))
def test_a_page_map_comes_back_in_whatever_pieces_it_arrives(pages_id: int, given_runs: list[Run], step: int) -> None:
    data = encode_pagemap(pages_id, given_runs)
    assert parse_pagemap(data, "it") == (pages_id, given_runs)
    parser = PagemapParser("it")
    found = [run for at in range(0, len(data), step) for run in parser.feed(data[at : at + step])]
    assert (parser.finish(), found) == (pages_id, given_runs)


def _varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + _varint(value >> 7) if value > 0x7F else bytes([value])


def mm_image(*mappings: tuple[int, int, int | None]) -> bytes:
    """An `mm` image with a field of its own, and mappings (start, end, advice)."""
    message = b"\x08\x05"
    for start, end, advice in mappings:
        fields = [(1, start), (2, end), (3, 0), (4, 0), (5, 3), (6, 0x22), (7, 1 << 9 | 1)]
        fields += [] if advice is None else [(9, advice)]
        body = b"".join(bytes([number << 3]) + _varint(value) for number, value in fields)
        message += b"\x72" + _varint(len(body)) + body
    return struct.pack("<III", 0x54564319, 0x57492820, len(message)) + message


def test_huge_pages_are_asked_for_where_wanted_and_nothing_else_changes() -> None:
    image = mm_image(
        (PAGE, 9 * PAGE, None), (10 * PAGE, 1 << 40, 1 << 12), (1 << 41, 1 << 42, 1 << 15), (1 << 43, 1 << 44, None)
    )
    asked = criu_images.with_huge_pages(image, {PAGE, 10 * PAGE, 1 << 41}, "it")
    assert criu_images.parse_mappings(asked, "it") == criu_images.parse_mappings(image, "it")
    (message,) = criu_images.entries(asked, 0x57492820, "it")
    advice = [
        dict(criu_images.fields(v, "it")).get(9) for n, v in criu_images.fields(message, "it") if isinstance(v, bytes)
    ]
    assert advice == [1 << 14, 1 << 12 | 1 << 14, 1 << 15, None]
    assert criu_images.with_huge_pages(image, set(), "it") == image


PARSERS = [criu_images.parse_mappings, criu_images.parse_tree, criu_images.was_stopped, parse_pagemap]
MAGICS = [0x57492820, 0x50273030, 0x55053847, 0x56084025]


@pytest.mark.parametrize(("parser", "magic"), list(zip(PARSERS, MAGICS, strict=True)))
@given(body=st.binary(max_size=200), framed=st.booleans())
def test_any_bytes_as_an_image_are_parsed_or_refused(parser: object, magic: int, body: bytes, framed: bool) -> None:
    data = struct.pack("<II", 0x54564319, magic) + (struct.pack("<I", len(body)) if framed else b"") + body
    with contextlib.suppress(DamagedError):
        parser(data, "it")  # type: ignore[operator]
    with contextlib.suppress(DamagedError):
        criu_images.with_huge_pages(data, range(0, 1 << 57, PAGE), "it")


@pytest.mark.parametrize(
    "entry",
    [Run(5, 1), Run(PAGE, 0), Run(1 << 60, 1), Run(PAGE, 1 << 40)],
    ids=["unaligned", "empty", "beyond any address", "endless"],
)
def test_a_page_map_that_makes_no_sense_is_refused(entry: Run) -> None:
    with pytest.raises(DamagedError, match="makes no sense"):
        parse_pagemap(encode_pagemap(1, [entry]), "it")


def test_overlapping_runs_are_refused() -> None:
    with pytest.raises(DamagedError, match="makes no sense"):
        parse_pagemap(encode_pagemap(1, [Run(PAGE, 2), Run(2 * PAGE, 1)]), "it")


def space(*windows: Window, digests: int = 1) -> AddressSpace:
    return AddressSpace(pid=7, pages_id=1, pages=1, windows=list(windows), digests=bytes(32 * digests))


ONE = mask_bytes(1)
WIDE_ONE = mask_bytes(1, WIDE)


@pytest.mark.parametrize(
    "broken",
    [
        space(Window(1, [])),
        space(Window(2, [Piece(0, ONE)]), Window(1, [Piece(0, ONE)])),
        space(Window(1, [Piece(1, ONE)])),
        space(Window(1, [Piece(-1, ONE)])),
        space(Window(1, [Piece(0, b"\1")])),
        space(Window(1, [Piece(0, ONE, mask_bytes(2))])),
        space(Window(1, [Piece(0, ONE), Piece(0, ONE)])),
        space(Window(1 << 40, [Piece(0, ONE)])),
        space(Window(1, [Piece(0, bytes(32))])),
        space(Window(1, [Piece(0, mask_bytes(1 << i)) for i in range(5)])),
        space(Window(1, [Piece(0, WIDE_ONE)]), Window(WIDE, [Piece(0, ONE)])),
        space(Window(1, [Piece(0, WIDE_ONE), Piece(0, mask_bytes(2))])),
        space(Window(1, [Piece(0, ONE), Piece(0, mask_bytes(2, WIDE))])),
        space(Window(1, [Piece(0, WIDE_ONE, mask_bytes(1))])),
        space(Window(1, [Piece(0, b"")])),
        space(Window(1, [Piece(0, WIDE_ONE[:-1])])),
        space(Window(1, [Piece(0, mask_bytes(1, 17))])),
        space(Window((1 << 37) - 1, [Piece(0, mask_bytes(1, 2))])),
        space(Window(-1, [Piece(0, ONE)])),
    ],
)
def test_an_address_space_that_contradicts_itself_is_refused(broken: AddressSpace) -> None:
    with pytest.raises(DamagedError):
        memory_map.check(broken, "it")


def test_wide_and_narrow_windows_side_by_side_are_sound() -> None:
    windows = [Window(0, [Piece(0, WIDE_ONE)]), Window(WIDE, [Piece(0, ONE)]), Window(WIDE + 1, [Piece(0, WIDE_ONE)])]
    memory_map.check(space(*windows), "it")
    assert [(run.address, run.pages) for run in memory_map.runs_of(windows)] == [
        (0, 1),
        (WIDE * WINDOW, 1),
        ((WIDE + 1) * WINDOW, 1),
    ]


class Parent:
    """A parent snapshot made of what `captured_wide` has stored."""

    def __init__(self, made: AddressSpace, chunks: Chunks) -> None:
        self.turn = threading.BoundedSemaphore(1)
        self.read = 0
        self._made, self._chunks = made, chunks

    def has(self, _pid: int, span: Span) -> bool:
        return any((w.number, w.width) == (span.number, span.width) for w in self._made.windows)

    def cuts_narrow(self, pid: int, span: Span) -> bool:
        return any(self.has(pid, Span(span.number + at, 0)) for at in range(span.width))

    def windows(self, _pid: int, numbers: Sequence[int]) -> Iterator[tuple[Window, list[Digest], memoryview]]:
        digests = self._made.chunk_list()
        for number in numbers:
            self.read += 1
            window = next(w for w in self._made.windows if w.number == number)
            yield window, digests, memory_map.assemble(window, lambda n: self._chunks.held[digests[n]])


def captured_wide(memory: bytes, chunks: Chunks, parent: Parent | None = None) -> AddressSpace:
    span = Span(WIDE, (1 << WIDE * PAGES) - 1, WIDE)
    buffer = memoryview(bytearray(memory))
    stored = store_spans([(span, span.mask, buffer)], 7, parent, chunks)
    return address_space(7, 1, WIDE * PAGES, stored)


def expected_of(memory: bytes) -> dict[int, bytes]:
    pages = {WIDE * WINDOW + at: memory[at : at + PAGE] for at in range(0, len(memory), PAGE)}
    return {address: page for address, page in pages.items() if any(page)}


def test_dense_memory_is_one_chunk_and_comes_back_through_changes() -> None:
    chunks = Chunks()
    memory = bytearray(os.urandom(WIDE * WINDOW))
    memory[5 * PAGE : 9 * PAGE] = bytes(4 * PAGE)
    first = captured_wide(memory, chunks)
    assert [window.width for window in first.windows] == [WIDE]
    assert len(chunks.held) == 1
    assert contents(first, chunks) == expected_of(memory)
    parent = Parent(first, chunks)
    assert captured_wide(memory, chunks, parent) == first
    assert parent.read == 0  # its digest was enough
    before = chunks.put_bytes
    memory[PAGE : 2 * PAGE] = b"x" * PAGE
    memory[7 * PAGE : 8 * PAGE] = b"y" * PAGE
    second = captured_wide(memory, chunks, parent)
    assert chunks.put_bytes == before + 2 * PAGE
    assert contents(second, chunks) == expected_of(memory)


def test_pages_that_were_dropped_and_are_missing_the_next_time_change_nothing() -> None:
    chunks = Chunks()
    page = [os.urandom(PAGE) for _ in range(WIDE * PAGES)]
    for i in range(0, WIDE * PAGES, 5):
        page[i] = bytes(PAGE)
    first = captured_wide(b"".join(page), chunks)
    there = [i for i in range(WIDE * PAGES) if i % 5]
    span = Span(WIDE, sum(1 << i for i in there), WIDE)
    buffer = memoryview(bytearray(b"".join(page[i] for i in there)))
    stored = store_spans([(span, span.mask, buffer)], 7, Parent(first, chunks), chunks)
    assert address_space(7, 1, WIDE * PAGES, stored) == first


def test_memory_that_is_mostly_zeros_is_cut_narrowly_and_stays_so() -> None:
    chunks = Chunks()
    memory = bytearray(WIDE * WINDOW)
    memory[WINDOW : WINDOW + 40 * PAGE] = b"z" * (40 * PAGE)
    memory[5 * WINDOW : 5 * WINDOW + PAGE] = b"y" * PAGE
    first = captured_wide(memory, chunks)
    assert [(window.number, window.width) for window in first.windows] == [(WIDE + 1, 1), (WIDE + 5, 1)]
    assert contents(first, chunks) == expected_of(memory)
    memory[:] = b"w" * len(memory)
    second = captured_wide(memory, chunks, Parent(first, chunks))
    assert {window.width for window in second.windows} == {1}
    assert contents(second, chunks) == expected_of(memory)
    assert captured_wide(bytes(len(memory)), chunks).windows == []


def test_memory_that_packs_well_is_cut_narrowly_and_what_was_cut_wide_stays_so() -> None:
    chunks = Chunks()
    memory = os.urandom(WIDE * WINDOW)
    text = (b"the dormouse sleeps " * (WIDE * WINDOW // 20 + 1))[: WIDE * WINDOW]
    first = captured_wide(memory, chunks)
    assert {window.width for window in captured_wide(text, chunks).windows} == {1}
    assert {window.width for window in captured_wide(text, chunks, Parent(first, chunks)).windows} == {WIDE}


def test_large_mappings_that_will_be_full_get_huge_pages_and_others_do_not() -> None:
    full = mask_bytes((1 << WIDE * PAGES) - 1, WIDE)
    windows = [Window(number, [Piece(0, full)]) for number in range(0, 10 * WIDE, WIDE)]
    step = WIDE * WINDOW
    dense, loose, small = (
        Mapping(0, 4 * step, plain=True),
        Mapping(4 * step, 9 * step, plain=True),
        Mapping(9 * step, 10 * step, plain=True),
    )
    (plan,) = fill_plan([space(*windows[:6], *windows[9:])], {7: [dense, loose, small]}, [Task(7, 0)])
    assert plan.huge == {dense.start}


def test_large_memory_of_a_process_with_cuda_state_gets_huge_pages_also_where_it_is_zero() -> None:
    empty = Mapping(0, 256 << 20, plain=True)
    small = Mapping(1 << 30, (1 << 30) + (255 << 20), plain=True)
    reserved = Mapping(1 << 40, 1 << 41, plain=False)
    mappings = {7: [empty, small, reserved], 8: [empty, small, reserved]}
    tree = [Task(7, 0), Task(8, 0)]
    of_cuda, other = fill_plan([space(), msgspec.structs.replace(space(), pid=8)], mappings, tree, cuda=[7])
    assert of_cuda.huge == {empty.start} and not other.huge


def test_only_windows_wholly_in_plain_memory_are_filled() -> None:
    spaces = [space(*(Window(number, [Piece(0, mask_bytes(0b11))]) for number in (1, 2, 3)))]
    mappings = {
        7: [
            Mapping(WINDOW, WINDOW + 2 * PAGE, plain=True),
            Mapping(2 * WINDOW, 2 * WINDOW + PAGE, plain=True),
            Mapping(2 * WINDOW + PAGE, 3 * WINDOW, plain=False),
            Mapping(3 * WINDOW, 3 * WINDOW + PAGE, plain=True),
            Mapping(3 * WINDOW + PAGE, 4 * WINDOW, plain=True),
        ]
    }
    (plan,) = fill_plan(spaces, mappings, [Task(7, 0)])
    assert [window.number for window in plan.filled] == [1, 3]
    assert [window.number for window in plan.piped] == [2]


def test_memory_that_parent_and_child_share_goes_through_the_pipe() -> None:
    common, own = Mapping(WINDOW, 2 * WINDOW, plain=True), Mapping(2 * WINDOW, 3 * WINDOW, plain=True)
    windows = [Window(number, [Piece(0, ONE)]) for number in (1, 2)]
    spaces = [AddressSpace(pid=pid, pages_id=pid, pages=2, windows=windows, digests=bytes(32)) for pid in (7, 8)]
    plans = fill_plan(spaces, {7: [common], 8: [common, own]}, [Task(7, 0), Task(8, 7)])
    assert [[window.number for window in plan.filled] for plan in plans] == [[], [2]]


def test_only_page_maps_of_processes_name_a_process() -> None:
    assert process_of("pagemap-12.img") == 12
    assert [
        process_of(name) for name in ("pagemap-shmem-12.img", "pages-12.img", "pagemap-12.img.img", "pagemap-.img")
    ] == [*([None] * 4)]
