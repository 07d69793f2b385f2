"""Who codes chunks of floats while they are imported: a GPU, where there is one and enough to code, else the store's
own codec on the CPU.

    chunks of one codec -> Coder.code() -> how to store each of them (Coded) -> Transaction.put

Nothing here imports torch until a GPU is found, so an import on a machine without one doesn't wait for it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from dormouse.errors import HostError
from dormouse.store.chunk import Buffer
from dormouse.store.codec import Codec

log = logging.getLogger(__name__)

_WORTH_STARTING = 2 << 30
"""Bytes of floats from which on a GPU codes them sooner than CUDA takes to start."""
_DRIVER = Path("/dev/nvidiactl")


class Coded(NamedTuple):
    """How to store a chunk: with this payload of this codec, or, without one, as that codec makes it on the CPU."""

    codec: Codec
    payload: Buffer | None


class Coder(Protocol):
    """Codes on a device. One thread calls it."""

    @property
    def name(self) -> str:
        """The device, for people."""

    def code(self, plains: Sequence[memoryview], codec: Codec) -> list[Coded]:
        """What to store for each chunk; all are as long as the first, only the last may be shorter. A payload has been
        decoded again and compared. Raises HostError when the device fails."""

    def close(self) -> None:
        """Free the device's memory. Not called after a failure."""


def find_coder(float_bytes: int) -> Coder | None:
    """What is to code so many bytes of floats, if not the CPU."""
    if float_bytes < _WORTH_STARTING or not _DRIVER.exists():
        return None
    if missing := [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]:
        log.info("weights are coded by the CPU although there is a GPU: %s is not installed", missing[0])
        return None
    from dormouse.transfer.float_coder import GpuCoder

    try:
        return GpuCoder.open()
    except HostError as error:
        log.warning("weights are coded by the CPU: %s", error)
        return None
