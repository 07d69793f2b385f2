"""How fast the float codec is on this GPU: checks a gigabyte of random weights first, then times both directions.

    python bench/codec_gpu.py [--json bench/results/codec_gpu.json] [--seconds 55] [--size-mb 1024]

Times are medians of several launches over more bytes than the cache holds, by the device's own clock, in GB/s of plain
bytes. Encoding is timed as a whole, and its three steps alone. nvCOMP's ANS is timed beside it where it can be imported
(nvidia-nvcomp-cu13, and nvidia-libnvcomp-cu13 with the library itself).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from dormouse.store import floats
from dormouse.store.codec import Codec
from dormouse.transfer import float_kernels as kernels

CHUNK = 8 << 20
RUNS = 7
ROW_SECONDS = 20
SIGMA = 0.02
BF16 = 4
DTYPES = {4: torch.bfloat16, 5: torch.float16, 6: torch.float32, 7: torch.float8_e4m3fn, 8: torch.float8_e5m2}
NAMES = {4: "bf16", 5: "fp16", 6: "fp32", 7: "fp8_e4m3", 8: "fp8_e5m2"}
SCALES = {7: 1.0, 8: 1.0}
"""fp8 weights are stored with a scale that brings them near 1."""


@dataclass
class Report:
    """What was measured. What fails is a row too."""

    seconds: float
    begin: float = field(default_factory=time.perf_counter)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def row(self, what: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Print and keep one row, unless the time is up."""
        if time.perf_counter() - self.begin > self.seconds:
            print(f"{what:58} not measured: the time is up", flush=True)
            self.rows.append({"what": what, "skipped": "time is up"})
            return
        start = time.perf_counter()
        signal.alarm(ROW_SECONDS)
        try:
            found = measure()
        except Exception as error:  # noqa: BLE001 (what does not compile is a result)
            traceback.print_exc(limit=2, file=sys.stderr)
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        finally:
            signal.alarm(0)
        found["took_seconds"] = round(time.perf_counter() - start, 2)
        print(f"{what:58} {'  '.join(f'{key}={_short(value)}' for key, value in found.items())}", flush=True)
        self.rows.append({"what": what, **found})


def _too_long(_signal: int, _frame: object) -> None:
    raise TimeoutError(f"a row took longer than {ROW_SECONDS} s")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def timed(work: Callable[[], object], plain_bytes: int, runs: int = RUNS) -> dict[str, Any]:
    """Median time of `work` on the device after a first run that compiles."""
    work()
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) / 1e3 for begin, end in events)
    median = statistics.median(times)
    return {"gb_per_s": plain_bytes / median / 1e9, "ms": median * 1e3, "best_ms": times[0] * 1e3}


def weights(codec: int, size: int) -> torch.Tensor:
    made = torch.empty(size, dtype=torch.uint8, device="cuda")
    typed = made.view(DTYPES[codec])
    step = 64 << 20
    for at in range(0, typed.numel(), step):
        part = typed[at : at + step]
        part.copy_(torch.randn(part.numel(), device="cuda") * SCALES.get(codec, SIGMA))
    return made


class Coded:
    """Weights, their payloads as a load would have them in staging memory, and the rows that decode them."""

    def __init__(self, codec: int, size: int) -> None:
        self.codec, self.plain = codec, weights(codec, size)
        self.payloads = kernels.encode_batch(self.plain, codec, CHUNK)
        self.kept = [each for each in self.payloads if each is not None]
        self.stored = sum(len(each) for each in self.kept)
        rows, end, places = [], 0, []
        for chunk, payload in enumerate(self.payloads):
            if payload is not None:
                length = min(CHUNK, size - chunk * CHUNK)
                rows.append([codec, end, len(payload), chunk * CHUNK, length])
                places.append((end, payload))
                end += -(-len(payload) // 4096) * 4096
        self.staging = torch.zeros(end + 16, dtype=torch.uint8, device="cuda")
        for at, payload in places:
            self.staging[at : at + len(payload)] = payload
        self.covered = sum(row[4] for row in rows)
        self.out = torch.zeros_like(self.plain)
        self.status = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.decoder = kernels.FloatDecoder("cuda")
        self.tasks = self.decoder.prepare(np.array(rows, np.int64))
        self.count = len(rows)

    def decode(self) -> None:
        self.decoder.decode(self.tasks, 0, self.count, self.staging, self.out, self.status)

    def check(self) -> dict[str, Any]:
        """Whether all comes back; whether the reference codec agrees, on two chunks."""
        self.out.zero_()
        self.status.zero_()
        self.decode()
        right = int(self.status.item()) == 0 and len(self.kept) == len(self.payloads)
        right = right and torch.equal(self.out, self.plain)
        found: dict[str, Any] = {"right": right, "ratio": self.plain.numel() / max(self.stored, 1)}
        if not right:
            found["status"], found["kept"] = int(self.status.item()), f"{len(self.kept)}/{len(self.payloads)}"
            found["wrong_bytes"] = int((self.out != self.plain).sum().item())
        return {**found, **self._reference()}

    def _reference(self) -> dict[str, Any]:
        for chunk in (0, len(self.payloads) - 1):
            plain = self.plain[chunk * CHUNK : (chunk + 1) * CHUNK].cpu().numpy()
            wanted, made = floats.encode(plain.data, Codec(self.codec)), self.payloads[chunk]
            if (wanted is None) != (made is None):
                return {"reference": "differs in what is worth coding"}
            if wanted is not None and made is not None:
                if bytes(wanted) != made.cpu().numpy().tobytes():
                    return {"reference": "payload differs"}
                if bytes(floats.decode(Codec(self.codec), wanted, len(plain))) != plain.tobytes():
                    return {"reference": "decodes to other bytes"}
        return {"reference": "same bytes"}


def encode(coded: Coded) -> dict[str, Any]:
    """All of it, waiting and memory included."""
    found = timed(lambda: kernels.encode_batch(coded.plain, coded.codec, CHUNK), coded.plain.numel())
    made = kernels.encode_batch(coded.plain, coded.codec, CHUNK)
    same = all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(made, coded.payloads, strict=True)
    )
    return {**found, "same": same}


def encode_steps(coded: Coded) -> dict[str, Any]:
    """Each step of encoding alone, in milliseconds."""
    encoding = kernels.Encoding(coded.plain, coded.codec, CHUNK)
    steps = {"measure": encoding.measure, "choose": encoding.choose, "write": encoding.write}
    return {f"{name}_ms": timed(step, coded.plain.numel())["ms"] for name, step in steps.items()}


def as_imported(coded: Coded) -> dict[str, Any]:
    """A run of chunks as an import has it coded: from the host's memory and back there, decoded again and compared."""
    from dormouse.transfer.float_coder import GpuCoder

    plain = coded.plain[: 128 << 20].cpu().numpy().data
    chunks = [plain[at : at + CHUNK] for at in range(0, len(plain), CHUNK)]
    coder = GpuCoder("cuda")
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        made = coder.code(chunks, Codec(coded.codec))
        times.append(time.perf_counter() - begin)
    median = statistics.median(times[1:])  # the first one compiles
    kept = sum(each.payload is not None for each in made)
    return {"gb_per_s": len(plain) / median / 1e9, "ms": median * 1e3, "kept": f"{kept}/{len(chunks)}"}


def one_extent(coded: Coded) -> dict[str, Any]:
    """32 MiB of plain bytes a launch, as the load pipeline does it: shows what a launch costs."""

    def launches() -> None:
        for first in range(0, coded.count - 3, 4):
            coded.decoder.decode(coded.tasks, first, 4, coded.staging, coded.out, coded.status)

    start = time.perf_counter()
    found = timed(launches, coded.covered, 3)
    found["host_us_per_launch"] = (time.perf_counter() - start) / 4 / max(coded.count // 4, 1) * 1e6
    return found


def copy_speed(size: int) -> dict[str, Any]:
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return timed(lambda: target.copy_(source), size)


def nvcomp(plain: torch.Tensor) -> dict[str, Any]:
    """nvCOMP's ANS over 16-bit floats, in its own chunks."""
    from nvidia import nvcomp as library

    array = library.as_array(plain.view(torch.float16))
    stream = torch.cuda.current_stream().cuda_stream
    coder = library.Codec(algorithm="ANS", data_type="<f2", uncomp_chunk_size=1 << 18, cuda_stream=stream)
    coded = coder.encode(array)
    found = {f"encode_{key}": value for key, value in timed(lambda: coder.encode(array), plain.numel(), 3).items()}
    decoded = timed(lambda: coder.decode(coded), plain.numel(), 3)
    found |= {f"decode_{key}": value for key, value in decoded.items()}
    return {**found, "ratio": plain.numel() / coded.buffer_size}


def machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "unit": "GB/s of plain bytes, median",
        "chunk_bytes": CHUNK,
    }


def measure(report: Report, size: int) -> None:
    made: dict[int, Coded] = {}

    def checked(codec: int, length: int) -> dict[str, Any]:
        made[codec] = Coded(codec, length)
        return made[codec].check()

    report.row("copy within the device (read and written once)", lambda: copy_speed(size))
    report.row(f"bf16 N(0, {SIGMA}): check", lambda: checked(BF16, size))
    if BF16 in made:
        bf16 = made[BF16]
        report.row("bf16 decode", lambda: timed(bf16.decode, bf16.covered))
        report.row("bf16 encode", lambda: encode(bf16))
        report.row("bf16 encode, step by step", lambda: encode_steps(bf16))
        report.row("bf16 coded for an import, host to host, checked", lambda: as_imported(bf16))
        report.row("bf16 decode, 32 MiB a launch", lambda: one_extent(bf16))
        report.row("nvCOMP ANS, <f2", lambda: nvcomp(bf16.plain))
        del bf16, made[BF16]
    for codec in (5, 6, 7, 8):
        report.row(f"{NAMES[codec]}: check", lambda codec=codec: checked(codec, size // 4))
        if codec in made:
            coded = made.pop(codec)
            report.row(f"{NAMES[codec]} decode", lambda coded=coded: timed(coded.decode, max(coded.covered, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seconds", type=float, default=55, help="measure nothing more after this time (55)")
    parser.add_argument("--size-mb", type=int, default=1024, help="MiB of weights (1024)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU that torch can use: there is nothing to measure here")
    signal.signal(signal.SIGALRM, _too_long)
    report = Report(arguments.seconds)
    torch.manual_seed(0)
    measure(report, arguments.size_mb << 20)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": report.rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
