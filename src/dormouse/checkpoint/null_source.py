"""A model for the null engine: a folder whose config.json says `"model_type": "dormouse-null"`.

{"model_type": "dormouse-null", "null": {...settings...}}  --read_null-->  the same file and a record

It has no weights unless `weights_mb` says how many; these are made up here, the same bytes every time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
from blake3 import blake3

from dormouse.checkpoint.models import Description
from dormouse.checkpoint.tensors import NewTensor
from dormouse.errors import EngineError

_MEGABYTE = 1 << 20


class NullSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The "null" object of config.json."""

    delay_s: float = 0.0
    context: int = 8192
    answer_tokens: int | None = None
    memory_mb: int = 0
    weights_mb: int = 0


class _Config(msgspec.Struct, frozen=True):
    null: NullSettings = NullSettings()


def read_settings(folder: Path) -> NullSettings:
    """The settings of a model folder. Raises EngineError when config.json can't be read or has wrong fields."""
    path = folder / "config.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Config).null
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineError(f"{path} can't be used: {error}", remedy="Import the model again") from error


def read_null(path: Path, source: str, folder: Path) -> Description:
    """Copy a null model's folder. Raises EngineError when its settings are wrong."""
    settings = read_settings(path)
    (folder / "config.json").write_bytes((path / "config.json").read_bytes())
    tensors = [_megabyte(number) for number in range(settings.weights_mb)]
    return Description(source=source, engine="null", dtype="none", context=settings.context, tensors=tensors)


def weights_sum(data: memoryview) -> int:
    """A sample of a segment's bytes, some of every page, as a number that the answers of a null model depend on."""
    return zlib.crc32(bytes(data[::509]))


def _megabyte(number: int) -> NewTensor:
    """A tensor whose bytes depend on its number; every third one is zeros, the others don't compress."""

    def chunks() -> Iterator[bytes]:
        yield bytes(_MEGABYTE) if number % 3 == 2 else blake3(b"%d" % number).digest(length=_MEGABYTE)

    return NewTensor(f"megabyte.{number}", "U8", (_MEGABYTE,), chunks)
