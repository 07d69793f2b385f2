"""Our loader, in the ways in which it is used: plain files, checkpoints stored raw and coded, the DRAM tier."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from dormouse.bench_load.cache import files_below
from dormouse.bench_load.method import Job, Method, MissingError, Tensors, version_of
from dormouse.bench_load.weights import read_reference
from dormouse.checkpoint.tensors import CHUNK_SIZE

_HERE = __name__


def prepare_ours(device: str) -> str:
    import dormouse

    _ = dormouse.load_file, dormouse.load  # imported when they are first asked for
    if device.startswith("cuda"):
        importlib.import_module("dormouse.transfer.load_device")
    return version_of("dormouse", "dormouse")


def before_load(job: Job) -> None:
    """On a GPU, have the kernels compiled or taken from Triton's cache, as those of peers come compiled: by loading one
    tensor that has whole chunks and parts of others. Pinned memory is given back, for making it belongs to a load."""
    if not job.device.startswith("cuda"):
        return
    import torch

    import dormouse
    from dormouse.transfer.pinned import free_pinned

    sizes = {name: math.prod(each.shape) for name, each in read_reference(Path(job.reference)).items()}
    long_enough = [name for name, values in sizes.items() if values >= 2 * CHUNK_SIZE] or [
        max(sizes, key=sizes.__getitem__)
    ]
    chosen = min(long_enough, key=sizes.__getitem__)
    dormouse.load(job.model, device=job.device, data_dir=job.data_dir, tensors=[chosen])
    free_pinned()
    torch.cuda.empty_cache()


def _load_file(job: Job, _prepared: Any) -> Tensors:
    import dormouse

    tensors: Tensors = {}
    for file in job.files:
        tensors |= dormouse.load_file(file, device=job.device)
    return tensors


def prepare_tier(device: str) -> str:
    if not device.startswith("cuda"):
        raise MissingError("the DRAM tier serves loads to GPUs only")
    importlib.import_module("dormouse.transfer.dram")
    return prepare_ours(device)


def filled_tier(job: Job) -> Any:
    """A tier that holds the model's chunks, pinned."""
    before_load(job)
    import dormouse

    stored = sum(pack.stat().st_size for pack in files_below(Path(job.data_dir)))
    tier = dormouse.DramTier(stored * 6 // 5 + (1 << 30), pin=True)
    dormouse.hold(job.model, tier, data_dir=job.data_dir)
    return tier


def load_from(job: Job, tier: Any) -> Tensors:
    """By name, through the tier if there is one."""
    import dormouse

    tensors: Tensors = dormouse.load(job.model, device=job.device, data_dir=job.data_dir, tier=tier)
    return tensors


LOAD_FILE = Method(
    f"{_HERE}:LOAD_FILE",
    "dormouse.load_file",
    "plain safetensors, one call per file",
    "plain",
    prepare_ours,
    _load_file,
    ours=True,
)
LOAD_RAW = Method(
    f"{_HERE}:LOAD_RAW",
    "dormouse.load, raw",
    "imported checkpoint, chunks stored raw",
    "raw",
    prepare_ours,
    load_from,
    before_load,
    ours=True,
)
LOAD_CODED = Method(
    f"{_HERE}:LOAD_CODED",
    "dormouse.load, coded",
    "imported checkpoint, chunks coded",
    "coded",
    prepare_ours,
    load_from,
    before_load,
    ours=True,
)

LOAD_TIER = Method(
    f"{_HERE}:LOAD_TIER",
    "dormouse.load, DRAM tier",
    "imported checkpoint, its coded chunks in pinned memory",
    "coded",
    prepare_tier,
    load_from,
    filled_tier,
    conditions=("tier",),
    ours=True,
)
