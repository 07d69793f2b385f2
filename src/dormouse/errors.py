"""Every error a user of Dormouse can meet, in one tree.

DormouseError
  ConfigError          the configuration or the command line is wrong           exit 2, HTTP 400
  RequestError         a request is wrong (type, value, too long)               exit 2, HTTP 400
  NotFoundError        no such model, snapshot or file                          exit 3, HTTP 404
  HostError            this machine lacks something (root, criu, memory, disk)  exit 4, HTTP 503
  StoreError           the store refused or could not do it                     exit 5, HTTP 500
    DamagedError       stored bytes are not what was written                    exit 5, HTTP 500
    UntrustedError     stored bytes may be somebody else's                      exit 5, HTTP 500
    DiskFullError      no room for what was to be written                       exit 5, HTTP 507
    WeightsError       a model's weights can't be had                         exit 5, HTTP 500
  SnapshotError        a capture or a restore failed                            exit 6, HTTP 500
    IncompatibleError  a snapshot does not fit this host                        exit 6, HTTP 500
  EngineError          the engine or its worker failed                          exit 7, HTTP 500
  BusyError            a bounded queue is full; try again later                 exit 8, HTTP 429
  StoppingError        this node is shutting down; try again later              exit 9, HTTP 503
  DeadlineError        the longest time allowed has passed                      exit 10, HTTP 504

A message says what happened and to what; `remedy` says what to do about it. The CLI prints both and exits with
`exit_code`, the gateway turns them into an OpenAI error body with `http_status` and `code`.
"""

from __future__ import annotations

from typing import ClassVar


class DormouseError(Exception):
    """Base of the tree. `str(error)` is the message followed by the remedy, when there is one."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}" if self.remedy else self.message


class ConfigError(DormouseError):
    """The configuration file or the command line is wrong."""

    exit_code = 2
    http_status = 400
    code = "invalid_configuration"


class RequestError(DormouseError):
    """A request is wrong. `param` names the offending field and `reason` is OpenAI's machine-readable code."""

    exit_code = 2
    http_status = 400
    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, reason: str = "", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.param = param
        self.reason = reason or self.code


class NotFoundError(DormouseError):
    """No such model, snapshot or file."""

    exit_code = 3
    http_status = 404
    code = "not_found"


class HostError(DormouseError):
    """This machine lacks something that the job needs."""

    exit_code = 4
    http_status = 503
    code = "host_not_capable"


class StoreError(DormouseError):
    """The store refused, or could not do, what was asked."""

    exit_code = 5
    code = "store_error"


class DamagedError(StoreError):
    """Stored bytes are not the bytes that were written."""

    code = "store_damaged"


class UntrustedError(StoreError):
    """Stored bytes may be somebody else's: signed with another key, or open to other users."""

    code = "store_untrusted"


class DiskFullError(StoreError):
    """The disk has no room for what was to be written."""

    http_status = 507
    code = "disk_full"


class WeightsError(StoreError):
    """The weights of a model are gone or can't be read. No snapshot of it is to blame."""

    code = "weights_unusable"


class SnapshotError(DormouseError):
    """A capture or a restore failed."""

    exit_code = 6
    code = "snapshot_failed"


class IncompatibleError(SnapshotError):
    """A snapshot does not fit this host; the message names the field that differs."""

    code = "snapshot_incompatible"


class EngineError(DormouseError):
    """The engine or its worker process failed."""

    exit_code = 7
    code = "engine_error"


class BusyError(DormouseError):
    """A bounded queue is full. `retry_after` is in seconds."""

    exit_code = 8
    http_status = 429
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: float, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after = retry_after


class StoppingError(DormouseError):
    """This node is shutting down and takes no new work."""

    exit_code = 9
    http_status = 503
    code = "shutting_down"


class DeadlineError(DormouseError):
    """The longest time allowed for something has passed."""

    exit_code = 10
    http_status = 504
    code = "deadline_exceeded"


def of_kind(kind: str, message: str, remedy: str) -> DormouseError:
    """The error of a class of this module, as it was raised in another process; EngineError for an unknown class or
    one that needs more than a message."""
    found = globals().get(kind)
    if isinstance(found, type) and issubclass(found, DormouseError) and found not in (RequestError, BusyError):
        return found(message, remedy=remedy)
    return EngineError(message, remedy=remedy)
