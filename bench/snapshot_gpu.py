"""GPU snapshots against what others do, in one run: one table, one JSON file.

    python bench/snapshot_gpu.py [--size 8b] [--device cuda:0] [--rows cold,dram,…] [--vllm-site DIR] [--json FILE]

A Llama of random bfloat16 weights is made and imported; its engine takes 80 % of the GPU. The rows, in their order:

    cold           dormouse serve: the engine process starts from nothing, and is captured for the first time
    disk-cold      ours, cooperative: restored, page cache dropped, no weights in memory
    dram           the same, weights in the DRAM tier
    sleep          the process has stayed, its GPU memory was given back
    replica        a second replica on the same GPU
    disk-warm, again   restored with the page cache as it is; captured again after that
    transparent    dormouse run, checkpoint, restore of a program that knows nothing of Dormouse (gpu_subjects.py: a
                   Llama in plain torch, with CUDA graphs; less memory is reserved, as all ways must hold it in memory)
    raw            the same program by plain CRIU and the driver's checkpoint calls, files on the disk
    raw-lz4        that, and the files compressed afterwards with LZ4 by all cores; decompressed before the restore
    block          random bfloat16 in plain torch: the driver's own checkpoint and restore in place, then ours
    vllm           real vLLM in one process (`--vllm-site`: the folder to put on PYTHONPATH), ours transparent
    second         the snapshot of another model of the same engine

Seconds of a restore end at the first token of an answer, which must be what it was before the capture. The command
line's own time counts. `peak` is the most host memory taken beyond what was before, page cache left out. Rows are
independent: one that fails says why, and after `--row-seconds` it has failed. Figures are written after every row; rows
of an earlier run in the same file stay, marked with its date, its limits and the file system of its store, unless they
run again.
Needs root and CRIU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dormouse.catalogue import human
from dormouse.config import ModelConfig, ServeConfig
from dormouse.data_dir import DataDir, default_data_dir
from dormouse.errors import DormouseError
from dormouse.phases import Phase, Phases
from dormouse.snapshot.criu_setup import Criu, find_criu
from dormouse.store.store import Store
from dormouse.trace import gigabytes_per_second
from gpu_machine import Gpu, facts, filesystem, find_gpu, measure_limits, peak_memory
from gpu_model import SIZES, Made, make_model
from gpu_ways import (
    Cuda,
    Deadline,
    Raw,
    Reply,
    RowFailed,
    Served,
    Subject,
    Transparent,
    compress,
    decompress,
    folder_bytes,
    resident_bytes,
    run,
    steps_of,
)
from measuring import drop_page_cache

MODEL, TWIN, SECOND = "bench", "bench-twin", "bench-second"
_PROMPT = (11, 7, 5, 3)
_TOKENS = 16
_WIDTH = 170
_IDLE = 1.0  # seconds between falling asleep and the next request: giving 16 GB back takes 0.2 of them
_SHORTEST = 0.05  # seconds: shorter steps have no rate worth showing
_VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}
_LIMIT_OF_TRACK = {"cuda": "link", "weights": "link", "disk": "disk write"}

Row = dict[str, Any]
Steps = list[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """The command line."""

    device: str
    size: str
    second: str
    rows: tuple[str, ...]
    budget_seconds: float
    row_seconds: float
    folder: Path
    json: Path | None
    vllm_site: Path | None
    vllm_memory: float
    kv_share: float
    kv_gigabytes: float
    block_gigabytes: float
    tier_gigabytes: float
    limit_gigabytes: float

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to measure."""
        return self.device.startswith("cuda")


@dataclass
class Bench:
    """What the rows share. One server runs at a time, `serving` says with which configuration."""

    options: Options
    criu: Criu
    scratch: Path
    gpu: Gpu | None
    say: Callable[[str], None]
    made: Made | None = None
    rows: dict[str, Row] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    server: Served | None = None
    serving: str = ""
    idle_gpu_bytes: int = 0

    @property
    def home(self) -> DataDir:
        """The data folder of everything here."""
        return DataDir(self.scratch / "home")

    # Preparations

    def prepare(self) -> dict[str, Any]:
        """Make and import the model; how long that took."""
        took = Phases()
        with took.time("make"):
            self.made = make_model(self.scratch / "model", self.options.size, os.cpu_count() or 1)
        with took.time("import", bytes=self.made.plain_bytes):
            imported = self._import(self.made.folder, MODEL)
        if not (self.home.models / TWIN).exists():
            (self.home.models / TWIN).symlink_to(self.home.models / MODEL)  # the same weights under another name
        return {
            "size": self.options.size,
            "plain_bytes": imported["weight_bytes"],
            "stored_bytes": self.weights_stored(MODEL),
            "layers": self.made.layers,
            "kv_bytes_per_token": self.made.kv_bytes_per_token,
            "steps": steps_of(took),
        }

    def _import(self, folder: Path, name: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "dormouse.cli", "import", str(folder), "--name", name, "--json"]
        return dict(json.loads(run(command, Deadline.after(300), self._env())))

    def import_second(self) -> None:
        """Another model of the same engine, smaller, for its snapshot."""
        if not (self.home.models / SECOND).exists():
            folder = self.scratch / "second"
            make_model(folder, self.options.second, os.cpu_count() or 1)
            self._import(folder, SECOND)
            shutil.rmtree(folder)

    def weights_stored(self, name: str) -> int:
        """What a model's weights take in the store."""
        with Store.open(self.home.store) as store:
            return max(row.stored_bytes for row in store.manifests(name=name) if row.kind == "checkpoint")

    def _env(self) -> dict[str, str]:
        return {**os.environ, "DORMOUSE_HOME": str(self.home.root)}

    # Servers

    def serve(self, name: str, deadline: Deadline) -> Served:
        """The server of a configuration: the one that runs, or a new one in its place."""
        if self.server is not None and self.serving == name and self.server.runs:
            return self.server
        self.stop_server()
        self.server = Served(self.home.root, self._config(name), self.scratch / f"serve-{name}.log")
        self.serving = name
        self.server.start(deadline)
        return self.server

    def stop_server(self) -> None:
        """End the one that runs."""
        if self.server is not None:
            self.server.close()
            self.server = None

    def _config(self, name: str) -> dict[str, Any]:
        """`disk`: nothing stays in memory. `tier`: weights in DRAM, processes may stay. `pair`: two models side by
        side. Settings that this version does not know are left out."""
        tier = 0 if name == "disk" else int(self.options.tier_gigabytes * 1e9)
        top = {
            "templates": False,
            "dram_tier": tier,
            "kept_weights": 0 if name == "disk" or self.options.on_gpu else "50%",
            "sleep_memory": 0 if name == "disk" else "50%",
        }
        models = (TWIN, MODEL, SECOND) if name == "pair" else (MODEL,)
        model = {
            "device": self.options.device,
            "keep_alive": "forever",
            "kv_tokens": 4096 if name == "pair" or not self.options.on_gpu else self._kv_tokens(),
        }
        known = {key: value for key, value in top.items() if key in ServeConfig.model_fields}
        settings = {key: value for key, value in model.items() if key in ModelConfig.model_fields}
        there = [each for each in models if (self.home.models / each).exists()]
        return known | {"models": {each: settings.copy() for each in there}}

    def _kv_tokens(self) -> int:
        """So many that weights and cache take the wanted share of the GPU."""
        assert self.gpu is not None and self.made is not None
        room = self.gpu.total_bytes() * self.options.kv_share - self.made.plain_bytes
        return max(4096, int(room) // self.made.kv_bytes_per_token // 256 * 256)

    def ask(self, server: Served, deadline: Deadline, *, model: str = MODEL, path: str | None = None) -> Reply:
        """A request. Raises RowFailed when the start took another path than `path`, or the text is not what it was."""
        reply = server.ask(model, _PROMPT, _TOKENS, deadline)
        if path is not None and reply.path != path:
            raise RowFailed(f"{model} started by {reply.path!r}, not {path!r}: {server.last_words()}")
        if reply.text != self.texts.setdefault(model, reply.text):
            raise RowFailed(f"another text than before: {reply.text!r}, not {self.texts[model]!r}")
        return reply

    def need_snapshot(self, deadline: Deadline, *, model: str = MODEL, serving: str = "disk") -> Served:
        """A server with a model that is asleep and has a snapshot, as row `cold` leaves it."""
        server = self.serve(serving, deadline)
        if not any(row["model"] == model for row in server.do("ls", deadline=deadline)["snapshots"]):
            self.ask(server, deadline, model=model)
            server.do("snapshot", model, deadline=deadline)
        server.do("sleep", model, deadline=deadline)
        return server

    def restored(self, server: Served, deadline: Deadline, path: str, *, model: str = MODEL) -> Row:
        """The figures of one start by a path."""
        with peak_memory() as peak:
            reply = self.ask(server, deadline, model=model, path=path)
        start = server.last(model, "start", deadline)
        return {
            "restore_s": reply.first_token,
            "ready_s": reply.start_seconds,
            "start": reply.path,
            "restore_peak_bytes": peak.bytes,
            "restore_steps": start["phases"],
            "identical": True,
        }

    def captured(self, server: Served, deadline: Deadline, *, model: str = MODEL) -> Row:
        """The figures of a capture; the model is asleep then."""
        begin = time.monotonic()
        with peak_memory() as peak:
            server.do("snapshot", model, deadline=deadline)
        seconds = time.monotonic() - begin
        steps = server.last(model, "capture", deadline)
        found = next(row for row in server.do("ls", deadline=deadline)["snapshots"] if row["id"] == steps["how"])
        return {
            "capture_s": seconds,
            "capture_peak_bytes": peak.bytes,
            "capture_steps": steps["phases"],
            "raw_bytes": found["raw_bytes"],
            "stored_bytes": found["stored_bytes"],
            "own_bytes": found["own_bytes"],
            "added_bytes": next(step["stored"] for step in steps["phases"] if step["name"].endswith("dump")),
        }

    def gpu_bytes(self) -> int | None:
        """What is taken of the GPU beyond what was at the beginning."""
        return self.gpu.used_bytes() - self.idle_gpu_bytes if self.gpu is not None else None

    def subject(self, kind: str, name: str, **options: Any) -> Subject:
        """A program in a folder of its own."""
        folder = self.scratch / f"{name}-{time.monotonic_ns()}"
        return Subject(kind, folder, {"device": self.options.device, **options})

    def llama(self, name: str) -> Subject:
        """The plain Llama."""
        assert self.made is not None
        kv_bytes = int(self.options.kv_gigabytes * 1e9)
        return self.subject("llama", name, model=str(self.made.folder), kv_bytes=kv_bytes)

    def cuda(self) -> Cuda | None:
        """The driver's calls, where there is a GPU."""
        return Cuda() if self.options.on_gpu else None

    def need_disk(self, size: float) -> None:
        """Raises RowFailed when so many bytes have no room."""
        free = shutil.disk_usage(self.scratch).free
        if free < size:
            raise RowFailed(f"{human(size)} of disk are needed, {human(free)} are free")


# Rows, served


def row_cold(bench: Bench, deadline: Deadline) -> Row:
    """Nothing runs, nothing is cached: the start that everything is compared with, and the first capture."""
    server = bench.serve("disk", deadline)
    drop_page_cache()
    row: Row = {}
    with peak_memory() as peak:
        reply = bench.ask(server, deadline, path="cold")
    row |= {"cold_s": reply.first_token, "ready_s": reply.start_seconds, "start": reply.path}
    row |= {"restore_peak_bytes": peak.bytes, "restore_steps": server.last(MODEL, "start", deadline)["phases"]}
    status = next(model for model in server.do("ls", deadline=deadline)["models"] if model["name"] == MODEL)
    row |= {"gpu_bytes": bench.gpu_bytes(), "host_bytes": status["rss_bytes"], "identical": True}
    return row | bench.captured(server, deadline)


def row_disk_cold(bench: Bench, deadline: Deadline) -> Row:
    """Everything comes from the disk."""
    server = bench.need_snapshot(deadline)
    drop_page_cache()
    return bench.restored(server, deadline, "snapshot")


def row_disk_warm(bench: Bench, deadline: Deadline) -> Row:
    """The page cache is as the last start has left it."""
    server = bench.need_snapshot(deadline)
    bench.ask(server, deadline)
    server.do("sleep", MODEL, deadline=deadline)
    return bench.restored(server, deadline, "snapshot")


def row_again(bench: Bench, deadline: Deadline) -> Row:
    """A restored worker that has answered is captured again."""
    server = bench.need_snapshot(deadline)
    bench.ask(server, deadline, path="snapshot")
    return bench.captured(server, deadline)


def row_dram(bench: Bench, deadline: Deadline) -> Row:
    """The first restore has the weights brought into the tier, which takes some seconds after it; the better of two."""
    server = bench.need_snapshot(deadline, serving="tier")
    bench.ask(server, deadline, path="snapshot")
    if bench.options.on_gpu and not server.has_said("bytes are held in the DRAM tier", 30):
        raise RowFailed("the weights did not come into the tier")
    runs = []
    for _ in range(2):
        server.do("sleep", MODEL, deadline=deadline)
        time.sleep(_IDLE)
        runs.append(bench.restored(server, deadline, "snapshot"))
    return min(runs, key=lambda run: run["restore_s"]) | {"all_restore_s": [run["restore_s"] for run in runs]}


def row_sleep(bench: Bench, deadline: Deadline) -> Row:
    """The process has stayed; the better of two."""
    server = bench.need_snapshot(deadline, serving="tier")
    bench.ask(server, deadline)
    runs = []
    for _ in range(2):
        server.do("sleep", MODEL, "--keep", deadline=deadline)
        time.sleep(_IDLE)
        asleep = {"asleep_gpu_bytes": bench.gpu_bytes()}
        runs.append(bench.restored(server, deadline, "sleep") | asleep)
    return min(runs, key=lambda run: run["restore_s"]) | {"all_restore_s": [run["restore_s"] for run in runs]}


def row_replica(bench: Bench, deadline: Deadline) -> Row:
    """The same weights under another name beside the first, which is awake."""
    for model in (MODEL, TWIN):
        server = bench.need_snapshot(deadline, model=model, serving="pair")
    bench.ask(server, deadline)
    before = bench.gpu_bytes()
    row = bench.restored(server, deadline, "snapshot", model=TWIN)
    if bench.texts[TWIN] != bench.texts[MODEL]:
        raise RowFailed("the two replicas answer differently")
    after = bench.gpu_bytes()
    return row | {"added_gpu_bytes": after - before if after is not None and before is not None else None}


def row_second(bench: Bench, deadline: Deadline) -> Row:
    """Another model whose worker shares all that the engine has in common."""
    bench.need_snapshot(deadline, serving="pair")
    if not (bench.home.models / SECOND).exists():
        bench.stop_server()
        bench.import_second()
    server = bench.serve("pair", deadline)
    bench.ask(server, deadline, model=SECOND, path="cold")
    row = bench.captured(server, deadline, model=SECOND)
    return row | bench.restored(server, deadline, "snapshot", model=SECOND)


# Rows, programs


def row_transparent(bench: Bench, deadline: Deadline) -> Row:
    """Ours, of a program that knows nothing of it."""
    bench.stop_server()
    job = Transparent(bench.llama("transparent"), bench.home.root, "bench-llama")
    cache = bench.options.kv_gigabytes * 1e9
    return _transparent(bench, job, deadline, empty=cache) | {"cache_bytes": cache}


def _transparent(bench: Bench, job: Transparent, deadline: Deadline, *, empty: float = 0) -> Row:
    """`empty` bytes of its memory are zero, and need no room."""
    subject = job.subject
    with contextlib.closing(job):
        drop_page_cache()
        subject.ask()
        begin = time.monotonic()
        job.start(deadline)
        row: Row = {"cold_s": subject.first_token(deadline, job.alive) - begin}
        text = subject.answer(deadline, job.alive)
        row |= {"gpu_bytes": bench.gpu_bytes(), "host_bytes": resident_bytes(job.pid)}
        bench.need_disk(1.2 * ((row["gpu_bytes"] or 0) + row["host_bytes"] - empty))
        begin = time.monotonic()
        with peak_memory() as peak:
            captured = job.capture(deadline)
        row |= {"capture_s": time.monotonic() - begin, "capture_peak_bytes": peak.bytes}
        row |= {"capture_steps": captured["phases"]}
        row |= {"raw_bytes": captured["raw_bytes"], "stored_bytes": captured["stored_bytes"]}
        try:
            drop_page_cache()
            subject.ask()
            begin = time.monotonic()
            with peak_memory() as peak:
                restored = job.restore(captured["id"], deadline)
                row |= {"restore_s": subject.first_token(deadline, job.alive) - begin}
            row |= {"restore_peak_bytes": peak.bytes, "restore_steps": restored["phases"]}
            return row | {"identical": _same(text, subject.answer(deadline, job.alive))}
        finally:
            job.remove(captured["id"])


def _same(before: str, after: str) -> bool:
    if before != after:
        raise RowFailed(f"another answer than before: {after!r}, not {before!r}")
    return True


def row_raw(bench: Bench, deadline: Deadline) -> Row:
    """Plain CRIU. Its images stay for `raw-lz4`, which runs along with it."""
    return _raw_rows(bench, deadline)["raw"]


def row_raw_lz4(bench: Bench, deadline: Deadline) -> Row:
    """See `_raw_rows`."""
    return _raw_rows(bench, deadline)["raw-lz4"]


def _raw_rows(bench: Bench, deadline: Deadline) -> dict[str, Row]:
    """Both rows of the baseline, of one dump; made once."""
    if "raw" in bench.rows and "_lz4" in bench.rows["raw"]:
        return {"raw": bench.rows["raw"], "raw-lz4": bench.rows["raw"].pop("_lz4")}
    bench.stop_server()
    subject = bench.llama("raw")
    raw = Raw(subject, bench.criu.argv_prefix, bench.scratch / "images", bench.cuda())
    with contextlib.closing(raw):
        drop_page_cache()
        subject.ask()
        begin = time.monotonic()
        raw.start()
        row: Row = {"cold_s": subject.first_token(deadline, raw.alive) - begin}
        row |= {"cache_bytes": bench.options.kv_gigabytes * 1e9}
        text = subject.answer(deadline, raw.alive)
        row |= {"gpu_bytes": bench.gpu_bytes(), "host_bytes": resident_bytes(raw.pid)}
        bench.need_disk(1.1 * ((row["gpu_bytes"] or 0) + row["host_bytes"]))
        begin = time.monotonic()
        with peak_memory() as peak:
            steps = raw.capture(deadline)
        size = folder_bytes(raw.images)
        row |= {"capture_s": time.monotonic() - begin, "capture_peak_bytes": peak.bytes}
        row |= {"capture_steps": steps_of(steps), "raw_bytes": size, "stored_bytes": size}
        row |= _raw_restore(raw, text, deadline, lambda _phases: None)
        if "raw-lz4" in bench.options.rows:
            row["_lz4"] = _compressed(bench, raw, row, text, deadline)
    lz4 = row.get("_lz4", {"error": "not asked for"})
    return {"raw": row, "raw-lz4": lz4}


def _compressed(bench: Bench, raw: Raw, row: Row, text: str, deadline: Deadline) -> Row:
    """What LZ4 adds to both ways. Never an error of the row it follows."""
    threads = os.cpu_count() or 1
    try:
        raw.end()
        packed = Phases()
        compress(raw.images, packed, threads)
        (step,) = packed.steps
        found = {
            "capture_s": row["capture_s"] + step.seconds,
            "capture_steps": row["capture_steps"] + steps_of(packed),
            **{key: row[key] for key in ("raw_bytes", "gpu_bytes", "host_bytes")},
            "stored_bytes": step.stored,
        }
        return found | _raw_restore(raw, text, deadline, lambda phases: decompress(raw.images, phases, threads))
    except (RowFailed, OSError) as error:
        return {"error": str(error)}


def _raw_restore(raw: Raw, text: str, deadline: Deadline, before: Callable[[Phases], None]) -> Row:
    drop_page_cache()
    phases, begin = Phases(), time.monotonic()
    with peak_memory() as peak:
        before(phases)
        raw.restore(deadline, phases)
        raw.subject.ask()  # not before: nothing holds the program back until CUDA is there again
        restored = raw.subject.first_token(deadline, raw.alive) - begin
    row = {"restore_s": restored, "restore_peak_bytes": peak.bytes, "restore_steps": steps_of(phases)}
    return row | {"identical": _same(text, raw.subject.answer(deadline, raw.alive))}


def row_block(bench: Bench, deadline: Deadline) -> Row:
    """Only bytes: the driver's own times first, in place, then ours."""
    bench.stop_server()
    size = int(bench.options.block_gigabytes * 1e9)
    job = Transparent(bench.subject("block", "block", size=size), bench.home.root, "bench-block")
    row: Row = {}
    if (cuda := bench.cuda()) is not None:
        row |= _driver_alone(bench, cuda, size, deadline)
    row |= _transparent(bench, job, deadline)
    return row


def _driver_alone(bench: Bench, cuda: Cuda, size: int, deadline: Deadline) -> Row:
    subject = bench.subject("block", "driver", size=size)
    raw = Raw(subject, bench.criu.argv_prefix, bench.scratch / "none", cuda)
    with contextlib.closing(raw):
        subject.ask()
        raw.start()
        text = subject.answer(deadline, raw.alive)
        stopping, going_on = Phases(), Phases()
        cuda.stop(raw.pid, stopping, deadline)
        cuda.go_on(raw.pid, going_on, deadline)
        subject.ask()
        _same(text, subject.answer(deadline, raw.alive))
    return {
        "driver_checkpoint_s": sum(stopping.seconds().values()),
        "driver_restore_s": sum(going_on.seconds().values()),
        "driver_steps": steps_of(stopping) + steps_of(going_on),
    }


def row_vllm(bench: Bench, deadline: Deadline) -> Row:
    """The real thing, unmodified, in one process."""
    site = bench.options.vllm_site
    if site is None:
        raise RowFailed("no --vllm-site was given")
    bench.stop_server()
    model = bench.scratch / "vllm-model"
    env = {**_VLLM_ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    if not model.exists():
        command = [sys.executable, str(site / "mkmodel.py"), str(model), "--size", bench.options.size]
        run(command, deadline, {**os.environ, **env})
    subject = bench.subject("vllm", "vllm", model=str(model), memory=bench.options.vllm_memory)
    return _transparent(bench, Transparent(subject, bench.home.root, "bench-vllm", env), deadline)


ROWS: dict[str, Callable[[Bench, Deadline], Row]] = {
    "cold": row_cold,
    "disk-cold": row_disk_cold,
    "disk-warm": row_disk_warm,
    "again": row_again,
    "dram": row_dram,
    "sleep": row_sleep,
    "replica": row_replica,
    "transparent": row_transparent,
    "raw": row_raw,
    "raw-lz4": row_raw_lz4,
    "block": row_block,
    "vllm": row_vllm,
    "second": row_second,
}
"""In the order in which they run."""
MODELLESS = {"block", "vllm"}
"""They bring their own."""
SERVED = ("cold", "disk-cold", "disk-warm", "again", "dram", "sleep", "replica", "second")


# The run


def measure(bench: Bench, result: dict[str, Any]) -> None:
    """Every row that is asked for, as long as there is time."""
    end = Deadline.after(bench.options.budget_seconds)
    for name in bench.options.rows:
        left = end.at - time.monotonic()
        if left <= 0:
            bench.rows[name] = {"error": "no time was left"}
            continue
        bench.say(f"{name} ({left:.0f} s left)")
        begin = time.monotonic()
        bench.rows[name] = _row(bench, name, Deadline.after(min(left, bench.options.row_seconds)))
        bench.rows[name]["took_s"] = time.monotonic() - begin
        finish(bench, result)
    bench.stop_server()


def _row(bench: Bench, name: str, deadline: Deadline) -> Row:
    try:
        return ROWS[name](bench, deadline)
    except (RowFailed, DormouseError, OSError, LookupError, ValueError) as error:
        bench.say(f"{name} failed: {error}")
        if name in SERVED:
            bench.stop_server()  # whatever state it is in, the next row shall not find it
        return {"error": f"{error}" or repr(error)}


def finish(bench: Bench, result: dict[str, Any]) -> None:
    """Write what there is so far."""
    rows = {name: {key: value for key, value in row.items() if key[0] != "_"} for name, row in bench.rows.items()}
    for name, row in rows.items():
        row |= {"date": result["machine"]["date"], "store": filesystem(bench.scratch), "limits": result["limits"]}
        for kind in ("capture", "restore"):
            if f"{kind}_steps" in row:
                steps = [_with_gpu_bytes(name, row, fields) for fields in row[f"{kind}_steps"]]
                row[f"{kind}_steps"] = [fields | _rate(name, kind, fields, result["limits"]) for fields in steps]
    result["rows"] = result.get("rows", {}) | rows
    result["figures"] = figures(result)
    if bench.options.json is not None:
        draft = bench.options.json.with_suffix(".draft")
        draft.write_text(json.dumps(result, indent=2) + "\n")
        draft.rename(bench.options.json)


def _with_gpu_bytes(name: str, row: Row, fields: dict[str, Any]) -> dict[str, Any]:
    """The driver moves all GPU memory of a program that knows nothing of it, and does not tell."""
    moves = fields["name"] in ("cuda checkpoint", "cuda restore") and name not in SERVED
    return fields | {"bytes": row.get("gpu_bytes")} if moves and fields["bytes"] is None else fields


def _rate(row: str, kind: str, fields: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, Any]:
    """What a step has moved per second, and how much of what its link could carry that is."""
    step = Phase(**{name: fields[name] for name in Phase.__struct_fields__})
    rate = gigabytes_per_second(step)
    if rate is None or step.seconds < _SHORTEST:
        return {}
    link = _limit_of(row, kind, step.track)
    known = {"limit": link, "of_limit": rate * 1e9 / limits[link]} if link in limits else {}
    return {"gb_per_s": rate} | known


def _limit_of(row: str, kind: str, track: str) -> str:
    """The link that a step's bytes went over."""
    if track == "criu" and row.startswith("raw"):
        return "disk write" if kind == "capture" else "disk read"
    if track == "weights" and row in ("cold", "disk-cold"):
        return "disk read"
    return _LIMIT_OF_TRACK.get(track, "host copy")


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    """What the rows mean side by side; those that can't be said are left out."""
    rows, found = result["rows"], {}

    def say(name: str, figure: Callable[[], float]) -> None:
        with contextlib.suppress(KeyError, TypeError, ZeroDivisionError):
            found[name] = figure()

    def raw_of(row: Row) -> float:
        return float(row["gpu_bytes"] + row["host_bytes"])

    def stored() -> float:
        return float(result["model"]["stored_bytes"])

    say("restore, dram (s)", lambda: rows["dram"]["restore_s"])
    say("restore, sleep (s)", lambda: rows["sleep"]["restore_s"])
    say("restore, disk cold (s)", lambda: rows["disk-cold"]["restore_s"])
    say(
        "1.15 x coded bytes / disk rate + 0.6 (s)",
        lambda: 1.15 * stored() / rows["disk-cold"]["limits"]["disk read"] + 0.6,
    )
    say("cold start / restore from dram", lambda: rows["cold"]["cold_s"] / rows["dram"]["restore_s"])
    say("plain CRIU / ours from dram, restore", lambda: rows["raw"]["restore_s"] / rows["dram"]["restore_s"])
    say("plain CRIU / ours from disk, restore", lambda: rows["raw"]["restore_s"] / rows["disk-cold"]["restore_s"])
    caches = [rows[name].get("cache_bytes") for name in ("raw", "transparent") if name in rows]
    if len(set(caches)) == 1:  # else the two are not the same program
        say("plain CRIU / ours transparent, restore", lambda: rows["raw"]["restore_s"] / rows["transparent"]["restore_s"])  # fmt: skip  # noqa: E501
    say("image beside the weights (GB)", lambda: rows["cold"]["stored_bytes"] / 1e9)
    say("second model's snapshot, its own bytes (GB)", lambda: rows["second"]["own_bytes"] / 1e9)
    say("memory of the process / stored, transparent", lambda: raw_of(rows["transparent"]) / rows["transparent"]["stored_bytes"])  # fmt: skip  # noqa: E501
    say("memory of the process / stored, cooperative", lambda: raw_of(rows["cold"]) / (rows["cold"]["stored_bytes"] + stored()))  # fmt: skip  # noqa: E501
    say("capture, first (s)", lambda: rows["cold"]["capture_s"])
    say("capture, again (s)", lambda: rows["again"]["capture_s"])
    say("block: ours / the driver's own, capture", lambda: rows["block"]["capture_s"] / rows["block"]["driver_checkpoint_s"])  # fmt: skip  # noqa: E501
    say("block: ours / the driver's own, restore", lambda: rows["block"]["restore_s"] / rows["block"]["driver_restore_s"])  # fmt: skip  # noqa: E501
    say("second replica (s)", lambda: rows["replica"]["restore_s"])
    say("second replica, GPU memory added (GB)", lambda: rows["replica"]["added_gpu_bytes"] / 1e9)
    say("vLLM, cold start / transparent restore", lambda: rows["vllm"]["cold_s"] / rows["vllm"]["restore_s"])
    return found


# The tables


def show(result: Mapping[str, Any], console: Console) -> None:
    """Rows, then their steps with rates, then what they mean."""
    console.print(_row_table(result["rows"]))
    console.print(_step_table(result["rows"]))
    table = Table(title="side by side", title_justify="left")
    table.add_column("figure")
    table.add_column("", justify="right")
    for name, value in result["figures"].items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)


def _row_table(rows: Mapping[str, Row]) -> Table:
    table = Table(title="GPU snapshots", title_justify="left")
    for column in ("row", "cold s", "capture s", "stored", "restore s", "peak", "GPU", "host", "same text", ""):
        table.add_column(column, justify="left" if column in ("row", "") else "right")
    for name, row in rows.items():
        peak = max((row[key] for key in ("capture_peak_bytes", "restore_peak_bytes") if key in row), default=None)
        table.add_row(
            name,
            *(_seconds(row.get("cold_s")), _seconds(row.get("capture_s")), _bytes(row.get("stored_bytes"))),
            *(_seconds(row.get("restore_s")), _bytes(peak)),
            *(_bytes(row.get("gpu_bytes")), _bytes(row.get("host_bytes"))),
            "yes" if row.get("identical") else "",
            row.get("error", "")[:160],
        )
    return table


def _step_table(rows: Mapping[str, Row]) -> Table:
    table = Table(title="steps, against the limit of the link that their bytes go over", title_justify="left")
    for column in ("row", "step", "start", "seconds", "bytes", "stored", "GB/s", "limit", "of it"):
        table.add_column(column, justify="left" if column in ("row", "step", "limit") else "right")
    for name, row in rows.items():
        for kind in ("capture", "restore"):
            for fields in row.get(f"{kind}_steps", ()):
                if fields["seconds"] >= _SHORTEST:
                    table.add_row(name, *_step_cells(kind, fields))
    return table


def _step_cells(kind: str, step: Mapping[str, Any]) -> list[str]:
    share = step.get("of_limit")
    return [
        *(f"{kind}: {step['name']}", f"{step['start']:.3f}", f"{step['seconds']:.3f}"),
        *(_bytes(step["bytes"]), _bytes(step["stored"])),
        f"{step['gb_per_s']:.2f}" if "gb_per_s" in step else "",
        *(step.get("limit", ""), "" if share is None else f"{share:.0%}"),
    ]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _bytes(value: float | None) -> str:
    return "" if value is None else human(value)


# The command line


def parse(words: list[str]) -> Options:
    """Raises SystemExit for what makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu to try everything but the GPU's part")
    parser.add_argument("--size", default="8b", choices=sorted(SIZES))
    parser.add_argument("--second", default="1b", choices=sorted(SIZES), help="the other model of row `second`")
    parser.add_argument("--rows", default=",".join(ROWS), help="some of " + ", ".join(ROWS))
    parser.add_argument("--budget-seconds", type=float, default=480.0, help="for all rows together")
    parser.add_argument("--row-seconds", type=float, default=180.0)
    parser.add_argument("--folder", type=Path, default=Path(), help="where, on the disk to be measured")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--vllm-site", type=Path)
    parser.add_argument("--vllm-memory", type=float, default=0.16, help="its share of the GPU")
    parser.add_argument("--kv-share", type=float, default=0.8, help="of the GPU, for weights and cache when served")
    parser.add_argument("--kv-gigabytes", type=float, default=4.0, help="reserved by the program of `raw`")
    parser.add_argument("--block-gigabytes", type=float, default=20.0)
    parser.add_argument("--tier-gigabytes", type=float, default=24.0)
    parser.add_argument("--limit-gigabytes", type=float, default=2.0, help="written and read to find the disk's limits")
    found = vars(parser.parse_args(words))
    wanted = [name for name in found["rows"].split(",") if name]
    if unknown := [name for name in wanted if name not in ROWS]:
        parser.error(f"there is no row {', '.join(unknown)}")
    return Options(**found | {"rows": tuple(name for name in ROWS if name in wanted)})


@contextlib.contextmanager
def scratch_folder(parent: Path, criu: Path) -> Iterator[Path]:
    """One with a data folder that shares CRIU; all of it is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="bench-gpu-", dir=parent)).absolute()
    try:
        home = DataDir(folder / "home").create()
        if criu.exists():
            home.criu.symlink_to(criu.resolve())
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """See the module."""
    options = parse(sys.argv[1:])
    console, errors = Console(width=None if sys.stdout.isatty() else _WIDTH), Console(stderr=True)
    say = lambda text: errors.print(f"[{time.strftime('%H:%M:%S')}] {text}", markup=False, highlight=False)  # noqa: E731
    own = DataDir(default_data_dir(os.environ))
    try:
        criu, gpu = find_criu(own.root), find_gpu(options.device)
    except (DormouseError, OSError) as error:
        sys.exit(f"error: {error}")
    result: dict[str, Any] = {"machine": facts(gpu, criu.version_text)}
    if options.json is not None and options.json.exists():
        earlier = json.loads(options.json.read_text())
        result |= {name: earlier[name] for name in ("rows", "model") if name in earlier}
    with scratch_folder(options.folder, own.criu) as scratch, ExitStack() as exits:
        bench = Bench(options, criu, scratch, gpu, say)
        exits.callback(bench.stop_server)
        say("the machine's limits")
        result["limits"] = measure_limits(scratch, options.device, int(options.limit_gigabytes * (1 << 30)))
        bench.idle_gpu_bytes = 0 if gpu is None else gpu.used_bytes()
        if set(options.rows) - MODELLESS:
            say("the model")
            result["model"] = bench.prepare()
        measure(bench, result)
        finish(bench, result)
    show(result, console)
    if all("error" in row for row in bench.rows.values()):
        sys.exit("every row failed")


if __name__ == "__main__":
    main()
