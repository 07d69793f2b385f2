"""PID 1 of a cell: makes processes inside the cell's namespaces for the host service outside.

Run by `cell.py` as `unshare --pid --mount --net --fork --mount-proc ... python -I -S cell_init.py FD`, so only the
standard library is at hand and the start is quick. FD is a SOCK_SEQPACKET socket to the host service, one JSON object
per packet:

    ->  {"spawn": ID, "argv": [...], "env": {...}, "fds": [n, ...], "control": n or null, "pid_floor": n or null}
        with one descriptor per entry of "fds", each to be number n in the new process (0, 1, 2 default to /dev/null)
    <-  {"spawned": ID, "pid": pid in the cell, "inode": inode of the control socket or null}
        with the outer end of the control socket, when one was asked for
    <-  {"spawned": ID, "error": text}
    <-  {"exited": pid, "status": wait status}        for every child that ends, also those that were re-parented

The control socket is made here because CRIU looks for sockets in the network namespace of the process it dumps. When
the service's end of FD closes, this process ends, and with PID 1 the kernel kills everything in the cell.
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
_MAX_PACKET = 1 << 17


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


def become(argv: list[str], env: dict[str, str], wanted: dict[int, int]) -> None:
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
    os.chdir("/")
    os.execvpe(argv[0], argv, env)


def spawn(request: dict[str, object], fds: list[int], own: socket.socket) -> None:
    """Fork and exec one process; reply with its pid and the outer end of its control socket."""
    argv, env, numbers = request["argv"], request["env"], request["fds"]
    control, floor = request["control"], request["pid_floor"]
    assert isinstance(argv, list) and isinstance(env, dict) and isinstance(numbers, list)
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
            become(argv, env, wanted)
        except BaseException as error:  # noqa: BLE001 - the child must never return into this program
            os.write(2, f"cannot start {argv[0]}: {error}\n".encode())
        finally:
            os._exit(127)
    send(own, {"spawned": request["spawn"], "pid": pid, "inode": inode}, [outer.fileno()] if outer else [])
    for end in (outer, inner):
        if end is not None:
            end.close()


def reap(own: socket.socket) -> None:
    """Collect every ended child and report it."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            send(own, {"exited": pid, "status": status}, [])


def main(fd: int) -> None:
    """Serve until the host service closes its end."""
    own = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is the node's business
    bring_up_loopback()
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
                spawn(request, fds, own)
            except (OSError, ValueError) as error:
                send(own, {"spawned": request["spawn"], "error": str(error)}, [])
            for received in fds:
                os.close(received)


if __name__ == "__main__":
    main(int(sys.argv[1]))
