"""How much memory this process may count on: the machine's, or less where a control group (version 2) says so.

A limit may be set on the process's own group or on any above it (a systemd unit, a container), so all are looked at.
`root` is where the system's files are; tests give a folder of their own.
"""

from __future__ import annotations

from pathlib import Path

from dormouse.errors import HostError

ROOT = Path("/")


def total(root: Path = ROOT) -> int:
    """Bytes in all."""
    return min([_meminfo(root, "MemTotal"), *(limit for limit, _used in _limits(root))])


def available(root: Path = ROOT) -> int:
    """Bytes that can be taken now without swapping, as the kernel estimates it."""
    room = group_room(root)
    free = _meminfo(root, "MemAvailable")
    return free if room is None else min(free, room)


def group_room(root: Path = ROOT) -> int | None:
    """Bytes that the control groups still allow, None without a limit."""
    return min((max(0, limit - used) for limit, used in _limits(root)), default=None)


def _limits(root: Path) -> list[tuple[int, int]]:
    """The (limit, used) of every group above this process that has a limit."""
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::/"):
            own = Path(line.removeprefix("0::/"))
            for group in (own, *own.parents):
                limit = _text(root / "sys/fs/cgroup" / group / "memory.max").strip()
                used = _text(root / "sys/fs/cgroup" / group / "memory.current").strip()
                if limit.isdigit() and used.isdigit():
                    found.append((int(limit), int(used)))
    return found


def _meminfo(root: Path, name: str) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise HostError(f"/proc/meminfo has no {name}", remedy="Use Linux 3.14 or newer, with /proc mounted")


def _text(path: Path) -> str:
    """A small file, empty where there is none."""
    return path.read_text() if path.is_file() else ""
