"""Chooses how a large piece of a process's memory is stored: as floats, with LZ4, or raw.

    piece --a few samples--> what it looks like (guess) --what this machine's disk and cores do (Rates)--> codec

Coding floats costs a core seconds for each gigabyte. That pays where the disk is what is waited for, and loses where the
store is in memory: so both are measured, once for each disk, when the first piece of floats turns up, and the rest is a
plain function of the figures (`floats_pay`).
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import lz4.block
import numpy as np

from dormouse.store import floats
from dormouse.store.codec import FLOATS, Codec
from dormouse.transfer.budget import default_threads

log = logging.getLogger(__name__)

_SPOTS, _SPOT = 8, 4 << 10
_LZ4_HOPELESS = 0.98
_MOST_STORED = 0.86
"""A guess above this share is not worth coding: the codec itself gives up above 7/8."""
_OVERHEAD = 0.3
"""Bits by which the codec's digits are longer than the entropy of the exponents."""
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
    sample = b"".join(plain[at * step : at * step + _SPOT] for at in range(_SPOTS))
    packed = len(lz4.block.compress(sample, store_size=False)) / len(sample)
    stored, codec = min((_share(sample, codec), codec) for codec in FLOATS)
    if stored <= _MOST_STORED and stored < packed:
        return codec, stored
    return (Codec.LZ4, packed) if packed <= _LZ4_HOPELESS else (Codec.RAW, 1.0)


def _share(sample: bytes, codec: Codec) -> float:
    """What a codec of floats would make of a sample, by the entropy of the exponents."""
    form = floats.FORMATS[codec]
    exponents = np.frombuffer(sample, form.word) >> form.low & (1 << form.bits) - 1
    counts = np.bincount(exponents.astype(np.intp))
    odds = counts[counts > 0] / len(exponents)
    bits = min(float(form.bits), float(-(odds * np.log2(odds)).sum()) + _OVERHEAD)
    return 1 - (form.bits - bits) / (8 * form.item)


class BulkCodec:
    """The codecs for one store. Many threads may call it at once."""

    def __init__(
        self, folder: Path, *, threads: int | None = None, measure: Callable[[Path], Rates] | None = None
    ) -> None:
        self._folder = folder
        self._threads = threads or default_threads()
        self._measure = measure or measured_rates

    def __call__(self, plain: memoryview) -> Codec:
        """The codec for a large piece."""
        codec, stored = guess(plain)
        if codec not in FLOATS or floats_pay(self._measure(self._folder), self._threads, stored):
            return codec
        return Codec.RAW


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
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".speed-") as place:
            paths = [Path(place, str(number)) for number in range(_PROBE_FILES)]
            with ThreadPoolExecutor(_PROBE_FILES) as pool, mmap.mmap(-1, _PROBE_BYTES) as content:
                content[:] = os.urandom(1 << 20) * (_PROBE_BYTES >> 20)
                writing = _seconds(lambda: list(pool.map(lambda path: _transfer(path, content, os.pwritev), paths)))
                reading = _seconds(lambda: list(pool.map(lambda path: _transfer(path, content, os.preadv), paths)))
    except OSError as error:
        log.warning("how fast the disk of %s is could not be measured: %s", folder, error)
        return float("inf"), float("inf")
    size = _PROBE_FILES * _PROBE_BYTES
    return size / writing, size / reading


def _transfer(path: Path, content: mmap.mmap, transfer: Callable[[int, list[mmap.mmap], int], int]) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.open(path, flags, 0o600)
    try:
        if transfer(fd, [content], 0) != _PROBE_BYTES:
            raise OSError(errno.EIO, "a probe was cut short")
    finally:
        os.close(fd)


def _codec_rates() -> tuple[float, float]:
    values = np.random.default_rng(0).standard_normal(_PROBE_VALUES, np.float32)
    plain = memoryview((values.view(np.uint32) >> 16).astype("<u2").view(np.uint8))
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
