"""What the verbs do: run, restore, checkpoint, stop. The command line adds options and words."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dormouse import catalogue
from dormouse.data_dir import DataDir
from dormouse.errors import ConfigError, HostError, NotFoundError, SnapshotError
from dormouse.jobs.control import Request, ask, free_name
from dormouse.jobs.foreign import find_tree
from dormouse.jobs.guard import Guard
from dormouse.jobs.keeper import GivenUp, Keeper, in_background, require_root
from dormouse.jobs.private_files import DEFAULT_FOLDERS
from dormouse.jobs.record import JobRecord, Network, check_name, made_up_name, parse_publish, shown
from dormouse.jobs.replica import CaptureOptions, StoredJob, Tools, capture_replica
from dormouse.jobs.streams import say
from dormouse.jobs.survey import addresses_in_use
from dormouse.snapshot.criu_setup import find_criu
from dormouse.snapshot.cuda_checkpoint import chosen_gpu
from dormouse.snapshot.cuda_checkpoint import gpus as gpus_here
from dormouse.snapshot.tree import stopped_processes
from dormouse.store.store import Store
from dormouse.trace import steps_json

Tell = Callable[[str], None]
Emit = Callable[[dict[str, Any]], None]

MAX_REPLICAS = 64
_POLL = 0.1
_KILL_TIMEOUT = 120.0
_ENDING = 2.0
_LONGEST_PID = 10


@dataclass(frozen=True)
class Place:
    """Where and how a keeper runs. None for `publish` or `network`: as the snapshot says."""

    name: str | None
    network: Network | None
    publish: Sequence[str] | None
    detach: bool


@dataclass(frozen=True)
class Words:
    """For the user: `tell` shows a line. `emit`, when given, gets what a detached job is instead of lines."""

    tell: Tell
    emit: Emit | None = None


def run_job(data_dir: DataDir, argv: Sequence[str], place: Place, tmpfs: Sequence[str], words: Words) -> int:
    """`dormouse run`: the exit code of the job. With `detach` it returns once the job runs."""
    require_root()
    command = [shown(word) for word in argv]
    record = JobRecord(
        name=check_name(place.name) if place.name is not None else made_up_name(command[0]),
        argv=command,
        network=place.network or "own",
        streams=[],
        tmpfs=sorted({*DEFAULT_FOLDERS, *map(_folder, tmpfs)}),
        publish=[parse_publish(text) for text in place.publish or ()],
    )
    cwd = Path.cwd()
    _refuse_hidden(data_dir, record)
    return _keep(data_dir, _checked(record), place.detach, words, lambda keeper: keeper.run(argv, cwd))


def restore_job(
    data_dir: DataDir,
    snapshot: str,
    place: Place,
    replicas: int,
    words: Words,
    *,
    timeout: float,
    hook_timeout: float,
    gpus: Sequence[str] = (),
) -> int:
    """`dormouse restore`: the exit code of the job. With `detach` it returns once the replicas run. `gpus`: the numbers
    or UUIDs of those it shall use."""
    require_root()
    here = gpus_here() if gpus else []
    chosen = [chosen_gpu(text, here).uuid for text in gpus]
    find_criu(data_dir.root)
    with Store.open(data_dir.create().store) as store:
        stored = StoredJob.read(catalogue.resolve(store, snapshot), store)
    record = stored.record
    name = check_name(place.name) if place.name is not None else free_name(data_dir, record.name)
    network = place.network or record.network
    kept = record.publish if network == "own" else []
    publish = kept if place.publish is None else [parse_publish(text) for text in place.publish]
    record = msgspec.structs.replace(record, name=name, network=network, publish=publish)
    _refuse_hidden(data_dir, record)
    _refuse_taken_addresses(record, replicas)
    return _keep(
        data_dir,
        _checked(record),
        place.detach,
        words,
        lambda keeper: keeper.restore(stored, replicas, timeout, hook_timeout, chosen),
    )


def checkpoint(data_dir: DataDir, target: str, request: Request) -> dict[str, Any]:
    """`dormouse checkpoint`: captures a job by name, or any tree by the pid of its first process."""
    require_root()
    if not (target.isascii() and target.isdigit()):
        return ask(data_dir, check_name(target), request, timeout=None)
    if len(target) > _LONGEST_PID:
        raise SnapshotError(f"there is no process {target[:20]}…", remedy="`ps` shows what runs")
    data_dir.create()
    tree = find_tree(int(target), None)
    options = CaptureOptions(
        leave_running=request.leave_running,
        close_connections=request.close_connections,
        hook_timeout=request.hook_timeout,
    )
    with (
        Tools.find(data_dir, request.timeout) as tools,
        Store.open(data_dir.store) as store,
        Guard(tree.pid, stopped_processes(tree.home)),
    ):
        result = capture_replica(tree, store, tools, options)
    return {
        "id": result.snapshot_id,
        "name": tree.record.name,
        "raw_bytes": result.raw_bytes,
        "stored_bytes": result.stored_bytes,
        "phases": steps_json(result.phases),
        "left_running": request.leave_running,
    }


def stop_job(data_dir: DataDir, name: str, grace: float) -> dict[str, Any]:
    """`dormouse stop`: asks the job to end, and after `grace` seconds ends it. Raises NotFoundError."""
    ask(data_dir, check_name(name), Request("stop"))
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline:
        if not _runs(data_dir, name):
            return {"name": name, "killed": False}
        time.sleep(_POLL)
    try:
        ask(data_dir, name, Request("kill"), timeout=_KILL_TIMEOUT)
    except NotFoundError:
        return {"name": name, "killed": False}
    except SnapshotError:  # it may just be ending, as it was asked to before
        deadline = time.monotonic() + _ENDING
        while _runs(data_dir, name):
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL)
        return {"name": name, "killed": False}
    return {"name": name, "killed": True}


def _runs(data_dir: DataDir, name: str) -> bool:
    try:
        ask(data_dir, name, Request("status"))
    except NotFoundError:
        return False
    except SnapshotError:
        return True  # it is busy or about to end; the next look tells
    return True


def _keep(data_dir: DataDir, record: JobRecord, detach: bool, words: Words, begin: Callable[[Keeper], None]) -> int:
    log_path = data_dir.create().logs / f"{record.name}.log" if detach else None

    def work(report: Callable[[dict[str, Any]], None]) -> int:
        tell = _log if detach else words.tell
        with Keeper(data_dir, record, log_path=log_path, tell=tell) as keeper:
            try:
                begin(keeper)
            except GivenUp as error:
                if detach:
                    raise
                tell(error.message)
                return 128 + error.number
            restores = [operation.as_json() for operation in keeper.operations()]
            report({"name": record.name, "pids": keeper.pids, "published": keeper.addresses, "restores": restores})
            return keeper.wait()

    def report(state: dict[str, Any]) -> None:
        where = f", published at {', '.join(state['published'])}" if state["published"] else ""
        pids = ", ".join(map(str, state["pids"]))
        took = max((restore["seconds"] for restore in state["restores"]), default=None)
        after = f", restored in {took:.3f} s" if took is not None else ""
        words.tell(f"job {state['name']} runs (pid {pids}{where}{after})")

    if log_path is None:
        return work(report)
    state = in_background(log_path, work)
    if words.emit is not None:
        words.emit(state | {"log": shown(str(log_path))})
        return 0
    report(state)
    words.tell(f"its output goes to {log_path}; `dormouse stop {record.name}` ends it")
    return 0


def _log(text: str) -> None:
    say(1, text)


def _refuse_hidden(data_dir: DataDir, record: JobRecord) -> None:
    """CRIU works inside the job's cell, and must see itself and the data folder there."""
    needed = {data_dir.root: "the data folder", data_dir.criu: "CRIU"}
    with contextlib.suppress(HostError):  # no CRIU yet: `dormouse setup criu` puts it into the data folder
        needed |= {Path(find_criu(data_dir.root).argv_prefix[0]): "CRIU"}
    for path, what in needed.items():
        for folder in record.tmpfs:
            if path.resolve().is_relative_to(folder):
                raise ConfigError(
                    f"a tmpfs of the job's own at {folder} would hide {what} ({path}) from it",
                    remedy="Choose another --tmpfs, or a --data-dir elsewhere",
                )


def _checked(record: JobRecord) -> JobRecord:
    if record.publish and record.network == "host":
        raise ConfigError(
            "a job on the host's network has its ports there already; --publish is for a network of its own",
            remedy="Leave out --publish, or --net host",
        )
    if record.connections == "kept" and record.network == "host":
        raise ConfigError(
            "the snapshot has TCP connections of the job with itself, which only a network of its own can have again",
            remedy="Restore it with --net own, or capture it with --close-connections",
        )
    return record


def _refuse_taken_addresses(record: JobRecord, replicas: int) -> None:
    if record.network != "host" or not record.listening:
        return
    remedy = "Restore with a network of its own: --net own --publish PORT"
    if replicas > 1:
        raise ConfigError(f"{replicas} replicas can't all listen on {record.listening[0]} of the host", remedy=remedy)
    if taken := addresses_in_use(record.listening):
        raise SnapshotError(
            f"the job listens on {taken[0]}, and that address is in use here",
            remedy=f"Stop what uses it. {remedy}",
        )


def _folder(text: str) -> str:
    path = Path(text).resolve()
    if not path.is_dir() or path == Path("/"):
        raise ConfigError(f"{text} can't have a tmpfs of the job's own", remedy="Name an existing folder other than /")
    if (name := str(path)) != shown(name):
        raise ConfigError(f"{shown(name)} can't have a tmpfs of the job's own", remedy="Its name must be UTF-8")
    return name
