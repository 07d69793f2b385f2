"""The loaders of others, if they are installed, with the settings that their own documentation gives for the case at
hand; each is named in `how`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dormouse.bench_load.method import Job, Method, MissingError, Tensors, kept, prepares, version_of

_HERE = __name__


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
    return version_of("instanttensor", "instanttensor")


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


SAFETENSORS = Method(
    f"{_HERE}:SAFETENSORS",
    "safetensors",
    "load_file, one call per file",
    "plain",
    prepares("safetensors.torch", "safetensors"),
    _load_safetensors,
)
FASTSAFETENSORS = Method(
    f"{_HERE}:FASTSAFETENSORS",
    "fastsafetensors",
    "fastsafe_open of all files, nogds",
    "plain",
    prepares("fastsafetensors", "fastsafetensors"),
    _load_fastsafetensors,
)
RUNAI = Method(
    f"{_HERE}:RUNAI",
    "run:ai streamer",
    "SafetensorsStreamer of all files, 16 threads (its default)",
    "plain",
    prepares("runai_model_streamer", "runai-model-streamer"),
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
    prepares("torch", "torch"),
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
    prepares("sllm_store.torch", "serverless-llm-store"),
    _load_sllm,
    _before_sllm,
    conditions=("warm",),
)
