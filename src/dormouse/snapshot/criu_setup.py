"""Which CRIU this machine has, and how to get one: the system's own, or a newer Debian build in a private prefix.

    apt's own sources -> apt-get update / --download-only (private state) -> dpkg-deb -x -> probe -> rename

`find_criu` only looks. `setup_criu` fills DATA_DIR/criu when nothing usable is there. apt does the download, with
lists, cache and sources of its own below DATA_DIR/criu.partial, so no file of the system changes; it takes nothing
that is not covered by a list signed with Debian's archive keyring. The packages bring their own C library, so the
binary is started through its own loader and runs on older systems. A set-up that ends midway, in whatever way, leaves
at most criu.partial, which the next one removes.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dormouse.errors import ConfigError, DiskFullError, HostError

MIN_VERSION = (4, 1)
"""Older ones can't read the vDSO of current kernels."""

SUITE = "trixie"
NEWER_SUITE = "forky"
"""Debian's next release. Kernels from 6.16 on answer for unix sockets only what CRIU before 4.2 asks of every socket,
so that it can't capture a process that has TCP sockets."""
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
_SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin")
_NEEDED_SPACE = 256 << 20
_VERSION = re.compile(r"^Version:\s*(\d{1,4}(?:\.\d{1,4}){1,3})", re.MULTILINE)
_LIST_URI = re.compile(r"^'([^']+)/dists/([^']+)/InRelease' ", re.MULTILINE)
_PROBE_TIMEOUT = 30.0
_APT_TIMEOUT = 900.0
_SET_UP = "Run `dormouse setup criu`"
_GET_NEWER = "Install CRIU 4.1 or newer as `criu` in the PATH, from your distribution or built from source"

# A system's apt hooks refresh caches of other programs. Lists like these can be emptied in a file only.
_APT_CONFIG = (
    "#clear APT::Update::Pre-Invoke;\n#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n"
)

# What apt says -> what to do about it; the first match counts.
_APT_REMEDIES = (
    (r"NO_PUBKEY|not signed|EXPKEYSIG|REVKEYSIG|BADSIG", "Update the package debian-archive-keyring, then try again"),
    (r"Hash Sum mismatch|unexpected size|be authenticated|unauthenticated", "The archive's files are not what its "
     "signed list says: try again later or with another mirror, and do not install that file by hand"),
    (r"resolv|connect|timed out|Network is unreachable|Connection failed|Proxy", "Check the network, and the proxy "
     "settings of apt, then try again"),
)  # fmt: skip


@dataclass(frozen=True)
class Criu:
    """A CRIU that works: `argv_prefix` goes before its arguments and holds absolute paths only."""

    argv_prefix: tuple[str, ...]
    version: tuple[int, ...]
    source: Literal["system", "prefix"]

    @property
    def version_text(self) -> str:
        """The version with dots."""
        return ".".join(map(str, self.version))

    @property
    def captures_tcp(self) -> bool:
        """Whether it can capture processes with TCP sockets on this kernel. Models' workers have none."""
        return self.version >= (4, 2) or not _needs_newer()


@dataclass(frozen=True)
class Archive:
    """A Debian archive: base URI, suite, and the keyring its signature is checked with."""

    uri: str
    suite: str
    keyring: Path

    def source_line(self) -> str:
        """The line of a sources.list."""
        return f"deb [signed-by={self.keyring}] {self.uri} {self.suite} main\n"


def find_criu(data_dir: Path) -> Criu:
    """The system's CRIU if it is new enough, else the one in DATA_DIR/criu; one that captures TCP sockets before one
    that doesn't. Raises HostError, which tells what is."""
    usable = []
    found = []
    for candidate in _candidates(data_dir):
        try:
            usable.append(_probe(candidate))
        except HostError as error:
            found.append(error.message)
            continue
        if usable[-1].captures_tcp:
            return usable[-1]
    if usable:
        return usable[0]
    raise HostError(f"CRIU 4.1 or newer is needed: {'; '.join(found) or 'none was found'}", remedy=_SET_UP)


def setup_criu(data_dir: Path, *, progress: Callable[[str], None]) -> Criu:
    """`find_criu`, or else unpack one into DATA_DIR/criu, also when the one found can't capture TCP sockets. `progress`
    is told each step.

    Blocks for as long as the download takes; a second caller waits for the first. Raises HostError, DiskFullError,
    or ConfigError when DATA_DIR cannot be used.
    """
    with _locked(data_dir):
        found = None
        try:
            found = find_criu(data_dir)
        except HostError as error:
            progress(error.message)
        if found is not None and found.captures_tcp:
            return found
        try:
            if found is not None:
                progress(f"CRIU {found.version_text} can't capture TCP sockets on kernel {platform.release()}")
            return _unpack_first(data_dir, progress)
        except HostError as error:
            if found is None:
                raise
            progress(f"{error.message}. CRIU {found.version_text} stays; it does for models")
            return found


def _unpack_first(data_dir: Path, progress: Callable[[str], None]) -> Criu:
    _require_debian()
    refusals: list[HostError] = []
    for archive in debian_archives(NEWER_SUITE if _needs_newer() else SUITE):
        try:
            return unpack_criu(archive, data_dir, progress=progress)
        except HostError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    raise HostError("apt has no package source on this system", remedy=_GET_NEWER)


def _needs_newer() -> bool:
    match = re.match(r"(\d+)\.(\d+)", platform.release())
    return match is not None and (int(match[1]), int(match[2])) >= (6, 16)


def debian_archives(suite: str = SUITE) -> list[Archive]:
    """The archives the system's apt reads from, each as a source of the given suite; not the security ones, which
    hold no complete suite. Whether one is Debian's is for the signature to say."""
    # Unlike `apt-get indextargets` this also answers where the lists were deleted, as in container images.
    listing = _run(["apt-get", "--print-uris", "update"], "list this system's package sources")
    uris = [uri for uri, name in _LIST_URI.findall(listing) if not name.endswith(("-security", "/updates"))]
    return [Archive(uri, suite, KEYRING) for uri in dict.fromkeys(uris)]


def unpack_criu(archive: Archive, data_dir: Path, *, progress: Callable[[str], None]) -> Criu:
    """Download CRIU with its libraries from `archive` and put it at DATA_DIR/criu, where nothing appears before it
    was seen to work. Raises HostError or DiskFullError."""
    prefix = _prefix(data_dir)
    try:
        with _work_folder(data_dir) as work:
            packages = _download(archive, work / "apt", progress)
            progress(f"unpacking {len(packages)} packages")
            for package in packages:
                _run(["dpkg-deb", "--extract", str(package), str(work / "all")], f"unpack {package.name}")
            _keep_needed(work / "all", work / "criu")
            _probe(_prefix_argv(work / "criu"))
            # What was there did not work, else it would have been used; the set-up lock keeps other set-ups out.
            _remove(prefix)
            (work / "criu").rename(prefix)
    except OSError as error:
        raise HostError(
            f"CRIU could not be unpacked below {data_dir}: {error}",
            remedy="See that the folder is yours and not full, or choose another with --data-dir",
        ) from error
    return _probe(_prefix_argv(prefix))


def parse_version(text: str) -> tuple[int, ...] | None:
    """The version in what `criu --version` prints."""
    match = _VERSION.search(text)
    return tuple(map(int, match[1].split("."))) if match else None


# Finding


def _prefix(data_dir: Path) -> Path:
    return data_dir.absolute() / "criu"


def _libraries(prefix: Path) -> Path:
    return prefix / f"usr/lib/{platform.machine()}-linux-gnu"


def _prefix_argv(prefix: Path) -> tuple[str, ...]:
    libraries = _libraries(prefix)
    loader = libraries / _LOADERS[_machine()]
    return (str(loader), "--library-path", str(libraries), str(prefix / "usr/sbin/criu"))


def _machine() -> str:
    machine = platform.machine()
    if machine not in _LOADERS:
        raise HostError(f"{machine} processors are not supported", remedy=f"Use one of {', '.join(_LOADERS)}")
    return machine


def _candidates(data_dir: Path) -> Iterator[tuple[str, ...]]:
    folders = [*os.environ.get("PATH", os.defpath).split(os.pathsep), *_SYSTEM_FOLDERS]
    for folder in dict.fromkeys(folders):
        if path := shutil.which("criu", path=folder):
            yield (str(Path(path).absolute()),)
    if _prefix(data_dir).exists():
        yield _prefix_argv(_prefix(data_dir))


def _probe(argv: tuple[str, ...]) -> Criu:
    """What `criu --version` says. Raises HostError when it does not run or is too old."""
    try:
        done = _execute([*argv, "--version"], timeout=_PROBE_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"{argv[-1]} does not run: {error}", remedy=_SET_UP) from error
    version = parse_version(done.stdout)
    if done.returncode != 0 or version is None:
        raise HostError(f"{argv[-1]} does not run: {_last_words(done)}", remedy=_SET_UP)
    criu = Criu(argv, version, "system" if len(argv) == 1 else "prefix")
    if version < MIN_VERSION:
        raise HostError(f"{argv[-1]} is {criu.version_text}", remedy=_SET_UP)
    return criu


def _execute(argv: Sequence[str], *, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        env=os.environ | {"LC_ALL": "C"},
    )


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


# Unpacking


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """One set-up at a time; the lock goes with its holder, however that ends."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data_dir / "criu.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the data folder {data_dir} cannot be used: {error.strerror}", remedy="Choose another with --data-dir"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextmanager
def _work_folder(data_dir: Path) -> Iterator[Path]:
    """DATA_DIR/criu.partial, empty, and gone at the end."""
    work = data_dir.absolute() / "criu.partial"
    _remove(work)
    work.mkdir(mode=0o700)
    try:
        _require_space(work)
        yield work
    finally:
        _remove(work)


def _require_debian() -> None:
    _machine()
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise HostError(
            f"CRIU can be unpacked on Debian and Ubuntu only; {' and '.join(missing)} is not here", remedy=_GET_NEWER
        )
    if not KEYRING.exists():
        raise HostError(
            f"Debian's archive keys are not here ({KEYRING}), so that a download could not be verified",
            remedy="Install the package debian-archive-keyring; or: " + _GET_NEWER,
        )


def _require_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_SPACE:
        raise DiskFullError(
            f"{folder.parent} has {free >> 20} MiB free, setting up CRIU takes {_NEEDED_SPACE >> 20} MiB for a while",
            remedy="Free some space, or choose another folder with --data-dir",
        )


def _download(archive: Archive, root: Path, progress: Callable[[str], None]) -> list[Path]:
    """The verified .deb files of CRIU and all it depends on, none taken as installed."""
    for folder in ("lists/partial", "archives/partial", "log"):
        (root / folder).mkdir(mode=0o700, parents=True)
    (root / "status").touch(0o600)
    (root / "sources.list").write_text(archive.source_line())
    (root / "apt.conf").write_text(_APT_CONFIG)
    progress(f"reading the package list of {archive.suite} at {archive.uri}")
    _apt(root, ["update"], f"read the package list of {archive.suite} at {archive.uri}")
    progress("downloading CRIU and its libraries")
    _apt(root, ["install", "--download-only", "criu"], f"download CRIU from {archive.uri}")
    return sorted((root / "archives").glob("*.deb"))


def _apt(root: Path, arguments: Sequence[str], what: str) -> None:
    options = {
        "Dir::State": root,
        "Dir::State::lists": root / "lists",
        "Dir::State::status": root / "status",
        "Dir::Cache": root,
        "Dir::Cache::archives": root / "archives",
        "Dir::Log": root / "log",
        "Dir::Etc::sourcelist": root / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::Etc::preferences": "-",
        "Dir::Etc::preferencesparts": "-",
        # The folders are private, which apt's own download user could not enter.
        "APT::Sandbox::User": "root",
        "APT::Install-Recommends": "false",
        # Else a list that can't be had is a warning only.
        "APT::Update::Error-Mode": "any",
        # Said in full, because a system's own configuration may say otherwise.
        "APT::Get::AllowUnauthenticated": "false",
        "APT::Get::Assume-Yes": "true",
        "Acquire::AllowInsecureRepositories": "false",
        "Acquire::AllowWeakRepositories": "false",
        "Acquire::AllowDowngradeToInsecureRepositories": "false",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
        "Acquire::http::Timeout": "30",
        "Acquire::https::Timeout": "30",
    }
    flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    _run(["apt-get", "-c", str(root / "apt.conf"), *flags, *arguments], what)


def _run(argv: Sequence[str], what: str) -> str:
    """The output of a tool. Raises HostError with its first words about an error, and the remedy for them."""
    try:
        done = _execute(argv, timeout=_APT_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"could not {what}: {error}", remedy=_GET_NEWER) from error
    if done.returncode != 0:
        # apt's first error is the cause and a warning before it may be too; its last one is "some files failed".
        errors = [line for line in done.stderr.splitlines() if line.startswith(("E: ", "W: "))]
        reason = " ".join(errors[0][3:].split()).rstrip(".") if errors else _last_words(done)
        raise HostError(f"could not {what}: {reason}", remedy=_apt_remedy(done.stderr))
    return done.stdout


def _apt_remedy(text: str) -> str:
    return next((remedy for pattern, remedy in _APT_REMEDIES if re.search(pattern, text)), _GET_NEWER)


def _keep_needed(unpacked: Path, prefix: Path) -> None:
    """Move the binary, the loader, the shared libraries and the licences over; what remains is of no use to CRIU."""
    prefix.mkdir(mode=0o700)
    libraries = _libraries(unpacked).glob("*.so*")
    licences = unpacked.glob("usr/share/doc/*/copyright")
    # A documentation folder may be a link to another package's.
    own = (path for path in licences if not path.parent.is_symlink())
    for path in (unpacked / "usr/sbin/criu", *libraries, *own):
        target = prefix / path.relative_to(unpacked)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.rename(target)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
