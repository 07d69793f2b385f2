"""On a real GPU: what falls asleep wakes bit for bit, no failure loses it, and no GPU memory is ever left behind.

`plain` is a program that speaks with the driver alone, which starts in a moment; one test uses torch and a CUDA graph.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.jobs.conftest import eventually
from tests.snapshot.fake_cuda import lives
from tests.snapshot.test_cuda_capture import Host, fail_in_attach

from dormouse.errors import DormouseError, SnapshotError
from dormouse.phases import Phases
from dormouse.snapshot.capture import run_on
from dormouse.snapshot.cell import CONTROL_FD, Cell, worker_pid_floor
from dormouse.snapshot.compatibility import gpu_key
from dormouse.snapshot.criu_setup import Criu
from dormouse.snapshot.cuda_checkpoint import CUDA, CudaError, CudaTree, Driver, Limits, State, devices, gpus
from dormouse.snapshot.held_threads import thread_ids
from dormouse.snapshot.images import decode_body
from dormouse.snapshot.restore import restore
from dormouse.snapshot.tree import External, ProcessTree
from dormouse.store.store import Store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.root,
    pytest.mark.timeout(90),
    pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no NVIDIA GPU"),
]

alone = pytest.mark.gpu(alone=True)  # it measures the GPU's memory

SIZE = 512 << 20

# CRIU wants open files to be of the cell's own mounts, so the program opens its log itself.
OPEN_LOG = """
import os, sys
for stream in (1, 2): os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
"""

PLAIN = """
import ctypes, hashlib, os, socket, sys, threading, time
cuda = ctypes.CDLL("libcuda.so.1")
def do(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    assert code == 0, (name, code)
size = int(sys.argv[2])
do("cuInit", ctypes.c_uint(0))
ticks = 0
def tick():
    global ticks
    while True:
        ticks += 1
        time.sleep(0.001)
threading.Thread(target=tick, daemon=True).start()
memory = ctypes.c_uint64()
if size:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    do("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
    do("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    do("cuCtxSetCurrent", context)
    do("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(size))
    do("cuMemsetD32_v2", memory, ctypes.c_uint(0x12345678), ctypes.c_size_t(size // 4))
    noise = os.urandom(1 << 20)
    do("cuMemcpyHtoD_v2", memory, noise, ctypes.c_size_t(len(noise)))
kept = []
def digest():
    if not size: return "none"
    buffer = ctypes.create_string_buffer(2 << 20)
    do("cuMemcpyDtoH_v2", buffer, memory, ctypes.c_size_t(1 << 20))
    do("cuMemcpyDtoH_v2", ctypes.byref(buffer, 1 << 20), ctypes.c_uint64(memory.value + size - (1 << 20)),
       ctypes.c_size_t(1 << 20))
    return hashlib.sha256(buffer.raw).hexdigest()
def managed():
    pointer = ctypes.c_uint64()
    do("cuMemAllocManaged", ctypes.byref(pointer), ctypes.c_size_t(4 << 20), ctypes.c_uint(1))
    ctypes.memset(pointer.value, 7, 4 << 20)
    return "ok"
def busy():
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _data: time.sleep(5))
    kept.append(function)
    do("cuLaunchHostFunc", None, function, None)
    return "ok"
control = socket.socket(fileno=3)
lines = control.makefile("r")
while True:
    answer = {"digest": digest, "managed": managed, "busy": busy, "ticks": lambda: ticks}[lines.readline().strip()]()
    control.sendall(f"{answer}\\n".encode())
"""

TORCH = """
import hashlib, socket, torch
torch.manual_seed(1)
weights = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
given = torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)
side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    for _ in range(3): given @ weights
torch.cuda.current_stream().wait_stream(side)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    made = torch.softmax((given @ weights).float(), dim=-1)
pinned = torch.arange(1 << 20, dtype=torch.int32).pin_memory()
control = socket.socket(fileno=3)
lines = control.makefile("r")
while True:
    lines.readline()
    made.zero_()
    graph.replay()
    eager = (given @ weights).float().sum()
    again = pinned.to("cuda", non_blocking=True).sum()
    torch.cuda.synchronize()
    text = f"{hashlib.sha256(made.cpu().numpy().tobytes()).hexdigest()} {eager.item()} {again.item()}"
    control.sendall((text + "\\n").encode())
"""


class Program:
    """A program in a cell that answers words through its control socket."""

    def __init__(self, tree: ProcessTree, control: socket.socket, log: Path) -> None:
        self.tree, self._control, self._log = tree, control, log
        self.pid = tree.home.outer_pid(tree.pid)

    def ask(self, word: str = "digest") -> str:
        self._control.settimeout(30)
        self._control.sendall(f"{word}\n".encode())
        data = b""
        while not data.endswith(b"\n"):
            part = self._control.recv(4096)
            assert part, f"the program has ended; its last words: {self._log.read_text()[-2000:]}"
            data += part
        return data.decode().strip()

    def close(self) -> None:
        self._control.close()
        self.tree.home.close()


class GpuHost(Host):
    """On the real driver."""

    def __init__(self, store: Store, criu: Criu, folder: Path) -> None:
        super().__init__(store, criu, folder)
        self.cuda = CUDA
        self._log = folder / "program.log"
        self._programs: list[Program] = []

    def run(self, source: str, *arguments: object) -> Program:
        cell = Cell.create()
        self.cells.append(cell)
        spawned = cell.spawn(
            [sys.executable, "-c", OPEN_LOG + source, str(self._log), *map(str, arguments)],
            env=dict(os.environ),
            control=CONTROL_FD,
            pid_floor=worker_pid_floor(),
            io_uring=False,
        )
        assert spawned.control is not None and spawned.inode is not None
        tree = ProcessTree(cell, spawned.pid, (External("socket", spawned.inode),))
        return self._adopt(tree, spawned.control)

    def plain(self, size: int = SIZE) -> Program:
        program = self.run(PLAIN, size)
        program.ask()
        return program

    def wake(self, snapshot_id: str, wanted: tuple[str, ...] = ()) -> tuple[Program, dict[str, float]]:
        cell = Cell.create()
        self.cells.append(cell)
        restored = restore(
            snapshot_id, self.store, self.criu, key={"machine": "here"}, take_home=lambda: cell, timeout=60,
            digests=self.digests, folders=self.folders, gpus=wanted, cuda=self.cuda,
        )  # fmt: skip
        assert restored.control is not None
        return self._adopt(restored.tree, restored.control), restored.phases.seconds()

    def _adopt(self, tree: ProcessTree, control: socket.socket) -> Program:
        program = Program(tree, control, self._log)
        self._programs.append(program)
        return program

    def close(self) -> None:
        super().close()
        for program in self._programs:
            program.close()


class Watched:
    """The real driver; `at(call, pid)` is called before each call."""

    def __init__(self, driver: Driver, at: Callable[[str, int], None]) -> None:
        self._driver, self._at = driver, at

    def restore_thread(self, pid: int) -> int:
        return self._driver.restore_thread(pid)

    def state(self, pid: int) -> State:
        return self._driver.state(pid)

    def lock(self, pid: int, milliseconds: int) -> None:
        self._at("lock", pid)
        self._driver.lock(pid, milliseconds)

    def checkpoint(self, pid: int) -> None:
        self._at("checkpoint", pid)
        self._driver.checkpoint(pid)

    def restore(self, pid: int, gpus: Mapping[str, str]) -> None:
        self._at("restore", pid)
        self._driver.restore(pid, gpus)

    def unlock(self, pid: int) -> None:
        self._at("unlock", pid)
        self._driver.unlock(pid)


@pytest.fixture
def host(store: Store, criu: Criu, tmp_path: Path) -> Iterator[GpuHost]:
    made = GpuHost(store, criu, tmp_path)
    yield made
    made.close()


def used_memory() -> list[int]:
    """Bytes in use on each GPU, by number."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        pytest.skip("no nvidia-smi to measure with")
    query = [smi, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30)
    return [int(line) << 20 for line in done.stdout.split()]


def used_by_uuid() -> dict[str, int]:
    """Bytes in use on each GPU."""
    query = ["nvidia-smi", "--query-gpu=uuid,memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30)
    return {uuid: int(used) << 20 for uuid, used in (line.split(", ") for line in done.stdout.splitlines())}


def facts(**values: Any) -> None:
    """Printed with `pytest -rP`, and when a test fails."""
    print(*(f"{name}: {value}" for name, value in values.items()), sep="\n")


def test_a_torch_program_with_a_cuda_graph_wakes_bit_for_bit_and_again(host: GpuHost) -> None:
    program = host.run(TORCH)
    before = program.ask()
    captured = host.capture(program.tree)
    assert not devices(program.pid)
    program.close()
    body = decode_body(host.store.manifest(captured.snapshot_id).body, captured.snapshot_id)
    facts(
        capture=captured.phases.seconds(),
        raw=captured.raw_bytes,
        stored=captured.stored_bytes,
        cuda=body.cuda,
        key=body.key,
    )
    assert body.cuda is not None and len(body.cuda.processes) == 1
    assert body.cuda.processes[0].gpus == [gpu.uuid for gpu in gpus()], "of all that there are it holds some memory"
    assert body.key["gpu_driver"] == body.cuda.driver and body.key["gpu"]
    woken, phases = host.wake(captured.snapshot_id)
    facts(restore=phases)
    assert woken.ask() == before
    again = host.capture(woken.tree)
    run_on(woken.tree, again)  # in place
    assert woken.ask() == before
    woken.close()
    second, _phases = host.wake(again.snapshot_id)
    assert second.ask() == before


@alone
def test_a_tree_falls_asleep_and_wakes_in_place_without_criu(host: GpuHost) -> None:
    program = host.plain()
    before, busy = program.ask(), used_memory()[0]
    found = CUDA.find(program.tree.home.processes())
    assert list(found) == [program.pid] and found[program.pid] in thread_ids(program.pid)
    restorer = Path(f"/proc/{program.pid}/task/{found[program.pid]}")
    facts(restorer=(restorer / "comm").read_text().strip(), status=(restorer / "status").read_text())
    phases = Phases()
    tree = CudaTree(found, CUDA.driver(), program.tree.home.close, CUDA.limits)
    tree.suspend(phases)
    facts(devices=devices(program.pid), state=CUDA.driver().state(program.pid))
    assert not devices(program.pid) and used_memory()[0] <= busy - SIZE
    assert int(program.ask("ticks")) > 0  # the program's own threads go on
    tree.resume(phases)
    facts(phases=phases.seconds())
    assert program.ask() == before


def test_no_thread_of_the_program_runs_before_its_gpu_state_is_back(host: GpuHost) -> None:
    program = host.plain()
    before = program.ask()
    captured = host.capture(program.tree)
    program.close()
    held: list[tuple[str, list[str]]] = []

    def at(call: str, pid: int) -> None:
        threads = [Path(f"/proc/{pid}/task/{tid}/stat").read_text() for tid in thread_ids(pid)]
        held.append((call, sorted(text.rpartition(")")[2].split()[0] for text in threads)))

    driver = CUDA.driver()
    host.cuda = replace(CUDA, driver=lambda: Watched(driver, at))
    woken, phases = host.wake(captured.snapshot_id)
    facts(held=held, phases=phases)
    assert [call for call, _states in held] == ["restore", "unlock"]
    assert all(len(states) - states.count("t") == 1 for call, states in held if call == "restore")
    assert woken.ask() == before


@pytest.mark.parametrize(
    "more",
    [{"attach": fail_in_attach}, {"still_wanted": lambda: False}, {"criu_options": ["--no-such-option"]}],
    ids=["at the images", "at the commit", "in criu"],
)
def test_after_a_failure_in_the_middle_cuda_works_on(host: GpuHost, more: dict[str, Any]) -> None:
    program = host.plain()
    before = program.ask()
    with pytest.raises(SnapshotError) as caught:
        host.capture(program.tree, **more)
    facts(error=caught.value)
    assert program.ask() == before and CUDA.driver().state(program.pid) == "running"


def test_managed_memory_is_refused_clearly_and_the_program_goes_on(host: GpuHost) -> None:
    program = host.plain()
    before = program.ask()
    program.ask("managed")
    try:
        captured = host.capture(program.tree)
    except SnapshotError as error:
        facts(error=error, alive=lives(program.pid))
        assert f"process {program.pid}: it uses what the driver can't checkpoint: managed memory" in error.message
        assert program.ask() == before
        return
    facts(managed_memory="this driver can checkpoint it")  # then it has to be right
    program.close()
    assert host.wake(captured.snapshot_id)[0].ask() == before


def test_a_program_that_does_not_come_to_rest_is_refused_in_time_and_goes_on(host: GpuHost) -> None:
    program = host.plain()
    before = program.ask()
    host.cuda = replace(CUDA, limits=replace(CUDA.limits, lock=1.0))
    program.ask("busy")
    begin = time.monotonic()
    with pytest.raises(SnapshotError, match="did not come to rest in time") as caught:
        host.capture(program.tree)
    facts(error=caught.value, seconds=time.monotonic() - begin)
    assert program.ask() == before
    assert time.monotonic() - begin < 30


@alone
@pytest.mark.parametrize("verb", ["lock", "checkpoint", "restore", "unlock"])
def test_a_kill_at_any_phase_gives_the_gpus_memory_back(host: GpuHost, verb: str) -> None:
    idle = used_memory()[0]
    program = host.plain()

    def at(call: str, pid: int) -> None:
        if call == verb and verb in ("lock", "unlock"):
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: not lives(pid), "killed")
        elif call == verb:  # while the driver is at work
            threading.Timer(0.02, os.kill, (pid, signal.SIGKILL)).start()

    driver = CUDA.driver()
    limits = Limits(lock=5, memory=20, call=5, grace=3)
    watched = replace(CUDA, driver=lambda: Watched(driver, at), limits=limits)
    begin = time.monotonic()
    error = None
    try:
        if verb in ("lock", "checkpoint"):
            host.cuda = watched
            host.capture(program.tree)
        else:
            captured = host.capture(program.tree)
            program.close()
            host.cuda = watched
            host.wake(captured.snapshot_id)
    except DormouseError as caught:
        error = caught
    facts(error=error, seconds=time.monotonic() - begin)
    assert error is not None or verb == "restore"  # which may be quicker than the kill
    eventually(lambda: used_memory()[0] < idle + SIZE // 2, f"memory back to {idle}", patience=20)


def test_a_program_that_only_initialised_cuda_wakes_too(host: GpuHost) -> None:
    program = host.plain(size=0)
    found = CUDA.find(program.tree.home.processes())
    facts(devices=devices(program.pid), found=found)
    captured = host.capture(program.tree)
    program.close()
    woken, _phases = host.wake(captured.snapshot_id)
    assert woken.ask() == "none"


def test_what_the_driver_says_of_processes_without_cuda() -> None:
    process = subprocess.Popen(["/bin/sleep", "60"])
    try:
        driver = CUDA.driver()
        for call in (driver.restore_thread, driver.state):
            try:
                facts(answer=(call.__name__, call(process.pid)))
            except CudaError as error:
                facts(answer=(call.__name__, error.name))
        assert CUDA.find([process.pid]) == {}
        assert replace(CUDA, uses_gpu=lambda _pid: True).find([process.pid]) == {}
    finally:
        process.kill()
        process.wait()


NVML = """
import ctypes, socket
nvml = ctypes.CDLL("libnvidia-ml.so.1")
begun = nvml.nvmlInit_v2()
control = socket.socket(fileno=3)
lines = control.makefile("r")
while True:
    lines.readline()
    count = ctypes.c_uint()
    code = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    control.sendall(f"{begun} {code} {count.value}\\n".encode())
"""


def test_a_program_with_nvml_alone_wakes_too_or_is_refused_clearly_and_goes_on(host: GpuHost) -> None:
    """NVML takes part in the driver's checkpoints from some version on: there the process counts as one with CUDA."""
    program = host.run(NVML)
    before = program.ask()
    found = CUDA.find([program.pid])
    facts(before=before, devices=devices(program.pid), found=found)
    try:
        captured = host.capture(program.tree)
    except SnapshotError as error:
        facts(error=error)
        assert not found or "still has /dev/nvidia" in error.message or "CUDA could not" in error.message
        assert program.ask() == before
        return
    program.close()
    assert found, "a device file was dumped that nobody has closed"
    woken, phases = host.wake(captured.snapshot_id)
    facts(restore=phases)
    assert woken.ask() == before


def test_the_gpus_are_listed_with_uuid_and_model() -> None:
    facts(gpus=gpus(), key=gpu_key())
    assert gpus() and all(gpu.uuid.startswith("GPU-") and gpu.model for gpu in gpus())
    assert gpu_key()["gpu_driver"][0].isdigit()


@alone
@pytest.mark.skipif(len(gpus()) < 2, reason="needs two GPUs")
def test_a_program_wakes_on_another_gpu(host: GpuHost) -> None:
    idle = used_by_uuid()
    program = host.plain()
    before = program.ask()
    (first,) = [uuid for uuid, used in used_by_uuid().items() if used >= idle[uuid] + SIZE]
    second = next(gpu.uuid for gpu in gpus() if gpu.uuid != first)
    captured = host.capture(replace(program.tree, gpu=first))
    program.close()
    body = decode_body(host.store.manifest(captured.snapshot_id).body, captured.snapshot_id)
    facts(before=idle, cuda=body.cuda, gpus=(first, second))
    assert body.cuda is not None and body.cuda.processes[0].gpus[0] == first
    woken, phases = host.wake(captured.snapshot_id, (second,))
    facts(after=used_by_uuid(), phases=phases)
    assert woken.ask() == before
    assert used_by_uuid()[second] >= idle[second] + SIZE
    again = host.capture(replace(woken.tree, gpu=second))
    woken.close()
    body = decode_body(host.store.manifest(again.snapshot_id).body, again.snapshot_id)
    facts(cuda_again=body.cuda)
    home, _phases = host.wake(again.snapshot_id, (first,))
    assert home.ask() == before
    assert used_by_uuid()[first] >= idle[first] + SIZE
