"""What the verbs do: run, restore, checkpoint, stop. The command line adds options and words."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dormouse import catalogue
from dormouse.config import DataDir
from dormouse.errors import ConfigError, NotFoundError, SnapshotError
from dormouse.jobs.control import Request, ask, free_name
from dormouse.jobs.foreign import find_tree
from dormouse.jobs.guard import Guard
from dormouse.jobs.keeper import Keeper, in_background, require_root
from dormouse.jobs.private_files import DEFAULT_FOLDERS
from dormouse.jobs.record import JobRecord, Network, check_name, made_up_name, parse_publish
from dormouse.jobs.replica import CaptureOptions, StoredJob, capture_replica
from dormouse.jobs.survey import addresses_in_use
from dormouse.snapshot.criu_setup import find_criu
from dormouse.snapshot.mapped_files import CACHE_NAME, DigestCache
from dormouse.snapshot.tree import stopped_processes
from dormouse.store.store import Store

Tell = Callable[[str], None]

MAX_REPLICAS = 64
_POLL = 0.1


@dataclass(frozen=True)
class Place:
    """Where and how a keeper runs. None for `publish` or `network`: as the snapshot says."""

    name: str | None
    network: Network | None
    publish: Sequence[str] | None
    detach: bool


def run_job(data_dir: DataDir, argv: Sequence[str], place: Place, tmpfs: Sequence[str], tell: Tell) -> int:
    """`dormouse run`: the exit code of the job. With `detach` it returns once the job runs."""
    require_root()
    record = JobRecord(
        name=check_name(place.name) if place.name is not None else made_up_name(argv[0]),
        argv=list(argv),
        network=place.network or "own",
        streams=[],
        tmpfs=sorted({*DEFAULT_FOLDERS, *map(_folder, tmpfs)}),
        publish=[parse_publish(text) for text in place.publish or ()],
    )
    cwd = Path.cwd()
    return _keep(data_dir, _checked(record), place.detach, tell, lambda keeper: keeper.run(cwd))


def restore_job(
    data_dir: DataDir, snapshot: str, place: Place, replicas: int, tell: Tell, *, timeout: float, hook_timeout: float
) -> int:
    """`dormouse restore`: the exit code of the job. With `detach` it returns once the replicas run."""
    require_root()
    find_criu(data_dir.root)
    with Store.open(data_dir.create().store) as store:
        stored = StoredJob.read(catalogue.resolve(store, snapshot), store)
    record = stored.record
    name = check_name(place.name) if place.name is not None else free_name(data_dir, record.name)
    network = place.network or record.network
    kept = record.publish if network == "own" else []
    publish = kept if place.publish is None else [parse_publish(text) for text in place.publish]
    record = msgspec.structs.replace(record, name=name, network=network, publish=publish)
    _refuse_taken_addresses(record, replicas)
    return _keep(
        data_dir,
        _checked(record),
        place.detach,
        tell,
        lambda keeper: keeper.restore(stored, replicas, timeout, hook_timeout),
    )


def checkpoint(data_dir: DataDir, target: str, request: Request) -> dict[str, Any]:
    """`dormouse checkpoint`: captures a job by name, or any tree by the pid of its first process."""
    require_root()
    if not target.isdigit():
        return ask(data_dir, target, request, timeout=None)
    criu = find_criu(data_dir.root)
    tree = find_tree(int(target), None)
    options = CaptureOptions(
        leave_running=request.leave_running,
        close_connections=request.close_connections,
        hook_timeout=request.hook_timeout,
        timeout=request.timeout,
    )
    digests = DigestCache(data_dir.root / CACHE_NAME)
    with Store.open(data_dir.create().store) as store, Guard(tree.pid, stopped_processes(tree.home)):
        result = capture_replica(tree, store, criu, digests, options)
    return {
        "id": result.snapshot_id,
        "name": tree.record.name,
        "raw_bytes": result.raw_bytes,
        "stored_bytes": result.stored_bytes,
        "left_running": request.leave_running,
    }


def stop_job(data_dir: DataDir, name: str, grace: float) -> None:
    """`dormouse stop`: asks the job to end, and after `grace` seconds ends it. Raises NotFoundError."""
    ask(data_dir, name, Request("stop"))
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline:
        try:
            ask(data_dir, name, Request("status"))
        except NotFoundError:
            return
        time.sleep(_POLL)
    ask(data_dir, name, Request("kill"))


def _keep(data_dir: DataDir, record: JobRecord, detach: bool, tell: Tell, begin: Callable[[Keeper], None]) -> int:
    log_path = data_dir.create().logs / f"{record.name}.log" if detach else None

    def work(report: Callable[[dict[str, Any]], None]) -> int:
        with Keeper(data_dir, record, log_path=log_path, tell=_log if detach else tell) as keeper:
            begin(keeper)
            report({"name": record.name, "pids": keeper.pids, "published": keeper.addresses})
            return keeper.wait()

    def report(state: dict[str, Any]) -> None:
        where = f", published at {', '.join(state['published'])}" if state["published"] else ""
        pids = ", ".join(map(str, state["pids"]))
        tell(f"job {state['name']} runs (pid {pids}{where})")

    if log_path is None:
        return work(report)
    report(in_background(log_path, work))
    tell(f"its output goes to {log_path}; `dormouse stop {record.name}` ends it")
    return 0


def _log(text: str) -> None:
    print(text, flush=True)


def _checked(record: JobRecord) -> JobRecord:
    if record.publish and record.network == "host":
        raise ConfigError(
            "a job on the host's network has its ports there already; --publish is for a network of its own",
            remedy="Leave out --publish, or --net host",
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
    return str(path)
