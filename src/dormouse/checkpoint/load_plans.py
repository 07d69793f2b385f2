"""Load plans of what holds tensors: a plain safetensors file, or the chunks of a checkpoint.

Placement --of_file--> pieces of plain bytes, as long as they follow each other
          --of_checkpoint--> the chunks that are needed, and no others
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dormouse.checkpoint.shards import Placement, by_chunk
from dormouse.checkpoint.tensors import CheckpointBody
from dormouse.errors import DamagedError
from dormouse.store.codec import Codec
from dormouse.store.pack import StoredChunk
from dormouse.store.store import Manifest, Reader
from dormouse.transfer.plan import Copy, LoadPlan, Piece, plan, stored_pieces


def of_file(path: Path, placement: Placement) -> LoadPlan:
    """The plan for tensors that lie in one file as they are; their offsets count from its beginning."""
    pieces = []
    for copy in placement.copies:
        length = (copy.rows - 1) * copy.source_pitch + copy.row_bytes
        pieces.append(Piece(0, copy.source, length, length, Codec.RAW, None, (copy._replace(source=0),)))
    return plan([path], pieces, placement.sizes)


def of_checkpoint(
    body: CheckpointBody, manifest: Manifest, placement: Placement, reader: Reader, what: str
) -> LoadPlan:
    """The plan for tensors of a checkpoint, whose offsets count from the beginning of its segment. Only chunks that are
    needed are looked for. Raises DamagedError when the checkpoint's table and its chunks don't fit each other."""
    files, pieces = stored_pieces(_placed(body, manifest, placement, reader, what), reader.pack)
    return plan(files, pieces, placement.sizes)


def _placed(
    body: CheckpointBody, manifest: Manifest, placement: Placement, reader: Reader, what: str
) -> Iterator[tuple[StoredChunk, tuple[Copy, ...]]]:
    count = -(-body.size // body.chunk_size)
    if len(manifest.refs) != count:
        raise _misfit(what, f"it has {len(manifest.refs)} chunks where {body.size} bytes need {count}")
    needed = list(by_chunk(placement.copies, body.size, body.chunk_size))
    most = manifest.id if 2 * len(needed) > count else None
    chunks = reader.locate([manifest.refs[number] for number, _copies in needed], manifest_id=most)
    for chunk, (number, copies) in zip(chunks, needed, strict=True):
        length = min(body.chunk_size, body.size - number * body.chunk_size)
        if chunk.plain_length != length:
            raise _misfit(what, f"its chunk {number} has {chunk.plain_length} bytes instead of {length}")
        yield chunk, copies


def _misfit(what: str, why: str) -> DamagedError:
    return DamagedError(f"{what} is damaged: {why}", remedy="Import the model again: dormouse import … --replace")
