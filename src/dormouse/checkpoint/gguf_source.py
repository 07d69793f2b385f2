"""GGUF files: metadata, tokenizer and chat template come from the file itself, quantised weights become BF16.

transformers does the naming, the permutations and the dequantisation; before that every tensor type is tried with
the gguf package, so that an unsupported one is named at once and not after minutes.
"""

from __future__ import annotations

import re
from pathlib import Path

from dormouse.checkpoint.models import Description, Progress
from dormouse.checkpoint.transformers_source import (
    describe,
    import_transformers,
    reading,
    save_description,
    tensors_of,
)
from dormouse.errors import ConfigError

_MAGIC = b"GGUF"


def read_gguf(path: Path, source: str, folder: Path, progress: Progress) -> Description:
    """Read a GGUF file into the staging folder."""
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise ConfigError(f"{path} is not a GGUF file", remedy="Download or copy it again")
    transformers = import_transformers()
    import torch

    place = {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "local_files_only": True,
        "trust_remote_code": False,  # left out, transformers would ask on the terminal, and run it on a yes
    }
    with reading(path):
        _check_types(path)
        progress("read", 0, 1)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **place, quantization_config=transformers.GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        progress("read", 1, 1)
        # The config still says "quantised with GGUF"; what is written below is not.
        model.config.__dict__.pop("quantization_config", None)
        save_description(folder, model.config, model.generation_config, tokenizer)
    return describe(source, model.config, tensors_of(model))


def _check_types(path: Path) -> None:
    import gguf

    try:
        tensors = gguf.GGUFReader(path).tensors
    except ValueError as error:
        if number := re.search(r"(\d+)\W* is not a valid GGMLQuantizationType", str(error)):
            raise _unsupported(path, number[1]) from error
        raise
    for kind, tensor in {tensor.tensor_type: tensor for tensor in tensors}.items():
        try:
            gguf.dequantize(tensor.data[:1], kind)
        except NotImplementedError as error:
            raise _unsupported(path, kind.name) from error


def _unsupported(path: Path, kind: str) -> ConfigError:
    return ConfigError(
        f"{path} has tensors of type {kind}, which can't be converted",
        remedy="Use a file of another type, such as Q4_K_M, Q8_0, F16 or BF16",
    )
