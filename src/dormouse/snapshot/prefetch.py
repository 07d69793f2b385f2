"""File pages a restored process will want: noted at capture, asked of the disk at restore.

CRIU does not store unmodified pages of mapped files (libraries, weights); after a restore they come in by page faults,
one small read after another when the page cache is cold. So a capture notes which ranges of which files were in the
process's memory (`/proc/PID/pagemap`), and a restore has the kernel read them (`posix_fadvise WILLNEED`, no copy)
while CRIU is busy with the rest. One step of a few MiB is under way at a time: CRIU's own reads and those of the
snapshot's chunks are more urgent, and behind a deep queue they would wait for all of it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dormouse.snapshot.images import MappedFile

log = logging.getLogger(__name__)

_MAPS_LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ...(.) ([0-9a-f]+) \S+ (\d+) *(.*)", re.DOTALL)
# The top byte of a pagemap entry: bit 7 present, bit 5 file page (Documentation/admin-guide/mm/pagemap.rst).
_PRESENT_FILE_PAGES = re.compile(rb"[\xa0-\xbf\xe0-\xff]+")
_WRITTEN_PAGES = re.compile(rb"[\x80-\x9f\xc0-\xdf]+")
_MERGE_GAP = 128 << 10
_ADVISE_STEP = 4 << 20


@dataclass
class MappedRanges:
    """A file as processes have it mapped: its inode, the (offset, length) in bytes that were in memory, those of which
    the process has copies of its own, and whether any mapping is private, as those of programs and libraries are."""

    inode: int
    ranges: list[tuple[int, int]]
    written: list[tuple[int, int]] = field(default_factory=list)
    private: bool = False


def mapped_ranges(pids: Iterable[int]) -> dict[str, MappedRanges]:
    """The files that host processes have mapped, by path, in the order of their address spaces. Processes that have
    ended, zombies too, have none. Raises OSError when one may not be inspected."""
    files: dict[str, MappedRanges] = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            _add_files(pid, files)
    return files


def _add_files(pid: int, files: dict[str, MappedRanges]) -> None:
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        for line in Path(f"/proc/{pid}/maps").read_bytes().split(b"\n"):  # file names may hold other ends of lines
            match = _MAPS_LINE.fullmatch(line)
            if match is None:
                continue
            start, end, offset = (int(match[group], 16) for group in (1, 2, 4))
            name = match[6]
            if (
                match[5] == b"0"
                or not name.startswith(b"/")
                or name.startswith(b"/dev/")
                or name.endswith(b" (deleted)")
            ):
                continue
            try:
                path = name.decode()
            except UnicodeDecodeError:
                log.warning("mapped file %r is neither compared nor read ahead: its name is not UTF-8", name)
                continue
            file = files.setdefault(path, MappedRanges(int(match[5]), []))
            file.private |= match[3] == b"p"
            entries = os.pread(pagemap.fileno(), (end - start) // mmap.PAGESIZE * 8, start // mmap.PAGESIZE * 8)
            file.ranges.extend(present_ranges(entries, offset, _PRESENT_FILE_PAGES))
            file.written.extend(present_ranges(entries, offset, _WRITTEN_PAGES))


def present_ranges(entries: bytes, offset: int, kind: re.Pattern[bytes] = _PRESENT_FILE_PAGES) -> list[tuple[int, int]]:
    """The (offset, length) of each run of present file pages in raw pagemap entries that begin at file `offset`."""
    top_bytes = entries[7::8] if struct.pack("=H", 1) == b"\1\0" else entries[0::8]
    return [
        (offset + run.start() * mmap.PAGESIZE, (run.end() - run.start()) * mmap.PAGESIZE)
        for run in kind.finditer(top_bytes)
    ]


def merge(ranges: Iterable[tuple[int, int]], gap: int = _MERGE_GAP) -> list[tuple[int, int]]:
    """Sorted ranges, those joined that overlap or lie at most `gap` bytes apart: one read beats two with a seek."""
    merged: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if merged and offset <= merged[-1][0] + merged[-1][1] + gap:
            first = merged[-1][0]
            merged[-1] = (first, max(merged[-1][1], offset + length - first))
        else:
            merged.append((offset, length))
    return merged


def prefetch(files: Sequence[MappedFile]) -> int:
    """Have the kernel read all ranges, and wait for it; returns their bytes. Those that were written come first: CRIU
    itself waits for them, because the kernel reads a file's page before it copies it, even for one that is then
    overwritten. What can't be opened is logged and left to CRIU, whose own check of mapped files gives the error that
    counts."""
    asked = sum(_read(file.path, file.written, wait=False) for file in files if file.written)
    return asked + sum(_read(file.path, file.ranges, wait=True) for file in files)


def _read(path: str, ranges: Iterable[tuple[int, int]], *, wait: bool) -> int:
    try:
        # A FIFO that has taken the file's place must not hold us up; CRIU's check tells of it.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        log.warning("no read-ahead for %s: %s", path, error)
        return 0
    asked = 0
    try:
        for offset, length in ranges:
            for at in range(offset, offset + length, _ADVISE_STEP):
                step = min(_ADVISE_STEP, offset + length - at)
                os.posix_fadvise(fd, at, step, os.POSIX_FADV_WILLNEED)
                if wait:
                    os.pread(fd, 1, at + step - 1)  # returns when the step's last page has arrived
            asked += length
    except OSError as error:
        log.warning("no further read-ahead for %s: %s", path, error)
    finally:
        os.close(fd)
    return asked
