"""How CRIU is called, and what its log says when it fails. Nothing here runs anything.

Both commands run inside the cell (cell.py), started in the image folder so that its name may have any length; images
go through the streamer's socket there, only logs and statistics are files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dormouse.snapshot.criu_setup import Criu
from dormouse.snapshot.tree import External

# From 4.2 on the time in front is there only at higher log levels.
_ERROR_LINE = re.compile(r"\s*(?:\([\d.]+\)\s*)?(?:pie: )?(?:\d+: )?Error \([^)]*\):\s*(.*)")
# CRIU raises its own limits where it may, and goes on where it may not.
_HARMLESS = "rlimit: Can't setup"


def dump_command(criu: Criu, *, pid: int, externals: Sequence[External], options: Sequence[str] = ()) -> list[str]:
    """`criu dump` of the tree whose root is `pid`; it is left stopped, so that its memory can be read, and it can be
    killed or continued once the manifest's fate is known."""
    sockets = [f"unix[{external.inode}]" for external in externals if external.kind == "socket"]
    return [
        *criu.argv_prefix,
        "dump",
        *_common("dump.log"),
        *("--tree", str(pid), "--leave-stopped"),
        # The other end of such a socket is outside the dump, and it comes back by --inherit-fd. A pipe needs no word.
        *(["--ext-unix-sk"] if sockets else []),
        *(word for name in sockets for word in ("--external", name)),
        *options,
    ]


def restore_command(criu: Criu, *, inherited: Mapping[int, External], options: Sequence[str] = ()) -> list[str]:
    """`criu restore` where descriptor N of the criu process takes the place of `inherited[N]`. The restored processes
    are stopped and wait for SIGCONT."""
    return [
        *criu.argv_prefix,
        "restore",
        *_common("restore.log"),
        *("--restore-detached", "--leave-stopped"),
        *(word for fd, external in inherited.items() for word in ("--inherit-fd", f"fd[{fd}]:{_as_link(external)}")),
        *options,
    ]


def _as_link(external: External) -> str:
    """As the link in /proc/PID/fd reads."""
    return f"{external.kind}:[{external.inode}]"


def _common(log: str) -> Sequence[str]:
    return (
        *("--stream", "--images-dir", ".", "--work-dir", "."),
        *("--log-file", log, "-v2"),
        # A worker sits in the node's own cgroup, and that is where it shall wake.
        "--manage-cgroups=ignore",
        # No plugins: this folder has none. An installed one for CUDA would do again what is done already, its own way.
        *("--libdir", "."),
    )


def failures(log_text: str, *, lines: int = 3) -> list[str]:
    """The first errors in a CRIU log, which name the cause; what follows are consequences."""
    errors = [match[1].strip() for line in log_text.splitlines() if (match := _ERROR_LINE.match(line))]
    return [error for error in errors if not error.startswith(_HARMLESS)][:lines]


def failure_reason(log_text: str, *, lines: int = 3) -> str:
    """The same as a sentence."""
    return "; ".join(failures(log_text, lines=lines)) or "its log has no error line"
