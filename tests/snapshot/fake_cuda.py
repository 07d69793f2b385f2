"""A CUDA driver that can fail or hang at every call, for real processes that have never seen a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from dormouse.snapshot.cuda_checkpoint import CudaError, State, Verb
from dormouse.snapshot.held_threads import thread_ids

STEPS: Mapping[Verb, tuple[State, State]] = {
    "lock": ("running", "locked"),
    "checkpoint": ("locked", "checkpointed"),
    "restore": ("checkpointed", "locked"),
    "unlock": ("locked", "running"),
}


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


class FakeDriver:
    """`states` are the processes' CUDA states, `first` that of one not seen before. `fails` has the error for a call,
    `hangs` the calls that come back only when their process is dead, or what they wait for is done. `watch` is told of
    every call before it works."""

    def __init__(self, first: State = "running") -> None:
        self.first = first
        self.states: dict[int, State] = {}
        self.calls: list[tuple[str, int]] = []
        self.gpus: list[Mapping[str, str]] = []
        self.fails: dict[tuple[str, int], str] = {}
        self.hangs: dict[tuple[str, int], Callable[[], bool]] = {}
        self.threads: dict[int, int] = {}
        self.watch: Callable[[str, int], None] = lambda _verb, _pid: None
        self._pause = threading.Event()

    def restore_thread(self, pid: int) -> int:
        self._begin("restore_thread", pid)
        return self.threads.get(pid, thread_ids(pid)[-1])

    def state(self, pid: int) -> State:
        self._begin("state", pid)
        return self.states.get(pid, self.first)

    def lock(self, pid: int, milliseconds: int) -> None:
        assert milliseconds > 0
        self._step("lock", pid)

    def checkpoint(self, pid: int) -> None:
        self._step("checkpoint", pid)

    def restore(self, pid: int, gpus: Mapping[str, str]) -> None:
        self.gpus.append(gpus)
        self._step("restore", pid)

    def unlock(self, pid: int) -> None:
        self._step("unlock", pid)

    def _begin(self, call: str, pid: int) -> None:
        self.calls.append((call, pid))
        self.watch(call, pid)
        freed = self.hangs.get((call, pid))
        if freed is not None:
            while lives(pid) and not freed():
                self._pause.wait(0.01)
        if not lives(pid):
            raise CudaError("CUDA_ERROR_OPERATING_SYSTEM")
        if (call, pid) in self.fails:
            raise CudaError(self.fails[call, pid])

    def _step(self, verb: Verb, pid: int) -> None:
        self._begin(verb, pid)
        before, after = STEPS[verb]
        if self.states.get(pid, self.first) != before:
            raise CudaError("CUDA_ERROR_ILLEGAL_STATE")
        self.states[pid] = after


def never() -> bool:
    return False
