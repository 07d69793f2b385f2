"""Stands by while a tree that is not ours is captured: if the capturing process dies in between, however hard, the
tree must not stay stopped for ever.

    capture ends in good order -> it says so, this process ends
    the pipe just closes       -> wait until CRIU has let go of the tree, then continue what was left stopped, and
                                  have CUDA work again in it (cuda_rescue.py)

`Guard` starts it; run as a program (standard library only) it is the guard itself. Jobs need none: they are their
keeper's, and end with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Self

_CALM = 2.0
_PATIENCE = 120.0
_RESCUE = 1800.0


class Guard:
    """Use it as a context manager around the capture. `but` are pids that were stopped before."""

    def __init__(self, root: int, but: Iterable[int]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(root), *map(str, but)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            # Where the rescuer finds its modules; this program itself looks at no such variable (-I).
            env={"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._process.communicate(b"done")


def watch(root: int, but: set[int]) -> None:
    """Until told that all is well; else until the tree runs again."""
    if os.read(0, 4):
        return
    begin = calm_since = time.monotonic()
    while time.monotonic() - calm_since < _CALM and time.monotonic() - begin < _PATIENCE:
        for pid in _tree(root):
            state, tracer = _state(pid)
            if tracer or (state == "T" and pid not in but):
                calm_since = time.monotonic()
                if not tracer:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)
    if any(map(_knows_cuda, _tree(root))):
        subprocess.run([sys.executable, "-m", "dormouse.jobs.cuda_rescue", str(root)], timeout=_RESCUE, check=False)


def _knows_cuda(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:  # noqa: PTH123
            return b"/libcuda.so" in file.read()
    except OSError:
        return False


def _tree(root: int) -> list[int]:
    pids = [root]
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - stdlib-light on purpose
                with open(f"/proc/{pid}/task/{task}/children") as file:  # noqa: PTH123
                    pids += [int(word) for word in file.read().split()]
    return pids


def _state(pid: int) -> tuple[str, bool]:
    """State letter, and whether somebody traces the process; of one that has ended: neither."""
    try:
        with open(f"/proc/{pid}/status") as file:  # noqa: PTH123
            fields = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return "", False
    return fields["State"].split()[0], fields["TracerPid"].strip() != "0"


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    watch(int(sys.argv[1]), {int(word) for word in sys.argv[2:]})
