"""`load_model`: a model of transformers out of a folder as hubs give it or an imported checkpoint, ready to compute.

    config.json --> model without memory; which tensors it needs
    folder: headers of all files --names and shapes are the model's--> load_file of each --bind--> model
                                 --others--> tensors on the CPU --transformers' own conversion--> model, moved
    imported: load ---------------------------------------------------------------------bind--> model

The result is what `AutoModelForCausalLM.from_pretrained` gives for the same folder.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from dormouse.checkpoint.hf_source import Found, refuse_quantised, tensors_in, weight_files
from dormouse.checkpoint.load import Device, Tensors, data_dir_of, load, tensors_of_file
from dormouse.checkpoint.models import open_model
from dormouse.checkpoint.torch_tensors import DTYPES, WIDE_FLOATS, find_device
from dormouse.checkpoint.transformers_binding import bind, empty_model, wanted_shapes
from dormouse.checkpoint.transformers_source import reading
from dormouse.errors import ConfigError
from dormouse.transfer.report import Progress

if TYPE_CHECKING:
    from dormouse.transfer.dram import DramTier

log = logging.getLogger(__name__)


def load_model(
    name_or_folder: str | os.PathLike[str],
    *,
    device: Device = "cpu",
    dtype: torch.dtype | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    tier: DramTier | None = None,
    progress: Progress | None = None,
    cancelled: threading.Event | None = None,
) -> Any:
    """The causal language model of an imported name, or of a folder with config.json and .safetensors files, in eval
    mode. A name that is no folder's, or that was imported, is taken for an imported one.

    `dtype` is that of the config unless given. On the CPU the parameters of a folder's model are its files, mapped
    privately: training them changes no file. Raises what `load` and `load_file` do, ConfigError for a folder that can't
    be loaded so, EngineError for weights that are not the model's.
    """
    where = find_device(device)
    model = _imported(name_or_folder, where, dtype, data_dir, tier, progress, cancelled)
    if model is None:
        model = _of_folder(Path(name_or_folder), where, dtype, progress, cancelled)
    return model.eval().to(where)


def _imported(
    name: str | os.PathLike[str],
    where: torch.device,
    dtype: torch.dtype | None,
    data_dir: str | os.PathLike[str] | None,
    tier: DramTier | None,
    progress: Progress | None,
    cancelled: threading.Event | None,
) -> Any:
    """The model of an imported name, None when a folder is meant."""
    models = data_dir_of(data_dir).models
    if not isinstance(name, str) or (Path(name).is_dir() and not (models / name / "dormouse.json").is_file()):
        return None
    found = open_model(models, name)
    if found.base is not None:
        raise ConfigError(
            f"{name} is an adapter of {found.base}", remedy=f"Load {found.base}; `load` gives its tensors"
        )
    if found.engine != "transformers":
        raise ConfigError(f"{name} is a model of the {found.engine} engine", remedy="Name a model of transformers")
    config = _config(found.path)
    chosen = dtype or config.dtype or torch.bfloat16
    model = empty_model(config, chosen)
    tensors = load(name, device=where, data_dir=data_dir, tier=tier, progress=progress, cancelled=cancelled)
    bind(model, _fitted(model, tensors, chosen), name)
    return _with_generation(model, found.path)


def _of_folder(
    folder: Path,
    where: torch.device,
    dtype: torch.dtype | None,
    progress: Progress | None,
    cancelled: threading.Event | None,
) -> Any:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} has no config.json", remedy="Give a model's folder, or the name of an imported one"
        )
    files = weight_files(folder)
    found = tensors_in(files)
    config = _config(folder)
    refuse_quantised(folder, config)
    chosen = dtype or config.dtype or _first_float(found)
    model = empty_model(config, chosen)
    wanted = wanted_shapes(model)
    if all(name in found and found[name][1].shape == shape for name, shape in wanted.items()):
        names = found.keys() & model.state_dict().keys()
        tensors = _read(files, names, where, progress, cancelled)
        bind(model, _fitted(model, tensors, chosen), str(folder))
    else:
        log.warning(
            "the tensors in %s are stored under other names or shapes than %s has; transformers converts them on the "
            "CPU. Import the model to have that done once",
            folder,
            type(model).__name__,
        )
        tensors = _read(files, found.keys(), torch.device("cpu"), progress, cancelled)
        model = _converted(type(model), config, tensors, chosen, folder)
    return _with_generation(model, folder)


def _config(folder: Path) -> Any:
    with reading(folder):
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _first_float(found: Found) -> torch.dtype:
    """What transformers takes when a config names no type."""
    kinds = [DTYPES.get(tensor.dtype) for _path, tensor in found.values()]
    return next((kind for kind in kinds if kind in WIDE_FLOATS and kind is not None), torch.float32)


def _read(
    files: Sequence[Path],
    names: Any,
    where: torch.device,
    progress: Progress | None,
    cancelled: threading.Event | None,
) -> Tensors:
    """The named tensors of all files. Progress counts all files as one, and each in full once it is read."""
    sizes = [file.stat().st_size for file in files]
    total, before = sum(sizes), 0
    tensors: Tensors = {}
    for file, size in zip(files, sizes, strict=True):
        tensors.update(tensors_of_file(file, where, names, _shifted(progress, before, total), cancelled))
        before += size
        if progress is not None:
            progress(before, total)  # a GPU gets neither headers nor what is not wanted
    return tensors


def _shifted(progress: Progress | None, before: int, total: int) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, _total: progress(before + done, total)


def _fitted(model: Any, tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Each tensor in the type that the model gives it: its own, but for parts that must be computed in float32."""
    types = {name: value.dtype for name, value in model.state_dict().items()}
    if plan := model._get_dtype_plan(dtype):
        from transformers.core_model_loading import build_glob_alternation

        pattern = build_glob_alternation(list(plan))[0]
        types |= {name: torch.float32 for name in types if pattern.search(name)}
    return {name: tensor.to(types.get(name, tensor.dtype)) for name, tensor in tensors.items()}


def _converted(kind: Any, config: Any, tensors: Tensors, dtype: torch.dtype, folder: Path) -> Any:
    with reading(folder):
        model, loading = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    if wrong := sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"]):
        raise ConfigError(
            f"the weights in {folder} are not those of {kind.__name__}: {wrong[0]}",
            remedy="Copy all parts of the model, and check that config.json belongs to them",
        )
    return model


def _with_generation(model: Any, folder: Path) -> Any:
    """A model with the settings for generation that lie beside it."""
    if (folder / "generation_config.json").is_file():
        with reading(folder):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model
