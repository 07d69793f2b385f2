"""Files that a process had mapped: a changed one is always found and named, an unchanged one is read once."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from dormouse.errors import SnapshotError
from dormouse.snapshot import mapped_files
from dormouse.snapshot.mapped_files import DigestCache, fingerprint, first_changed_file

OLD = 1_700_000_000_000_000_000


@dataclass(frozen=True)
class File:
    path: str
    size: int
    mtime_ns: int
    digest: bytes


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a test are young; the tests that are about that set the limit again."""
    monkeypatch.setattr(mapped_files, "_SETTLED_NS", -(10**12))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were read, not just looked up."""
    paths: list[str] = []
    read = mapped_files._read_digest
    monkeypatch.setattr(mapped_files, "_read_digest", lambda fd, path: (paths.append(path), read(fd, path))[1])
    return paths


def library(folder: Path, name: str = "lib.so", content: bytes = b"code " * 1000) -> Path:
    path = folder / name
    path.write_bytes(content)
    os.utime(path, ns=(OLD, OLD))
    return path


def capture(folder: Path, *paths: Path) -> list[File]:
    found = fingerprint(map(str, paths), DigestCache(folder / "cache"))
    return [File(path, now.size, now.mtime_ns, now.digest) for path, now in found.items()]


def test_digests_are_those_of_the_bytes_and_are_read_once_per_host(tmp_path: Path, reads: list[str]) -> None:
    paths = [library(tmp_path, f"{n}.so", bytes([n]) * (n * 3_000_000)) for n in range(4)]
    for _ in range(2):
        for file in capture(tmp_path, *paths, *paths):
            assert file.digest == blake3(Path(file.path).read_bytes()).digest()
            assert file.size == Path(file.path).stat().st_size
    assert sorted(reads) == sorted(map(str, paths))
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o600


def test_files_as_they_were_fit_without_being_read(tmp_path: Path, reads: list[str]) -> None:
    mapped = capture(tmp_path, library(tmp_path))
    reads.clear()
    assert first_changed_file(mapped, DigestCache(tmp_path / "other")) is None
    assert reads == []


def _rewrite(path: Path) -> None:
    path.write_bytes(b"evil " * 1000)


def _grow(path: Path) -> None:
    path.write_bytes(b"code " * 1001)
    os.utime(path, ns=(OLD, OLD))


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_rewrite, "content has changed"),
        (_grow, "had 5000 bytes at the capture, has 5005 now"),
        (Path.unlink, "No such file"),
        (_make_folder, "no longer a plain file"),
    ],
)
def test_a_changed_file_is_named(tmp_path: Path, change: Callable[[Path], None], words: str) -> None:
    other, path = library(tmp_path, "other.so"), library(tmp_path)
    mapped = capture(tmp_path, other, path)
    change(path)
    reason = first_changed_file(mapped, DigestCache(tmp_path / "cache"))
    assert reason is not None and str(path) in reason and words in reason


def test_the_same_bytes_with_another_time_fit_and_are_read_once(tmp_path: Path, reads: list[str]) -> None:
    path = library(tmp_path)
    mapped = capture(tmp_path, path)
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.rename(path)
    reads.clear()
    for _ in range(2):
        assert first_changed_file(mapped, DigestCache(tmp_path / "cache")) is None
    assert reads == [str(path)]


def test_a_time_set_back_by_hand_does_not_bring_the_old_digest_back(tmp_path: Path) -> None:
    path = library(tmp_path)
    before = capture(tmp_path, path)[0]
    path.write_bytes(b"evil " * 1000)
    os.utime(path, ns=(OLD, OLD))
    assert capture(tmp_path, path)[0].digest != before.digest


def test_what_was_changed_a_moment_ago_is_not_remembered(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_files, "_SETTLED_NS", 10**12)
    path = library(tmp_path)
    capture(tmp_path, path)
    capture(tmp_path, path)
    assert len(reads) == 2


def test_what_is_no_plain_file_is_a_named_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path / "gone"):
        with pytest.raises(SnapshotError, match=path.name):
            capture(tmp_path, path)


@given(st.binary(max_size=200))
def test_any_bytes_as_a_cache_are_ignored(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("c")
    (folder / "cache").write_bytes(data)
    path = library(folder)
    assert capture(folder, path)[0].digest == blake3(path.read_bytes()).digest()


@pytest.mark.parametrize("digest", [b"short", b"x" * 33])
def test_a_cache_with_a_malformed_digest_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, digest: bytes
) -> None:
    entries = [[b"/lib/x.so", [1, 2, 3, 4, 5], digest]]
    (tmp_path / "cache").write_bytes(msgspec.msgpack.encode({"version": 1, "entries": entries}))
    DigestCache(tmp_path / "cache")
    assert "read again" in caplog.text


def test_a_cache_that_cannot_be_saved_costs_only_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = library(tmp_path)
    assert fingerprint([str(path)], DigestCache(tmp_path / "missing" / "cache"))[str(path)].size == 5000
    assert "not saved" in caplog.text


def test_a_full_cache_forgets_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]) -> None:
    monkeypatch.setattr(mapped_files, "_MAX_ENTRIES", 2)
    paths = [library(tmp_path, f"{n}.so") for n in range(3)]
    for path in (*paths, paths[2], paths[0]):
        capture(tmp_path, path)
    assert reads == [str(paths[0]), str(paths[1]), str(paths[2]), str(paths[0])]
