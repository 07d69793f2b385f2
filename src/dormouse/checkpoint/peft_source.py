"""A LoRA adapter as PEFT saves it: adapter_config.json and adapter_model.safetensors in a folder.

    base_model.model.MODULE.lora_A.weight (rank x in), …lora_B.weight (out x rank)  -->  MODULE.lora_A, MODULE.lora_B
    lora_alpha, r, use_rslora, rank_pattern, alpha_pattern                          -->  one scaling per module

What the file holds decides which modules are adapted; the configuration must agree with it. What would need more than
`W + scaling * B A` is refused by name, never left out: an adapter without a part of it answers like no model at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from dormouse.checkpoint import adapters
from dormouse.checkpoint.adapters import A, B, check_fit, encode_scalings
from dormouse.checkpoint.models import Description, ImportedModel, list_models, open_model, read_table
from dormouse.checkpoint.safetensors_file import TensorInfo, copied_tensor, read_header
from dormouse.checkpoint.transformers_source import pickles_refused
from dormouse.errors import ConfigError, NotFoundError

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_MAX_CONFIG = 4 << 20
_MAX_RANK = 4096
_FLOATS = ("F64", "F32", "F16", "BF16")

_KEY = re.compile(r"base_model\.model\.((?:\w+\.)*\w+)\.lora_([AB])\.weight")
_PLAIN_PATTERN = re.compile(r"\^?(?:\w+\.)*\w+\$?")
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to initialise an adapter that leave the base's own weights as they are."""


class _Config(msgspec.Struct, frozen=True):
    """What matters of adapter_config.json."""

    peft_type: str
    r: int
    lora_alpha: float
    base_model_name_or_path: str | None = None
    target_modules: str | list[str] | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    init_lora_weights: bool | str = True
    use_dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    layer_replication: list[object] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: object = None
    alora_invocation_tokens: object = None
    use_qalora: bool = False
    arrow_config: object = None


class _Type(msgspec.Struct, frozen=True):
    peft_type: str = ""


def read_adapter(path: Path, source: str, folder: Path, base: str | None) -> Description:
    """Read the adapter into the staging folder of an import. Raises ConfigError for what is not supported,
    NotFoundError when its base model is not imported."""
    config = _read_config(path / CONFIG)
    _refuse(config, path)
    found = _factors(path)
    model = _find_base(folder.parent, base, config.base_model_name_or_path, path)
    names = {f"{module}.{part}": tensor for module, pair in found.items() for part, tensor in pair.items()}
    scalings = {module: _scaling(config, module, pair[A].shape[0], path) for module, pair in found.items()}
    if model.checkpoint is None:
        raise ConfigError(f"{model.name} has no weights to adapt", remedy="Name another model with --base")
    shapes = {name: tensor.shape for name, tensor in names.items()}
    check_fit(shapes, read_table(model.path, model.weight_bytes), path.name, model.name)
    (folder / adapters.SCALINGS).write_bytes(encode_scalings(scalings))
    return Description(
        source=source,
        engine=model.engine,
        dtype="bfloat16",
        context=model.context,
        tensors=[copied_tensor(path / _WEIGHTS, tensor, name) for name, tensor in names.items()],
        base=model.name,
        base_digest=model.digest,
    )


def _read_config(path: Path) -> _Config:
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise ConfigError(f"{path} is over {_MAX_CONFIG} bytes", remedy="Download or copy it again")
        data = path.read_bytes()
        kind = msgspec.json.decode(data, type=_Type).peft_type
        if kind != "LORA":
            raise _unsupported(path, f"it is of the PEFT type {kind or 'unknown'!r}, not LORA")
        return msgspec.json.decode(data, type=_Config)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid: {error}", remedy="Download or copy it again") from error


def _refuse(config: _Config, path: Path) -> None:
    """Raise ConfigError for whatever is more than a product of two factors beside a linear layer."""
    extras = {
        "DoRA (use_dora)": config.use_dora,
        "whole modules of its own (modules_to_save)": config.modules_to_save,
        f"biases (bias: {config.bias})": config.bias != "none",
        "biases (lora_bias)": config.lora_bias,
        "transposed layers (fan_in_fan_out)": config.fan_in_fan_out,
        "repeated layers (layer_replication)": config.layer_replication,
        "parameters that are no layer (target_parameters)": config.target_parameters,
        "trained tokens (trainable_token_indices)": config.trainable_token_indices,
        "a place in the prompt where it begins (alora_invocation_tokens)": config.alora_invocation_tokens,
        "QA-LoRA (use_qalora)": config.use_qalora,
        "a choice among adapters (arrow_config)": config.arrow_config is not None,
        f"a changed base (init_lora_weights: {config.init_lora_weights})": config.init_lora_weights
        not in _PLAIN_STARTS,
    }
    for what, wanted in extras.items():
        if wanted:
            raise _unsupported(path, f"it has {what}")
    ranks = [config.r, *config.rank_pattern.values()]
    alphas = [config.lora_alpha, *config.alpha_pattern.values()]
    if not all(0 < rank <= _MAX_RANK for rank in ranks) or not all(math.isfinite(alpha) for alpha in alphas):
        raise ConfigError(f"{path / CONFIG} has an impossible r or lora_alpha", remedy="Download or copy it again")
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not _PLAIN_PATTERN.fullmatch(pattern):
            raise _unsupported(path, f"{pattern!r} in rank_pattern or alpha_pattern is a regular expression")


def _factors(path: Path) -> dict[str, dict[str, TensorInfo]]:
    """The pair of factors of each module, as they are in the file."""
    file = path / _WEIGHTS
    if not file.is_file():
        if (path / _PICKLE).exists():
            raise pickles_refused(path / _PICKLE)
        raise ConfigError(f"{path} has no {_WEIGHTS}", remedy="Give the folder that PEFT's save_pretrained wrote")
    found: dict[str, dict[str, TensorInfo]] = {}
    for key, tensor in read_header(file).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise _unsupported(path, f"its tensor {key} is no factor of a linear layer")
        if tensor.dtype not in _FLOATS or len(tensor.shape) != 2:
            raise _unsupported(path, f"its tensor {key} is {tensor.dtype} of shape {tensor.shape}")
        found.setdefault(match[1], {})[A if match[2] == "A" else B] = tensor
    _check_pairs(found, path)
    return {module: {A: pair[A], B: pair[B]} for module, pair in found.items()}


def _check_pairs(found: Mapping[str, Mapping[str, TensorInfo]], path: Path) -> None:
    if not found:
        raise ConfigError(f"{path / _WEIGHTS} has no tensors", remedy="Download or copy it again")
    for module, pair in found.items():
        if len(pair) != 2:
            raise ConfigError(
                f"{path / _WEIGHTS} has only one of the two factors of {module}", remedy="Download or copy it again"
            )
        if ".experts." in f".{module}." or module.rpartition(".")[2] == "lm_head":
            raise _unsupported(path, f"it adapts {module}, which does not see every token")


def _scaling(config: _Config, module: str, rank: int, path: Path) -> float:
    """As PEFT computes it. The file's rank must be the configuration's."""
    if not _is_target(config.target_modules, module):
        raise ConfigError(
            f"{path / _WEIGHTS} has factors of {module}, which is not among the target_modules of {CONFIG}",
            remedy="Check that both files belong together",
        )
    configured = _of_pattern(config.rank_pattern, module, config.r)
    if rank != configured:
        raise ConfigError(
            f"{path / _WEIGHTS} has rank {rank} for {module}, {CONFIG} says {configured}",
            remedy="Check that both files belong together",
        )
    alpha = _of_pattern(config.alpha_pattern, module, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _is_target(targets: str | list[str] | None, module: str) -> bool:
    """Whether a list names the module. A string may be a regular expression of a stranger, which is not run: then the
    file alone says."""
    return not isinstance(targets, list) or any(_ends_with(module, target) for target in targets)


def _of_pattern(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    for pattern, value in patterns.items():
        name = pattern.removesuffix("$")
        if module == name[1:] if name.startswith("^") else _ends_with(module, name):
            return value
    return otherwise


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _find_base(models_dir: Path, given: str | None, hint: str | None, path: Path) -> ImportedModel:
    """The imported model that was named, or the one that the configuration means: by its source or its name."""
    if given is not None:
        model = open_model(models_dir, given)
        if model.base is not None:
            raise ConfigError(f"{given} is an adapter itself", remedy=f"Name its base: --base {model.base}")
        return model
    models = [model for model in list_models(models_dir) if model.base is None]
    if hint:
        last = hint.rstrip("/").rpartition("/")[2].lower()
        for model in models:
            if model.source == hint or model.name in (hint, last):
                return model
    known = ", ".join(model.name for model in models) or "none yet"
    raise NotFoundError(
        f"the base model of {path} ({hint or 'not named'}) is not imported under that name",
        remedy=f"Name it with --base; imported are: {known}",
    )


def _unsupported(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"the adapter {path} can't be used: {why}", remedy="docs/models.md tells which adapters are supported"
    )
