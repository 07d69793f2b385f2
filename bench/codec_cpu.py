"""What the codec of floating-point numbers gains, and how fast numpy codes them on one core.

    python bench/codec_cpu.py [--mb 8] [--runs 7] [--model smollm2-135m] [--json FILE]

Subjects are chunks of numbers of known distributions, and the weights of an imported model (left out, with a note,
when it is not there). FP8 is scaled so that the largest number is the type's largest, as checkpoints have it. Beside
the codec stand LZ4, without the store's sampling that skips it, and a copy of the plain bytes. Speeds are plain bytes
per second of one thread's CPU time, the best of the runs: what other programs take does not count, what they do to the
caches does.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lz4.block
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dormouse.bench_start import host_facts
from dormouse.checkpoint.models import open_model
from dormouse.data_dir import default_data_dir
from dormouse.errors import DormouseError
from dormouse.store import floats
from dormouse.store.codec import Codec
from dormouse.store.store import Store
from dormouse.transfer.memory import keep_freed_memory

TYPES = {
    Codec.BF16: torch.bfloat16,
    Codec.FP16: torch.float16,
    Codec.FP32: torch.float32,
    Codec.FP8_E4M3: torch.float8_e4m3fn,
    Codec.FP8_E5M2: torch.float8_e5m2,
}


@dataclass(frozen=True)
class Row:
    """One subject with one way to code it. `ratio` is None for what is not coded; speeds are in GB/s."""

    subject: str
    way: str
    ratio: float | None
    encode: float
    decode: float | None


def subjects(size: int) -> Iterator[tuple[str, Codec, bytes]]:
    """Name, codec and numbers of each distribution."""
    random = np.random.default_rng(0)
    for codec, dtype in TYPES.items():
        count = size // floats.FORMATS[codec].item
        draws: dict[str, np.ndarray[Any, Any]] = {"N(0, 0.02)": random.normal(0, 0.02, count)}
        if codec is Codec.BF16:
            draws["N(0, 1)"] = random.normal(0, 1, count)
            draws["Laplace(0.02)"] = random.laplace(0, 0.02, count)
            draws["Student t(4) · 0.02"] = random.standard_t(4, count) * 0.02
        for name, draw in draws.items():
            if codec in (Codec.FP8_E4M3, Codec.FP8_E5M2):
                np.multiply(draw, torch.finfo(dtype).max / np.abs(draw).max(), out=draw)
            yield (
                f"{codec.name.lower()} {name}",
                codec,
                torch.from_numpy(draw).to(dtype).view(torch.uint8).numpy().tobytes(),
            )


def weights(name: str, folder: Path) -> Iterator[tuple[str, Codec, bytes]]:
    """The chunks of an imported model that are numbers, as it has them."""
    checkpoint = open_model(folder / "models", name).checkpoint
    assert checkpoint is not None
    with Store.open(folder / "store") as store, store.reader() as reader:
        for at, chunk in enumerate(reader.locate(store.manifest(checkpoint).refs)):
            if chunk.codec in floats.FORMATS:
                yield f"{name}, chunk {at}", Codec(chunk.codec), bytes(reader.plain(chunk))


def best(work: Callable[[], object], size: int, runs: int) -> float:
    """GB per second of CPU time."""
    times = []
    for _ in range(runs):
        begin = time.thread_time()
        work()
        times.append(time.thread_time() - begin)
    return size / min(times) / 1e9


def measure(subject: str, codec: Codec, plain: bytes, runs: int) -> Iterator[Row]:
    """All ways to code one subject. Raises AssertionError when anything but `plain` comes back."""
    size, out = len(plain), memoryview(bytearray(len(plain)))

    def row(
        way: str, stored: bytes | memoryview | None, encode: Callable[[], object], decode: Callable[[], object]
    ) -> Row:
        speed = best(decode, size, runs) if stored is not None else None
        assert stored is None or out == plain, f"{way} of {subject} gave back something else"
        return Row(subject, way, size / len(stored) if stored is not None else None, best(encode, size, runs), speed)

    stored = floats.encode(plain, codec)
    yield row(
        "floats", stored, lambda: floats.encode(plain, codec), lambda: floats.decode_into(codec, stored or b"", out)
    )
    packed = lz4.block.compress(plain, store_size=False)

    def unpack() -> None:
        out[:] = lz4.block.decompress(packed, uncompressed_size=size)

    yield row("lz4", packed, lambda: lz4.block.compress(plain, store_size=False), unpack)

    def copy() -> None:
        out[:] = plain

    yield row("copy", plain, copy, copy)


def show(rows: list[Row], console: Console) -> None:
    table = Table("subject", "way", "ratio", "encode GB/s", "decode GB/s", box=box.SIMPLE)
    for row in rows:
        cells = [row.ratio, row.encode, row.decode]
        table.add_row(row.subject, row.way, *("-" if cell is None else f"{cell:.3f}" for cell in cells))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=8, help="bytes of each subject, in MiB")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    console = Console(stderr=True)
    rows = [
        row for name, codec, plain in subjects(options.mb << 20) for row in measure(name, codec, plain, options.runs)
    ]
    result: dict[str, Any] = {"host": host_facts(), "numpy": np.__version__, "mb": options.mb, "runs": options.runs}
    result["load_average"] = round(os.getloadavg()[0], 1)  # beside its cores, this tells how far to trust the speeds
    try:
        chunks = list(weights(options.model, default_data_dir(os.environ)))
    except DormouseError as error:
        console.print(f"without weights: {error}")
    else:
        stored = [len(floats.encode(plain, codec) or plain) for _name, codec, plain in chunks]
        result["model"] = {"name": options.model, "ratio": sum(len(plain) for *_, plain in chunks) / sum(stored)}
        rows += [row for chunk in chunks[1:2] for row in measure(*chunk, options.runs)]
        console.print(f"{options.model}: {result['model']['ratio']:.3f}")
    show(rows, console)
    result["rows"] = [asdict(row) for row in rows]
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
