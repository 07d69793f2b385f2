"""The folders of imported models: what is in one, and how to find, describe and remove it.

    MODELS_DIR/NAME/  dormouse.json   what the model is (the record below)
                      config.json, generation_config.json, tokenizer.json, ..., model.safetensors

A folder is complete when it is visible under its name: it was built beside under a name that begins with a dot and
renamed. `dormouse.json` is written by this package only; a newer format is refused.
"""

from __future__ import annotations

import difflib
import logging
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dormouse.errors import ConfigError, DamagedError, NotFoundError

FORMAT = 1
RECORD = "dormouse.json"
WEIGHTS = "model.safetensors"
STAGING_PREFIX = ".import-"

Progress = Callable[[str, int, int], None]
"""What an import calls with the step it is in ("download", "read", "write"), how much is done, and of how much."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
log = logging.getLogger(__name__)


class Record(msgspec.Struct, frozen=True):
    """dormouse.json. `dtype` is that of the floating-point weights, `digest` the BLAKE3 of the weights file (of
    config.json for a model without weights), `context` the longest prompt + answer the model was made for."""

    format: int
    source: str
    engine: str
    dtype: str
    parameters: int
    weight_bytes: int
    digest: str
    context: int


@dataclass(frozen=True)
class ImportedModel:
    """A model that is ready to be served."""

    name: str
    path: Path
    engine: str
    digest: str
    parameters: int
    weight_bytes: int
    context: int


def check_name(name: str) -> None:
    """Raise ConfigError when `name` can't be a model's name (it is also the name of a folder)."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} can't be the name of a model",
            remedy="Use 1 to 64 of a-z, 0-9, dot, underscore and hyphen, beginning with a letter or a digit",
        )


def list_models(models_dir: Path) -> list[ImportedModel]:
    """All models, by name. A folder that can't be read as one is left out with a warning in the log."""
    found = []
    for path in sorted(models_dir.iterdir()) if models_dir.is_dir() else []:
        if not (path / RECORD).exists() or path.name.startswith("."):
            continue
        try:
            found.append(_read(path))
        except DamagedError as error:
            log.warning("%s", error)
    return found


def open_model(models_dir: Path, name: str) -> ImportedModel:
    """The model of that name. Raises NotFoundError (with names that are near) or DamagedError."""
    path = models_dir / name
    if not _NAME.fullmatch(name) or not (path / RECORD).exists():
        names = [model.name for model in list_models(models_dir)]
        raise NotFoundError(f"there is no model named {name!r}", remedy=_suggestion(name, names))
    return _read(path)


def remove_model(models_dir: Path, name: str) -> None:
    """Delete a model. Raises NotFoundError. A process that has its weights mapped keeps them until it ends."""
    path = open_model(models_dir, name).path
    grave = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=models_dir))
    path.rename(grave / name)  # from here on it is gone, however long the deletion takes
    shutil.rmtree(grave)


def _read(path: Path) -> ImportedModel:
    remedy = f"Import it again: dormouse import SOURCE --name {path.name} --replace"
    try:
        record = msgspec.json.decode((path / RECORD).read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path / RECORD} can't be read: {error}", remedy=remedy) from error
    if record.format > FORMAT:
        raise DamagedError(
            f"model {path.name} has format {record.format}, newer than {FORMAT}, the newest this version knows",
            remedy="Update Dormouse",
        )
    weights = path / WEIGHTS
    size = weights.stat().st_size if weights.exists() else 0
    if record.weight_bytes != size:
        raise DamagedError(f"{weights} has {size} bytes where {record.weight_bytes} were imported", remedy=remedy)
    return ImportedModel(
        name=path.name,
        path=path,
        engine=record.engine,
        digest=record.digest,
        parameters=record.parameters,
        weight_bytes=record.weight_bytes,
        context=record.context,
    )


def _suggestion(name: str, names: list[str]) -> str:
    if near := difflib.get_close_matches(name, names, n=3):
        return f"Did you mean {' or '.join(near)}?"
    if names:
        return f"There are: {', '.join(names)}"
    return f"Import one first: dormouse import SOURCE --name {name}"
