"""What the snapshot code does with hostile bytes, as functions of bytes: each raises what is a bug and returns
otherwise. Images, bodies and frames are authenticated or come from processes of ours, but what stands behind that door
must hold too: no endless loop, no memory beyond the size of what came in, no error that is not one of ours.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Sequence

import msgspec

from dormouse.engine.frames import Inbox, pack_frame
from dormouse.engine.messages import ChatPrompt, FromWorker, Generate, Sampling, ToWorker
from dormouse.errors import DamagedError, EngineError, NotFoundError, RequestError, SnapshotError
from dormouse.snapshot import criu_images
from dormouse.snapshot.criu_images import PAGE, PagemapParser, Run, Task, encode_pagemap
from dormouse.snapshot.images import BODY_VERSION, ImageFile, SnapshotBody, decode_body, encode_body
from dormouse.snapshot.memory_map import PAGES, WINDOW, AddressSpace, Piece, Spans, Window, mask_bytes, window_mask
from dormouse.snapshot.memory_restore import fill_plan, page_parts, pagemap_parts
from dormouse.snapshot.pages import ProcessMap, extents, read, usage
from dormouse.snapshot.streamer import parse_request
from dormouse.store.chunk import Digest

_COMMON = 0x54564319
_MOST_SPANS = 5000
_CHUNK = b"\1" * (16 * PAGES * PAGE)


def _image(magic: int, *messages: bytes) -> bytes:
    framed = b"".join(struct.pack("<I", len(message)) + message for message in messages)
    return struct.pack("<II", _COMMON, magic) + framed


def _parser(magic: int, parse: Callable[[bytes, str], object]) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        for whole in (data, _image(magic) + data, _image(magic, data)):
            with contextlib.suppress(DamagedError):
                parse(whole, "it")

    return target


def fuzz_inventory(data: bytes) -> None:
    for whole in (data, struct.pack("<I", 0x58313116) + data):
        with contextlib.suppress(DamagedError):
            criu_images.check_inventory(whole, "it")


def fuzz_pagemap(data: bytes) -> None:
    """Whole and in pieces it says the same, and its spans are its pages."""
    outcomes = []
    for step in (len(data) or 1, 7):
        parser = PagemapParser("it")
        try:
            runs = [run for at in range(0, len(data), step) for run in parser.feed(data[at : at + step])]
            outcomes.append((parser.finish(), runs))
        except DamagedError as error:
            outcomes.append(error.message)
    assert outcomes[0] == outcomes[1]
    if isinstance(outcomes[0], tuple) and sum(run.pages for run in outcomes[0][1]) < _MOST_SPANS:
        spans = Spans()
        found = [span for run in outcomes[0][1] for span in spans.add(run)] + list(spans.last())
        assert sum(span.mask.bit_count() for span in found) == sum(run.pages for run in outcomes[0][1])


def fuzz_request(data: bytes) -> None:
    with contextlib.suppress(SnapshotError):
        name = parse_request(data)
        assert "/" not in name and name


def fuzz_frames(data: bytes) -> None:
    for message_type in (ToWorker, FromWorker):
        for whole in (data, struct.pack("<I", len(data)) + data):
            inbox: Inbox[object] = Inbox(message_type)  # type: ignore[arg-type]
            with contextlib.suppress(EngineError):
                for at in range(0, len(whole), 100):
                    list(inbox.feed(whole[at : at + 100]))


class _Chunks:
    """Any chunk, with the length that is expected of it, as a reader ahead."""

    def __init__(self, lengths: dict[Digest, int]) -> None:
        self._lengths = lengths

    def stream(self, digests: Sequence[Digest]):  # type: ignore[no-untyped-def]
        yield from (memoryview(_CHUNK)[: self._lengths[digest]] for digest in digests)


def fuzz_body(data: bytes) -> None:
    """A body that is accepted can be planned, served, filled and read, or an error of ours says why not."""
    with contextlib.suppress(DamagedError, SnapshotError):
        body = decode_body(data, "x")
        body.references()
        assert body.raw_bytes() >= 0
        mappings = {space.pid: _mappings(space) for space in body.memory}
        tasks = [Task(pid, body.pid) for pid in mappings]
        for plan in fill_plan(body.memory, mappings, tasks):
            _serve(plan.space, plan)
            _look(plan.space, mappings[plan.space.pid])


def _mappings(space: AddressSpace) -> list[criu_images.Mapping]:
    numbers = [window.number for window in space.windows[:50]]
    return [
        criu_images.Mapping(n * WINDOW, n * WINDOW + (n % PAGES + 1) * PAGE, plain=n % 2 == 0, sparse=n % 3 == 0)
        for n in numbers
    ]


def _serve(space: AddressSpace, plan) -> None:  # type: ignore[no-untyped-def]
    digests = space.chunk_list()
    lengths = {
        digests[piece.chunk]: int.from_bytes(piece.held, "little").bit_count() * PAGE
        for window in space.windows
        for piece in window.pieces
    }
    piped = sum(window_mask(window).bit_count() for window in plan.piped)
    assert sum(len(part) for part in pagemap_parts(plan)) <= 64 + 64 * (piped + 1)
    with contextlib.suppress(DamagedError):
        served = sum(len(part) for part in page_parts(plan, _Chunks(lengths)))  # type: ignore[arg-type]
        assert served == piped * PAGE


def _look(space: AddressSpace, mappings: list[criu_images.Mapping]) -> None:
    process = ProcessMap(space, mappings, {})
    assert len(usage(process, lambda _digest: 4096)) == len(mappings)
    for mapping in mappings[:5]:
        with contextlib.suppress(NotFoundError, RequestError, DamagedError):
            found = extents(process, mapping.start + 5, mapping.end - mapping.start - 5)
            data = b"".join(read(process, found, lambda _digest: memoryview(_CHUNK)[:PAGE]))
            assert len(data) == mapping.end - mapping.start - 5


def _good_body() -> SnapshotBody:
    windows = [
        Window(5, [Piece(0, mask_bytes(0b111)), Piece(1, mask_bytes(0b1110000), mask_bytes(0b1100000))]),
        Window(6, [Piece(0, mask_bytes(0b111))]),
        Window(
            16, [Piece(0, mask_bytes(0b111 << 900, 8)), Piece(1, mask_bytes(0b1110000, 8), mask_bytes(0b1100000, 8))]
        ),
        Window(1 << 20, [Piece(2, b"\xff" * 32)]),
    ]
    space = AddressSpace(pid=7, pages_id=1, pages=400, windows=windows, digests=bytes(range(96)))
    image = ImageFile(name="core-7.img", size=3, inline=b"abc")
    long = ImageFile(name="files.img", size=70_000, digests=bytes(32))
    return SnapshotBody(BODY_VERSION, "m", {"a": "b"}, 7, [], [image, long], [space], [], {})


def _nested(message: bytes, instead_of: bytes) -> bytes:
    """Lists in lists, deeper than any stack."""
    assert message.count(instead_of) == 1
    return message.replace(instead_of, b"\x91" * 5000 + b"\xc0")


_RUNS = [Run(PAGE, 3), Run(9 * PAGE, 700)]
_VMA = b"\x08\x80\x20\x10\x80\xc0\x01\x18\x00\x20\x00\x28\x03\x30\x22\x38\x81\x04\x40\x01"

GOOD: dict[str, list[bytes]] = {
    "mappings": [b"\x72" + bytes([len(_VMA)]) + _VMA],
    "files": [b"\x08\x01\x10\x03\x1a\x05\x08\x03\x32\x01/"],
    "tree": [b"\x08\x07\x10\x00"],
    "core": [b"\x08\x01\x1a\x02\x08\x03"],
    "machine": [b"\x08\x01\x1a\x02\x08\x03"],
    "inventory": [struct.pack("<I", 2) + b"\x08\x02"],
    "pagemap": [encode_pagemap(1, _RUNS)],
    "request": [b"\x0a\x06fs.img"],
    "frames": [
        _nested(pack_frame(Generate(id="a", prompt=ChatPrompt([{"role": ""}]), sampling=Sampling(5)))[4:], b"\xa0"),
        pack_frame(Generate(id="a", prompt=ChatPrompt([{"role": "user", "content": "hi"}]), sampling=Sampling(5)))[4:],
    ],
    "body": [
        encode_body(_good_body()),
        msgspec.msgpack.encode({"version": 1}),
        b"\x81\xa1a" + b"\x91" * 5000 + b"\xc0",
    ],
}

TARGETS: dict[str, Callable[[bytes], None]] = {
    "mappings": _parser(0x57492820, criu_images.parse_mappings),
    "files": _parser(0x56303138, criu_images.parse_file_names),
    "tree": _parser(0x50273030, criu_images.parse_tree),
    "core": _parser(0x55053847, criu_images.was_stopped),
    "machine": _parser(0x55053847, criu_images.machine_of),
    "inventory": fuzz_inventory,
    "pagemap": fuzz_pagemap,
    "request": fuzz_request,
    "frames": fuzz_frames,
    "body": fuzz_body,
}


def corpus(target: str) -> list[bytes]:
    """Inputs of a target to begin from."""
    return GOOD[target]
