"""What the codec of bfloat16 does alone: its ratio, and how fast one core and the GPU code and decode.

`python -m dormouse.bench_load.codec DEVICE` prepares, waits for a line, and tells figures of N(0, 0.02): the CPU's by
the reference codec on one thread, the GPU's by the kernels. What is decoded is compared with what was coded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

from dormouse.bench_load.weights import SIGMA
from dormouse.checkpoint.tensors import CHUNK_SIZE
from dormouse.store.codec import Codec

_HOST_CHUNKS = 16
_DEVICE_CHUNKS = 256
_REPEATS = 3


class CodecFigures(msgspec.Struct, frozen=True):
    """Bytes per second are of plain bytes. `right`: all that was decoded equals what was coded."""

    where: str
    plain_bytes: int
    ratio: float
    encode: float
    decode: float
    right: bool


def on_host() -> CodecFigures:
    """One thread."""
    import numpy as np

    from dormouse.store import floats

    random = np.random.Generator(np.random.SFC64(7))
    values = random.standard_normal(_HOST_CHUNKS * CHUNK_SIZE // 2, dtype=np.float32) * np.float32(SIGMA)
    plain = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    chunks = [plain[at : at + CHUNK_SIZE] for at in range(0, len(plain), CHUNK_SIZE)]
    coded = [memoryview(floats.encode(chunk, Codec.BF16) or b"") for chunk in chunks]
    out = memoryview(bytearray(CHUNK_SIZE))

    def decode() -> None:
        for payload in coded:
            floats.decode_into(Codec.BF16, payload, out)

    def encode() -> None:
        for chunk in chunks:
            floats.encode(chunk, Codec.BF16)

    stored = sum(map(len, coded))
    decoded, encoded = _best(decode), _best(encode)
    right = out == chunks[-1]
    return CodecFigures("one core", len(plain), len(plain) / stored, len(plain) / encoded, len(plain) / decoded, right)


def on_device(torch: Any, device: str, chunks: int = _DEVICE_CHUNKS) -> CodecFigures:
    """The kernels; the clock stops when the device has done it."""
    import numpy as np

    from dormouse.transfer.float_kernels import FloatDecoder, encode_batch

    size = chunks * CHUNK_SIZE
    values = torch.empty(size // 2, dtype=torch.bfloat16, device=device).normal_(0, SIGMA)
    plain = values.view(torch.uint8)
    payloads = [payload for payload in encode_batch(plain, Codec.BF16, CHUNK_SIZE) if payload is not None]
    starts = np.cumsum([0, *(-(-payload.numel() // 16) * 16 for payload in payloads)])
    staging = torch.zeros(int(starts[-1]), dtype=torch.uint8, device=device)
    for start, payload in zip(starts.tolist(), payloads, strict=False):
        staging[start : start + payload.numel()] = payload
    rows = [
        (Codec.BF16, start, payload.numel(), number * CHUNK_SIZE, CHUNK_SIZE)
        for number, (start, payload) in enumerate(zip(starts.tolist(), payloads, strict=False))
    ]
    target, status = torch.zeros_like(plain), torch.zeros(1, dtype=torch.int32, device=device)
    decoder = FloatDecoder(device)
    tasks = decoder.prepare(np.array(rows, np.int64))
    decode = _synchronised(torch, device, lambda: decoder.decode(tasks, 0, len(rows), staging, target, status))
    encode = _synchronised(torch, device, lambda: encode_batch(plain, Codec.BF16, CHUNK_SIZE))
    decoded, encoded = _best(decode), _best(encode)
    stored = sum(payload.numel() for payload in payloads)
    right = int(status.item()) == 0 and bool(torch.equal(target, plain))
    return CodecFigures(device, size, size / stored, size / encoded, size / decoded, right)


def _synchronised(torch: Any, device: str, work: Callable[[], object]) -> Callable[[], None]:
    def timed() -> None:
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    return timed


def _best(work: Callable[[], None]) -> float:
    """Seconds of the fastest of some runs, after one that counts for nothing."""
    seconds = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def main() -> None:
    """Prepare, wait, tell."""
    device = sys.argv[1]
    figures = []
    if device.startswith("cuda"):
        import torch

        on_device(torch, device, chunks=1)  # compiles the kernels
    if not sys.stdin.readline():
        return
    figures.append(on_host())
    if device.startswith("cuda"):
        figures.append(on_device(torch, device))
    sys.stdout.buffer.write(msgspec.json.encode({"codec": figures}) + b"\n")


if __name__ == "__main__":
    main()
