"""Writes a model's weights into the store: tensors of any source become the chunks of a checkpoint.

    NewTensor.chunks() of each tensor --pieces, padding--> buffers of CHUNK_SIZE --Ingest (threads)--> transaction
    table of tensors -------------------------------------> a codec for each ----^

Nothing is visible until the caller commits `manifest_of` what was written, in the same transaction. `sweep` removes
checkpoints that no model's folder names: what an import leaves when it dies between the two, and what a removed or
replaced model leaves.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from dormouse.checkpoint.models import checkpoints_named
from dormouse.checkpoint.tensors import CheckpointBody, NewTensor, encode_body, lay_out
from dormouse.errors import ConfigError
from dormouse.store.chunk import Digest
from dormouse.store.codec import Codec
from dormouse.store.store import Manifest, Store, Transaction
from dormouse.transfer.ingest import Ingest

CHECKPOINT_KIND = "checkpoint"

_FLOATS = {
    "BF16": Codec.BF16,
    "F16": Codec.FP16,
    "F32": Codec.FP32,
    **dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ"), Codec.FP8_E4M3),
    **dict.fromkeys(("F8_E5M2", "F8_E5M2FNUZ"), Codec.FP8_E5M2),
}
"""Types that have a codec of their own. All others, packed or whole numbers, are tried with LZ4."""


@dataclass(frozen=True)
class Written:
    """A checkpoint whose chunks are in a transaction. `id` is its manifest's, new and random."""

    id: str
    body: CheckpointBody
    refs: list[Digest]

    def digest(self) -> str:
        """What identifies the weights: the BLAKE3 of the table and the chunks' names, in hex."""
        return blake3(encode_body(self.body) + b"".join(self.refs)).hexdigest()

    def manifest(self, name: str, created: float) -> Manifest:
        """What to commit for the model of that name."""
        return Manifest(
            id=self.id, kind=CHECKPOINT_KIND, name=name, created=created, body=encode_body(self.body), refs=self.refs
        )


def write_tensors(
    transaction: Transaction,
    tensors: Sequence[NewTensor],
    progress: Callable[[int, int], None],
    *,
    coded: bool = True,
) -> Written:
    """Put all tensors into the transaction, as they are if not `coded`. `progress(done, total)`: bytes.

    Raises ConfigError when a tensor yields other bytes than its shape needs, DiskFullError, StoreError.
    """
    body = lay_out(tensors)
    futures: list[Future[Digest]] = []
    with Ingest(transaction) as ingest:
        for buffer, codec in zip(_cut(_pieces(body, tensors), body), chunk_codecs(body), strict=True):
            futures.append(ingest.submit(buffer, codec if coded else Codec.RAW))
            progress(min(len(futures) * body.chunk_size, body.size), body.size)
    return Written(secrets.token_hex(6), body, [future.result() for future in futures])


def chunk_codecs(body: CheckpointBody) -> list[Codec]:
    """How each chunk is to be coded: as what has most of its bytes."""
    size = body.chunk_size
    held: list[Counter[Codec]] = [Counter() for _ in range(-(-body.size // size))]
    for tensor in body.tensors:
        codec, end = _FLOATS.get(tensor.dtype, Codec.LZ4), tensor.offset + tensor.length
        for at in range(tensor.offset // size, -(-end // size)):
            held[at][codec] += min(end, (at + 1) * size) - max(tensor.offset, at * size)
    return [bytes_of.most_common(1)[0][0] for bytes_of in held]


def _pieces(body: CheckpointBody, tensors: Sequence[NewTensor]) -> Iterator[bytes | memoryview]:
    """The bytes of the segment from beginning to end."""
    at = 0
    for placed, tensor in zip(body.tensors, tensors, strict=True):
        yield bytes(placed.offset - at)
        at = placed.offset
        for piece in tensor.chunks():
            at += len(piece)
            yield piece
        if at != placed.offset + placed.length:
            raise ConfigError(
                f"tensor {tensor.name} gave {at - placed.offset} bytes where its shape needs {placed.length}",
                remedy="The source is damaged; download or copy it again",
            )


def _cut(pieces: Iterator[bytes | memoryview], body: CheckpointBody) -> Iterator[memoryview]:
    """The same bytes in buffers of `chunk_size`, each with memory of its own, the last one shorter."""
    buffer, filled = memoryview(bytearray(body.chunk_size)), 0
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            count = min(len(rest), body.chunk_size - filled)
            buffer[filled : filled + count] = rest[:count]
            rest, filled = rest[count:], filled + count
            if filled == body.chunk_size:
                yield buffer
                buffer, filled = memoryview(bytearray(body.chunk_size)), 0
    if filled:
        yield buffer[:filled]


def copy_checkpoint(checkpoint: str, source: Store, target: Store) -> None:
    """The same checkpoint, under the same id, in another store. Raises NotFoundError, DamagedError, DiskFullError."""
    manifest = source.manifest(checkpoint)
    with source.reader() as reader, target.begin() as transaction:
        for chunk in reader.locate(manifest.refs):
            transaction.put(reader.plain(chunk), codec=Codec(chunk.codec))
        transaction.commit(manifest)


@contextmanager
def publishing(models_dir: Path) -> Iterator[None]:
    """Around the moments between the commit of a checkpoint and the naming of its model's folder."""
    with _locked(models_dir, fcntl.LOCK_SH):
        yield


def sweep(store: Store, models_dir: Path) -> list[str]:
    """Remove the checkpoints that no model uses; their ids. While another import publishes, nothing is done: it may be
    one of these that it is about to name."""
    try:
        with _locked(models_dir, fcntl.LOCK_EX | fcntl.LOCK_NB):
            ids, unreadable = checkpoints_named(models_dir)
            orphans = [
                row.id
                for row in store.manifests(kind=CHECKPOINT_KIND)
                if row.id not in ids and row.name not in unreadable
            ]
            for orphan in orphans:
                store.remove(orphan)
            return orphans
    except BlockingIOError:
        return []


@contextmanager
def _locked(folder: Path, mode: int) -> Iterator[None]:
    """The folder's own lock, freed by the end of the process too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, mode)
        yield
    finally:
        os.close(descriptor)
