"""What a load did: figures that are taken once, where they arise, and shown as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Progress = Callable[[int, int], None]
"""Called with the plain bytes that have come and those that will have, by one thread at a time."""


@dataclass(frozen=True)
class LoadReport:
    """`direct_bytes` were read past the page cache, `cached_bytes` through it, `tier_bytes` came from the DRAM tier.
    `decoded_on` tells what checked and decoded: "host", or "device" (which leaves LZ4 and zstd to the host). `reached`:
    of a load to GPUs, the seconds after which it was worked out, had its lanes, and had asked for all."""

    seconds: float
    plain_bytes: int
    stored_bytes: int
    direct_bytes: int
    cached_bytes: int
    tier_bytes: int = 0
    peak_pinned_bytes: int = 0
    decoded_on: str = "host"
    reached: Mapping[str, float] = field(default_factory=dict)
