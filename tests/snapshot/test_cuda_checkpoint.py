"""Trees whose CUDA state is to be moved, on a driver that fails or hangs at every call: no lock is ever left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.jobs.conftest import eventually
from tests.snapshot.fake_cuda import FakeDriver, lives, never

from dormouse.doctor import cuda_checkpoint
from dormouse.errors import DormouseError, HostError, IncompatibleError, NotFoundError, SnapshotError
from dormouse.jobs.cuda_rescue import rescue
from dormouse.jobs.foreign import HostHome
from dormouse.phases import Phases
from dormouse.snapshot.cuda_checkpoint import (
    REFUSALS,
    Cuda,
    CudaError,
    CudaProcess,
    CudaState,
    CudaTree,
    Gpu,
    Limits,
    chosen_gpu,
    cuda_driver,
    cuda_state,
    devices,
    gpu_pairs,
    gpus,
    refusal,
    restore_threads,
    used_gpus,
    uuid_bytes,
)

QUICK = Limits(lock=0.1, memory=0.3, call=0.3, grace=0.2)


class Tree:
    """Three sleeping processes, and the driver that has their CUDA state."""

    def __init__(self) -> None:
        self.processes = [subprocess.Popen(["/bin/sleep", "600"]) for _ in range(3)]
        self.pids = [process.pid for process in self.processes]
        self.driver = FakeDriver()
        self.ended = 0
        self.cuda = CudaTree(self.pids, self.driver, self.end, QUICK)

    def end(self) -> None:
        self.ended += 1
        for process in self.processes:
            process.kill()
            process.wait()

    def states(self) -> set[str]:
        return {self.driver.states.get(pid, "running") for pid in self.pids if lives(pid)}


@pytest.fixture
def tree() -> Iterator[Tree]:
    made = Tree()
    yield made
    made.end()


def test_all_are_locked_before_the_first_is_checkpointed_and_restored_before_the_first_is_unlocked(tree: Tree) -> None:
    phases = Phases()
    tree.cuda.suspend(phases)
    assert tree.states() == {"checkpointed"}
    tree.cuda.resume(phases, {"GPU-a": "GPU-b"})
    assert tree.states() == {"running"} and tree.ended == 0
    verbs = [verb for verb, _pid in tree.driver.calls]
    assert verbs == ["lock"] * 3 + ["checkpoint"] * 3 + ["restore"] * 3 + ["unlock"] * 3
    assert tree.driver.gpus == [{"GPU-a": "GPU-b"}] * 3
    assert list(phases.seconds()) == ["cuda lock", "cuda checkpoint", "cuda restore"]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("verb", ["lock", "checkpoint"])
def test_a_refusal_leaves_all_running(tree: Tree, verb: str, which: int) -> None:
    tree.driver.fails[verb, tree.pids[which]] = "CUDA_ERROR_NOT_SUPPORTED"
    with pytest.raises(SnapshotError, match=f"could not {verb} process {tree.pids[which]}: it uses what") as caught:
        tree.cuda.suspend(Phases())
    assert tree.states() == {"running"} and tree.ended == 0
    assert "CUDA_ERROR_NOT_SUPPORTED" in caught.value.message and "cudaMallocManaged" in caught.value.remedy


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("verb", ["lock", "checkpoint"])
def test_a_call_that_hangs_ends_the_tree_and_says_so(tree: Tree, verb: str, which: int) -> None:
    tree.driver.hangs[verb, tree.pids[which]] = never
    begin = time.monotonic()
    with pytest.raises(SnapshotError, match=f"did not {verb} process {tree.pids[which]} in time; its processes were"):
        tree.cuda.suspend(Phases())
    assert tree.ended == 1 and time.monotonic() - begin < 3


def test_a_lock_that_waits_for_one_held_already_is_freed_by_letting_that_go(tree: Tree) -> None:
    first, second, _third = tree.pids
    tree.driver.hangs["lock", second] = lambda: tree.driver.states.get(first) == "running"
    with pytest.raises(SnapshotError, match="waits for another process"):
        tree.cuda.suspend(Phases())
    assert tree.states() == {"running"} and tree.ended == 0


@pytest.mark.parametrize("how", ["fails", "hangs"])
@pytest.mark.parametrize("verb", ["state", "restore", "unlock"])
def test_what_can_not_be_brought_back_is_ended(tree: Tree, verb: str, how: str) -> None:
    tree.driver.fails["checkpoint", tree.pids[2]] = "CUDA_ERROR_OUT_OF_MEMORY"
    if how == "fails":
        tree.driver.fails[verb, tree.pids[0]] = "CUDA_ERROR_UNKNOWN"
    else:
        tree.driver.hangs[verb, tree.pids[0]] = never
    with pytest.raises(SnapshotError, match=r"cut up by MIG.*its processes were ended"):
        tree.cuda.suspend(Phases())
    assert tree.ended == 1


def test_a_process_the_driver_has_lost_is_ended(tree: Tree) -> None:
    tree.driver.fails["checkpoint", tree.pids[0]] = "CUDA_ERROR_UNKNOWN"

    def lose(call: str, pid: int) -> None:
        if call == "checkpoint":
            tree.driver.states[pid] = "failed"

    tree.driver.watch = lose
    with pytest.raises(SnapshotError, match="the driver has lost it"):
        tree.cuda.suspend(Phases())
    assert tree.ended == 1


@pytest.mark.parametrize("verb", ["lock", "checkpoint"])
def test_a_process_that_is_killed_meanwhile_is_no_riddle_and_the_others_go_on(tree: Tree, verb: str) -> None:
    def kill(call: str, pid: int) -> None:
        if (call, pid) == (verb, tree.pids[1]):
            tree.processes[1].kill()
            tree.processes[1].wait()

    tree.driver.watch = kill
    with pytest.raises(SnapshotError, match=f"process {tree.pids[1]} has ended while CUDA was to {verb} it"):
        tree.cuda.suspend(Phases())
    assert tree.states() == {"running"} and tree.ended == 0


@pytest.mark.parametrize("verb", ["restore", "unlock"])
def test_a_restore_that_hangs_ends_the_tree(tree: Tree, verb: str) -> None:
    tree.cuda.suspend(Phases())
    tree.driver.hangs[verb, tree.pids[1]] = never
    with pytest.raises(SnapshotError, match=f"did not {verb}"):
        tree.cuda.resume(Phases())
    assert tree.ended == 1


def test_a_full_gpu_is_the_hosts_shortage(tree: Tree) -> None:
    tree.cuda.suspend(Phases())
    tree.driver.fails["restore", tree.pids[0]] = "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(HostError, match="the GPU has not enough free memory"):
        tree.cuda.resume(Phases())


def test_an_interrupt_brings_all_back_too(tree: Tree) -> None:
    def interrupt(call: str, pid: int) -> None:
        if (call, pid) == ("checkpoint", tree.pids[1]):
            raise KeyboardInterrupt

    tree.driver.watch = interrupt
    with pytest.raises(KeyboardInterrupt):
        tree.cuda.suspend(Phases())
    assert tree.states() == {"running"}


def test_a_stopped_process_is_refused(tree: Tree) -> None:
    os.kill(tree.pids[1], signal.SIGSTOP)
    eventually(lambda: " T " in Path(f"/proc/{tree.pids[1]}/stat").read_text(), "stopped")
    with pytest.raises(SnapshotError, match=f"process {tree.pids[1]} uses CUDA and is stopped"):
        tree.cuda.suspend(Phases())
    assert tree.states() == {"running"}


@pytest.mark.parametrize(("verb", "name"), list(REFUSALS))
def test_every_refusal_says_what_to_do(verb: str, name: str) -> None:
    error = refusal(verb, 4711, CudaError(name))  # type: ignore[arg-type]
    assert f"could not {verb} process 4711" in error.message and name in error.message and error.remedy
    assert isinstance(error, DormouseError)


def test_an_unknown_refusal_keeps_the_drivers_word() -> None:
    assert "the driver refused (CUDA_ERROR_STRANGE)" in refusal("lock", 1, CudaError("CUDA_ERROR_STRANGE")).message


# Which processes


def test_only_processes_with_a_gpus_device_are_asked_about(tree: Tree) -> None:
    cuda = Cuda(driver=lambda: tree.driver, uses_gpu=lambda pid: pid != tree.pids[1], limits=QUICK)
    assert cuda.find(tree.pids) == {tree.pids[0]: tree.pids[0], tree.pids[2]: tree.pids[2]}
    assert [pid for _call, pid in tree.driver.calls] == [tree.pids[0], tree.pids[2]]


def test_without_a_gpu_the_driver_is_never_loaded(tree: Tree) -> None:
    def load() -> FakeDriver:
        raise AssertionError

    assert Cuda(driver=load).find([*tree.pids, os.getpid(), 2**22 + 1]) == {}


def test_a_process_with_a_device_and_no_cuda_has_no_state_nor_has_a_forked_one(tree: Tree) -> None:
    tree.driver.fails["restore_thread", tree.pids[0]] = "CUDA_ERROR_NOT_INITIALIZED"
    tree.driver.threads[tree.pids[1]] = tree.pids[2]  # the thread of another process
    cuda = Cuda(driver=lambda: tree.driver, uses_gpu=lambda _pid: True, limits=QUICK)
    assert cuda.find(tree.pids) == {tree.pids[2]: tree.pids[2]}


def test_a_driver_that_does_not_answer_is_an_error(tree: Tree) -> None:
    tree.driver.hangs["restore_thread", tree.pids[0]] = never
    cuda = Cuda(driver=lambda: tree.driver, uses_gpu=lambda _pid: True, limits=QUICK)
    with pytest.raises(SnapshotError, match="does not answer about process"):
        cuda.find(tree.pids)


def test_the_state_names_processes_and_threads_as_they_know_themselves(tree: Tree) -> None:
    state = cuda_state({tree.pids[0]: tree.pids[0]}, Path("/nonexistent"))
    assert state == CudaState([CudaProcess(tree.pids[0], tree.pids[0], [])], [], "")
    assert restore_threads(state, lambda pid: pid) == {tree.pids[0]: tree.pids[0]}


def test_devices_are_open_files_and_mappings() -> None:
    assert devices(os.getpid()) == set() and devices(2**22 + 1) == set()


def test_a_rescue_frees_what_a_dead_capturer_has_left(tree: Tree) -> None:
    first, second, third = tree.pids
    shell = subprocess.Popen(["/bin/sh", "-c", "sleep 600 & sleep 600 & wait"])
    try:
        eventually(lambda: len(HostHome(shell.pid).processes()) == 3, "two children")
        first, second, third = HostHome(shell.pid).processes()
        tree.driver.states = {second: "checkpointed", third: "locked"}
        rescue(shell.pid, Cuda(driver=lambda: tree.driver, uses_gpu=lambda _pid: True, limits=QUICK))
        assert tree.driver.states == {second: "running", third: "running"} and lives(first)
        tree.driver.states[second], tree.driver.states[third] = "locked", "failed"
        rescue(shell.pid, Cuda(driver=lambda: tree.driver, uses_gpu=lambda _pid: True, limits=QUICK))
        assert not any(map(lives, (first, second, third)))
    finally:
        shell.kill()
        shell.wait()


def test_a_rescue_of_a_tree_without_cuda_is_none() -> None:
    rescue(os.getpid())


# GPUs

GPUS = [Gpu(0, "GPU-aaaaaaaa-0000-0000-0000-000000000000", "H200"), Gpu(1, "GPU-bbbbbbbb-0000", "H200")]


def test_gpus_are_read_as_the_driver_lists_them(tmp_path: Path) -> None:
    for minor, bus in ((1, "0000:0a:00.0"), (0, "0000:1b:00.0")):
        page = tmp_path / "gpus" / bus / "information"
        page.parent.mkdir(parents=True)
        page.write_text(
            f"Model: \t\t NVIDIA H200\nIRQ:   \t\t 1\nGPU UUID: \t GPU-{minor}\nBus Location: \t {bus}\n"
            f"Device Minor: \t {minor}\nGPU Excluded:\t No\n"
        )
    assert gpus(tmp_path) == [Gpu(0, "GPU-0", "NVIDIA H200"), Gpu(1, "GPU-1", "NVIDIA H200")]
    assert gpus(tmp_path / "none") == []
    assert used_gpus(os.getpid(), GPUS) == []


def test_a_gpu_is_meant_by_number_or_by_the_beginning_of_its_uuid() -> None:
    assert chosen_gpu("1", GPUS) == chosen_gpu("GPU-bbbb", GPUS) == chosen_gpu("bbbbbbbb", GPUS) == GPUS[1]
    for wrong in ("2", "GPU-", "cc"):
        with pytest.raises(NotFoundError, match=f"there is no GPU {wrong} here, or more than one"):
            chosen_gpu(wrong, GPUS)


def test_uuids_are_bytes_for_the_driver() -> None:
    assert uuid_bytes("GPU-00010203-0405-0607-0809-0a0b0c0d0e0f") == bytes(range(16))
    with pytest.raises(ValueError, match="no UUID"):
        uuid_bytes("GPU-0001")


def used(*uuids: str, of: str) -> CudaState:
    return CudaState([CudaProcess(1, 1, list(uuids))], list(of), "580")


@pytest.mark.parametrize(
    ("state", "here", "wanted", "pairs"),
    [
        (used("a", of="ab"), "ab", "", {}),
        (used("a", of="a"), "abc", "", {}),
        (used("a", of="ab"), "ab", "b", {"a": "b", "b": "a"}),
        (used("a", of="ab"), "cd", "", {"a": "c", "b": "d"}),
        (used("b", of="ab"), "cd", "d", {"b": "d", "a": "c"}),
        (used("b", of="ab"), "c", "", {"b": "c"}),
        (used("a", "b", of="abc"), "abc", "ca", {"a": "c", "b": "a", "c": "b"}),
        (used("a", of="ab"), "ab", "a", {}),
        (used(of="a"), "b", "", {"a": "b"}),
        (used(of=""), "", "", {}),
        (used(of=""), "", "a", {}),
        (used("b", "a", of="ab"), "ab", "a", {"b": "a", "a": "b"}),
        (used("b", "a", of="ab"), "ab", "b", {}),
        (used("a", of="abc"), "abc", "c", {"a": "c", "b": "b", "c": "a"}),
    ],
)
def test_each_gpu_goes_to_one_of_its_own(state: CudaState, here: str, wanted: str, pairs: dict[str, str]) -> None:
    assert gpu_pairs(state, list(here), list(wanted)) == pairs


def test_a_gpu_that_is_not_there_does_not_fit() -> None:
    with pytest.raises(IncompatibleError, match="there is no GPU c"):
        gpu_pairs(used("a", of="ab"), ["a", "b"], ["c"])


def test_the_gpu_a_worker_computes_on_comes_first(tmp_path: Path) -> None:
    for minor, uuid in enumerate(("GPU-a", "GPU-b")):
        folder = tmp_path / "gpus" / uuid
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: H200\nGPU UUID: {uuid}\nDevice Minor: {minor}\n")
    found = {os.getpid(): threading.get_native_id()}
    for wanted, expected in (("GPU-b", ["GPU-b"]), (None, []), ("GPU-c", [])):
        assert cuda_state(found, tmp_path, computes_on=wanted).processes[0].gpus == expected


def test_too_few_gpus_do_not_fit() -> None:
    with pytest.raises(IncompatibleError, match="it used 2 GPUs, and there are 1"):
        gpu_pairs(used("a", "b", of="ab"), ["c"])


def test_without_bindings_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    cuda_driver.cache_clear()  # type: ignore[attr-defined]
    with pytest.raises(HostError, match="bindings to its driver are not installed") as caught:
        cuda_driver()
    assert "dormouse[cuda]" in caught.value.remedy


def test_the_doctor_tells_whether_cuda_programs_can_be_captured() -> None:
    def missing() -> None:
        raise HostError("no bindings", remedy="install them")

    assert cuda_checkpoint([], missing).ok is None
    bad, good = cuda_checkpoint(GPUS, missing), cuda_checkpoint(GPUS, lambda: None)
    assert (bad.ok, bad.value, bad.remedy, bad.needed) == (False, "no bindings", "install them", False)
    assert good.ok and good.value.startswith("2 x H200, driver ")
