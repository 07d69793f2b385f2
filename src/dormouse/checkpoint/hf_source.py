"""A model folder as model hubs give it, or .safetensors files beside a config.json and a tokenizer.

If the tensors in the files are exactly those of the runtime's model class they are copied from the files, 16 MiB
at a time. Otherwise (older names, experts stored one by one) transformers loads the model and its tensors are written.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from dormouse.checkpoint.models import Description, Progress
from dormouse.checkpoint.safetensors_file import TensorInfo, copied_tensor, read_header
from dormouse.checkpoint.tensors import NewTensor
from dormouse.checkpoint.transformers_source import (
    PICKLES,
    describe,
    import_transformers,
    pickles_refused,
    reading,
    save_description,
    tensors_of,
)
from dormouse.errors import ConfigError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")

Found = dict[str, tuple[Path, TensorInfo]]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_folder(path: Path, source: str, folder: Path, progress: Progress) -> Description:
    """Read a folder, or one .safetensors file (with its sister shards) in a folder, into the staging folder."""
    place = path if path.is_dir() else path.parent
    files = weight_files(path)
    _require_beside(place)
    found = tensors_in(files)
    transformers = import_transformers()
    with reading(place):
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)
        refuse_quantised(place, config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=True)
        generation = _generation_config(transformers, place, config)
        config.dtype = "bfloat16"
        save_description(folder, config, generation, tokenizer)
        tensors = _copied(transformers, config, found)
        if tensors is None:
            tensors = tensors_of(_converted(transformers, place, files, config, progress))
    return describe(source, config, tensors)


def weight_files(path: Path) -> list[Path]:
    """The .safetensors files of a folder, or one file with its sister shards. Raises ConfigError when there is none or
    one is missing."""
    if path.is_file():
        shard = _SHARD.fullmatch(path.name)
        files = sorted(path.parent.glob(f"{shard[1]}-*-of-{shard[2]}.safetensors")) if shard else [path]
        if shard and len(files) != int(shard[2]):
            raise ConfigError(
                f"{path.parent} has {len(files)} of the {int(shard[2])} parts of {shard[1]}",
                remedy="Copy the missing parts beside it",
            )
        return files
    if (index := path / "model.safetensors.index.json").exists():
        return _indexed_files(index)
    if (single := path / "model.safetensors").exists():
        return [single]
    if not (files := sorted(path.glob("*.safetensors"))):
        pickled = next((p for p in sorted(path.iterdir()) if p.suffix in PICKLES), None)
        if pickled is not None:
            raise pickles_refused(pickled)
        raise ConfigError(f"{path} has no weights", remedy="Give a folder with .safetensors files in it")
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{index} is not valid: {error}", remedy="Download or copy it again") from error
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ConfigError(f"{index} names {name!r}, which is not a file beside it", remedy="Copy all parts")
    return [index.parent / name for name in names]


def _require_beside(place: Path) -> None:
    if not (place / "config.json").exists():
        raise ConfigError(f"{place} has no config.json", remedy="Copy the config.json of the model beside its weights")
    if not any((place / name).exists() for name in _TOKENIZER_FILES):
        raise ConfigError(f"{place} has no tokenizer", remedy="Copy the model's tokenizer.json beside its weights")


def tensors_in(files: list[Path]) -> Found:
    """What is in the files, by name. Raises ConfigError for a file that is not sound and a name that is there twice."""
    found: Found = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in found:
                raise ConfigError(
                    f"tensor {name} is in {found[name][0].name} and in {file.name}",
                    remedy="Leave only one copy of the weights in the folder",
                )
            found[name] = (file, tensor)
    return found


def refuse_quantised(place: Path, config: Any) -> None:
    """Raises ConfigError for a model whose weights only another library can read."""
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method is not None:
        raise ConfigError(
            f"the model in {place} is quantised with {method}, which is not supported",
            remedy="Use the unquantised model or a GGUF file of it",
        )


def _generation_config(transformers: Any, place: Path, config: Any) -> Any:
    if (place / "generation_config.json").exists():
        return transformers.GenerationConfig.from_pretrained(place, local_files_only=True)
    return transformers.GenerationConfig.from_model_config(config)


def _copied(transformers: Any, config: Any, found: Found) -> list[NewTensor] | None:
    """The tensors as they are in the files, or None when they are not the ones that the model class has."""
    import torch

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    tied = set(model.all_tied_weights_keys)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    if any(name not in found or found[name][1].shape != shape for name, shape in wanted.items()):
        return None
    return [copied_tensor(*found[name], name) for name in wanted]


def _converted(transformers: Any, place: Path, files: list[Path], config: Any, progress: Progress) -> Any:
    import torch

    if set(files) != set(weight_files(place)):
        raise ConfigError(
            f"the tensors of {files[0]} are not those that config.json describes",
            remedy="Check that the weights and config.json belong together",
        )
    progress("read", 0, 1)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        place,
        config=config,
        dtype=torch.bfloat16,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    progress("read", 1, 1)
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(
            f"the weights in {place} lack {len(missing)} tensors, the first is {missing[0]}",
            remedy="Copy all parts of the model, or check that config.json belongs to them",
        )
    return model
