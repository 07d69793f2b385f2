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


def budget(config: ServeConfig) -> int:
    """Bytes that all workers and what is kept for them may take together."""
    return config.memory or int(host_memory.total() * 0.8)


def allotted(setting: float, whole: int) -> int:
    """Bytes of a setting that is a share of the budget (up to 1) or bytes."""
    return int(setting * whole) if setting <= 1 else int(setting)


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


_CONTEXT = {"null": 64 << 20}
"""What a process takes of a GPU beside weights and scratch, and keeps while it dozes: CUDA's context, the code of
kernels and graphs. No one process can measure it (the driver tells the GPU's free memory, which others change, too);
five processes with graphs had 0.8 GB each on an H200, so a GiB is counted."""

_ON_GPU = {"null": 64 << 20}
"""Beside the weights: CUDA's context, cache and scratch of a model that has not been loaded yet."""


def context_bytes(engine: str) -> int:
    """Bytes of a GPU that a process of this engine takes as long as it lives."""
    return _CONTEXT.get(engine, 1 << 30)


def gpu_estimate(model: Model, engine: str) -> int:
    """Bytes of a GPU that a worker of this model is expected to take before it has told."""
    return model.weight_bytes + _ON_GPU.get(engine, 3 << 30)


def gpu_budget(config: ServeConfig, total: int) -> int:
    """Bytes of a GPU that models may take."""
    return min(config.gpu_memory or total, int(total * 0.95))


def oom_kills() -> int:
    """How many processes this kernel has killed for want of memory; 0 where it does not tell."""
    try:
        words = Path("/proc/vmstat").read_text().split()
    except OSError:
        return 0
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


def own_bytes(pid: int) -> int:
    """The memory that only this process keeps from being freed: its anonymous pages, in memory and in swap; 0 when it
    has gone. Pages of files don't count, which the kernel can drop, nor segments, which others own."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "VmSwap") if name in fields)


def resident_bytes(pid: int) -> int:
    """The memory a process has now, shared file pages included; 0 when it has gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0
