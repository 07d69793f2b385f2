"""How CRIU is called, and what its log says when it fails. Nothing here runs anything.

Both commands run inside the cell (cell.py) with the image folder as working folder; images go through the streamer's
socket there, only logs and statistics are files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dormouse.snapshot.criu_setup import Criu

_ERROR_LINE = re.compile(r"\([\d.]+\)\s*(?:pie: )?(?:\d+: )?Error \([^)]*\):\s*(.*)")


def dump_command(criu: Criu, directory: Path, *, pid: int, control_inode: int) -> list[str]:
    """`criu dump` of the worker `pid`; it is left stopped, so that it can be killed or continued once the
    manifest's fate is known."""
    return [
        *criu.argv_prefix,
        "dump",
        *_common(directory, "dump.log"),
        *("--tree", str(pid), "--leave-stopped"),
        # The control socket's other end is outside the dump, and it comes back by --inherit-fd.
        *("--ext-unix-sk", "--external", f"unix[{control_inode}]"),
    ]


def restore_command(criu: Criu, directory: Path, *, control_fd: int, control_inode: int) -> list[str]:
    """`criu restore` with descriptor `control_fd` of the criu process as the socket that had `control_inode`."""
    return [
        *criu.argv_prefix,
        "restore",
        *_common(directory, "restore.log"),
        "--restore-detached",
        *("--inherit-fd", f"fd[{control_fd}]:socket:[{control_inode}]"),
    ]


def _common(directory: Path, log: str) -> Sequence[str]:
    return (
        *("--stream", "--images-dir", str(directory), "--work-dir", str(directory)),
        *("--log-file", log, "-v2"),
        # A worker sits in the node's own cgroup, and that is where it shall wake.
        "--manage-cgroups=ignore",
    )


def failure_reason(log_text: str, *, lines: int = 3) -> str:
    """The first errors in a CRIU log, which name the cause; what follows are consequences."""
    errors = [match[1].strip() for line in log_text.splitlines() if (match := _ERROR_LINE.match(line))]
    return "; ".join(errors[:lines]) or "its log has no error line"
