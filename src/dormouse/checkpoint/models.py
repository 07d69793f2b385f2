"""The folders of imported models: what is in one, and how to find, describe and remove it.

    MODELS_DIR/NAME/  dormouse.json   what the model is (the record below)
                      weights.json    the tensor table of its checkpoint (tensors.py)
                      config.json, generation_config.json, tokenizer.json, ...
    MODELS_DIR/NAME/  dormouse.json, weights.json, adapter.json: an adapter of another model (adapters.py)

The weights themselves are chunks of the store: the record names the manifest of their checkpoint. A folder is complete
when it is visible under its name: it was built beside under a name that begins with a dot and renamed. `dormouse.json`
is written by this package only; a newer format is refused.
"""

from __future__ import annotations

import difflib
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dormouse.checkpoint.tensors import CheckpointBody, NewTensor, decode_table
from dormouse.errors import ConfigError, DamagedError, NotFoundError

FORMAT = 1
RECORD = "dormouse.json"
TABLE = "weights.json"
STAGING_PREFIX = ".import-"

Progress = Callable[[str, int, int], None]
"""What an import calls with the step it is in ("download", "read", "write"), how much is done, and of how much."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_IMPORT_AGAIN = "Import the model again: dormouse import SOURCE --name NAME --replace"
log = logging.getLogger(__name__)


class Record(msgspec.Struct, frozen=True):
    """dormouse.json. `dtype` is that of the floating-point weights, `weight_bytes` the size of their segment, `digest`
    the BLAKE3 of all that the model consists of (importer.py), `context` the longest prompt + answer the model was made
    for, `checkpoint` the manifest of the weights, null for a model without any. `base`: this is no model but an adapter
    of the model of that name, whose digest was `base_digest` then."""

    format: int
    source: str
    engine: str
    dtype: str
    parameters: int
    weight_bytes: int
    digest: str
    context: int
    checkpoint: str | None
    base: str | None = None
    base_digest: str | None = None


@dataclass(frozen=True)
class ImportedModel:
    """A model that is ready to be served, or an adapter of the model `base`, whose digest was `base_digest`."""

    name: str
    path: Path
    engine: str
    digest: str
    parameters: int
    weight_bytes: int
    context: int
    checkpoint: str | None
    source: str = ""
    base: str | None = None
    base_digest: str | None = None


@dataclass(frozen=True)
class Description:
    """What a source's reader has found: the model's files are in the staging folder, its tensors wait to be read."""

    source: str
    engine: str
    dtype: str
    context: int
    tensors: Sequence[NewTensor]
    base: str | None = None
    base_digest: str | None = None


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
    """Delete a model's folder; its checkpoint is left to `writer.sweep`. Raises NotFoundError. A worker that has the
    weights mapped keeps them until it ends."""
    path = open_model(models_dir, name).path
    grave = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=models_dir))
    path.rename(grave / name)  # from here on it is gone, however long the deletion takes
    shutil.rmtree(grave)


def _read(path: Path) -> ImportedModel:
    remedy = f"Import it again: dormouse import SOURCE --name {path.name} --replace"
    try:
        record = msgspec.json.decode((path / RECORD).read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedError(f"{path / RECORD} can't be read: {error}", remedy=remedy) from error
    if record.format > FORMAT:
        raise DamagedError(
            f"model {path.name} has format {record.format}, newer than {FORMAT}, the newest this version knows",
            remedy="Update Dormouse",
        )
    if record.checkpoint is not None and not (path / TABLE).exists():
        raise DamagedError(f"model {path.name} has no {TABLE}", remedy=remedy)
    return ImportedModel(
        name=path.name,
        path=path,
        engine=record.engine,
        digest=record.digest,
        parameters=record.parameters,
        weight_bytes=record.weight_bytes,
        context=record.context,
        checkpoint=record.checkpoint,
        source=record.source,
        base=record.base,
        base_digest=record.base_digest,
    )


def checkpoints_named(models_dir: Path) -> tuple[set[str], set[str]]:
    """The checkpoints that the models' records name, and the names of the models whose record can't be read: theirs
    are not known, and so not to be touched."""
    ids: set[str] = set()
    unreadable: set[str] = set()
    for path in models_dir.iterdir() if models_dir.is_dir() else ():
        if path.name.startswith("."):
            continue
        try:
            record = msgspec.json.decode((path / RECORD).read_bytes(), type=Record)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            unreadable.add(path.name)
            continue
        if record.format > FORMAT:
            unreadable.add(path.name)
        elif record.checkpoint is not None:
            ids.add(record.checkpoint)
    return ids, unreadable


def _suggestion(name: str, names: list[str]) -> str:
    if near := difflib.get_close_matches(name, names, n=3):
        return f"Did you mean {' or '.join(near)}?"
    if names:
        return f"There are: {', '.join(names)}"
    return f"Import one first: dormouse import SOURCE --name {name}"


def read_table(folder: Path, size: int) -> CheckpointBody:
    """The tensor table of a model whose segment has `size` bytes. Raises DamagedError."""
    path = folder / TABLE
    try:
        body = decode_table(path.read_bytes(), str(path))
    except OSError as error:
        raise DamagedError(f"{path} can't be read: {error.strerror}", remedy=_IMPORT_AGAIN) from error
    if body.size != size:
        raise DamagedError(
            f"{path} describes {body.size} bytes of weights where there are {size}", remedy=_IMPORT_AGAIN
        )
    return body
