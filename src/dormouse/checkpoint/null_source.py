"""A model without weights, for the null engine: a folder whose config.json says `"model_type": "dormouse-null"`.

{"model_type": "dormouse-null", "null": {...settings...}}  --read_null-->  the same file and a record
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from blake3 import blake3

from dormouse.checkpoint.models import FORMAT, Record
from dormouse.errors import EngineError


class NullSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The "null" object of config.json."""

    delay_s: float = 0.0
    context: int = 8192
    answer_tokens: int | None = None
    memory_mb: int = 0


class _Config(msgspec.Struct, frozen=True):
    null: NullSettings = NullSettings()


def read_settings(folder: Path) -> NullSettings:
    """The settings of a model folder. Raises EngineError when config.json can't be read or has wrong fields."""
    path = folder / "config.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Config).null
    except (OSError, msgspec.DecodeError) as error:
        raise EngineError(f"{path} can't be used: {error}", remedy="Import the model again") from error


def read_null(path: Path, source: str, folder: Path) -> Record:
    """Copy a null model's folder. Raises EngineError when its settings are wrong."""
    settings = read_settings(path)
    config = (path / "config.json").read_bytes()
    (folder / "config.json").write_bytes(config)
    return Record(
        format=FORMAT,
        source=source,
        engine="null",
        dtype="none",
        parameters=0,
        weight_bytes=0,
        digest=blake3(config).hexdigest(),
        context=settings.context,
    )
