"""CRIU's words in ours: the lines of its log that users meet, each as a sentence with a remedy.

What is not in the table is shown as CRIU said it. docs/processes.md has the same list for people.
"""

from __future__ import annotations

import re

from dormouse.errors import SnapshotError

# (what CRIU says, what it means, what to do about it); the first that matches counts. Groups are numbered from 1.
_MEANINGS: tuple[tuple[str, str, str], ...] = (
    (r"Connected TCP socket|In-flight connection|TCP sock.*established",
     "it has open TCP connections", "Let them end, or capture with --close-connections"),
    (r"External socket is used|Can't dump half of stream unix|unix.*(external|peer)",
     "one of its unix sockets is connected to a process outside the tree",
     "Close that connection first, or capture a parent of both processes"),
    (r"si_code=\d+.*Killed|SEIZE \d+.*No such process|Unable to (?:seize|interrupt) task.*No such process",
     "a process of it ended in the middle", "If it was not meant to end, look into its own log"),
    (r"Dangling connection|in-flight.*unix|Can't dump.*queue",
     "one of its unix sockets waits to be accepted by a process outside the tree", "Let that process accept it first"),
    (r"Can't get 1:16 opt: Operation not supported|Can't get 1:34 opt",
     "this CRIU can't capture TCP sockets on this kernel", "Run `dormouse setup criu`, which gets CRIU 4.2 or newer"),
    (r"tty: .*(dangling|external|unpaired|session leader)|Found.*slave peer|tty.*isn't|Inherit.*tty",
     "it uses a terminal", "Start it by `dormouse run`, or with its input and output in files or pipes"),
    (r"File /?(.+?) has bad size (\d+) \(expect (\d+)\)",
     "the file /{1} was {3} bytes long at the capture and is {2} now",
     "Bring back the file as it was, or start afresh"),
    (r"File /?(.+?) has bad mode", "the file /{1} has other permissions than at the capture", "Set them as they were"),
    (r"File /?(.+?) has bad build-?ID",
     "the program file /{1} is not the one that was captured", "Restore needs the same version of it"),
    (r"Can't open file /?(.+?)(?: on restore)?: No such file",
     "the file /{1} is not there any more", "Bring back the file, or start afresh"),
    (r"Address already in use",
     "an address it listened on is in use here", "Stop what uses it, or restore with --net own --publish PORT"),
    (r"Can't dump ghost file.*?(\S+) of (\d+) size",
     "it holds a deleted file of {2} bytes open, more than a snapshot takes in", "Close that file first"),
    (r"Can't create link remap|link.remap",
     "it holds a deleted file open that still has another name", "Close that file first"),
    (r"Some file locks are hold|file.?lock|Can't set lock",
     "a lock it holds on a file can't be taken again", "End the process that holds that lock, or wait for it"),
    (r"anon_inode:\[?(io_uring|perf_event|userfaultfd|kvm-vm|bpf-prog)|Unknown anonymous inode|can't dump.*anon",
     "it has a kernel object open that CRIU can't capture (io_uring, perf, KVM, BPF)",
     "Start it by `dormouse run`, which denies io_uring"),
    (r"doesn't live in IPC ns|SysV", "it uses System V shared memory, semaphores or queues",
     "Have the program use POSIX shared memory (/dev/shm) instead"),
    (r"Can't get rlimit.*not permitted", "it runs as another user, and this root may not touch its limits",
     "Run dormouse with CAP_SYS_RESOURCE, or the program as root"),
    (r"nested .*namespace|Can't dump.*namespace|namespace.*not supported",
     "a process in it made namespaces of its own (a container, a sandbox)", "Capture it without the sandbox"),
    (r"(\d+): Can't (?:fork|clone).*File exists|Pid (\d+).*(?:taken|in use)|Can't fork for \d+: File exists",
     "a process id it had is taken", "Try again; a fresh cell has them free"),
    (r"Unable to (?:seize|interrupt) task|ptrace.*Operation not permitted",
     "one of its processes is traced by another program", "End strace or the debugger, then try again"),
    (r"cpu: .*(?:mismatch|not supported)|cpuinfo", "this CPU is not like the one it was captured on",
     "Restore it on a machine with the same CPU features"),
    (r"[Ss]ession leader of \d+.*outside|sid.*outside", "its session began outside the tree",
     "Capture the session's first process, or start it by `dormouse run`"),
)  # fmt: skip


def explained(error: SnapshotError) -> SnapshotError:
    """The error in our words, with CRIU's own in brackets, when it is one of the table."""
    _, marker, words = error.message.partition(": ")
    if "criu could not" not in error.message or not marker:
        return error
    act = "captured" if "could not dump" in error.message else "restored"
    for pattern, meaning, remedy in _MEANINGS:
        match = re.search(pattern, words)
        if match:
            groups = [match[0], *(group or "" for group in match.groups())]
            return SnapshotError(f"the job can't be {act}: {meaning.format(*groups)} (criu: {words})", remedy=remedy)
    return SnapshotError(
        f"the job can't be {act} (criu: {words})",
        remedy="docs/processes.md tells what can't be; `dormouse doctor` what this machine lacks",
    )
