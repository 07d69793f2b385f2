"""Dormouse: serve large models that sleep when nobody asks for them and wake in about a second.

From Python: `load_file`, `load` and `load_model` (docs/loading.md). They need torch, so they are imported when they are
first asked for, and `import dormouse` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dormouse.checkpoint.load import load, load_file
    from dormouse.checkpoint.load_model import load_model
    from dormouse.checkpoint.shards import Shard

__version__ = "0.1.0"

__all__ = ["Shard", "load", "load_file", "load_model"]

_PLACES = {"Shard": "shards", "load": "load", "load_file": "load", "load_model": "load_model"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"dormouse.checkpoint.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
