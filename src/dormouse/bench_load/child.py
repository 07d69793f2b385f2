"""The process that one row is measured in: `python -m dormouse.bench_load.child MODULE:NAME DEVICE`.

It talks in lines of JSON over the standard output it was started with (a peer's own prints go to stderr):

    -> version    packages imported, the device's context made; or "missing", "error"
    <- job        what to load (method.Job)
    -> ready      `before` is done; only now is the page cache put into the state that the row asks for
    <- go         an empty line
    -> loaded     seconds, CPU seconds
    -> wrong      what is wrong with the tensors, nothing if they are right
    -> again      seconds of the same load once more in this process, with what it keeps; none if that is not asked,
                  or if the first one took so long that this would make no difference

On a GPU the clock stops after a synchronisation. In host memory it stops when every byte has been read once: a loader
that only maps files would otherwise have done nothing yet.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from dormouse.bench_load.method import WHOLE, Job, Method, MissingError, Tensors, find, kept
from dormouse.bench_load.weights import read_reference, sample_ranges, wrapped

_NAMED = 3
_QUICK = 2.0


class Loaded(msgspec.Struct, frozen=True):
    """`resident_growth` counts file pages that were mapped too; `device_bytes` is what the load took of the GPU."""

    seconds: float
    cpu_seconds: float
    plain_bytes: int
    resident_growth: int | None
    device_bytes: int


def main() -> None:
    """Speak the protocol, and leave at once: what a library does at its end is not measured."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    place, device = sys.argv[1:3]
    try:
        _serve(find(place), device, sys.stdin.buffer, out)
    except MissingError as error:
        _tell(out, {"missing": str(error)})
    except Exception as error:  # noqa: BLE001 (whatever a peer does becomes its row)
        import traceback

        traceback.print_exc()
        _tell(out, {"error": f"{type(error).__name__}: {error}"})
    sys.stderr.flush()
    os._exit(0)


def _serve(method: Method, device: str, orders: BinaryIO, out: BinaryIO) -> None:
    version = method.prepare(device)
    torch = _torch(device)
    _tell(out, {"version": version})
    line = orders.readline()
    if not line:
        return
    job = msgspec.json.decode(line, type=Job)
    prepared = method.before(job)
    _tell(out, {"ready": True})
    if not orders.readline():
        return
    loaded, tensors, totals = _measure(method, job, prepared, torch)
    _tell(out, {"loaded": loaded})
    _tell(out, {"wrong": _wrong(tensors, totals, job, torch, some=method.source not in WHOLE)})
    again = None
    if job.again and loaded.seconds < _QUICK:
        tensors.clear()
        kept.clear()
        if job.device.startswith("cuda"):
            torch.cuda.empty_cache()
        again = _measure(method, job, prepared, torch)[0].seconds
    _tell(out, {"again": again})


def _torch(device: str) -> Any:
    """torch, with the device's context made and its copy and sum kernels loaded."""
    import torch

    block = torch.ones(1 << 20, dtype=torch.uint8).to(device)
    block.view(torch.int64).sum().item()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return torch


def _measure(method: Method, job: Job, prepared: Any, torch: Any) -> tuple[Loaded, Tensors, dict[str, int]]:
    on_device = job.device.startswith("cuda")
    free = torch.cuda.mem_get_info(job.device)[0] if on_device else 0
    totals: dict[str, int] = {}
    before = _forget_peak()
    used, start = _cpu_seconds(), time.perf_counter()
    tensors = method.load(job, prepared)
    if on_device:
        torch.cuda.synchronize(job.device)
    else:
        totals = {name: _total(tensor, torch) for name, tensor in tensors.items()}
    seconds, cpu = time.perf_counter() - start, _cpu_seconds() - used
    taken = free - torch.cuda.mem_get_info(job.device)[0] if on_device else 0
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    growth = None if before is None else _status("VmHWM") - before
    return Loaded(seconds, cpu, size, growth, taken), tensors, totals


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _forget_peak() -> int | None:
    """Begin the peak of resident memory anew; what is resident now. None where the kernel can't do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5\n")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


def _flat(tensor: Any, torch: Any) -> Any:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _total(tensor: Any, torch: Any) -> int:
    """The sum of a tensor's bytes as 64-bit integers; reads them all."""
    data = _flat(tensor, torch)
    data = data[: data.numel() // 8 * 8]
    if data.storage_offset() % 8 or data.data_ptr() % 8:
        data = data.clone()
    return wrapped(int(data.view(torch.int64).sum().item()))


def _wrong(tensors: Tensors, totals: dict[str, int], job: Job, torch: Any, *, some: bool) -> list[str]:
    """What differs from the reference, the first few. `some`: not all tensors need be there."""
    reference = read_reference(Path(job.reference))
    wrong = [f"{name} is missing" for name in reference if name not in tensors and not some]
    wrong += [f"{name} should not be there" for name in tensors if name not in reference]
    for name in tensors:
        if name in reference and len(wrong) < _NAMED:
            expected = reference[name]
            total = totals[name] if name in totals else _total(tensors[name], torch)
            if list(tensors[name].shape) != expected.shape or _dtype(tensors[name]) != expected.dtype:
                wrong.append(f"{name} is {_dtype(tensors[name])} {list(tensors[name].shape)}")
            elif total != expected.total or _sample(tensors[name], torch) != expected.sample:
                wrong.append(f"{name} has other bytes than the file")
    return wrong[:_NAMED]


def _dtype(tensor: Any) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


def _sample(tensor: Any, torch: Any) -> str:
    from blake3 import blake3

    data = _flat(tensor, torch)
    digest = blake3()
    for start, count in sample_ranges(data.numel()):
        digest.update(data[start : start + count].cpu().numpy().tobytes())
    return digest.hexdigest()


def _tell(out: BinaryIO, message: object) -> None:
    out.write(msgspec.json.encode(message) + b"\n")
    out.flush()


_DTYPES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "complex64": "C64",
}


if __name__ == "__main__":
    main()
