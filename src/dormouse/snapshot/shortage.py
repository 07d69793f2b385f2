"""Which failures are this host's and no snapshot's: it is out of memory, disk, descriptors or processes.

A snapshot that can't be restored for such a reason is as good as before, so these come as HostError wherever they are
met, and only what may be the snapshot's fault as SnapshotError.
"""

from __future__ import annotations

import errno
import os
import re

from dormouse.errors import HostError, SnapshotError

_ERRNOS = (errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN)
_NO_THREAD = "can't start new thread"
_WORDS = re.compile(
    "|".join(os.strerror(code) for code in _ERRNOS if code != errno.EAGAIN)
    + f"|(?:fork|clone).*{os.strerror(errno.EAGAIN)}"
)
# CRIU itself kills what it has begun when anything fails, so this is the cause only where nothing was said before.
_KILLED = re.compile(r"\d+ killed by signal 9\b")
REMEDY = "Look for a lack of memory, disk or descriptors in the node's and the kernel's log, and try again"


def is_shortage(error: Exception) -> bool:
    """Whether what a system call, or Python, could not do was for want of something."""
    if isinstance(error, OSError):
        return error.errno in _ERRNOS
    return isinstance(error, MemoryError) or _NO_THREAD in str(error)


def tells_of_shortage(criu_errors: list[str]) -> bool:
    """Whether the first errors that CRIU has logged are of that kind."""
    return any(_WORDS.search(line) for line in criu_errors) or any(map(_KILLED.match, criu_errors[:1]))


def system_failure(message: str, error: OSError, *, remedy: str = "") -> HostError | SnapshotError:
    """The error for a system call that failed."""
    text = f"{message}: {error.strerror or error}"
    return HostError(text, remedy=REMEDY) if is_shortage(error) else SnapshotError(text, remedy=remedy)
