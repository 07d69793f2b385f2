"""Verification: reads every chunk and manifest and says exactly what is damaged and whom it hits. What it learns is
also noted in the index, so that the next capture stores damaged chunks afresh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dormouse.errors import DamagedError, NotFoundError, UntrustedError
from dormouse.store.chunk import Digest, digest_of
from dormouse.store.layout import Layout
from dormouse.store.pack import StoredChunk, read_table
from dormouse.store.reader import Reader

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong. `pack` is its file name, `manifests` are the ids of those that need what is damaged."""

    problem: str
    pack: str | None = None
    chunk: Digest | None = None
    manifests: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.problem} (needed by {', '.join(self.manifests)})" if self.manifests else self.problem


@dataclass(frozen=True)
class VerifyReport:
    """`chunks` were checked; `notes` are worth knowing but harmless, such as an index that had to be built anew."""

    chunks: int
    damages: list[Damage]
    notes: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages


def verify(layout: Layout, *, deep: bool, progress: Progress) -> VerifyReport:
    """Check every pack, chunk and manifest; `deep` also decodes each chunk and compares it with its name."""
    with layout.reader() as reader:
        packs = {number: layout.index.chunks_of(number) for number in layout.index.packs()}
        packs.update({number: [] for number in layout.pack_numbers() if number not in packs})
        total = sum(chunk.stored_length for chunks in packs.values() for chunk in chunks)
        damages: list[Damage] = []
        done = 0
        for number in sorted(packs):
            damages += _check_table(layout, number, packs[number])
            bad: list[Digest] = []
            for chunk in packs[number]:
                problem = _problem_of(reader, chunk, deep=deep)
                if problem is not None:
                    bad.append(chunk.digest)
                    damages.append(_chunk_damage(layout, chunk, problem))
                done += chunk.stored_length
                progress(done, total)
            layout.index.mark({chunk.digest for chunk in packs[number]}.difference(bad), damaged=False)
            layout.index.mark(bad, damaged=True)
    with layout.change():
        damages += _check_manifests(layout)
    return VerifyReport(sum(map(len, packs.values())), damages, layout.index.notes())


def _problem_of(reader: Reader, chunk: StoredChunk, *, deep: bool) -> str | None:
    try:
        if not deep:
            reader.stored(chunk)
        elif digest_of(reader.plain(chunk)) != chunk.digest:
            return f"chunk {chunk.digest.hex()} decodes to other bytes than its name says"
    except (DamagedError, UntrustedError) as error:
        return error.message
    return None


def _chunk_damage(layout: Layout, chunk: StoredChunk, problem: str) -> Damage:
    users = tuple(layout.index.users_of([chunk.digest]))
    return Damage(problem, layout.pack(chunk.pack).name, chunk.digest, users)


def _check_table(layout: Layout, number: int, rows: list[StoredChunk]) -> Iterator[Damage]:
    path = layout.pack(number)
    try:
        table = {chunk.digest: chunk for chunk in read_table(path, number, layout.key)}
    except FileNotFoundError:
        return  # each of its chunks tells
    except (DamagedError, UntrustedError) as error:
        yield Damage(error.message, path.name, None, tuple(layout.index.users_of(row.digest for row in rows)))
        return
    for row in rows:
        if table.get(row.digest) != row:
            problem = f"the index has a wrong row for chunk {row.digest.hex()}; delete {layout.root / 'index.sqlite'}"
            yield _chunk_damage(layout, row, f"{problem} to have it built anew")


def _check_manifests(layout: Layout) -> Iterator[Damage]:
    for manifest_id in sorted(layout.manifest_ids() | layout.index.manifest_ids()):
        try:
            manifest, _raw_bytes = layout.read_manifest(manifest_id)
        except (DamagedError, NotFoundError, UntrustedError) as error:
            yield Damage(error.message, manifests=(manifest_id,))
            continue
        if set(manifest.refs) != layout.index.refs_of(manifest_id):
            yield Damage(f"the index does not know all chunks of manifest {manifest_id}", manifests=(manifest_id,))
    for chunk in layout.index.unplaced():
        yield Damage(f"chunk {chunk.hex()} is in no pack", None, chunk, tuple(layout.index.users_of([chunk])))
