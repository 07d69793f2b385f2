"""The page cache of files: what of them is in it, and getting them into and out of it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_BLOCK = 16 << 20
_FILES_AT_ONCE = 8
_WINDOW = 1 << 30
_ODD = bytes(range(1, 256, 2))
_libc = ctypes.CDLL(None, use_errno=True)


def files_below(*places: Path) -> list[Path]:
    """The files that are these places, or below them."""
    found: list[Path] = []
    for place in places:
        found += sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    return found


def resident(files: Iterable[Path]) -> float:
    """The share of the files' pages that is in the page cache, as mincore tells. Raises OSError."""
    pages = here = 0
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            for offset in range(0, size, _WINDOW):
                flags = _page_flags(stream.fileno(), offset, min(_WINDOW, size - offset))
                pages += len(flags)
                here += len(flags) - len(flags.translate(None, _ODD))
    return here / pages if pages else 0.0


def _page_flags(descriptor: int, offset: int, length: int) -> bytes:
    """A byte for each page; its lowest bit is set when the page is in memory."""
    flags = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    with mmap.mmap(descriptor, length, access=mmap.ACCESS_COPY, offset=offset) as view:
        start = ctypes.c_char.from_buffer(view)
        failed = _libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(length), flags)
        del start  # while it is there, the view can't be closed
    if failed:
        raise OSError(ctypes.get_errno(), "what is in the page cache can't be told")
    return bytes(flags)


def sync(files: Sequence[Path]) -> None:
    """Write what is dirty to the disk. Raises OSError."""
    _each(os.fsync, files)


def drop(files: Sequence[Path]) -> None:
    """Write what is dirty to the disk, then take the files out of the page cache. Raises OSError."""
    sync(files)
    _each(lambda descriptor: os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED), files)


def _each(act: Callable[[int], None], files: Sequence[Path]) -> None:
    def one(file: Path) -> None:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            act(descriptor)
        finally:
            os.close(descriptor)

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        list(pool.map(one, files))


def warm(files: Sequence[Path], threads: int) -> None:
    """Read the files once, through the page cache."""
    blocks = [(file, offset) for file in files for offset in range(0, file.stat().st_size, _BLOCK)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_read, blocks))


def _read(block: tuple[Path, int]) -> None:
    file, offset = block
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.pread(descriptor, _BLOCK, offset)
    finally:
        os.close(descriptor)
