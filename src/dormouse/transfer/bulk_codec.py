"""Chooses how a large piece of a process's memory is stored: as floats, with LZ4, or raw.

    piece --a few samples--> what it looks like (guess) --what this machine's disk and cores do (Rates)--> codec

Coding floats costs about two seconds of a core for each gigabyte. That pays where the disk is what is waited for, and
loses where the store is in memory. So both are measured, once for each disk, when the first piece of floats turns up;
the rest is a plain function of the figures (`floats_pay`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dormouse.store import floats
from dormouse.store.codec import FLOATS, Codec, sampled_share
from dormouse.store.transaction import FLOATS_AT_ONCE
from dormouse.transfer.budget import default_threads

log = logging.getLogger(__name__)

_SPOTS, _SPOT = 8, 4 << 10
_LZ4_HOPELESS = 0.98
_LZ4_SUFFICES = 0.55
"""No kind of floats gets below; not to look at them saves most of the time of a guess."""
_MOST_STORED = 0.865
"""A guess above this share is not worth coding: the codec itself gives up above 7/8."""
_MARGIN = 1.05
_PROBE_FILES, _PROBE_BYTES = 8, 16 << 20
_PROBE_VALUES = 1 << 20


class Rates(NamedTuple):
    """Bytes per second: of the disk, and of plain bytes that one thread codes and decodes."""

    write: float
    read: float
    encode: float
    decode: float


def floats_pay(rates: Rates, threads: int, stored: float) -> bool:
    """Whether coding to the share `stored` of the plain bytes makes a capture faster, and no restore slower."""
    capture = min(rates.write / stored, rates.encode * threads)
    restore = min(rates.read / stored, rates.decode * threads)
    return capture >= rates.write * _MARGIN and restore >= rates.read


def guess(plain: memoryview) -> tuple[Codec, float]:
    """What a piece looks like, and about what share of its bytes would be stored."""
    step = (len(plain) - _SPOT) // (_SPOTS - 1) & ~7
    spots = [plain[at * step : at * step + _SPOT] for at in range(_SPOTS)]
    packed = sampled_share(plain)
    if packed <= _LZ4_SUFFICES:
        return Codec.LZ4, packed
    numbers = b"".join(spot[: _SPOT // 2] for spot in spots)
    stored, codec = min((_share(numbers, codec), codec) for codec in FLOATS)
    if stored <= _MOST_STORED and stored < packed:
        return codec, stored
    return (Codec.LZ4, packed) if packed <= _LZ4_HOPELESS else (Codec.RAW, 1.0)


def _share(sample: bytes, codec: Codec) -> float:
    """What a codec of floats would make of a sample: two bits for the best three neighbouring exponents, two more for
    the next three and for those after them, and a byte for the rest (docs/formats.md)."""
    form = floats.FORMATS[codec]
    exponents = np.frombuffer(sample, form.word) >> form.low & (1 << form.bits) - 1
    counts = np.bincount(exponents.astype(np.intp), minlength=1 << form.bits)
    best = int((counts[:-2] + counts[1:-1] + counts[2:]).argmax())
    others = np.sort(np.delete(counts, slice(best, best + 3)))[::-1]
    passed = [int(others[begin:].sum()) / len(exponents) for begin in (0, 3, 6)]
    bits = 2 + 2 * passed[0] + 2 * passed[1] + 8 * passed[2]
    return 1 - (form.bits - bits) / (8 * form.item)


class BulkCodec:
    """The codecs for one store. Many threads may call it at once."""

    def __init__(
        self, folder: Path, *, threads: int | None = None, measure: Callable[[Path], Rates] | None = None
    ) -> None:
        """`threads` code at once; those of this process, unless others do."""
        self._folder = folder
        self._threads = threads or min(default_threads(), FLOATS_AT_ONCE)
        self._measure = measure or measured_rates

    def __call__(self, plain: memoryview) -> Codec:
        """The codec for a large piece."""
        codec, stored = guess(plain)
        return codec if codec not in FLOATS or self.pays(stored) else Codec.RAW

    def pays(self, stored: float) -> bool:
        """Whether to code floats of which this share would be stored."""
        return floats_pay(self._measure(self._folder), self._threads, stored)


_known: dict[int, Rates] = {}
_measuring = threading.Lock()


def measured_rates(folder: Path) -> Rates:
    """Those of the disk of a folder, measured once per process; what can't be measured counts as infinitely fast, so
    that nothing is coded there."""
    device = folder.stat().st_dev
    with _measuring:
        if device not in _known:
            _known[device] = rates = Rates(*_disk_rates(folder), *_codec_rates())
            log.info(
                "the disk of %s writes %.1f and reads %.1f GB/s; a core codes %.2f and decodes %.2f",
                folder,
                *(rate / 1e9 for rate in rates),
            )
        return _known[device]


def _disk_rates(folder: Path) -> tuple[float, float]:
    """Of several files at once, as packs are written. They never have a name, so nothing can be left behind."""
    try:
        with contextlib.ExitStack() as exits:
            files = [_nameless_file(folder) for _ in range(_PROBE_FILES)]
            for fd in files:
                exits.callback(os.close, fd)
            pool = exits.enter_context(ThreadPoolExecutor(_PROBE_FILES))
            content = exits.enter_context(mmap.mmap(-1, _PROBE_BYTES))
            content[:] = os.urandom(1 << 20) * (_PROBE_BYTES >> 20)
            writing = _seconds(lambda: list(pool.map(lambda fd: _whole(os.pwritev(fd, [content], 0)), files)))
            reading = _seconds(lambda: list(pool.map(lambda fd: _whole(os.preadv(fd, [content], 0)), files)))
    except OSError as error:
        log.warning("how fast the disk of %s is could not be measured: %s", folder, error)
        return float("inf"), float("inf")
    size = _PROBE_FILES * _PROBE_BYTES
    return size / writing, size / reading


def _nameless_file(folder: Path) -> int:
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(folder, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(folder, flags, 0o600)


def _whole(count: int) -> None:
    if count != _PROBE_BYTES:
        raise OSError(errno.EIO, "a probe was cut short")


def _codec_rates() -> tuple[float, float]:
    values = np.random.default_rng(0).standard_normal(_PROBE_VALUES, np.float32)
    plain = memoryview((values.view(np.uint32) >> 16).astype("<u2").tobytes())
    coded = floats.encode(plain, Codec.BF16)  # once for the arrays that it uses again
    assert coded is not None
    encoding = _seconds(lambda: floats.encode(plain, Codec.BF16))
    floats.decode(Codec.BF16, coded, len(plain))
    decoding = _seconds(lambda: floats.decode(Codec.BF16, coded, len(plain)))
    return len(plain) / encoding, len(plain) / decoding


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
