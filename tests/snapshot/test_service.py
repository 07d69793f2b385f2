"""The node's end of the host checkpoint service, with the real process behind it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.snapshot.attached import AttachedWorker
from tests.snapshot.test_capture_restore import gone_within, our_commands

from dormouse.data_dir import DataDir
from dormouse.errors import HostError, NotFoundError, WeightsError
from dormouse.snapshot.service import HostService, WorkerHandle

pytestmark = pytest.mark.root

KEY = {"kernel": "this one"}


def with_service(data_dir: DataDir, body: Callable[[HostService], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine with a service of its own."""

    async def run() -> None:
        service = await HostService.start(data_dir.root)
        try:
            await body(service)
        finally:
            await service.close()

    asyncio.run(run())


async def talk(handle: WorkerHandle, log: Path, model: Path | None) -> str:
    """Load a fresh worker or resume a restored one, ask, and leave it quiesced."""

    def blocking() -> str:
        worker = AttachedWorker(handle.control, log, fresh=model is not None)
        if model is not None:
            worker.load(model, engine="null")
        else:
            worker.resume()
        text = worker.answer()
        worker.quiesce()
        return text

    return await asyncio.to_thread(blocking)


def test_start_capture_restore_stop(data_dir: DataDir, null_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def body(service: HostService) -> None:
        handle = await service.start_worker(log_path=log)
        text = await talk(handle, log, null_model)
        captured = await service.capture(handle, model="m", key=KEY)
        handle.control.close()
        restored = await service.restore(captured.snapshot_id, key=KEY)
        assert await talk(restored, log, None) == text
        assert set(restored.phases.seconds()) == {
            "manifest",
            "cell",
            "plan",
            "criu start",
            "criu images",
            "criu finish",
            "fill ahead",
            "fill",
            "mapped files",
        }
        restored.control.close()
        await service.stop_worker(restored)
        await service.stop_worker(restored)
        await asyncio.to_thread(gone_within, 1, lambda: not Path(f"/proc/{restored.pid}").exists())
        with pytest.raises(NotFoundError):
            await service.restore("nothing", key=KEY)
        for attempt in (
            service.restore(captured.snapshot_id, key=KEY, checkpoint="gone"),
            service.start_worker(log_path=log, checkpoint="gone"),
        ):
            with pytest.raises(WeightsError, match="the weights are gone"):  # neither the snapshot nor the model is
                await attempt

    with_service(data_dir, body)


def test_a_service_that_dies_takes_its_workers_along_and_comes_back(
    data_dir: DataDir, null_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log"

    async def body(service: HostService) -> None:
        handle = await service.start_worker(log_path=log)
        await talk(handle, log, null_model)
        pending = asyncio.create_task(service.capture(handle, model="m", key=KEY))
        await asyncio.sleep(0.01)
        kill_children("service_main")
        with pytest.raises(HostError, match="has ended"):
            await pending
        await asyncio.to_thread(gone_within, 10, lambda: not Path(f"/proc/{handle.pid}").exists())
        handle.control.close()
        await service.stop_worker(handle)
        again = await service.start_worker(log_path=log)
        assert "has died" in caplog.text
        await talk(again, log, null_model)
        again.control.close()

    with_service(data_dir, body)


def kill_children(word: str) -> None:
    """kill -9 the children of this process with a word in their command line."""
    table = subprocess.run(
        ["ps", "-ww", "--ppid", str(os.getpid()), "-o", "pid,args"], stdout=subprocess.PIPE, text=True, check=True
    )
    for line in table.stdout.splitlines()[1:]:
        pid, args = line.split(maxsplit=1)
        if word in args:
            os.kill(int(pid), signal.SIGKILL)


def test_a_cancelled_start_leaves_no_worker(data_dir: DataDir, tmp_path: Path) -> None:
    async def body(service: HostService) -> None:
        start = asyncio.create_task(service.start_worker(log_path=tmp_path / "log"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        second = await service.start_worker(log_path=tmp_path / "log")
        second.control.close()
        await service.stop_worker(second)
        await asyncio.to_thread(gone_within, 10, lambda: not workers())

    with_service(data_dir, body)


def workers() -> list[str]:
    """The workers below this process."""
    return [words for words in our_commands().values() if "dormouse.engine.worker" in words]


def test_a_host_without_criu_is_refused_with_the_remedy(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path\n"
        "from dormouse.snapshot.service import HostService; from dormouse.errors import HostError\n"
        "try: asyncio.run(HostService.start(Path(sys.argv[1])))\n"
        "except HostError as error: print(error)\n"
    )
    if Path("/usr/sbin/criu").exists():
        pytest.skip("this machine has a criu of its own")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True)
    assert "CRIU 4.1 or newer is needed" in done.stdout and "dormouse setup criu" in done.stdout
