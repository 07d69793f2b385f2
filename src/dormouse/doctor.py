"""What this machine can do for Dormouse, and the remedy for what it cannot: `dormouse doctor`.

    probes (read, run, try)  ->  list[Check]  ->  render (table) | as_json | main_job_possible

Every probe reports what it saw rather than what should be so: a cell is created, a process is dumped and restored, the
disk is read. Nothing on the machine is changed, temporary files are removed. A probe never raises for something that
is missing; that is a Check with `ok=False` and its remedy.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from dormouse import disk_speed, host_memory
from dormouse.data_dir import DataDir
from dormouse.errors import DormouseError, HostError, SnapshotError, StoreError
from dormouse.snapshot.cell import Cell, worker_pid_floor
from dormouse.snapshot.compatibility import cpu_flags, gpu_key
from dormouse.snapshot.criu import failure_reason
from dormouse.snapshot.criu_setup import Criu, find_criu
from dormouse.snapshot.cuda_checkpoint import Gpu, cuda_driver, gpus
from dormouse.store.key import read_key

_GIB = 1 << 30
_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage"
_MIN_MEMORY = 2 * _GIB
_MIN_DISK = 4 * _GIB
_TRIAL_TIMEOUT = 30.0

_ROOT_REMEDY = "Run as root (sudo); in a container, start it privileged"

# The bits of the capabilities that cells (namespaces, loopback) and CRIU (ptrace, pids) need.
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21}

# CRIU's names of kernel features -> what each gives us, and whether the main job needs it.
_FEATURES = {
    "get_rseq_conf": ("dump programs of glibc 2.35 and newer", True),
    "clone3_set_tid": ("restore processes under their old pids", True),
    "kcmp_epoll": ("dump programs that use epoll", True),
    "seccomp_suspend": ("dump programs under a seccomp filter", False),
    "pagemap_scan": ("find the pages to dump faster", False),
}

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")

_EXTRAS = {"transformers": ("torch", "transformers", "safetensors", "gguf"), "gpu": ("cuda-bindings", "triton")}

# Start path -> the checks that must not fail.
_HOST = ("operating system", "privileges", "cell", "criu")
_START_PATHS = {
    "hot": (*_HOST, "engine packages"),
    "cold": (*_HOST, "engine packages"),
    "snapshot": (*_HOST, "engine packages", "criu check", "process snapshot"),
    "template": (*_HOST, "engine packages", "criu check", "process snapshot"),
}


@dataclass(frozen=True)
class Check:
    """One finding. `ok` is None for information; `needed`: the main job (sleep and wake) cannot run without it."""

    name: str
    ok: bool | None
    value: str
    needed: bool = False
    remedy: str = ""


def examine(data_dir: Path) -> list[Check]:
    """Probe everything. Blocks for some seconds, most of them in the disk measurement."""
    criu = _find(data_dir)
    checks = [
        _operating_system(),
        privileges(os.geteuid(), Path("/proc/self/status").read_text()),
        _cell(),
        *_criu_checks(criu),
        _engine_packages(),
        _gpu_packages(),
        memory(_read("/proc/meminfo") or "", host_memory.group_room()),
        *_disk(data_dir),
        _cpu(),
        Check("python", None, platform.python_version()),
        _gpu(),
        cuda_checkpoint(gpus(), cuda_driver),
        ptrace_scope(_read("/proc/sys/kernel/yama/ptrace_scope")),
        seccomp(Path("/proc/self/status").read_text()),
        huge_pages(_read(f"{_HUGE_PAGES}/enabled")),
        shared_huge_pages(_read(f"{_HUGE_PAGES}/shmem_enabled")),
        signing_key(DataDir(data_dir).key),
    ]
    return [*checks, start_paths(checks)]


def main_job_possible(checks: Iterable[Check]) -> bool:
    """Whether models can sleep and wake here."""
    return not any(check.needed and check.ok is False for check in checks)


def as_json(checks: Iterable[Check]) -> list[dict[str, Any]]:
    """The checks as plain data."""
    return [asdict(check) for check in checks]


def render(checks: Sequence[Check]) -> Table:
    """One table; its caption is the verdict."""
    possible = main_job_possible(checks)
    table = Table(
        caption="Models can sleep and wake on this machine."
        if possible
        else "Models cannot sleep and wake on this machine yet: see the remedies.",
        caption_style="green" if possible else "red",
        caption_justify="left",
    )
    table.add_column("check", no_wrap=True)
    table.add_column("")
    table.add_column("found", overflow="fold")
    table.add_column("remedy", overflow="fold")
    for check in checks:
        table.add_row(check.name, _mark(check), escape(check.value), escape(check.remedy))
    return table


def _mark(check: Check) -> str:
    if check.ok is None:
        return ""
    if check.ok:
        return "[green]ok[/]"
    return "[red]missing[/]" if check.needed else "[yellow]no[/]"


# Judgements on what was read


def privileges(uid: int, status: str) -> Check:
    """Root with the capabilities that matter, from /proc/self/status."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    effective = int(match[1], 16) if match else 0
    missing = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    if uid != 0:
        return Check("privileges", False, f"user {uid}, not root", True, _ROOT_REMEDY)
    if missing:
        return Check("privileges", False, f"root without {', '.join(missing)}", True, _ROOT_REMEDY)
    return Check("privileges", True, "root", True)


def memory(meminfo: str, cgroup_room: int | None) -> Check:
    """Memory that can be taken, by /proc/meminfo and by the cgroup this process is in."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", meminfo, re.MULTILINE)
    available = int(match[1]) << 10 if match else 0
    room = available if cgroup_room is None else min(available, cgroup_room)
    limit = " (limited by the cgroup)" if room < available else ""
    ok = room >= _MIN_MEMORY
    remedy = "" if ok else f"Free memory: a small model and its wake-up take about {_gib(_MIN_MEMORY)}"
    return Check("free memory", ok, _gib(room) + limit, True, remedy)


def ptrace_scope(value: str | None) -> Check:
    """Yama's switch; 3 forbids ptrace even to root."""
    if value == "3":
        remedy = "Set kernel.yama.ptrace_scope to 2 or lower where sysctl settings are made, and reboot"
        return Check("ptrace scope", False, "3: ptrace is switched off", True, remedy)
    return Check("ptrace scope", True, value or "no Yama", True)


def cuda_checkpoint(found: Sequence[Gpu], driver: Callable[[], object]) -> Check:
    """Whether processes that use CUDA can be captured. Loads the driver where there is a GPU."""
    if not found:
        return Check("cuda checkpoint", None, "no NVIDIA GPU")
    try:
        driver()
    except HostError as error:
        return Check("cuda checkpoint", False, error.message, False, error.remedy)
    models = sorted({gpu.model for gpu in found})
    version = gpu_key().get("gpu_driver", "unknown")
    return Check("cuda checkpoint", True, f"{len(found)} x {', '.join(models)}, driver {version}")


def seccomp(status: str) -> Check:
    """Whether a filter (a container's, say) is over this process."""
    filtered = re.search(r"^Seccomp:\s*2$", status, re.MULTILINE) is not None
    remedy = "If a check above fails, start the container without its seccomp profile" if filtered else ""
    return Check("seccomp", None, "a filter is active" if filtered else "no filter", False, remedy)


def huge_pages(value: str | None) -> Check:
    """The kernel's policy. A recommendation only: the setting concerns every program of the machine."""
    policy = _chosen(value)
    remedy = ""
    if policy not in ("always", "not supported"):
        faster = "filling memory at a restore, and capturing programs that use a GPU, become faster"
        remedy = f"Consider `echo always > {_HUGE_PAGES}/enabled`: {faster}"
    return Check("transparent huge pages", None, policy, False, remedy)


def shared_huge_pages(value: str | None) -> Check:
    """The policy for memory that workers share: the weights."""
    policy = _chosen(value)
    remedy = ""
    if policy in ("never", "deny"):
        remedy = f"Consider `echo always > {_HUGE_PAGES}/shmem_enabled`: weights are filled and read faster"
    return Check("huge pages of shared memory", None, policy, False, remedy)


def _chosen(value: str | None) -> str:
    """The word in brackets of a kernel setting."""
    match = re.search(r"\[(\w+)\]", value or "")
    return match[1] if match else "not supported"


def signing_key(path: Path) -> Check:
    """The key that signs this data folder's snapshots. It is only looked at, never made here."""
    try:
        key = read_key(path)
    except StoreError as error:
        return Check("signing key", False, error.message, True, error.remedy or "Put the key's file right")
    return Check("signing key", None, f"{key.id.hex()} in {path}" if key else "none yet; the first use makes one")


def start_paths(checks: Sequence[Check]) -> Check:
    """Which ways a model can become ready here."""
    failed = {check.name for check in checks if check.ok is False}
    paths = [path for path, needs in _START_PATHS.items() if not failed.intersection(needs)]
    remedy = "" if len(paths) == len(_START_PATHS) else "See the rows above that are missing"
    return Check("start paths open", len(paths) == len(_START_PATHS), ", ".join(paths) or "none", True, remedy)


# Probes


def _read(path: str) -> str | None:
    """A kernel file's text, None where this kernel has none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _operating_system() -> Check:
    system, machine = platform.system(), platform.machine()
    ok = system == "Linux" and machine in ("x86_64", "aarch64")
    remedy = "" if ok else "Use Linux on x86_64 or aarch64"
    return Check("operating system", ok, f"{system} {platform.release()} {machine}", True, remedy)


def _cell() -> Check:
    """Create a cell and run a program in it."""
    try:
        cell = Cell.create()
        try:
            code = cell.wait(cell.spawn(["/bin/true"], env={}).pid, _TRIAL_TIMEOUT)
        finally:
            cell.close()
    except DormouseError as error:
        remedy = error.remedy if isinstance(error, HostError) else _ROOT_REMEDY
        return Check("cell", False, error.message, True, remedy)
    if code != 0:
        return Check("cell", False, f"a program in it ended with status {code}", True, _ROOT_REMEDY)
    return Check("cell", True, "PID, mount and network namespaces can be made", True)


def _find(data_dir: Path) -> Criu | HostError:
    try:
        return find_criu(data_dir)
    except HostError as error:
        return error


def _criu_checks(criu: Criu | HostError) -> Iterator[Check]:
    if isinstance(criu, HostError):
        yield Check("criu", False, criu.message, True, criu.remedy)
        yield Check("criu check", False, "not possible without criu", True, criu.remedy)
        return
    where = "the system's" if criu.source == "system" else "in the data folder"
    yield Check("criu", True, f"{criu.version_text}, {where}", True)
    good, text = _criu_check(criu)
    remedy = "" if good else f"{_ROOT_REMEDY}; else use a newer kernel with CONFIG_CHECKPOINT_RESTORE"
    yield Check("criu check", good, text, True, remedy)
    for feature, (purpose, needed) in _FEATURES.items():
        has, _text = _criu_check(criu, "--feature", feature)
        remedy = "" if has else "Use a newer kernel" if good else _ROOT_REMEDY
        yield Check(f"criu {feature}", has, purpose if has else f"cannot {purpose}", needed, remedy)
    yield _process_snapshot(criu)


def _criu_check(criu: Criu, *arguments: str) -> tuple[bool, str]:
    """Whether `criu check` is content, and its first complaint or its last word."""
    try:
        done = subprocess.run(
            [*criu.argv_prefix, "check", *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TRIAL_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit status {done.returncode}"]
    errors = [line for line in lines if line.startswith("Error")]
    return done.returncode == 0, (errors or lines[-1:])[0] if done.returncode else lines[-1]


def _process_snapshot(criu: Criu) -> Check:
    """Dump a small process in one cell and restore it in another, the way workers are."""
    try:
        with tempfile.TemporaryDirectory(prefix="dormouse-") as folder:
            _dump_and_restore(criu, Path(folder))
    except (SnapshotError, HostError, OSError) as error:
        reason = error.message if isinstance(error, DormouseError) else str(error)
        return Check(
            "process snapshot", False, reason, True, "See the checks above; in a container, start it privileged"
        )
    return Check("process snapshot", True, "a small process was dumped and restored", True)


def _dump_and_restore(criu: Criu, folder: Path) -> None:
    first = Cell.create()
    try:
        process = first.spawn(["/bin/sleep", "600"], env={}, pid_floor=worker_pid_floor())
        _run_criu(first, criu, folder, "dump", "--tree", str(process.pid))
    finally:
        first.close()
    second = Cell.create()
    try:
        _run_criu(second, criu, folder, "restore", "--restore-detached")
        os.kill(second.outer_pid(process.pid), signal.SIGKILL)
    finally:
        second.close()


def _run_criu(cell: Cell, criu: Criu, folder: Path, verb: str, *arguments: str) -> None:
    log = f"{verb}.log"
    images = ("--images-dir", str(folder), "--log-file", log, "-v2", "--manage-cgroups=ignore")
    code = cell.wait(cell.spawn([*criu.argv_prefix, verb, *images, *arguments], env={}).pid, _TRIAL_TIMEOUT)
    if code != 0:
        text = _read(str(folder / log)) or ""
        raise SnapshotError(f"criu {verb} failed: {failure_reason(text)}")


def _versions(packages: Iterable[str]) -> tuple[list[str], list[str]]:
    """The installed ones with their versions, and those that are missing."""
    found, missing = [], []
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    return found, missing


def _engine_packages() -> Check:
    found, missing = _versions(_EXTRAS["transformers"])
    if missing:
        remedy = "pip install 'dormouse[transformers]'"
        return Check("engine packages", False, f"not installed: {', '.join(missing)}", True, remedy)
    return Check("engine packages", True, ", ".join(found), True)


def _gpu_packages() -> Check:
    found, missing = _versions(_EXTRAS["gpu"])
    remedy = "Only for GPUs: pip install 'dormouse[gpu]'" if missing else ""
    return Check("gpu packages", None, ", ".join(found) or "not installed", False, remedy)


def _disk(data_dir: Path) -> Iterator[Check]:
    """Room and speed where the data folder is, or will be."""
    folder = next(path for path in (data_dir.absolute(), *data_dir.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    ok = free >= _MIN_DISK
    remedy = "" if ok else f"Free {_gib(_MIN_DISK)}, or choose another folder with --data-dir"
    yield Check("free disk", ok, f"{_gib(free)} at {folder}", True, remedy)
    try:
        reading = disk_speed.measure(folder)
    except OSError as error:
        yield Check(
            "disk read", False, f"{folder}: {error.strerror}", False, "See that the folder is yours and not full"
        )
        return
    how = "past the page cache" if reading.direct else "through the page cache, which this file system insists on"
    yield Check("disk read", None, f"{reading.bytes_per_second / 1e9:.2f} GB/s {how}")


def _cpu() -> Check:
    info = _read("/proc/cpuinfo") or ""
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = [flag for flag in _CPU_FLAGS if flag in cpu_flags().split()]
    value = (
        f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores, {' '.join(flags) or 'no vector flags'}"
    )
    return Check("processor", None, value)


def _gpu() -> Check:
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        query = [smi, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, check=False, capture_output=True, text=True, timeout=_TRIAL_TIMEOUT)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Check("gpu", False, f"nvidia-smi: {error}", False, "Reinstall the NVIDIA driver")
        if done.returncode != 0:
            words = (done.stdout + done.stderr).strip().splitlines() or [f"exit status {done.returncode}"]
            return Check("gpu", False, f"nvidia-smi: {words[0]}", False, "Load or reinstall the NVIDIA driver")
        return Check("gpu", None, "; ".join(done.stdout.strip().splitlines()))
    version = _read("/proc/driver/nvidia/version")
    return Check("gpu", None, version.splitlines()[0] if version else "none")


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
