"""Programs that use CUDA as jobs, on a real GPU: nothing about them is special to the user."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from dormouse.jobs.cuda_rescue import rescue
from dormouse.phases import Phases
from dormouse.snapshot.cuda_checkpoint import CUDA, CudaTree, gpus
from tests.jobs.conftest import Dormouse, eventually

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.root,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not gpus(), reason="no NVIDIA GPU"),
]

PROGRAM = """
import hashlib, sys, torch
torch.manual_seed(3)
weights = torch.randn(4096, 4096, device="cuda")
count = torch.zeros((), device="cuda")
for line in sys.stdin:
    count += 1
    made = weights @ weights
    torch.cuda.synchronize()
    print(int(count), hashlib.sha256(made.cpu().numpy().tobytes()).hexdigest(), flush=True)
"""


def test_a_cuda_program_is_run_captured_and_restored_unmodified(dormouse: Dormouse) -> None:
    job = dormouse.python(PROGRAM)
    job.say("go\n")
    job.until("\n")
    dormouse.checkpoint("job", "--leave-running")
    job.say("go\n")
    job.until("\n2 ")
    snapshot = dormouse.checkpoint()
    assert job.code() == 0
    again = dormouse.start("restore", snapshot)
    again.say("go\n")
    again.until("3 ")
    eventually(again.lines, "a line")
    assert {line.split()[1] for line in (*job.lines(), *again.lines())} == {job.lines()[0].split()[1]}
    print(dormouse.do("inspect", snapshot))


@pytest.fixture
def program() -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield started
    started.kill()
    started.communicate()


@pytest.mark.parametrize("last", ["lock", "checkpoint"])
def test_a_tree_whose_capturer_died_works_on_after_a_rescue(program: subprocess.Popen[str], last: str) -> None:
    def ask() -> str:
        assert program.stdin is not None and program.stdout is not None
        program.stdin.write("go\n")
        program.stdin.flush()
        return program.stdout.readline().split()[1]

    before = ask()
    driver = CUDA.driver()
    if last == "lock":
        driver.lock(program.pid, 5000)
    else:
        CudaTree([program.pid], driver, program.kill, CUDA.limits).suspend(Phases())
    rescue(program.pid)
    assert driver.state(program.pid) == "running" and ask() == before
