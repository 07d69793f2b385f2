"""What a snapshot's manifest says: the CRIU images and the memory as chunks, and all that is needed to bring them back.

The body is one msgpack map (`SnapshotBody`) with a version; the store keeps it as an opaque, checksummed record beside
the list of chunks it needs. Small images (nearly all of them) travel inside the body, so a restore reads one record
and then only page chunks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import msgspec

from dormouse.errors import DamagedError, IncompatibleError, SnapshotError
from dormouse.phases import Phases
from dormouse.snapshot.criu_images import PAGE
from dormouse.snapshot.cuda_checkpoint import CudaState
from dormouse.snapshot.memory_map import AddressSpace, check
from dormouse.snapshot.tree import External
from dormouse.store.chunk import DIGEST_SIZE, Buffer, Digest

BODY_VERSION = 1
INLINE_LIMIT = 64 << 10

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")


class ImageFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One CRIU image: either its bytes (`inline`) or its chunks in order (`digests`, 32 bytes each, concatenated)."""

    name: str
    size: int
    inline: bytes | None = None
    digests: bytes = b""

    def chunk_list(self) -> list[Digest]:
        """The chunks in order."""
        return [Digest(self.digests[at : at + DIGEST_SIZE]) for at in range(0, len(self.digests), DIGEST_SIZE)]


class MappedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file the process had mapped. `ranges` are the (offset, length) in bytes that were in its memory, `written`
    those that it had copies of. `size`, `mtime_ns` and `digest` (BLAKE3) tell whether the file is still the same;
    without a digest it may change."""

    path: str
    ranges: list[tuple[int, int]]
    size: int = 0
    mtime_ns: int = 0
    digest: bytes = b""
    written: list[tuple[int, int]] = []


class SnapshotBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a snapshot's manifest.

    `key` is the compatibility key, `pid` the root's pid in its cell, `externals` what tied the tree to the outside,
    `memory` the private memory of its processes (their page maps and pages are not among `images`), `phases` the
    steps of the capture before its commit, `cuda` what is to be known of processes with CUDA state, whose GPU memory is
    in theirs.
    """

    version: int
    name: str
    key: dict[str, str]
    pid: int
    externals: list[External]
    images: list[ImageFile]
    memory: list[AddressSpace]
    mapped: list[MappedFile]
    phases: Phases
    cuda: CudaState | None = None

    def references(self) -> Sequence[Digest]:
        """Every chunk the images and the memory need."""
        holders: list[ImageFile | AddressSpace] = [*self.images, *self.memory]
        return [digest for holder in holders for digest in holder.chunk_list()]

    def raw_bytes(self) -> int:
        """Bytes of all images as CRIU wrote them, pages included."""
        return raw_bytes(self.images, self.memory)

    def image(self, name: str) -> ImageFile | None:
        """The image of that name."""
        return next((image for image in self.images if image.name == name), None)


def raw_bytes(images: Sequence[ImageFile], memory: Sequence[AddressSpace]) -> int:
    """Bytes of these images as CRIU wrote them, pages included."""
    return sum(image.size for image in images) + PAGE * sum(space.pages for space in memory)


def encode_body(body: SnapshotBody) -> bytes:
    """The body as stored."""
    return msgspec.msgpack.encode(body)


def decode_body(data: bytes, snapshot_id: str) -> SnapshotBody:
    """The body of snapshot `snapshot_id`. Raises DamagedError, or IncompatibleError for a newer version."""
    try:
        version = msgspec.msgpack.decode(data, type=dict).get("version")
        if isinstance(version, int) and version > BODY_VERSION:
            raise IncompatibleError(
                f"snapshot {snapshot_id} has format version {version}; this program reads up to {BODY_VERSION}",
                remedy="Update dormouse, or remove the snapshot with `dormouse rm`",
            )
        body = msgspec.msgpack.decode(data, type=SnapshotBody)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(snapshot_id, error) from error
    for image in body.images:
        if not _is_sound(image):
            raise _malformed(snapshot_id, f"at image {image.name!r}")
    for space in body.memory:
        check(space, f"the manifest of snapshot {snapshot_id}")
    names = [image.name for image in body.images]
    names += (name for space in body.memory for name in (space.pagemap_name, space.pages_name))
    if len(set(names)) != len(names):
        raise _malformed(snapshot_id, "it has two images of one name")
    return body


def is_image_name(name: str) -> bool:
    """Whether this can be the name of an image: one that stays in its folder, and prints."""
    return _NAME.fullmatch(name) is not None


def _is_sound(image: ImageFile) -> bool:
    whole = image.inline is None or (len(image.inline) == image.size and not image.digests)
    return is_image_name(image.name) and image.size >= 0 and len(image.digests) % DIGEST_SIZE == 0 and whole


def _malformed(snapshot_id: str, why: object) -> DamagedError:
    return DamagedError(
        f"the manifest of snapshot {snapshot_id} is malformed: {why}",
        remedy="Remove it with `dormouse rm`; the model then starts cold and is captured anew",
    )


def image_bytes(body: SnapshotBody, name: str, plain: Callable[[Digest], Buffer]) -> bytes:
    """All of one image; `plain` gives a chunk's bytes. Raises SnapshotError when there is none, DamagedError."""
    image = body.image(name)
    if image is None:
        raise SnapshotError(f"the snapshot has no image {name}")
    if image.inline is not None:
        return image.inline
    return b"".join(plain(digest) for digest in image.chunk_list())
