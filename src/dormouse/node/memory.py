"""What a worker takes, and what one will take before it runs."""

from __future__ import annotations

import os
from pathlib import Path

from dormouse import host_memory
from dormouse.config import ServeConfig, gpus_of
from dormouse.node.parts import Model

_PAGE = os.sysconf("SC_PAGE_SIZE")

# Beside the weights: interpreter, libraries, KV cache and scratch of an idle worker, measured and rounded up.
_OVERHEAD = {"transformers": 1 << 30, "null": 64 << 20}


def estimate(model: Model, engine: str) -> int:
    """Bytes a worker of this model is expected to take."""
    return model.weight_bytes + engine_bytes(engine)


def engine_bytes(engine: str) -> int:
    """Bytes of it that are not the model's."""
    return _OVERHEAD.get(engine, 1 << 30)


def dram_tier(config: ServeConfig) -> int:
    """Bytes that the loader may pin for coded weights of models on GPUs."""
    if config.dram_tier is not None:
        return config.dram_tier
    return int(host_memory.total() * 0.15) if gpus_of(config) else 0


def oom_kills() -> int:
    """How many processes this kernel has killed for want of memory; 0 where it does not tell."""
    try:
        words = Path("/proc/vmstat").read_text().split()
    except OSError:
        return 0
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


def resident_bytes(pid: int) -> int:
    """The memory a process has now, shared file pages included; 0 when it has gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0
