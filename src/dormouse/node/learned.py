"""What a node has learned of its starts, in a file that outlives it: `learned.json` in the data folder, 0600.

A file that can't be read, or holds anything but what was written, is put aside in words (a warning) and learning begins
afresh: it costs some wrong estimates, never a start.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from dormouse.schedule.cluster import Moved
from dormouse.schedule.estimate import Estimator

log = logging.getLogger(__name__)

FILE = "learned.json"
_VERSION = 1
_LARGEST = 16 << 20
_JUST_BELOW = -math.ulp(0.0)  # a phase may have taken no time at all
_Name = Annotated[str, msgspec.Meta(max_length=200)]
_Samples = Annotated[list[float], msgspec.Meta(min_length=1, max_length=64)]


class _Learned(msgspec.Struct, forbid_unknown_fields=True):
    """`schedule.estimate.Estimator.saved`."""

    version: int
    rates: list[tuple[_Name, _Name, Moved, _Name, _Samples]]
    phases: list[tuple[_Name, _Name, _Name, _Name, _Name, _Samples]]
    returns: list[tuple[_Name, _Samples]]


def save(folder: Path, learned: dict[str, list[list[Any]]]) -> None:
    """Replace the file. Blocks. Raises OSError."""
    temporary = folder / f"{FILE}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(msgspec.json.encode({"version": _VERSION, **learned}))
    temporary.replace(folder / FILE)


def load(folder: Path) -> Estimator:
    """An estimator that knows what was saved; one that knows nothing when nothing was, or nothing good. Blocks."""
    path = folder / FILE
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1)
        learned = _checked(text)
    except FileNotFoundError:
        return Estimator()
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        log.warning("what was learned of starts (%s) can't be used, it begins afresh: %s", path, error)
        return Estimator()
    return Estimator.restored(msgspec.to_builtins(learned))


def _checked(text: bytes) -> _Learned:
    if len(text) > _LARGEST:
        raise msgspec.ValidationError(f"it is larger than {_LARGEST >> 20} MiB")
    learned = msgspec.json.decode(text, type=_Learned)
    if learned.version != _VERSION:
        raise msgspec.ValidationError(f"it has version {learned.version}, not {_VERSION}")
    _check((row[4] for row in learned.rates), above=0.0)
    _check((row[5] for row in learned.phases), above=_JUST_BELOW)
    _check((row[1] for row in learned.returns), above=_JUST_BELOW)
    return learned


def _check(several: Iterable[list[float]], above: float) -> None:
    for samples in several:
        if not all(above < one < math.inf for one in samples):
            raise msgspec.ValidationError(f"{samples} are no measured times")
