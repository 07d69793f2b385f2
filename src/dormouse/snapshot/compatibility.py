"""The compatibility key: what must be the same (or enough) for a snapshot to be restored here.

`host_key` gathers a flat map of field -> value; it is stored with each snapshot and gathered again before a restore;
`first_mismatch` compares the two by the one table of rules below. What is not in the table must be equal, so a field
that only one of the two has (a snapshot of another version of this program) is a mismatch and never overlooked. The
files a process has mapped have their own comparison: mapped_files.py.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

_NUMBERS = re.compile(r"\d+(?:\.\d+)*")
_DRIVER = re.compile(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)")


@dataclass(frozen=True)
class Rule:
    """How one field is compared. `lacking(then, now)` says what the host lacks, None when it has enough;
    `follows` completes "a restore here ..."."""

    lacking: Callable[[str, str], str | None]
    follows: str


@dataclass(frozen=True)
class Mismatch:
    """The first field in which a snapshot does not fit a host."""

    field: str
    finding: str
    follows: str

    def __str__(self) -> str:
        return f"{self.field}: {self.finding}; a restore {self.follows}"


def _equal(then: str, now: str) -> str | None:
    return None if then == now else f"captured with {then or 'nothing'}, here is {now or 'nothing'}"


def _ignore(_then: str, _now: str) -> None:
    return None


def _superset(then: str, now: str) -> str | None:
    missing = set(then.split()) - set(now.split())
    return f"captured on a CPU with {' '.join(sorted(missing))}, which this CPU lacks" if missing else None


def _at_least(parts: int) -> Callable[[str, str], str | None]:
    """The first `parts` numbers of a version must not be lower here. Versions that can't be read must be equal."""

    def lacking(then: str, now: str) -> str | None:
        old, new = _version(then, parts), _version(now, parts)
        if old is None or new is None:
            return _equal(then, now)
        return None if new >= old else f"captured with {then}, here is the older {now}"

    return lacking


RULES: Mapping[str, Rule] = {
    "machine": Rule(_equal, "needs the machine code it was made of"),
    # A library may have chosen its code by any of the flags, and keeps the choice.
    "cpu_flags": Rule(_superset, "could run into an instruction that this CPU does not know"),
    # Programs probe once for what the kernel can do. Linux takes nothing away from programs, so a newer kernel will
    # do; CRIU redirects calls into the old vDSO. Within one major.minor, updates neither add nor remove interfaces.
    "kernel": Rule(_at_least(2), "could miss what the older kernel can't do"),
    # CRIU reads the images of older versions, and none promises to read those of newer ones.
    "criu": Rule(_at_least(3), "needs a CRIU that is not older than its images"),
    "python": Rule(_equal, "would bring back another interpreter than the one that is installed"),
    "worker": Rule(_equal, "would bring back a worker of other code than this node speaks with"),
    "engine": Rule(_equal, "would bring back another engine than the one configured"),
    "model": Rule(_equal, "would answer with other weights than those imported"),
    "gpu": Rule(_equal, "needs the GPU its kernels were built for"),
    "gpu_driver": Rule(_equal, "needs the driver that made the GPU's image"),
    # Not a property of a host: what the worker answered before its capture (node/canary.py).
    "canary": Rule(_ignore, "does not depend on it"),
}
"""By field; `option NAME` and `package NAME` have the two rules below, everything else must be equal."""

_OPTION = Rule(_equal, "would not follow the configuration")
_PACKAGE = Rule(_equal, "would bring back the other version")
_OTHER = Rule(_equal, "is not known to be safe")


def rule_of(field: str) -> Rule:
    """The rule of a field."""
    if field.startswith("option "):
        return _OPTION
    return _PACKAGE if field.startswith("package ") else RULES.get(field, _OTHER)


def host_key(
    *,
    engine: str,
    worker: str,
    packages: Iterable[str],
    model_digest: str | None,
    options: Mapping[str, object],
    device: str = "cpu",
) -> dict[str, str]:
    """The key of a model on this host. `worker` names the worker's own code, `packages` are those its engine uses,
    `options` the settings it was loaded with. A template has no model: `model_digest` is None."""
    return {
        **system_key(gpu=device != "cpu"),
        "python": platform.python_version(),
        "worker": worker,
        "engine": engine,
        **({"model": model_digest} if model_digest is not None else {}),
        **{f"option {name}": str(value) for name, value in sorted(options.items())},
        **{f"package {name}": version for name, version in _versions(packages)},
    }


def system_key(*, gpu: bool) -> dict[str, str]:
    """The part of the key that holds for every process of this host; `gpu`: whether the process uses one."""
    key = {"machine": platform.machine(), "cpu_flags": cpu_flags(), "kernel": platform.release()}
    return key | gpu_key() if gpu else key


def first_mismatch(snapshot: Mapping[str, str], host: Mapping[str, str]) -> Mismatch | None:
    """The first field in which the snapshot does not fit the host, in the table's order; None when it fits."""
    here = snapshot.keys() | host.keys()
    for field in (*(field for field in RULES if field in here), *sorted(here - RULES.keys())):
        rule = rule_of(field)
        both = field in snapshot and field in host
        lacking = rule.lacking if both or rule.lacking is _ignore else _equal
        finding = lacking(snapshot.get(field, ""), host.get(field, ""))
        if finding is not None:
            return Mismatch(field, finding, rule.follows)
    return None


@cache
def cpu_flags() -> str:
    """The CPU's feature flags as the kernel names them, sorted ("Features" on Arm)."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return " ".join(sorted(value.split()))
    return ""


def gpu_key(driver: Path = Path("/proc/driver/nvidia")) -> dict[str, str]:
    """What the NVIDIA driver says of itself and its GPUs; empty where there is none."""
    try:
        version = _DRIVER.search((driver / "version").read_text())
        pages = [page.read_text() for page in sorted(driver.glob("gpus/*/information"))]
    except OSError:
        return {}
    models = {line.partition(":")[2].strip() for page in pages for line in page.splitlines() if line[:6] == "Model:"}
    return {"gpu": ", ".join(sorted(models)), "gpu_driver": version[1] if version else "unknown"}


def _version(text: str, parts: int) -> tuple[int, ...] | None:
    match = _NUMBERS.match(text)
    numbers = tuple(map(int, match[0].split(".")[:parts])) if match else ()
    return numbers + (0,) * (parts - len(numbers)) if numbers else None


def _versions(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    for package in packages:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed"
