"""Which code a worker is: for telling whether a snapshot of one would still answer by today's rules."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from blake3 import blake3

import dormouse
from dormouse.engine.messages import PROTOCOL_VERSION

PACKAGES: dict[str, tuple[str, ...]] = {
    "null": ("msgspec",),
    "transformers": ("torch", "transformers", "tokenizers", "safetensors", "numpy", "msgspec"),
}
"""The packages whose code and data are in a worker's memory, by engine."""


@cache
def worker_identity() -> str:
    """Version, protocol and a digest of the worker's own source files."""
    digest = blake3()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"{dormouse.__version__} protocol {PROTOCOL_VERSION} code {digest.hexdigest(8)}"
