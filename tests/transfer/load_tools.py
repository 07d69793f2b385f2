"""What the tests of loading share: plans over real stores and plain files, and what they must come to."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from dormouse.store.chunk import Digest
from dormouse.store.codec import Codec
from dormouse.store.key import Key
from dormouse.store.reader import Reader
from dormouse.store.store import Manifest, Store
from dormouse.transfer.plan import EXTENT_BYTES, Copy, LoadPlan, Piece, plan, stored_pieces


def weights(seed: int, length: int) -> bytes:
    """Numbers in bfloat16 as weights are."""
    values = np.random.default_rng(seed).standard_normal(-(-length // 2), dtype=np.float32) * 0.02
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:length]


def mixed(seed: int, count: int, size: int = 40_000) -> list[tuple[bytes, Codec]]:
    """Chunks of every coding, some of odd lengths."""
    chance = random.Random(seed)
    kinds = [
        lambda n: (weights(chance.randrange(1 << 30), n), Codec.BF16),
        lambda n: (chance.randbytes(n), Codec.RAW),
        lambda n: ((b"text %d " % n) * (n // 8), Codec.LZ4),
        lambda n: ((b"more %d " % n) * (n // 8), Codec.ZSTD),
        lambda n: (bytes(n), Codec.RAW),
    ]
    return [chance.choice(kinds)(chance.choice([size, size, size, 777, size // 2 + 1])) for _ in range(count)]


@dataclass
class Stored:
    """Chunks in a store, and their places one after the other."""

    store: Store
    plains: list[bytes]
    refs: list[Digest]

    @property
    def key(self) -> Key:
        return self.store.key

    @property
    def content(self) -> bytes:
        return b"".join(self.plains)

    def plan(self, *, extent_bytes: int = EXTENT_BYTES) -> LoadPlan:
        """All chunks in a row, as one destination."""
        offsets = [sum(map(len, self.plains[:at])) for at in range(len(self.plains))]
        copies = [
            [Copy(0, 0, offset, len(plain))] if plain else []
            for offset, plain in zip(offsets, self.plains, strict=True)
        ]
        return self.plan_of(copies, [len(self.content)], extent_bytes=extent_bytes)

    def plan_of(self, copies: Sequence[list[Copy]], sizes: list[int], *, extent_bytes: int = EXTENT_BYTES) -> LoadPlan:
        """What each chunk's copies say."""
        with self.reader() as reader:
            placed = [(chunk, wanted) for chunk, wanted in zip(reader.locate(self.refs), copies, strict=True) if wanted]
            files, pieces = stored_pieces(placed, reader.pack)
            return plan(files, pieces, sizes, extent_bytes=extent_bytes)

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        with self.store.reader() as reader:
            yield reader

    def pack(self) -> Path:
        """The one pack."""
        with self.reader() as reader:
            return reader.pack(reader.locate(self.refs)[0])

    def damage(self, number: int) -> str:
        """Flip a bit of a stored chunk; what an error must say."""
        with self.reader() as reader:
            (chunk,) = reader.locate([self.refs[number]])
            with reader.pack(chunk).open("r+b") as file:
                file.seek(chunk.offset + chunk.stored_length // 2)
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 16]))
        return f"chunk {chunk.digest.hex()} in .*pack is damaged"


def stored(store: Store, chunks: Sequence[tuple[bytes, Codec]], name: str = "m") -> Stored:
    """Put chunks into a store."""
    with store.begin() as transaction:
        refs = [transaction.put(plain, codec=codec) for plain, codec in chunks]
        transaction.commit(Manifest(name * 8, "test", name, 0.0, b"", refs))
    with store.reader() as reader:  # a chunk that its codec does not make smaller would test less than it seems to
        for chunk, (plain, codec) in zip(reader.locate(refs), chunks, strict=True):
            assert chunk.codec in (codec, Codec.ZERO) or len(plain) < 32_768, f"{codec} became {chunk.codec}"
    return Stored(store, [plain for plain, _codec in chunks], refs)


def cut_by(expected: Sequence[bytes], copies: Sequence[Sequence[Copy]], sizes: Sequence[int]) -> list[bytes]:
    """The destinations after these copies, byte after byte."""
    spaces = [bytearray(size) for size in sizes]
    for plain, wanted in zip(expected, copies, strict=True):
        for copy in wanted:
            for row in range(copy.rows):
                source, target = copy.source + row * copy.source_pitch, copy.target + row * copy.target_pitch
                spaces[copy.device][target : target + copy.row_bytes] = plain[source : source + copy.row_bytes]
    return [bytes(space) for space in spaces]


def shards(plains: Sequence[bytes], devices: int) -> tuple[list[list[Copy]], list[int]]:
    """Each chunk as rows of up to 64 bytes, of which each device gets its columns; what is over goes to all, whole.
    Some chunks go to one device as they are."""
    copies: list[list[Copy]] = []
    end = 0
    for at, plain in enumerate(plains):
        wanted: list[Copy] = []
        if at % 3 == 0 or len(plain) < 640:
            wanted.extend(Copy(device, 0, end, len(plain)) for device in {at % devices, (at + 1) % devices})
        else:
            width = 64 // devices
            rows = len(plain) // 64
            rest = len(plain) - rows * 64
            for device in range(devices):
                wanted.append(Copy(device, device * width, end, width, rows, 64, width + 16))
                if rest:
                    wanted.append(Copy(device, rows * 64, end + rows * (width + 16), rest))
        copies.append(wanted)
        end += -(-len(plain) * 2 // 256) * 256
    return copies, [end] * devices


def plain_file(path: Path, content: bytes, cuts: Sequence[int]) -> LoadPlan:
    """A plain file whose parts, cut at `cuts`, come one after the other in reverse order."""
    path.write_bytes(content)
    ends = [0, *sorted(cuts), len(content)]
    pieces, target = [], 0
    for begin, end in reversed(list(pairwise(ends))):
        if end > begin:
            copy = Copy(0, 0, target, end - begin)
            pieces.append(Piece(0, begin, end - begin, end - begin, Codec.RAW, None, (copy,)))
            target += end - begin
    return plan([path], pieces, [len(content)], extent_bytes=1 << 20)


def reversed_parts(content: bytes, cuts: Sequence[int]) -> bytes:
    """What `plain_file` must come to."""
    ends = [0, *sorted(cuts), len(content)]
    return b"".join(content[begin:end] for begin, end in reversed(list(pairwise(ends))))
