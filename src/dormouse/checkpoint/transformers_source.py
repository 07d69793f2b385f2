"""What the sources that go through transformers share: its quiet, offline import, and the tensors of a loaded model.

Weights are stored as the runtime's own model class names them, so that loading is nothing but pointing into a segment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dormouse.checkpoint.models import Description
from dormouse.checkpoint.tensors import NewTensor
from dormouse.errors import ConfigError, DormouseError, HostError

if TYPE_CHECKING:
    import torch

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CHUNK_ELEMENTS = 8 << 20


def pickles_refused(path: Path) -> ConfigError:
    """The error of weights in a format that runs code when it is opened."""
    return ConfigError(
        f"{path} holds pickled weights, and opening a pickle runs the code in it, so Dormouse does not",
        remedy="Get the model as .safetensors, or convert it on a machine that may run its code",
    )


def import_transformers() -> Any:
    """The transformers module, told to stay offline and quiet. Raises HostError when it is not installed."""
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")  # both are read when they are imported
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise HostError(
            f"importing a model needs a package that is missing: {error.name}",
            remedy="Install it: pip install 'dormouse[transformers]'",
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Whatever a library raises while it reads the source becomes one sentence about the source."""
    try:
        yield
    except (DormouseError, OSError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{source} can't be imported: {reason[0]}", remedy="docs/models.md tells which models are supported"
        ) from error


def save_description(folder: Path, config: Any, generation: Any, tokenizer: Any) -> None:
    """Write config.json, generation_config.json and the tokenizer's files. The tokenizer must be a fast one."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "the model's tokenizer can't be converted to tokenizer.json",
            remedy="Add a tokenizer.json to the source folder",
        )
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def describe(source: str, config: Any, tensors: list[NewTensor]) -> Description:
    """A model of transformers."""
    text = config.get_text_config()
    return Description(
        source=source,
        engine="transformers",
        dtype="bfloat16",
        context=int(getattr(text, "max_position_embeddings", None) or 2048),
        tensors=tensors,
    )


def tensors_of(model: Any) -> list[NewTensor]:
    """The tensors of a loaded model, each once: tied weights are left to the model class to tie again."""
    tied = set(model.all_tied_weights_keys)
    return [_new_tensor(name, value) for name, value in model.state_dict().items() if name not in tied]


def _new_tensor(name: str, value: torch.Tensor) -> NewTensor:
    import torch
    from safetensors.torch import _TYPES

    stored = value.bfloat16() if value.is_floating_point() and value.element_size() > 1 else value
    dtype = next(key for key, known in _TYPES.items() if known == stored.dtype)

    def chunks() -> Iterator[bytes | memoryview]:
        for part in torch.split(stored.contiguous().flatten(), _CHUNK_ELEMENTS):
            yield part.view(torch.uint8).numpy().data

    return NewTensor(name, dtype, tuple(stored.shape), chunks)
