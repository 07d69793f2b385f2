"""What a process tree has open, and what of it can't be captured.

    /proc/PID/{status,fd,fdinfo,net,ns} of every process  ->  Survey  ->  refusal(survey) or None

CRIU refuses most of these things too, but late, in its own words and without the descriptor; here the user learns
which process and which descriptor it is. What only CRIU can see is put into words in explain.py. Needs root.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dormouse.errors import SnapshotError

STANDARD_STREAMS = ("stdin", "stdout", "stderr")

_LISTEN, _CLOSE = 0x0A, 0x07
_BRACKETS = re.compile(r"(socket|pipe):\[(\d+)\]")
_NVIDIA = re.compile(r"/dev/nvidia")
_OTHER_GPU = re.compile(r"/dev/(dri/|kfd)")
# Files that are the kernel's own and that CRIU can't make anew.
_UNKNOWN_TO_CRIU = {
    "anon_inode:[io_uring]": "an io_uring",
    "anon_inode:[userfaultfd]": "a userfaultfd",
    "anon_inode:[perf_event]": "a performance counter",
    "anon_inode:[bpf-prog]": "a BPF program",
    "anon_inode:kvm-vm": "a virtual machine",
    "anon_inode:[fanotify]": "a fanotify watch",
}
_NAMESPACES = ("pid", "mnt", "net", "ipc", "uts", "user")
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_NLMSG_DONE, _NLMSG_ERROR = 3, 2
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_UDIAG_SHOW_PEER, _UNIX_DIAG_PEER = 0x4, 2


@dataclass(frozen=True)
class Descriptor:
    """One open file of one process; `target` is what its link in /proc says."""

    pid: int
    number: int
    target: str

    @property
    def inode(self) -> int | None:
        """Of a socket or pipe."""
        match = _BRACKETS.fullmatch(self.target)
        return int(match[2]) if match else None

    def __str__(self) -> str:
        return f"descriptor {self.number} of process {describe(self.pid)}"


@dataclass(frozen=True)
class Connection:
    """An internet socket: its addresses as text, its TCP state and its inode."""

    local: str
    remote: str
    state: int
    inode: int

    @property
    def open(self) -> bool:
        """Whether somebody is, or may still be, at the other end."""
        return self.state not in (_LISTEN, _CLOSE)


@dataclass
class Survey:
    """The open things of a tree. `unix_peers` maps the inode of a connected unix socket to its other end's, or to 0
    when that has been closed. `strangers` are processes in a namespace of their own, with its kind."""

    pids: list[int]
    strangers: dict[int, str] = field(default_factory=dict)
    descriptors: list[Descriptor] = field(default_factory=list)
    tcp: dict[int, Connection] = field(default_factory=dict)
    unix_peers: dict[int, int] = field(default_factory=dict)

    def inodes(self, kind: str) -> set[int]:
        """Of all sockets or pipes in the tree."""
        return {int(match[2]) for item in self.descriptors if (match := _BRACKETS.fullmatch(item.target))
                if match[1] == kind}  # fmt: skip

    def open_connections(self) -> list[Connection]:
        """Its TCP connections that are not quite closed."""
        held = self.inodes("socket")
        return [connection for inode, connection in self.tcp.items() if inode in held and connection.open]

    def stays_inside(self, connection: Connection) -> bool:
        """Whether the other end is in the tree too, or has been closed, provided that nothing else is in its network
        than the tree and those whose sockets `tcp` has."""
        ends = (connection.remote, connection.local)
        others = [inode for inode, other in self.tcp.items() if (other.local, other.remote) == ends and other.open]
        return set(others) <= self.inodes("socket")

    def listening(self) -> list[str]:
        """The addresses it listens on."""
        held = self.inodes("socket")
        return [connection.local for inode, connection in self.tcp.items()
                if inode in held and connection.state == _LISTEN]  # fmt: skip


def survey(pids: Iterable[int], make_socket: Callable[[int, int, int], socket.socket], insider: int) -> Survey:
    """Look at every process; those that end meanwhile are left out. `make_socket` makes sockets in their network, and
    `insider` is a process in the namespaces they should all be in."""
    found = Survey([pid for pid in pids if Path(f"/proc/{pid}").exists()])
    for pid in found.pids:
        found.descriptors += descriptors(pid)
        if (namespace := foreign_namespace(pid, insider)) is not None:
            found.strangers[pid] = namespace
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.tcp |= parse_tcp(Path(f"/proc/{pid}/net/{table}").read_text())
    with make_socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diagnosis:
        found.unix_peers = dict(unix_peers(diagnosis))
    return found


def refusal(
    found: Survey,
    *,
    external: set[int],
    close_connections: bool,
    own_network: bool = False,
    cuda: Collection[int] = (),
) -> SnapshotError | None:
    """Why the tree can't be captured; None when nothing speaks against it. The inodes in `external` are known to have
    their other end outside and are taken care of; so are NVIDIA's devices of the processes `cuda`, which have CUDA
    state: its driver closes them. In a network of its own, connections within the tree can be captured."""
    outside = {
        connection.inode: connection
        for connection in found.open_connections()
        if not close_connections and not (own_network and found.stays_inside(connection))
    }
    return next(_refusals(found, external, outside, cuda), None)


def _refusals(
    found: Survey, external: set[int], outside: Mapping[int, Connection], cuda: Collection[int]
) -> Iterator[SnapshotError]:
    for pid, namespace in found.strangers.items():
        yield SnapshotError(
            f"process {describe(pid)} has a {namespace} namespace of its own: it is a container or a sandbox",
            remedy="Run the program without it; a job has namespaces of its own already",
        )
    for pid in found.pids:
        if (tracer := int(status_field(pid, "TracerPid") or 0)) > 0:
            yield SnapshotError(
                f"process {describe(pid)} is being traced by process {describe(tracer)}",
                remedy="End strace or the debugger, then try again",
            )
    unix = found.inodes("socket")
    terminals = {_terminal_index(item) for item in found.descriptors if item.target.endswith("/ptmx")}
    for item in found.descriptors:
        inode = item.inode
        if item.target in _UNKNOWN_TO_CRIU:
            yield _refused(item, f"is {_UNKNOWN_TO_CRIU[item.target]}, which CRIU can't capture", _uring_remedy(item))
        elif _NVIDIA.match(item.target) and item.pid not in cuda:
            yield _refused(
                item,
                f"is the GPU device {item.target}, held open without CUDA: by NVML, or inherited by a fork",
                "Have the program close it (nvmlShutdown), or start such processes before it uses CUDA",
            )
        elif _OTHER_GPU.match(item.target):
            yield _refused(
                item, f"is the GPU device {item.target}", "Only NVIDIA GPUs used through CUDA can be captured"
            )
        elif _is_terminal(item.target) and _terminal_index(item) not in terminals:
            yield _refused(
                item,
                f"is the terminal {item.target}",
                "Start it by `dormouse run`, or with its input and output in files or pipes (</dev/null >log 2>&1)",
            )
        elif inode is None or inode in external:
            continue
        elif found.unix_peers.get(inode, 0) not in unix | external | {0}:
            yield _refused(
                item,
                "is a unix socket connected to a process outside the tree",
                "Close that connection first, or capture a parent of both processes",
            )
        elif (connection := outside.get(inode)) is not None:
            yield _refused(
                item,
                f"is an open TCP connection, {connection.local} with {connection.remote}",
                "Let it end, or capture with --close-connections: the program then finds it closed",
            )


def _refused(item: Descriptor, what: str, remedy: str) -> SnapshotError:
    return SnapshotError(f"{item} {what}", remedy=remedy)


def _uring_remedy(item: Descriptor) -> str:
    if "io_uring" in item.target:
        return (
            "Start it by `dormouse run`, which denies io_uring so that programs do without (Node.js: UV_USE_IO_URING=0)"
        )
    return "Capture it before it opens that, or do without"


def descriptors(pid: int) -> list[Descriptor]:
    """All open files of a process that we may see; none when it has ended."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for entry in sorted(Path(f"/proc/{pid}/fd").iterdir(), key=lambda entry: int(entry.name)):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                found.append(Descriptor(pid, int(entry.name), str(entry.readlink())))
    return found


def addresses_in_use(wanted: Iterable[str]) -> list[str]:
    """Those of the addresses that somebody listens on in our own network. CRIU would listen beside them, and
    connections would go to the one or the other."""
    taken = [
        connection.local
        for table in ("tcp", "tcp6")
        for connection in _sockets(Path(f"/proc/self/net/{table}").read_text())
        if connection.state == _LISTEN
    ]
    return [address for address in wanted if any(_clash(address, other) for other in taken)]


def _clash(one: str, other: str) -> bool:
    (host, _, port), (other_host, _, other_port) = one.rpartition(":"), other.rpartition(":")
    return port == other_port and (host == other_host or bool({host, other_host} & {"0.0.0.0", "[::]"}))


@dataclass(frozen=True)
class PipeEnds:
    """What the tree holds of one pipe. `outside`: a process outside holds it, too. `one_sided`: the tree has only
    what reads from it, or only what writes to it."""

    items: list[Descriptor]
    outside: bool
    one_sided: bool


def pipe_ends(found: Survey) -> dict[int, PipeEnds]:
    """The tree's pipes by inode."""
    held: dict[int, list[Descriptor]] = {}
    for item in found.descriptors:
        if item.target.startswith("pipe:") and (inode := item.inode) is not None:
            held.setdefault(inode, []).append(item)
    inside = set(found.pids)
    others = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    outside = {item.inode for pid in others if held and pid not in inside for item in descriptors(pid)}
    return {
        inode: PipeEnds(items, inode in outside, len({_writes(item) for item in items}) == 1)
        for inode, items in held.items()
    }


def _writes(item: Descriptor) -> bool:
    try:
        text = Path(f"/proc/{item.pid}/fdinfo/{item.number}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    flags = re.search(r"flags:\s*([0-7]+)", text)
    return bool(flags and int(flags[1], 8) & (os.O_WRONLY | os.O_RDWR))


def refuse_foreign(pid: int) -> None:
    """Raises SnapshotError when the tree below `pid` may not be captured from here at all."""
    if not Path(f"/proc/{pid}").exists():
        raise SnapshotError(f"there is no process {pid}", remedy="`ps` shows what runs")
    if pid == 1:
        raise SnapshotError("process 1 is the system's init, without which nothing runs", remedy="Name another one")
    if not Path(f"/proc/{pid}/maps").read_text():
        raise SnapshotError(
            f"process {describe(pid)} has no memory of its own: it is a kernel thread or has ended",
            remedy="Name a process of a program",
        )
    if (leader := status_field(pid, "Tgid")) not in (None, str(pid)):
        raise SnapshotError(
            f"{pid} is a thread of process {leader}, not a process of its own", remedy=f"Capture {leader}"
        )
    if pid in ancestors(os.getpid()):
        raise SnapshotError(
            f"process {describe(pid)} is an ancestor of this command, which would have to capture itself",
            remedy="Run the command from another terminal, outside that tree",
        )
    if (namespace := foreign_namespace(pid, os.getpid())) is not None:
        raise SnapshotError(
            f"process {describe(pid)} lives in another {namespace} namespace: it is in a container or in a cell",
            remedy="A job of `dormouse run` is captured by its name; for containers use their own tools",
        )


def foreign_namespace(pid: int, insider: int) -> str | None:
    """The first kind of namespace in which a process differs from another, None when it has ended or in none."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for name in _NAMESPACES:
            if Path(f"/proc/{pid}/ns/{name}").readlink() != Path(f"/proc/{insider}/ns/{name}").readlink():
                return name
    return None


def ancestors(pid: int) -> set[int]:
    """The process itself and all above it."""
    found: set[int] = set()
    while pid and pid not in found:
        found.add(pid)
        pid = int(status_field(pid, "PPid") or 0)
    return found


def status_field(pid: int, name: str) -> str | None:
    """A field of /proc/PID/status, None when the process has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
    return None


def describe(pid: int) -> str:
    """A process for people: pid and program."""
    name = status_field(pid, "Name")
    return f"{pid} ({name})" if name else str(pid)


def session_of(pid: int) -> int:
    """The session a process belongs to."""
    return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[3])


def _is_terminal(target: str) -> bool:
    return (target.startswith(("/dev/pts/", "/dev/tty")) and not target.endswith("/ptmx")) or target == "/dev/console"


def _terminal_index(item: Descriptor) -> int | None:
    if item.target.endswith("/ptmx"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            match = re.search(r"tty-index:\s*(\d+)", Path(f"/proc/{item.pid}/fdinfo/{item.number}").read_text())
            return int(match[1]) if match else None
    digits = item.target.rpartition("/")[2]
    return int(digits) if digits.isdigit() else None


def parse_tcp(text: str) -> Mapping[int, Connection]:
    """/proc/net/tcp or tcp6, by inode; those that no process has open have none and are left out."""
    return {connection.inode: connection for connection in _sockets(text) if connection.inode}


def _sockets(text: str) -> Iterator[Connection]:
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) > 9:
            yield Connection(_address(words[1]), _address(words[2]), int(words[3], 16), int(words[9]))


def _address(text: str) -> str:
    digits, _, port = text.partition(":")
    # The kernel prints each 32-bit group as a number in the machine's byte order.
    groups = [bytes.fromhex(digits[at : at + 8]) for at in range(0, len(digits), 8)]
    packed = b"".join(group[::-1] if sys.byteorder == "little" else group for group in groups)
    address = ipaddress.ip_address(packed)
    address = getattr(address, "ipv4_mapped", None) or address
    return f"[{address}]:{int(port, 16)}" if address.version == 6 else f"{address}:{int(port, 16)}"


def unix_peers(diagnosis: socket.socket) -> Iterator[tuple[int, int]]:
    """(inode, inode of the other end) of every connected unix socket of a network namespace."""
    request = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _UDIAG_SHOW_PEER, 0xFFFFFFFF, 0xFFFFFFFF)
    flags = _NLM_F_REQUEST | _NLM_F_DUMP
    diagnosis.settimeout(10)
    diagnosis.sendall(struct.pack("=IHHII", 16 + len(request), _SOCK_DIAG_BY_FAMILY, flags, 1, 0) + request)
    while True:
        data = diagnosis.recv(1 << 16)
        while len(data) >= 16:
            length, kind = struct.unpack_from("=IH", data)
            if kind in (_NLMSG_DONE, _NLMSG_ERROR) or length < 16:
                return
            yield from _peer(data[16:length])
            data = data[(length + 3) & ~3 :]


def _peer(message: bytes) -> Iterator[tuple[int, int]]:
    (inode,) = struct.unpack_from("=I", message, 4)
    attributes = message[16:]
    while len(attributes) >= 4:
        length, kind = struct.unpack_from("=HH", attributes)
        if kind == _UNIX_DIAG_PEER and length >= 8:
            yield inode, struct.unpack_from("=I", attributes, 4)[0]
        if length < 4:
            return
        attributes = attributes[(length + 3) & ~3 :]
