"""PID 1 of a cell: makes processes inside the cell's namespaces for the cell's owner outside.

Run by `cell.py` as `unshare --pid --mount [--net] --fork --mount-proc ... python -I -S cell_init.py FD [TMPFS...]`, so
only the standard library is at hand and the start is quick. Each TMPFS is a folder that gets an empty tmpfs of the
cell's own. FD is a SOCK_SEQPACKET socket to the owner, one JSON object per packet:

    ->  {"spawn": ID, "argv": [...], "env": {...}, "cwd": folder, "fds": [n, ...], "control": n or null,
         "pid_floor": n or null, "io_uring": bool}
        with one descriptor per entry of "fds", each to be number n in the new process (0, 1, 2 default to /dev/null)
    <-  {"spawned": ID, "pid": pid in the cell, "inode": inode of the control socket or null}
        with the outer end of the control socket, when one was asked for
    ->  {"spawn": ID, "socket": [family, type, protocol]}
    <-  {"spawned": ID} with a new socket of the cell's network namespace, not yet connected
    <-  {"spawned": ID, "error": text}
    <-  {"exited": pid, "status": wait status}        for every child that ends, also those that were re-parented

Sockets are made here because a socket belongs to the network namespace it was made in: CRIU finds the control socket
only there, and only from there can the owner reach what listens inside. Nothing here waits for a connection. When the
owner's end of FD closes, this process ends, and with PID 1 the kernel kills everything in the cell.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
_MAX_PACKET = 1 << 18

# A seccomp filter: io_uring_setup answers "no such system call", so programs take their other way. CRIU can't dump
# io_uring, and it does dump filters. Fields: code, jump if true, jump if false, constant.
_IO_URING_SETUP, _ENOSYS = 425, 38
_IO_URING_FILTER = (
    # Load the system call's number, which is the same on all architectures for calls this young, so 32-bit calls of a
    # 64-bit machine (and Arm) are denied by the same rule, without a look at the architecture.
    (0x20, 0, 0, 0),
    (0x15, 0, 1, _IO_URING_SETUP),
    (0x06, 0, 0, 0x00050000 | _ENOSYS),  # return SECCOMP_RET_ERRNO
    (0x06, 0, 0, 0x7FFF0000),  # return SECCOMP_RET_ALLOW
)
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2


def bring_up_loopback() -> None:
    """A new network namespace has `lo` down; engines expect 127.0.0.1 to answer. (`ip` may be missing.)"""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sh", b"lo", 0) + bytes(22)
        flags = struct.unpack_from("h", fcntl.ioctl(probe, _SIOCGIFFLAGS, request), 16)[0]
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | _IFF_UP) + bytes(22))


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One packet and the descriptors that came with it."""
    fds = array.array("i")
    data, ancillary, _flags, _addr = sock.recvmsg(
        _MAX_PACKET, socket.CMSG_SPACE(64 * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds)


def send(sock: socket.socket, message: dict[str, object], fds: list[int]) -> None:
    """One JSON packet, with descriptors."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([json.dumps(message).encode()], rights)


def forbid_io_uring() -> None:
    """For this process and all it starts. Raises OSError."""
    import ctypes  # slow to import, and most cells never need it

    code = b"".join(struct.pack("=HBBI", *step) for step in _IO_URING_FILTER)
    program = struct.pack(
        "HxxxxxxP", len(_IO_URING_FILTER), ctypes.addressof(held := ctypes.create_string_buffer(code))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp was refused")
    del held


def mount_tmpfs(folder: str) -> None:
    """An empty tmpfs over `folder`, with the modes of /tmp. Raises OSError."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    nosuid_nodev = 0x6
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", nosuid_nodev, b"mode=1777") != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"cannot mount a tmpfs at {folder}: {os.strerror(error)}")


def become(argv: list[str], env: dict[str, str], cwd: str, io_uring: bool, wanted: dict[int, int]) -> None:
    """In the new child: own session, default signals, the wanted descriptors {number: source}, then exec."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for handled in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT, signal.SIGTERM):
        signal.signal(handled, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    sources = {0: null, 1: null, 2: null} | wanted
    # Sources first move out of the way of every target number, so that no dup2 closes one that is still needed.
    above = max(sources) + 1
    moved = {number: fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, above) for number, source in sources.items()}
    for number, source in moved.items():
        os.dup2(source, number, inheritable=True)
    os.chdir(cwd)
    if not io_uring:
        forbid_io_uring()
    os.execvpe(argv[0], argv, env)


def spawn(request: dict[str, object], fds: list[int], own: socket.socket) -> None:
    """Fork and exec one process; reply with its pid and the outer end of its control socket."""
    argv, env, numbers = request["argv"], request["env"], request["fds"]
    control, floor, cwd = request["control"], request["pid_floor"], request["cwd"]
    assert isinstance(argv, list) and isinstance(env, dict) and isinstance(numbers, list) and isinstance(cwd, str)
    wanted = dict(zip(numbers, fds, strict=True))
    outer = inner = None
    inode = None
    if control is not None:
        assert isinstance(control, int)
        outer, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        wanted[control] = inner.fileno()
        inode = os.fstat(inner.fileno()).st_ino
    if floor is not None:
        # CRIU restores a process under the pid it had; a high one is never taken by the few processes of a new cell.
        with open("/proc/sys/kernel/ns_last_pid", "w") as last:  # noqa: PTH123 - stdlib-light on purpose
            last.write(str(floor))
    pid = os.fork()
    if pid == 0:
        try:
            become(argv, env, cwd, request["io_uring"] is True, wanted)
        except BaseException as error:  # noqa: BLE001 - the child must never return into this program
            os.write(2, f"cannot start {argv[0]}: {error}\n".encode())
        finally:
            os._exit(127)
    send(own, {"spawned": request["spawn"], "pid": pid, "inode": inode}, [outer.fileno()] if outer else [])
    for end in (outer, inner):
        if end is not None:
            end.close()


def give_socket(request: dict[str, object], own: socket.socket) -> None:
    """Reply with a new socket of this network namespace."""
    asked = request["socket"]
    assert isinstance(asked, list)
    with socket.socket(*asked) as made:
        send(own, {"spawned": request["spawn"]}, [made.fileno()])


def reap(own: socket.socket) -> None:
    """Collect every ended child and report it."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            send(own, {"exited": pid, "status": status}, [])


def main(fd: int, tmpfs: list[str]) -> None:
    """Serve until the owner closes its end."""
    own = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is the node's business
    bring_up_loopback()
    for folder in tmpfs:
        mount_tmpfs(folder)
    while True:
        ready, _, _ = select.select([own.fileno(), wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            reap(own)
        if own.fileno() in ready:
            data, fds = receive(own)
            if not data:
                return
            request = json.loads(data)
            try:
                if "socket" in request:
                    give_socket(request, own)
                else:
                    spawn(request, fds, own)
            except (OSError, ValueError) as error:
                send(own, {"spawned": request["spawn"], "error": str(error)}, [])
            for received in fds:
                os.close(received)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
