"""The ways to load weights that are compared: the peers that are installed, and ours.

Each runs in a child process (child.py): `prepare` imports what it needs before the clock starts and tells the version;
`before` may do what belongs to no load, such as filling a tier; `load` is what is timed. It returns all tensors by
name, and the child keeps them all until the clock has stopped, as whoever loads a model does.

Settings are those that the peer's own documentation gives for the case at hand; each is named in `how`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from dormouse.bench_load.weights import read_reference

Tensors = dict[str, Any]
WHOLE = ("plain", "raw", "coded")
"""The sources that have all tensors."""


class Job(msgspec.Struct, frozen=True):
    """What a child is told to load. `files` are plain safetensors files; `data_dir` holds an imported model `model`;
    `scratch` is a folder for what a method must make first. `again`: load once more afterwards."""

    files: list[str]
    scratch: str
    data_dir: str
    model: str
    device: str
    condition: str
    reference: str
    again: bool


class MissingError(Exception):
    """The package of a method is not installed, or can't work on this machine."""


def _nothing(job: Job) -> None:
    return None


@dataclass(frozen=True)
class Method:
    """`place` is where a child finds this very object, as MODULE:NAME. `source` tells what is read: the `plain` files,
    the imported model, `raw` or `coded`, or a file that `before` makes in the scratch folder, with some of the tensors.
    `extra`: only measured when named."""

    place: str
    name: str
    how: str
    source: str
    prepare: Callable[[str], str]
    load: Callable[[Job, Any], Tensors]
    before: Callable[[Job], Any] = _nothing
    conditions: tuple[str, ...] = ("warm", "cold")
    ours: bool = False
    extra: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def find(place: str) -> Method:
    """The method of that place."""
    module, _, name = place.partition(":")
    method = getattr(importlib.import_module(module), name)
    assert isinstance(method, Method)
    return method


def _version(module: str, package: str) -> str:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise MissingError(f"{package} can't be imported: {error}") from error
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package  # run from its sources


def _prepares(module: str, package: str) -> Callable[[str], str]:
    return lambda device: _version(module, package)


def _load_safetensors(job: Job, _prepared: Any) -> Tensors:
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for file in job.files:
        tensors |= load_file(file, device=job.device)
    return tensors


def _load_fastsafetensors(job: Job, _prepared: Any) -> Tensors:
    from fastsafetensors import fastsafe_open

    files = fastsafe_open(filenames={0: job.files}, device=job.device, nogds=True)
    kept.append(files)
    return {name: files.get_tensor(name) for name in files.keys()}  # noqa: SIM118 (not a mapping)


def _load_runai(job: Job, _prepared: Any) -> Tensors:
    from runai_model_streamer import SafetensorsStreamer

    streamer = SafetensorsStreamer()
    kept.append(streamer)  # on the CPU the tensors are views of its buffer
    streamer.__enter__()
    streamer.stream_files(job.files, device=job.device)
    return dict(streamer.get_tensors())


def _prepare_instanttensor(device: str) -> str:
    if not device.startswith("cuda"):
        raise MissingError("instanttensor loads to GPUs only")
    return _version("instanttensor", "instanttensor")


def _load_instanttensor(job: Job, _prepared: Any) -> Tensors:
    from instanttensor import BackendPolicy, safe_open

    backend = BackendPolicy.BUFFERED if job.condition == "warm" else None
    with safe_open(list(job.files), framework="pt", device=job.device, backend=backend) as files:
        return dict(files.tensors())


def _before_torch(job: Job) -> str:
    """A .pt file with the tensors of the first file."""
    import torch
    from safetensors.torch import load_file

    target = Path(job.scratch) / TORCH.source
    torch.save(load_file(job.files[0]), target)
    return str(target)


def _load_torch(job: Job, path: str) -> Tensors:
    import torch

    tensors: Tensors = torch.load(path, map_location=job.device, weights_only=True)
    return tensors


def _before_sllm(job: Job) -> str:
    """The same tensors in the store's own format, made before the clock starts."""
    from safetensors.torch import load_file
    from sllm_store.torch import save_dict

    folder = str(Path(job.scratch) / "sllm")
    save_dict({name: tensor for file in job.files for name, tensor in load_file(file).items()}, folder)
    return folder


def _load_sllm(job: Job, folder: str) -> Tensors:
    from sllm_store.torch import load_dict

    tensors: Tensors = load_dict(Path(folder).name, {"": job.device}, str(Path(folder).parent))
    return tensors


def prepare_ours(device: str) -> str:
    import dormouse

    _ = dormouse.load_file, dormouse.load  # imported when they are first asked for
    if device.startswith("cuda"):
        importlib.import_module("dormouse.transfer.load_device")
    return _version("dormouse", "dormouse")


def before_load(job: Job) -> None:
    """On a GPU, have the kernels compiled or taken from Triton's cache, as those of peers come compiled: by loading the
    smallest tensor. Pinned memory is given back, for making it belongs to a load."""
    if not job.device.startswith("cuda"):
        return
    import dormouse
    from dormouse.transfer.pinned import free_pinned

    reference = read_reference(Path(job.reference))
    least = min(reference, key=lambda name: math.prod(reference[name].shape))
    dormouse.load(job.model, device=job.device, data_dir=job.data_dir, tensors=[least])
    free_pinned()


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
    from dormouse.checkpoint.load_plans import of_checkpoint
    from dormouse.checkpoint.models import open_model
    from dormouse.checkpoint.shards import place
    from dormouse.checkpoint.tensors import decode_body
    from dormouse.config import DataDir
    from dormouse.store.store import Store
    from dormouse.transfer.dram import SLAB_BYTES, DramTier

    data_dir = DataDir(Path(job.data_dir))
    checkpoint = open_model(data_dir.models, job.model).checkpoint
    assert checkpoint is not None
    with Store.open(data_dir.store) as store, store.reader() as reader:
        manifest = store.manifest(checkpoint)
        body = decode_body(manifest.body, job.model)
        plan = of_checkpoint(body, manifest.refs, place(body.tensors, 1, {}), reader, job.model)
        tier = DramTier(plan.stored_bytes * 6 // 5 + SLAB_BYTES, pin=True)
        tier.hold(plan, store.key)
    return tier


def load_from(job: Job, tier: Any) -> Tensors:
    """By name, through the tier if there is one."""
    import dormouse

    tensors: Tensors = dormouse.load(job.model, device=job.device, data_dir=job.data_dir, tier=tier)
    return tensors


kept: list[Any] = []
"""What tensors are views of, where the peer does not keep it itself."""

_HERE = __name__

SAFETENSORS = Method(
    f"{_HERE}:SAFETENSORS",
    "safetensors",
    "load_file, one call per file",
    "plain",
    _prepares("safetensors.torch", "safetensors"),
    _load_safetensors,
)
FASTSAFETENSORS = Method(
    f"{_HERE}:FASTSAFETENSORS",
    "fastsafetensors",
    "fastsafe_open of all files, nogds",
    "plain",
    _prepares("fastsafetensors", "fastsafetensors"),
    _load_fastsafetensors,
)
RUNAI = Method(
    f"{_HERE}:RUNAI",
    "run:ai streamer",
    "SafetensorsStreamer of all files, 16 threads (its default)",
    "plain",
    _prepares("runai_model_streamer", "runai-model-streamer"),
    _load_runai,
    environment={"RUNAI_STREAMER_LOG_LEVEL": "ERROR"},
)
INSTANTTENSOR = Method(
    f"{_HERE}:INSTANTTENSOR",
    "instanttensor",
    "safe_open of all files; direct when cold, buffered when warm, as it advises",
    "plain",
    _prepare_instanttensor,
    _load_instanttensor,
)
TORCH = Method(
    f"{_HERE}:TORCH",
    "torch.load",
    "a .pt of the first file's tensors, weights_only",
    "first.pt",
    _prepares("torch", "torch"),
    _load_torch,
    _before_torch,
    conditions=("warm",),
    extra=True,
)
SLLM = Method(
    f"{_HERE}:SLLM",
    "serverless-llm-store",
    "load_dict from its own format; its store server must be running",
    "plain",
    _prepares("sllm_store.torch", "serverless-llm-store"),
    _load_sllm,
    _before_sllm,
    conditions=("warm",),
)
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

METHODS = (LOAD_TIER, LOAD_CODED, LOAD_FILE, SAFETENSORS, FASTSAFETENSORS, INSTANTTENSOR, RUNAI, LOAD_RAW, TORCH, SLLM)
"""In the order in which they are measured: should the time run out, the last are left out."""
