"""The streaming protocol, with CRIU faked at its own end of the sockets, and whatever bytes a peer may send."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.errors import DamagedError, HostError, SnapshotError
from dormouse.snapshot import streamer
from dormouse.snapshot.images import INLINE_LIMIT, ImageFile
from dormouse.snapshot.memory_map import AddressSpace
from dormouse.snapshot.streamer import (
    CAPTURE_SOCKET,
    SERVE_SOCKET,
    CaptureStream,
    Parts,
    RestoreStream,
    image_parts,
    parse_request,
    read_image,
)
from dormouse.store.store import Manifest, Store
from dormouse.transfer.ingest import Ingest
from dormouse.transfer.readahead import ReadAhead

MIB = 1 << 20


def no_memory(pid: int, pagemap: int) -> AddressSpace:
    raise AssertionError("no page map was sent")


def served(images: list[ImageFile], chunks: ReadAhead) -> dict[str, Parts]:
    return {image.name: partial(image_parts, image, chunks) for image in images}


def request_bytes(name: str) -> bytes:
    """A request as protobuf-c writes it: tag, varint length, text."""
    text = name.encode()
    length = bytes([len(text)]) if len(text) < 128 else bytes([len(text) & 0x7F | 0x80, len(text) >> 7])
    body = b"\x0a" + length + text
    return struct.pack("<I", len(body)) + body


class FakeCriu:
    """CRIU's side of the protocol."""

    def __init__(self, directory: Path, socket_name: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(directory / socket_name))

    def write_image(self, name: str) -> int:
        """Dump side: the pipe to write an image to."""
        read_end, write_end = os.pipe()
        self.sock.sendall(request_bytes(name))
        socket.send_fds(self.sock, [b"\0"], [read_end])
        os.close(read_end)
        return write_end

    def read_image(self, name: str) -> bytes | None:
        """Restore side: a whole image, None when it does not exist."""
        self.sock.sendall(request_bytes(name))
        head = self.sock.recv(6, socket.MSG_WAITALL)
        assert head[:5] == b"\x02\0\0\0\x08"
        if not head[5]:
            return None
        read_end, write_end = os.pipe()
        socket.send_fds(self.sock, [b"\0"], [write_end])
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            return pipe.read()

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        yield opened


def images() -> dict[str, bytes]:
    """Sizes around every border: nothing, inline, one chunk, exact chunks, several chunks, zeros."""
    pattern = os.urandom(4096) + bytes(4096)
    return {
        "empty.img": b"",
        "inline.img": b"x" * INLINE_LIMIT,
        "over-inline.img": pattern * (INLINE_LIMIT // 8192) + b"y",
        "one-chunk.img": (pattern * 128)[:MIB],
        "pages-1.img": (pattern * 700)[: 5 * MIB + 4096],
        "zeros.img": bytes(3 * MIB),
    }


def capture(store: Store, directory: Path, contents: dict[str, bytes]) -> list[ImageFile]:
    """All images through a CaptureStream into a committed manifest, written side by side as CRIU does."""
    with (
        store.begin() as transaction,
        Ingest(transaction) as ingest,
        CaptureStream(directory, ingest, no_memory) as stream,
    ):
        criu = FakeCriu(directory, CAPTURE_SOCKET)
        pipes = {name: criu.write_image(name) for name in contents}

        def write(name: str) -> None:
            with os.fdopen(pipes[name], "wb") as pipe:
                pipe.write(contents[name])

        writers = [threading.Thread(target=write, args=(name,)) for name in contents]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        criu.close()
        stream.finish()
        found = stream.images()
        refs = [digest for image in found for digest in image.chunk_list()]
        transaction.commit(Manifest(id="a", kind="snapshot", name="m", created=0.0, body=b"", refs=refs))
    return found


def test_images_come_back_byte_for_byte_whatever_the_order(store: Store, tmp_path: Path) -> None:
    contents = images()
    found = capture(store, tmp_path, contents)
    assert {image.name: image.size for image in found} == {name: len(data) for name, data in contents.items()}
    with ReadAhead(store) as chunks, RestoreStream(tmp_path, served(found, chunks)) as stream:
        criu = FakeCriu(tmp_path, SERVE_SOCKET)
        for name in [*reversed(contents), "pages-1.img", "pages-1.img"]:
            assert criu.read_image(name) == contents[name], name
        assert criu.read_image("not-there.img") is None
        criu.close()
        stream.finish()


def test_a_reader_that_stops_early_hurts_nobody(store: Store, tmp_path: Path) -> None:
    contents = images()
    found = capture(store, tmp_path, contents)
    with ReadAhead(store) as chunks, RestoreStream(tmp_path, served(found, chunks)) as stream:
        criu = FakeCriu(tmp_path, SERVE_SOCKET)
        criu.sock.sendall(request_bytes("pages-1.img"))
        assert criu.sock.recv(6, socket.MSG_WAITALL)[5] == 1
        read_end, write_end = os.pipe()
        socket.send_fds(criu.sock, [b"\0"], [write_end])
        os.close(write_end)
        os.read(read_end, 10)
        os.close(read_end)
        assert criu.read_image("one-chunk.img") == contents["one-chunk.img"]
        criu.close()
        stream.finish()


def test_a_damaged_chunk_ends_the_stream_with_its_name(store: Store, tmp_path: Path) -> None:
    found = capture(store, tmp_path, images())
    (pack,) = (tmp_path / "store").rglob("*.pack")
    data = bytearray(pack.read_bytes())
    pages = next(image for image in found if image.name == "pages-1.img")
    where = store.locate(pages.chunk_list())[0]
    data[where.offset + where.stored_length // 2] ^= 1
    pack.write_bytes(data)
    with ReadAhead(store) as chunks, RestoreStream(tmp_path, served(found, chunks)) as stream:
        criu = FakeCriu(tmp_path, SERVE_SOCKET)
        got = criu.read_image("pages-1.img")
        assert got is not None and len(got) < pages.size
        criu.close()
        with pytest.raises(DamagedError):
            stream.finish()


def test_criu_that_dies_in_the_middle_is_an_error_not_a_hang(store: Store, tmp_path: Path) -> None:
    with (
        store.begin() as transaction,
        Ingest(transaction) as ingest,
        CaptureStream(tmp_path, ingest, no_memory) as stream,
    ):
        criu = FakeCriu(tmp_path, CAPTURE_SOCKET)
        os.close(criu.write_image("core-1.img"))
        criu.sock.sendall(struct.pack("<I", 50) + b"\x0a")
        criu.close()
        with pytest.raises(SnapshotError, match="middle of a request"):
            stream.finish()


def test_criu_that_never_connects_is_not_waited_for(store: Store, tmp_path: Path) -> None:
    with (
        store.begin() as transaction,
        Ingest(transaction) as ingest,
        CaptureStream(tmp_path, ingest, no_memory) as stream,
    ):
        stream.finish()
        assert stream.images() == []


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("can't start new thread")])
def test_whatever_ends_an_images_thread_ends_the_capture(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def read(name: str, pipe: int, ingest: Ingest) -> ImageFile:
        if name == "files.img":
            raise error
        return read_image(name, pipe, ingest)

    monkeypatch.setattr(streamer, "read_image", read)
    with store.begin() as transaction, Ingest(transaction) as ingest:
        with CaptureStream(tmp_path, ingest, no_memory) as stream:
            criu = FakeCriu(tmp_path, CAPTURE_SOCKET)
            for name in ("files.img", "inventory.img"):
                with contextlib.suppress(ConnectionError):
                    os.close(criu.write_image(name))
            criu.close()
            with pytest.raises(SnapshotError, match="streaming CRIU's images failed"):
                stream.finish()


def test_an_image_without_a_thread_is_an_error_not_a_hang(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("criu-image"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with store.begin() as transaction, Ingest(transaction) as ingest:
        with CaptureStream(tmp_path, ingest, no_memory) as stream:
            criu = FakeCriu(tmp_path, CAPTURE_SOCKET)
            pipe = criu.write_image("core-1.img")
            with pytest.raises(HostError, match="no thread"):
                stream.finish()
            with pytest.raises(BrokenPipeError):
                os.write(pipe, b"x")
            os.close(pipe)
            criu.close()


def test_an_image_written_twice_is_refused(store: Store, tmp_path: Path) -> None:
    with (
        store.begin() as transaction,
        Ingest(transaction) as ingest,
        CaptureStream(tmp_path, ingest, no_memory) as stream,
    ):
        criu = FakeCriu(tmp_path, CAPTURE_SOCKET)
        os.close(criu.write_image("core-1.img"))
        os.close(criu.write_image("core-1.img"))
        criu.close()
        with pytest.raises(SnapshotError, match="twice"):
            stream.finish()


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", struct.pack("<I", 3) + b"abc", struct.pack("<I", 0)])
def test_garbage_on_the_socket_is_refused(store: Store, tmp_path: Path, garbage: bytes) -> None:
    with RestoreStream(tmp_path, {}) as stream:
        criu = FakeCriu(tmp_path, SERVE_SOCKET)
        criu.sock.sendall(garbage)
        with pytest.raises(SnapshotError):
            stream.finish()
        criu.close()


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/"), min_size=1, max_size=300))
def test_every_plain_name_is_understood(name: str) -> None:
    assert parse_request(request_bytes(name)[4:]) == name


@given(st.binary(max_size=300))
def test_any_other_bytes_give_a_name_without_a_path_or_a_named_error(body: bytes) -> None:
    try:
        name = parse_request(body)
    except SnapshotError:
        return
    assert name and "/" not in name and "\0" not in name
