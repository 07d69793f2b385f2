"""How a plan is carried out on GPUs, worked out once before the first byte is read. Pure data; nothing is touched here.

    LoadPlan -> pack() -> parcels (what is checked and decoded at once, and how, on each device)
                       -> tables per device (what is checked and decoded, for the kernels)

On a device, bytes that stay as they are go straight to their places; coded ones go to staging memory first. Chunks are
checked where they arrive, before they are decoded. A piece that the device can't decode (LZ4, zstd) is decoded by the
host and arrives plain; so is every coded piece where a device has no kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dormouse.store.codec import FLOATS, Codec
from dormouse.store.pack import StoredChunk, identity
from dormouse.transfer.plan import EXTENT_BYTES, Copy, Extent, LoadPlan, Piece, join, whole_copy

SOURCE_ALIGNMENT = 16
_SCRATCH_ALIGNMENT = 256
_NEAR = 64 << 10  # staged pieces with less between them are copied at once


class Span(NamedTuple):
    """Rows of a device's table."""

    first: int
    rows: int


class Direct(NamedTuple):
    """Bytes of a parcel that go to the destination as they are."""

    source: int
    target: int
    length: int


class Placed(NamedTuple):
    """A copy on the device, out of plain bytes that begin at `base` of its staging or its scratch memory."""

    in_scratch: bool
    base: int
    copy: Copy


class Part(NamedTuple):
    """What one device does with a parcel. `staged` are begins and ends of what goes to the same place in staging;
    `checks` are rows whose sources count from there, `placed_checks` from the destination; `decodes` are rows whose
    targets are in the destination, `unpacks` in scratch memory."""

    device: int
    direct: tuple[Direct, ...]
    staged: tuple[tuple[int, int], ...]
    checks: Span
    placed_checks: Span
    decodes: Span
    unpacks: Span
    copies: tuple[Placed, ...]

    @property
    def staging_bytes(self) -> int:
        """What it needs of staging memory."""
        return self.staged[-1][1] if self.staged else 0


class Parcel(NamedTuple):
    """What comes at once: the bytes of an extent as they are, or, if `host`, the plain bytes of its pieces one after
    the other. `starts` tells where each piece begins. `held`: the number of the extent in the plan it belongs to, if
    the bytes are in memory, where they were checked."""

    extent: Extent
    host: bool
    held: int | None
    starts: tuple[int, ...]
    length: int
    plain_bytes: int
    parts: tuple[Part, ...]


@dataclass
class Tables:
    """For one device: rows of what is decoded [codec, source, stored length, target, plain length] and checked [source,
    stored length], with identities and signatures; and the most scratch memory that a parcel needs."""

    decodes: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    checks: list[tuple[int, int]] = field(default_factory=list)
    identities: list[bytes] = field(default_factory=list)
    macs: list[bytes] = field(default_factory=list)
    scratch_bytes: int = 0

    def add_check(self, piece: Piece, chunk: StoredChunk, source: int) -> None:
        """One more row of what is checked."""
        self.checks.append((source, piece.stored_length))
        self.identities.append(identity(chunk.digest, piece.codec, piece.plain_length))
        self.macs.append(chunk.mac)


class Packed(NamedTuple):
    """A plan, ready for its devices."""

    parcels: tuple[Parcel, ...]
    tables: tuple[Tables, ...]


def pack(plan: LoadPlan, *, kernels: bool, plain_bytes: int = EXTENT_BYTES, held: int = 0) -> Packed:
    """`kernels`: whether the devices check and decode; else the host does. `plain_bytes`: the most that a parcel comes
    to where room is needed for them, unless one piece comes to more. The first `held` extents are in memory as they
    are stored, and were checked there."""
    tables = tuple(Tables() for _ in plan.sizes)
    parcels: list[Parcel] = []
    for number, whole in enumerate(plan.extents):
        where = number if number < held else None
        simple = _simple(whole, tables, where) if kernels else None
        if simple is not None:
            parcels.append(simple)
            continue
        for extent, host in _sorted_out(whole, plain_bytes, kernels=kernels):
            parcels.append(_parcel(extent, tables, None if host else where, host=host))
    return Packed(tuple(parcels), tables)


def _simple(extent: Extent, tables: Sequence[Tables], held: int | None) -> Parcel | None:
    """The parcel of an extent as most are: of coded chunks for one device, each of which goes there as it is. None for
    any other. What follows would make the same of it, in several times the time."""
    device = extent.pieces[0].copies[0].device
    starts = tuple(piece.offset - extent.offset for piece in extent.pieces)
    for piece, at in zip(extent.pieces, starts, strict=True):
        copy = whole_copy(piece.plain_length, piece.copies)
        if copy is None or copy.device != device or at % SOURCE_ALIGNMENT or piece.codec not in FLOATS:
            return None
    own = tables[device]
    checks, decodes = len(own.checks), len(own.decodes)
    for piece, at in zip(extent.pieces, starts, strict=True):
        own.decodes.append((piece.codec, at, piece.stored_length, piece.copies[0].target, piece.plain_length))
        if piece.chunk is not None and held is None:
            own.add_check(piece, piece.chunk, at)
    staged = tuple(_merged((at, at + piece.stored_length) for at, piece in zip(starts, extent.pieces, strict=True)))
    part = Part(
        device,
        (),
        staged,
        Span(checks, len(own.checks) - checks),
        Span(len(own.checks), 0),
        Span(decodes, len(starts)),
        Span(len(own.decodes), 0),
        (),
    )
    plain_bytes = sum([piece.plain_length for piece in extent.pieces])
    return Parcel(extent, False, held, starts, extent.length, plain_bytes, (part,))


def _sorted_out(extent: Extent, plain_bytes: int, *, kernels: bool) -> Iterator[tuple[Extent, bool]]:
    """The extent in parts that are treated alike: decoded by the host, decoded to scratch, and all else; the first two
    come to a bounded number of plain bytes."""
    host: list[Piece] = []
    scratch: list[Piece] = []
    rest: list[Piece] = []
    for piece in extent.pieces:
        if _for_host(piece, piece.offset - extent.offset, kernels=kernels):
            host.append(piece)
        elif piece.codec != Codec.RAW and _needs_scratch(piece):
            scratch.append(piece)
        else:
            rest.append(piece)
    if not host and not scratch:
        yield extent, False
        return
    for part in join(rest, extent.length):
        yield part, False
    for part in join(scratch, extent.length, plain_bytes):
        yield part, False
    for part in join(host, extent.length, plain_bytes):
        yield part, True


def _for_host(piece: Piece, at: int, *, kernels: bool) -> bool:
    if piece.codec == Codec.RAW and piece.chunk is None:
        return False
    return not kernels or at % SOURCE_ALIGNMENT != 0 or (piece.codec not in FLOATS and piece.codec != Codec.RAW)


def _needs_scratch(piece: Piece) -> bool:
    if len(piece.copies) == 1:
        return piece.whole is None
    devices = {copy.device for copy in piece.copies}
    return any(whole_copy(piece.plain_length, _on(piece, device)) is None for device in devices)


def _on(piece: Piece, device: int) -> tuple[Copy, ...]:
    copies = piece.copies
    if len(copies) == 1:
        return copies if copies[0].device == device else ()
    return tuple(copy for copy in copies if copy.device == device)


def _parcel(extent: Extent, tables: Sequence[Tables], held: int | None, *, host: bool) -> Parcel:
    starts = tuple(_host_starts(extent) if host else (piece.offset - extent.offset for piece in extent.pieces))
    last = extent.pieces[-1]
    length = starts[-1] + (last.plain_length if host else last.stored_length)
    devices = sorted({copy.device for piece in extent.pieces for copy in piece.copies})
    signed = not host and held is None
    parts = tuple(
        _PartMaker(device, tables[device], host=host, signed=signed).part(extent.pieces, starts) for device in devices
    )
    return Parcel(extent, host, held, starts, length, sum(piece.plain_length for piece in extent.pieces), parts)


def _host_starts(extent: Extent) -> Iterator[int]:
    end = 0
    for piece in extent.pieces:
        yield end
        end += -(-piece.plain_length // SOURCE_ALIGNMENT) * SOURCE_ALIGNMENT


class _PartMaker:
    """Collects what one device does with one parcel. `signed`: it checks the chunks."""

    def __init__(self, device: int, tables: Tables, *, host: bool, signed: bool) -> None:
        self._host = host
        self._signed = signed
        self._device = device
        self._tables = tables
        self._direct: list[Direct] = []
        self._staged: list[tuple[int, int]] = []
        self._checks: list[tuple[Piece, int]] = []
        self._placed_checks: list[tuple[Piece, int]] = []
        self._decodes: list[tuple[Piece, int, int]] = []
        self._unpacks: list[tuple[Piece, int, int]] = []
        self._copies: list[Placed] = []
        self._scratch = 0

    def part(self, pieces: Iterable[Piece], starts: Iterable[int]) -> Part:
        for piece, at in zip(pieces, starts, strict=True):
            copies = _on(piece, self._device)
            if copies and (self._host or piece.codec == Codec.RAW):
                self._add_plain(piece, at, copies, signed=piece.chunk is not None and self._signed)
            elif copies:
                self._add_coded(piece, at, copies)
        staged = tuple(_merged(self._staged))
        tables = self._tables
        tables.scratch_bytes = max(tables.scratch_bytes, self._scratch)
        return Part(
            self._device,
            tuple(_adjacent(self._direct)),
            staged,
            self._add_checks(self._checks),
            self._add_checks(self._placed_checks),
            self._add_decodes(self._decodes),
            self._add_decodes(self._unpacks),
            tuple(self._copies),
        )

    def _add_plain(self, piece: Piece, at: int, copies: tuple[Copy, ...], *, signed: bool) -> None:
        whole = whole_copy(piece.plain_length, copies)
        if signed and whole is not None and whole.target % SOURCE_ALIGNMENT == 0:
            self._direct.append(Direct(at, whole.target, whole.row_bytes))
            self._placed_checks.append((piece, whole.target))
        elif not signed and all(copy.rows == 1 for copy in copies):
            self._direct.extend(Direct(at + copy.source, copy.target, copy.row_bytes) for copy in copies)
        else:
            self._staged.append((at, at + piece.plain_length))
            self._copies.extend(Placed(False, at, copy) for copy in copies)
            if signed:
                self._checks.append((piece, at))

    def _add_coded(self, piece: Piece, at: int, copies: tuple[Copy, ...]) -> None:
        self._staged.append((at, at + piece.stored_length))
        self._checks.append((piece, at))
        whole = whole_copy(piece.plain_length, copies)
        if whole is not None:
            self._decodes.append((piece, at, whole.target))
            return
        self._unpacks.append((piece, at, self._scratch))
        self._copies.extend(Placed(True, self._scratch, copy) for copy in copies)
        self._scratch += -(-piece.plain_length // _SCRATCH_ALIGNMENT) * _SCRATCH_ALIGNMENT

    def _add_checks(self, found: Iterable[tuple[Piece, int]]) -> Span:
        tables, first = self._tables, len(self._tables.checks)
        for piece, source in found:
            if piece.chunk is not None and self._signed:
                tables.add_check(piece, piece.chunk, source)
        return Span(first, len(tables.checks) - first)

    def _add_decodes(self, found: Iterable[tuple[Piece, int, int]]) -> Span:
        rows, first = self._tables.decodes, len(self._tables.decodes)
        rows.extend((piece.codec, at, piece.stored_length, target, piece.plain_length) for piece, at, target in found)
        return Span(first, len(rows) - first)


def _merged(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Runs in order, those joined that are near each other."""
    begin = end = -1
    for low, high in runs:
        if begin < 0:
            begin, end = low, high
        elif low - end <= _NEAR:
            end = max(end, high)
        else:
            yield begin, end
            begin, end = low, high
    if begin >= 0:
        yield begin, end


def _adjacent(runs: Iterable[Direct]) -> Iterator[Direct]:
    """The same copies, those joined that are neighbours at both ends."""
    last: Direct | None = None
    for run in runs:
        if last is None:
            last = run
        elif (last.source + last.length, last.target + last.length) == (run.source, run.target):
            last = Direct(last.source, last.target, last.length + run.length)
        else:
            yield last
            last = run
    if last is not None:
        yield last
