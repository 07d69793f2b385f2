"""CUDA's part of a capture and a restore: the driver moves the GPU state of processes into their memory and back.

    running --lock--> locked --checkpoint--> checkpointed   (no GPU memory, no device file: CRIU can dump it)
    running <-unlock- locked <---restore---- checkpointed

The driver does it from outside (`cuCheckpointProcess…`, r570 and newer), by the pids of the host. `CudaTree` does it
for a whole tree: all are locked before the first is checkpointed, and all restored before the first is unlocked. The
driver's calls have no deadlines but one, so each runs in a thread of its own; for one that does not come back the tree
is given up, which frees the call. Whatever fails, what was locked or checkpointed is brought back, and where the driver
can't do that the tree is given up: no lock outlives us.

Which processes have CUDA state: those with a device file of NVIDIA's open (a look into /proc), of which the driver
knows a restore thread. So machines and trees without a GPU never load the driver. NVML takes part in this, too: a
driver of r580 has a restore thread for a process that has only called nvmlInit, so it is treated like the others.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from dormouse.errors import DormouseError, HostError, IncompatibleError, NotFoundError, SnapshotError
from dormouse.phases import Phases
from dormouse.snapshot.compatibility import gpu_key
from dormouse.snapshot.held_threads import inner_id, outer_thread, thread_ids

log = logging.getLogger(__name__)

MINIMUM_CUDA = (12, 8)
"""Of the driver: r570."""

State = Literal["running", "locked", "checkpointed", "failed"]
Verb = Literal["lock", "checkpoint", "restore", "unlock"]

_DEVICE = re.compile(r"/dev/nvidia(\d*)")
_PROC = Path("/proc/driver/nvidia")
_INSTALL = "pip install 'dormouse[cuda]'"
_CALLS = (
    *("cuCheckpointProcessLock", "cuCheckpointProcessCheckpoint", "cuCheckpointProcessRestore"),
    *("cuCheckpointProcessUnlock", "cuCheckpointProcessGetState", "cuCheckpointProcessGetRestoreThreadId"),
    "CUcheckpointGpuPair",
)


class CudaError(Exception):
    """The driver's answer to a call, `name` as in cuda.h. Never leaves this module's callers: see `refusal`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Driver(Protocol):
    """The driver's calls, for one host process each. They block, perhaps for ever, and raise CudaError."""

    def restore_thread(self, pid: int) -> int:
        """The thread of the process that restores it. A process without CUDA state has none: CudaError."""

    def state(self, pid: int) -> State: ...

    def lock(self, pid: int, milliseconds: int) -> None:
        """No CUDA call begins any more, and those under way are done."""

    def checkpoint(self, pid: int) -> None: ...

    def restore(self, pid: int, gpus: Mapping[str, str]) -> None:
        """With `gpus`, on others: old UUID -> new UUID, for every GPU there was."""

    def unlock(self, pid: int) -> None: ...


class CudaProcess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process with CUDA state as a snapshot remembers it: pid and restore thread as it knows them itself, and the
    UUIDs of the GPUs it used, the one it computes on first if that was known."""

    pid: int
    thread: int
    gpus: list[str]


class CudaState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The CUDA state in a snapshot. `gpus` are the UUIDs of all GPUs there were, used or not: the driver wants to be
    told about each when it restores on others. `driver` is its version."""

    processes: list[CudaProcess]
    gpus: list[str]
    driver: str


@dataclass(frozen=True)
class Gpu:
    """A GPU as the kernel's driver lists it."""

    minor: int
    uuid: str
    model: str


@dataclass(frozen=True)
class Limits:
    """Seconds: for the driver's own waiting for a lock, for what moves memory, for all other calls; and what a call
    gets beyond that when something has been done that should free it."""

    lock: float = 30.0
    memory: float = 600.0
    call: float = 30.0
    grace: float = 10.0


# Refusals

_MANAGED = (
    "it uses what the driver can't checkpoint: managed memory (UVM), memory shared between processes (CUDA IPC), or MPS"
)
_NOT_SUPPORTED = (
    _MANAGED,
    "Have the program do without (cudaMallocManaged, cudaIpc…, NCCL and UCX across processes); "
    "on Arm some drivers can't checkpoint at all",
)
_NO_MEMORY_HERE = (
    "there is no memory for it: of the host for the GPU's contents, or the GPU is cut up by MIG, which the driver "
    "can't checkpoint",
    "Free host memory as large as the GPU memory it uses, or use the GPU without MIG",
)
_BUSY = (
    "it did not come to rest in time: a kernel that runs on, or one that waits for another process (NCCL)",
    "Capture it when it is idle; programs that use several GPUs through NCCL can't be captured",
)
_ILLEGAL = (
    "it is not in the right state: it began to use CUDA at that moment, or somebody else has locked it",
    "Try again; end other tools that checkpoint it (cuda-checkpoint)",
)

REFUSALS: Mapping[tuple[Verb, str], tuple[str, str]] = {
    ("lock", "CUDA_ERROR_NOT_READY"): _BUSY,
    ("lock", "CUDA_ERROR_TIMEOUT"): _BUSY,
    ("lock", "CUDA_ERROR_ILLEGAL_STATE"): _ILLEGAL,
    ("lock", "CUDA_ERROR_NOT_SUPPORTED"): _NOT_SUPPORTED,
    ("checkpoint", "CUDA_ERROR_NOT_SUPPORTED"): _NOT_SUPPORTED,
    ("checkpoint", "CUDA_ERROR_OUT_OF_MEMORY"): _NO_MEMORY_HERE,
    ("checkpoint", "CUDA_ERROR_ILLEGAL_STATE"): _ILLEGAL,
    ("restore", "CUDA_ERROR_OUT_OF_MEMORY"): (
        "the GPU has not enough free memory for it",
        "Free memory of that GPU, or choose another one",
    ),
    ("restore", "CUDA_ERROR_NOT_SUPPORTED"): (
        "the GPU is not of the kind it was captured on, or the machine has another number of GPUs",
        "Restore it on a machine with the same GPUs",
    ),
    ("restore", "CUDA_ERROR_INVALID_VALUE"): (
        "the driver can't bring it to this GPU",
        "Restore it on a machine with the same GPUs, with a driver of r580 or newer for another GPU than before",
    ),
    ("restore", "CUDA_ERROR_NO_DEVICE"): ("it sees no GPU", "See `nvidia-smi`"),
}
"""What the driver's answers mean, and what to do about it. docs/processes.md has the same for people."""

_SHORTAGES = {("restore", "CUDA_ERROR_OUT_OF_MEMORY"), ("restore", "CUDA_ERROR_NO_DEVICE")}
"""Of these no snapshot is to blame."""


def refusal(verb: Verb, pid: int, error: CudaError) -> SnapshotError | HostError:
    """The driver's answer in words."""
    meaning, remedy = REFUSALS.get(
        (verb, error.name), ("the driver refused", "See `dormouse doctor` and the kernel's log (NVRM)")
    )
    kind = HostError if (verb, error.name) in _SHORTAGES else SnapshotError
    return kind(f"CUDA could not {verb} process {pid}: {meaning} ({error.name})", remedy=remedy)


# The driver


class Bindings:
    """The driver through `cuda.bindings.driver`, whose calls let go of the interpreter's lock."""

    def __init__(self, api: Any) -> None:
        self._api = api

    def restore_thread(self, pid: int) -> int:
        """See Driver."""
        return int(self._ask("cuCheckpointProcessGetRestoreThreadId", pid))

    def state(self, pid: int) -> State:
        """See Driver."""
        return _STATES.get(int(self._ask("cuCheckpointProcessGetState", pid)), "failed")

    def lock(self, pid: int, milliseconds: int) -> None:
        """See Driver."""
        arguments = self._api.CUcheckpointLockArgs()
        arguments.timeoutMs = milliseconds
        self._ask("cuCheckpointProcessLock", pid, arguments)

    def checkpoint(self, pid: int) -> None:
        """See Driver."""
        self._ask("cuCheckpointProcessCheckpoint", pid, None)

    def restore(self, pid: int, gpus: Mapping[str, str]) -> None:
        """See Driver."""
        self._ask("cuCheckpointProcessRestore", pid, self._pairs(gpus) if gpus else None)

    def unlock(self, pid: int) -> None:
        """See Driver."""
        self._ask("cuCheckpointProcessUnlock", pid, None)

    def _pairs(self, gpus: Mapping[str, str]) -> Any:
        pairs = []
        for old, new in gpus.items():
            pair = self._api.CUcheckpointGpuPair()
            pair.oldUuid, pair.newUuid = self._uuid(old), self._uuid(new)
            pairs.append(pair)
        arguments = self._api.CUcheckpointRestoreArgs()
        arguments.gpuPairs = pairs
        arguments.gpuPairsCount = len(pairs)
        return arguments

    def _uuid(self, text: str) -> Any:
        import ctypes

        made = self._api.CUuuid()  # its bytes can be set only where they lie
        ctypes.memmove(int(made.getPtr()), uuid_bytes(text), 16)
        return made

    def _ask(self, name: str, *arguments: Any) -> Any:
        try:
            code, *values = getattr(self._api, name)(*arguments)
        except (RuntimeError, AttributeError) as error:  # this driver, or these bindings, have no such call
            raise CudaError(f"CUDA_ERROR_NOT_FOUND: {error}") from error
        if int(code) != 0:
            raise CudaError(getattr(code, "name", str(code)))
        return values[0] if values else None


_STATES: Mapping[int, State] = {0: "running", 1: "locked", 2: "checkpointed"}


def uuid_bytes(text: str) -> bytes:
    """The 16 bytes of `GPU-xxxxxxxx-…`. Raises ValueError."""
    data = bytes.fromhex(text.removeprefix("GPU-").replace("-", ""))
    if len(data) != 16:
        raise ValueError(f"{text} is no UUID of a GPU")
    return data


@cache
def cuda_driver() -> Driver:
    """This host's driver, initialised in this process at the first call; no context is made and no GPU memory taken.
    Raises HostError."""
    try:
        api = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise HostError(
            f"a process uses CUDA, and the bindings to its driver are not installed: {error}", remedy=_INSTALL
        ) from error
    missing = [name for name in _CALLS if not hasattr(api, name)]
    if missing:
        raise HostError(f"the bindings to the CUDA driver are too old: they lack {missing[0]}", remedy=_INSTALL)
    call = _Call(partial(_initialise, api))
    if not call.done(Limits().call):
        raise HostError("the CUDA driver does not answer", remedy="See `nvidia-smi` and the kernel's log (NVRM)")
    call.result()
    return Bindings(api)


def _initialise(api: Any) -> None:
    """Raises HostError."""
    try:
        (code,) = api.cuInit(0)
        _same, version = api.cuDriverGetVersion()
    except (RuntimeError, OSError) as error:
        raise HostError(
            f"there is no CUDA driver: {error}", remedy="Install the NVIDIA driver, r570 or newer"
        ) from error
    if int(code) != 0:
        raise HostError(
            f"the CUDA driver can't be initialised: {getattr(code, 'name', code)}",
            remedy="See `nvidia-smi`; in a container, give it the GPUs",
        )
    found = divmod(int(version) // 10, 100)
    if found < MINIMUM_CUDA:
        raise HostError(
            f"this NVIDIA driver is for CUDA {found[0]}.{found[1]} and can't checkpoint", remedy="Install r570 or newer"
        )


@dataclass(frozen=True)
class Cuda:
    """How CUDA is reached. `uses_gpu` is the cheap look that comes before the driver is loaded at all."""

    driver: Callable[[], Driver] = cuda_driver
    uses_gpu: Callable[[int], bool] = field(default=lambda pid: devices(pid) != set())
    limits: Limits = Limits()

    def find(self, pids: Iterable[int]) -> dict[int, int]:
        """The processes with CUDA state and the restore thread of each, by host ids, in the order given. Raises
        HostError when there may be some and the driver can't be asked."""
        found = {pid: self._restore_thread(pid) for pid in pids if self.uses_gpu(pid)}
        return {pid: thread for pid, thread in found.items() if thread is not None}

    def _restore_thread(self, pid: int) -> int | None:
        call = _Call(partial(self.driver().restore_thread, pid))
        if not call.done(self.limits.call):
            raise SnapshotError(
                f"the CUDA driver does not answer about process {pid}",
                remedy="Processes that talk through NCCL can't be captured; else see the kernel's log (NVRM)",
            )
        try:
            return _thread_here(pid, call.result())
        except CudaError as error:
            log.info("process %d has a GPU's device file open, and no CUDA state: %s", pid, error.name)
            return None


CUDA = Cuda()
"""The driver of this host."""


def _thread_here(pid: int, thread: int) -> int | None:
    """The host's id of a thread the driver has named, in our PID namespace or in its own. A process that was forked
    from one with CUDA has that one's answers, but not its thread."""
    threads = thread_ids(pid)
    if thread in threads:
        return thread
    return next((tid for tid in threads if inner_id(pid, tid) == thread), None)


def devices(pid: int) -> set[str]:
    """NVIDIA's device files that a process has open or mapped; none when it has ended."""
    found: set[str] = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found |= set(filter(_DEVICE.match, [os.readlink(entry.path)]))  # noqa: PTH115 - many, and hot
        for line in Path(f"/proc/{pid}/maps").read_bytes().split(b"\n"):
            if b" /dev/nvidia" in line:
                found.add(os.fsdecode(line[line.index(b"/dev/nvidia") :]))
    return found


def require_closed(pids: Iterable[int]) -> None:
    """That processes whose CUDA state is checkpointed have no device file left, which CRIU could not dump. Raises
    SnapshotError."""
    for pid in pids:
        left = devices(pid)
        if left:
            raise SnapshotError(
                f"process {pid} still has {', '.join(sorted(left))} open after its CUDA state was checkpointed",
                remedy="Have the program close it (nvmlShutdown), or not share it with a process without CUDA",
            )


def knows_cuda(pid: int) -> bool:
    """Whether the driver's library is in a process: so it is also when its state is checkpointed."""
    try:
        return b"/libcuda.so" in Path(f"/proc/{pid}/maps").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def gpus(driver: Path = _PROC) -> list[Gpu]:
    """The GPUs of this host, in the order of their device files; none without a driver."""
    found = []
    for page in driver.glob("gpus/*/information"):
        lines = (line.partition(":") for line in page.read_text(errors="replace").splitlines())
        fields = {name.strip(): value.strip() for name, _, value in lines}
        minor = fields.get("Device Minor", "")
        if minor.isdigit() and "GPU UUID" in fields:
            found.append(Gpu(int(minor), fields["GPU UUID"], fields.get("Model", "")))
    return sorted(found, key=lambda gpu: gpu.minor)


def used_gpus(pid: int, here: Sequence[Gpu]) -> list[str]:
    """The UUIDs of the GPUs a process works with: the device files of the others it has open at most."""
    mapped = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        mapped = set(re.findall(r" /dev/nvidia(\d+)$", Path(f"/proc/{pid}/maps").read_text(errors="replace"), re.M))
    opened = {match[1] for path in devices(pid) if (match := _DEVICE.fullmatch(path)) and match[1]}
    return [gpu.uuid for gpu in here if str(gpu.minor) in (mapped or opened)]


def chosen_gpu(text: str, here: Sequence[Gpu]) -> Gpu:
    """The GPU a user means: by number or by (the beginning of its) UUID. Raises NotFoundError."""
    matches = [gpu for gpu in here if text == str(gpu.minor) or gpu.uuid.lower().startswith(text.lower())]
    matches = matches or [gpu for gpu in here if gpu.uuid.lower().startswith(f"gpu-{text.lower()}")]
    if len(matches) != 1:
        names = ", ".join(f"{gpu.minor} ({gpu.uuid})" for gpu in here) or "none"
        raise NotFoundError(f"there is no GPU {text} here, or more than one", remedy=f"There are: {names}")
    return matches[0]


def gpu_pairs(state: CudaState, here: Sequence[str], wanted: Sequence[str] = ()) -> dict[str, str]:
    """On which GPU each goes: old UUID -> new one, empty when each goes where it was.

    The used ones go to those `wanted`, in order, else stay, else take the first that is free; the others take what is
    left, as the driver wants to be told about all. Raises IncompatibleError when there are too few, or not the wanted.
    """
    strange = [uuid for uuid in wanted if uuid not in here]
    if strange and here:  # a container may hide the list: then the driver has the last word
        raise IncompatibleError(f"there is no GPU {strange[0]}", remedy="See `nvidia-smi -L`")
    used = list(dict.fromkeys(uuid for process in state.processes for uuid in process.gpus)) or state.gpus
    missing = [uuid for uuid in used if uuid not in here]
    if not missing and not wanted:
        return {}
    pairs = dict(zip(used, wanted, strict=False))
    for uuid in [*used, *state.gpus]:
        left = [new for new in here if new not in pairs.values()]
        if uuid in pairs:
            continue
        if not left:
            if uuid in used:
                raise IncompatibleError(
                    f"it used {len(used)} GPUs, and there are {len(here)}", remedy="Restore it where there are enough"
                )
            continue  # there were more than there are: the driver tells if it can't do that
        pairs[uuid] = uuid if uuid in left else left[0]
    return {} if all(old == new for old, new in pairs.items()) else pairs


# Trees


class _Call:
    """One call in a thread of its own. A call that never comes back leaves the thread behind."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cuda-call", daemon=True)
        self._thread.start()

    def done(self, seconds: float) -> bool:
        """Wait for its end."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> Any:
        """What it has returned; raises what it has raised."""
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:  # noqa: BLE001 - raised again by `result`
            self._error = error


class CudaTree:
    """The processes with CUDA state of one tree, by host pid. `give_up` kills the whole tree, at once and for good.
    Nothing here may be called by two threads at once."""

    def __init__(self, pids: Iterable[int], driver: Driver, give_up: Callable[[], None], limits: Limits) -> None:
        self._pids = list(pids)
        self._driver = driver
        self._give_up = give_up
        self._limits = limits
        self._given_up = False

    def suspend(self, phases: Phases) -> None:
        """Move all GPU state into the processes' memory. They must run. On any error it is as before, or given up."""
        try:
            with phases.time("cuda lock", track="cuda"):
                for pid in self._pids:
                    self._lock(pid)
            with phases.time("cuda checkpoint", track="cuda"):
                for pid in self._pids:
                    self._do("checkpoint", pid, partial(self._driver.checkpoint, pid), self._limits.memory)
        except DormouseError as error:
            left = self.bring_back(phases)
            if left is not None and not self._given_up_in(error):
                raise type(error)(f"{error.message}; {left}", remedy=error.remedy) from error
            raise
        except BaseException:
            self.bring_back(phases)
            raise

    def resume(self, phases: Phases, gpus: Mapping[str, str] | None = None) -> None:
        """Bring the GPU state back, on other GPUs with `gpus` (see `gpu_pairs`), and let CUDA work again. The restore
        threads must run. On an error the tree is of no use any more: close it."""
        with phases.time("cuda restore", track="cuda"):
            for pid in self._pids:
                self._do("restore", pid, partial(self._driver.restore, pid, gpus or {}), self._limits.memory)
            for pid in self._pids:
                self._do("unlock", pid, partial(self._driver.unlock, pid), self._limits.call)

    def bring_back(self, phases: Phases) -> str | None:
        """After a failure: whatever was done to a process is undone, where it was. Where that can't be, the tree is
        given up, and the words for that are returned."""
        with phases.time("cuda restore", track="cuda"):
            for pid in reversed(self._pids):
                if self._given_up:
                    return "its processes were ended"
                try:
                    self._undo(pid)
                except (DormouseError, CudaError, RuntimeError) as error:  # the last: no thread for a call
                    log.error("the CUDA state of process %d can't be brought back: %s", pid, error)
                    self._end()
                    return f"its processes were ended, for its CUDA state could not be brought back ({error})"
        return None

    def _undo(self, pid: int) -> None:
        if not _lives(pid):
            return
        call = _Call(partial(self._driver.state, pid))
        if not call.done(self._limits.call):
            raise SnapshotError("the driver does not answer")
        state = call.result()
        if state == "failed":
            raise SnapshotError("the driver has lost it")
        if state == "checkpointed":
            self._do("restore", pid, partial(self._driver.restore, pid, {}), self._limits.memory)
        if state in ("checkpointed", "locked"):
            self._do("unlock", pid, partial(self._driver.unlock, pid), self._limits.call)

    def _lock(self, pid: int) -> None:
        if _is_stopped(pid):
            raise SnapshotError(
                f"process {pid} uses CUDA and is stopped, so CUDA can't be checkpointed",
                remedy=f"Let it run first: kill -CONT {pid}",
            )
        call = _Call(partial(self._driver.lock, pid, int(self._limits.lock * 1000)))
        if not call.done(self._limits.lock + self._limits.grace):
            # Among processes that talk to each other, one that is locked can keep the next lock from ever coming back.
            others, self._pids = self._pids, [other for other in self._pids if other != pid]
            self.bring_back(Phases())
            self._pids = others
            if not call.done(self._limits.grace):
                raise self._hung("lock", pid, call)
            with contextlib.suppress(CudaError):
                call.result()
            raise refusal("lock", pid, CudaError("CUDA_ERROR_TIMEOUT"))
        self._told("lock", pid, call)

    def _do(self, verb: Verb, pid: int, function: Callable[[], None], seconds: float) -> None:
        call = _Call(function)
        if not call.done(seconds):
            raise self._hung(verb, pid, call)
        self._told(verb, pid, call)

    def _told(self, verb: Verb, pid: int, call: _Call) -> None:
        try:
            call.result()
        except CudaError as error:
            if not _lives(pid):
                raise SnapshotError(f"process {pid} has ended while CUDA was to {verb} it") from error
            raise refusal(verb, pid, error) from error

    def _hung(self, verb: Verb, pid: int, call: _Call) -> _GivenUp:
        self._end()
        if not call.done(self._limits.grace):
            log.error("the driver's call to %s process %d has not come back although its process is gone", verb, pid)
        return _GivenUp(
            f"the driver did not {verb} process {pid} in time; its processes were ended, which frees the call",
            remedy="See the kernel's log (NVRM); start it afresh",
        )

    def _end(self) -> None:
        if not self._given_up:
            self._given_up = True
            self._give_up()

    def _given_up_in(self, error: DormouseError) -> bool:
        return isinstance(error, _GivenUp)


class _GivenUp(SnapshotError):
    """The tree was killed."""


def cuda_state(found: Mapping[int, int], driver: Path = _PROC, *, computes_on: str | None = None) -> CudaState:
    """What a snapshot shall remember; to be asked before the processes are checkpointed. `computes_on`: the GPU that
    comes first, for CUDA may have others open."""
    here = gpus(driver)
    processes = []
    for pid, thread in found.items():
        inside, inside_thread = inner_id(pid, pid), inner_id(pid, thread)
        if inside is None or inside_thread is None:
            raise SnapshotError(f"process {pid} has ended")
        used = used_gpus(pid, here)
        first = [gpu.uuid for gpu in here if gpu.uuid == computes_on]
        processes.append(CudaProcess(inside, inside_thread, list(dict.fromkeys([*first, *used]))))
    return CudaState(processes, [gpu.uuid for gpu in here], gpu_key(driver).get("gpu_driver", ""))


def restore_threads(state: CudaState, outer_pid: Callable[[int], int]) -> dict[int, int]:
    """The host's pid of each restored process with CUDA state, and its restore thread there. Raises SnapshotError."""
    pids = {outer_pid(process.pid): process.thread for process in state.processes}
    return {pid: outer_thread(pid, thread) for pid, thread in pids.items()}


def _lives(pid: int) -> bool:
    return _process_state(pid) not in ("", "Z", "X")


def _is_stopped(pid: int) -> bool:
    return _process_state(pid) == "T"


def _process_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
