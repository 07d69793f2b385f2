"""CRIU's working folders: private, gone at the end, and swept when a killed process left one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dormouse.errors import HostError
from dormouse.snapshot.work_folder import sweep_work_folders, work_folder


def test_a_folder_lasts_as_long_as_its_call(tmp_path: Path) -> None:
    with work_folder(tmp_path / "criu") as first, work_folder(tmp_path / "criu") as second:
        assert first != second and first.stat().st_mode & 0o777 == 0o700
        (first / "dump.log").write_text("words")
        sweep_work_folders(tmp_path / "criu")
        assert (first / "dump.log").exists()
    assert list((tmp_path / "criu").iterdir()) == []


def test_what_a_killed_process_leaves_goes_with_the_next(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib; from dormouse.snapshot.work_folder import work_folder\n"
        "with work_folder(pathlib.Path(sys.argv[1])): print('made', flush=True); time.sleep(60)"
    )
    left = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert left.stdout is not None
    with left.stdout:
        assert left.stdout.readline() == b"made\n"
        left.send_signal(signal.SIGKILL)
        left.wait(10)
    assert len(list(tmp_path.iterdir())) == 1
    with work_folder(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]
    sweep_work_folders(tmp_path / "never")


def test_what_is_not_ours_is_never_swept(tmp_path: Path) -> None:
    (tmp_path / "usr").mkdir()
    (tmp_path / "usr" / "criu").touch()
    sweep_work_folders(tmp_path)
    with work_folder(tmp_path):
        pass
    assert (tmp_path / "usr" / "criu").exists()


def test_a_place_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=f"{os.fspath(tmp_path)}/file"), work_folder(tmp_path / "file"):
        pass
