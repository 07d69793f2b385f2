"""How fast a GPU checks the signatures of chunks, and whether it finds what is wrong with them.

    python bench/blake3_gpu.py [--mib 512] [--passes 10] [--json FILE]

Chunks of random bytes lie one after another in one block of GPU memory, larger than the caches, and are checked call by
call, as a load does it extent by extent. GB/s counts stored bytes over all calls of a pass, launches included;
`launch_us` is what Python and the driver take per call.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dormouse.store.chunk import Digest
from dormouse.store.key import Key
from dormouse.store.pack import aligned, chunk_mac, identity
from dormouse.transfer.blake3_kernel import SignatureCheck, SignedTasks

KEY = Key(bytes(range(32)))
CODEC = 4
KIB, MIB = 1 << 10, 1 << 20


class Signed:
    """Chunks of these lengths, signed on the host."""

    def __init__(self, lengths: list[int], check: SignatureCheck) -> None:
        self.lengths = lengths
        self.sources = [0]
        for length in lengths:
            self.sources.append(self.sources[-1] + aligned(length))
        self.staging = torch.randint(0, 256, (self.sources[-1],), dtype=torch.uint8, device="cuda")
        self.status = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.check = check
        self.tasks = self._prepared()

    def _prepared(self) -> SignedTasks:
        host = memoryview(self.staging.cpu().numpy())
        names = [(Digest(random.randbytes(32)), CODEC, length * 3 // 2) for length in self.lengths]
        macs = [
            chunk_mac(KEY, *name, host[at : at + length])
            for name, at, length in zip(names, self.sources, self.lengths, strict=False)
        ]
        rows = list(zip(self.sources, self.lengths, strict=False))
        return self.check.prepare(rows, b"".join(identity(*name) for name in names), b"".join(macs))

    def run(self, per_call: int) -> None:
        """Check all, `per_call` chunks at a time."""
        for first in range(0, len(self.lengths), per_call):
            count = min(per_call, len(self.lengths) - first)
            self.check.check(self.tasks, first, count, self.staging, self.status)

    def found(self) -> bool:
        """Whether a signature did not match, since this was last asked."""
        found = bool(int(self.status))
        self.status.zero_()
        return found


def finds_changes(signed: Signed, samples: int) -> bool:
    """Whether a changed byte is found wherever it is, and only there."""
    for _ in range(samples):
        i = random.randrange(len(signed.lengths))
        at = signed.sources[i] + random.choice([0, signed.lengths[i] - 1, random.randrange(signed.lengths[i])])
        signed.staging[at] ^= 1
        signed.check.check(signed.tasks, i, 1, signed.staging, signed.status)
        there = signed.found()
        signed.staging[at] ^= 1
        signed.check.check(signed.tasks, i, 1, signed.staging, signed.status)
        if not there or signed.found():
            return False
    return True


def seconds(work: Callable[[], None], passes: int) -> tuple[float, float]:
    """The median time of a pass, and of issuing it."""
    times, issued = [], []
    for _ in range(passes):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        issued.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times)[passes // 2], sorted(issued)[passes // 2]


def measure(name: str, lengths: list[int], per_call: int, check: SignatureCheck, passes: int) -> dict[str, Any]:
    """One line of the report."""
    signed = Signed(lengths, check)
    signed.run(per_call)
    accepted = not signed.found()
    total, issued = seconds(lambda: signed.run(per_call), passes)
    calls = -(-len(lengths) // per_call)
    return {
        "case": name,
        "accepted": accepted and not signed.found(),
        "changes_found": finds_changes(signed, 20),
        "gb_per_s": round(sum(lengths) / total / 1e9, 1),
        "us_per_call": round(total / calls * 1e6, 1),
        "launch_us": round(issued / calls * 1e6, 1),
    }


def report(mib: int, passes: int) -> dict[str, Any]:
    """All cases."""
    begin = time.perf_counter()
    check = SignatureCheck("cuda", KEY.chunks.secret)
    first = Signed([MIB + 5, 100], check)
    first.run(2)
    accepted = not first.found()
    compiled = time.perf_counter() - begin
    packed = 5_592_405  # 8 MiB at the ratio of BF16 weights
    mixed = [random.randrange(1, 8 * MIB) for _ in range(mib // 4)]
    cases = [
        ("8 MiB chunks, 4 per call", [8 * MIB] * (mib // 8), 4),
        ("8 MiB chunks, 16 per call", [8 * MIB] * (mib // 8), 16),
        ("5.3 MiB chunks, 6 per call", [packed] * (mib * MIB // packed), 6),
        ("random lengths, 8 per call", mixed, 8),
        ("16 MiB chunks, 1 per call", [16 * MIB - 1] * (mib // 16), 1),
        ("64 KiB chunks, 512 per call", [64 * KIB] * (mib * 16), 512),
    ]
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "first_use_s": round(compiled, 2),
        "first_accepted": accepted,
        "cases": [measure(name, lengths, per_call, check, passes) for name, lengths, per_call in cases],
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(report(arguments.mib, arguments.passes), indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
