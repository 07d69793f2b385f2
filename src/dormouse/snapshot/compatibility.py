"""The compatibility key: what must be the same (or enough) for a snapshot to be restored here.

`host_key` gathers a flat map of field -> value; it is stored with each snapshot and gathered again before a restore;
`first_mismatch` compares the two. Rules: "cpu_flags" of the snapshot must all be on this host (a library may have
chosen its code by any of them); every other field must be equal.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path


def host_key(
    *, engine: str, worker: str, packages: Iterable[str], model_digest: str, options: Mapping[str, object]
) -> dict[str, str]:
    """The key of a model on this host. `worker` names the worker's own code, `packages` are those its engine uses,
    `options` the settings it was loaded with."""
    return {
        "machine": platform.machine(),
        "cpu_flags": cpu_flags(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "worker": worker,
        "engine": engine,
        "model": model_digest,
        **{f"option {name}": str(value) for name, value in sorted(options.items())},
        **{f"package {name}": version for name, version in _versions(packages)},
    }


def first_mismatch(snapshot: Mapping[str, str], host: Mapping[str, str]) -> str | None:
    """A sentence that names the first field in which the snapshot does not fit the host; None when it fits."""
    for field in sorted(snapshot.keys() | host.keys()):
        then, now = snapshot.get(field), host.get(field)
        if field == "cpu_flags":
            missing = set((then or "").split()) - set((now or "").split())
            if missing:
                return f"cpu_flags: this CPU lacks {' '.join(sorted(missing))}"
        elif then != now:
            return f"{field}: captured with {then or 'nothing'}, here is {now or 'nothing'}"
    return None


@cache
def cpu_flags() -> str:
    """The CPU's feature flags as the kernel names them, sorted ("Features" on Arm)."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return " ".join(sorted(value.split()))
    return ""


def _versions(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    for package in packages:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed"
