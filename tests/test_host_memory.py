"""Limits of control groups count wherever above the process they are set."""

from __future__ import annotations

from pathlib import Path

import pytest

from dormouse import host_memory
from dormouse.errors import HostError


def system(root: Path, *, group: str, limits: dict[str, tuple[str, str]]) -> Path:
    """A machine with 8 MiB of memory, 6 of them available, and control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal:        8192 kB\nMemFree: 1 kB\nMemAvailable:    6144 kB\n")
    (root / "proc/self/cgroup").write_text(f"12:cpu:/x\n0::{group}\n")
    for name, (limit, used) in limits.items():
        folder = root / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    return root


@pytest.mark.parametrize(
    ("limits", "total", "available"),
    [
        ({}, 8 << 20, 6 << 20),
        ({"a/b": ("max", "4096")}, 8 << 20, 6 << 20),
        ({"a/b": (str(4 << 20), str(1 << 20))}, 4 << 20, 3 << 20),
        ({"a": (str(5 << 20), str(4 << 20)), "a/b": (str(7 << 20), "0")}, 5 << 20, 1 << 20),
        ({"a/b": (str(1 << 20), str(2 << 20))}, 1 << 20, 0),
        ({"elsewhere": ("1", "1")}, 8 << 20, 6 << 20),
    ],
)
def test_the_tightest_limit_counts(
    tmp_path: Path, limits: dict[str, tuple[str, str]], total: int, available: int
) -> None:
    root = system(tmp_path, group="/a/b", limits=limits)
    assert (host_memory.total(root), host_memory.available(root)) == (total, available)


def test_this_machine_has_memory() -> None:
    assert 0 < host_memory.available() <= host_memory.total()


def test_a_machine_without_proc_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="MemTotal"):
        host_memory.total(tmp_path)
