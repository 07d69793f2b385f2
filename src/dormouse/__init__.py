"""Dormouse: serve large models that sleep when nobody asks for them and wake in about a second.

From Python: `load_file`, `load` and `load_model`, and `hold` for what these take from a tier (docs/loading.md). They
need torch, so they are imported when they are first asked for, and `import dormouse` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dormouse.checkpoint.load import hold, load, load_file
    from dormouse.checkpoint.load_model import load_model
    from dormouse.checkpoint.shards import Shard
    from dormouse.transfer.dram import DramTier

__version__ = "0.1.0"

__all__ = ["DramTier", "Shard", "hold", "load", "load_file", "load_model"]

_PLACES = {
    "DramTier": "transfer.dram",
    "Shard": "checkpoint.shards",
    "hold": "checkpoint.load",
    "load": "checkpoint.load",
    "load_file": "checkpoint.load",
    "load_model": "checkpoint.load_model",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"dormouse.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
