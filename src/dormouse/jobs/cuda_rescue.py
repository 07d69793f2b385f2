"""Brings back the CUDA state of a tree that is not ours, after whoever captured it has died in the middle.

The guard (guard.py) runs it as `python -m dormouse.jobs.cuda_rescue PID` once the tree runs again: its CUDA calls would
wait for ever otherwise. What can't be brought back is ended. Jobs need none: they end with their keeper.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace

from dormouse.errors import DormouseError
from dormouse.jobs.foreign import HostHome
from dormouse.phases import Phases
from dormouse.snapshot.cuda_checkpoint import CUDA, Cuda, CudaTree, knows_cuda

log = logging.getLogger(__name__)


_CUDA = replace(CUDA, uses_gpu=knows_cuda)
"""A process that is checkpointed has no device open by which it would be known."""


def rescue(root: int, cuda: Cuda = _CUDA) -> None:
    """Whatever is locked or checkpointed in the tree below `root` works on. Raises HostError, SnapshotError."""
    home = HostHome(root)
    found = cuda.find(home.processes())
    if found:
        CudaTree(found, cuda.driver(), home.close, cuda.limits).bring_back(Phases())


if __name__ == "__main__":
    try:
        rescue(int(sys.argv[1]))
    except DormouseError as error:
        log.error("the CUDA state of the tree below %s can't be brought back: %s", sys.argv[1], error)
        sys.exit(error.exit_code)
