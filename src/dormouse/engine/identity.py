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


_ALSO_IN_A_WORKER = (
    "checkpoint/adapters.py",
    "checkpoint/models.py",
    "checkpoint/tensors.py",
    "checkpoint/null_source.py",
    "checkpoint/torch_tensors.py",
    "checkpoint/transformers_binding.py",
    "transfer/handles.py",
)


@cache
def worker_identity() -> str:
    """Version, protocol and a digest of the source files that are in a worker's memory and decide what it does."""
    package = Path(__file__).parent.parent
    files = [*sorted(Path(__file__).parent.glob("*.py")), *(package / name for name in _ALSO_IN_A_WORKER)]
    digest = blake3()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"{dormouse.__version__} protocol {PROTOCOL_VERSION} code {digest.hexdigest(8)}"
