"""The operations that bench/snapshot_cpu.py measures, each in a process of its own: `NAME ARGUMENTS` (JSON).

Captures make a cell, start the subject in it and wait until it is ready; then the page cache is dropped, and the clock
starts. Restores make an empty cell first, as the product keeps one ready; the clock stops when the subject answers.
CRIU always runs inside the cell, whoever calls it, so that all ways restore the same tree into the same place.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lz4.frame
import zstandard

from dormouse.checkpoint.smollm2 import fetched
from dormouse.config import ModelConfig, ServeConfig
from dormouse.data_dir import DataDir
from dormouse.engine.messages import ChatPrompt, Delta, Sampling
from dormouse.errors import DormouseError
from dormouse.node.assemble import assemble_node
from dormouse.node.node import Node
from dormouse.node.replica import Start
from dormouse.phases import Phases
from dormouse.schedule.cluster import StartPath
from dormouse.snapshot.capture import SNAPSHOT_KIND, CaptureResult, capture
from dormouse.snapshot.cell import Cell, worker_pid_floor
from dormouse.snapshot.criu_setup import Criu, find_criu
from dormouse.snapshot.mapped_files import CACHE_NAME, DigestCache
from dormouse.snapshot.restore import restore
from dormouse.snapshot.service_main import worker_environment
from dormouse.snapshot.tree import External, ProcessTree
from dormouse.snapshot.work_folder import criu_folders
from dormouse.store.store import Store
from dormouse.transfer.memory import keep_freed_memory
from measuring import Operation, allocated_bytes, drop_page_cache, sync_files, timed
from snapshot_subjects import CONTROL_FD

_READY_TIMEOUT = 600.0
_CRIU_TIMEOUT = 600.0
_INHERITED_FD = 100
_COPY = 1 << 20
_SUBJECTS = Path(__file__).with_name("snapshot_subjects.py")
_PROMPT = "What does a dormouse do in winter?"
_TOKENS = 16


class Control:
    """Our end of a subject's control socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(_READY_TIMEOUT)
        self._file = sock.makefile("rwb", buffering=0)
        self._lines = sock.makefile("r")

    def ask(self, command: str) -> str:
        """The subject's answer."""
        self._file.write(f"{command}\n".encode())
        return self.read()

    def read(self) -> str:
        """The next line."""
        line = self._lines.readline()
        if not line:
            raise EOFError("the subject has ended")
        answer: str = json.loads(line)
        return answer


def start_subject(words: list[str], exits: ExitStack) -> tuple[ProcessTree, Control]:
    """A ready subject in a cell of its own, and what ties it to the outside."""
    cell = Cell.create()
    exits.callback(cell.close)
    spawned = cell.spawn(
        [sys.executable, str(_SUBJECTS), *words],
        # Threads that wait for each other actively take the CPU from those they wait for, see docs/benchmarks.md.
        env=worker_environment(os.environ, 0) | {"OMP_WAIT_POLICY": "PASSIVE"},
        fds={2: sys.stderr.fileno()},
        control=CONTROL_FD,
        pid_floor=worker_pid_floor(),
    )
    assert spawned.control is not None and spawned.inode is not None
    control = Control(spawned.control)
    if control.read() != "ready":
        raise ValueError("the subject is not ready")
    return ProcessTree(cell, spawned.pid, (External("socket", spawned.inode),)), control


def answers(control: Control) -> dict[str, str]:
    """What the subject must answer after a restore, too."""
    return {"prove": control.ask("prove"), "sum": control.ask("sum")}


def check(control: Control, expected: Mapping[str, str]) -> None:
    """Time the proof and compare it. Raises ValueError."""
    begin = time.perf_counter()
    proof = control.ask("prove")
    seconds = time.perf_counter() - begin
    if {"prove": proof, "sum": control.ask("sum")} != expected:
        raise ValueError(f"the restored process answers {proof!r} instead of {expected['prove']!r}")
    Operation.add("restore", proof_seconds=seconds)


def run_criu(cell: Cell, criu: Criu, words: list[str], log: Path, control: int | None = None) -> socket.socket | None:
    """Run criu in a cell until it ends well."""
    process = cell.spawn([*criu.argv_prefix, *words], env={"PATH": os.defpath}, control=control)
    code = cell.wait(process.pid, _CRIU_TIMEOUT)
    if code != 0:
        text = log.read_text(errors="replace") if log.exists() else ""
        raise ValueError(f"criu {words[0]} ended with {code}: {text[-1000:]}")
    return process.control


def plain_capture(*, home: str, words: list[str], images: str, options: list[str]) -> None:
    """`criu dump` to files, then (timed apart) making them durable."""
    criu, folder = find_criu(Path(home)), Path(images)
    with ExitStack() as exits:
        tree, control = start_subject(words, exits)
        expected = answers(control)
        inode = tree.externals[0].inode
        command = [
            *("dump", "--tree", str(tree.pid), "--images-dir", images, "--log-file", "dump.log", "-v2"),
            *("--leave-stopped", "--manage-cgroups=ignore", "--ext-unix-sk", "--external", f"unix[{inode}]", *options),
        ]
        drop_page_cache()
        with Operation.measured("capture", [folder], only="criu"):
            assert isinstance(tree.home, Cell)
            run_criu(tree.home, criu, command, folder / "dump.log")
        Operation.add("capture", sync_seconds=timed(lambda: sync_files(folder)), stored_bytes=allocated_bytes([folder]))
        Operation.add("capture", snapshot={"inode": inode, "expected": expected})


def _plain_restore(cell: Cell, criu: Criu, images: Path, inode: int) -> Control:
    command = [
        *("restore", "--images-dir", str(images), "--log-file", "restore.log", "-v2", "--restore-detached"),
        *("--manage-cgroups=ignore", "--inherit-fd", f"fd[{_INHERITED_FD}]:socket:[{inode}]"),
    ]
    sock = run_criu(cell, criu, command, images / "restore.log", control=_INHERITED_FD)
    assert sock is not None
    return Control(sock)


def plain_restore(*, home: str, images: str, snapshot: dict[str, Any]) -> None:
    """`criu restore` from files that are not in memory."""
    criu, folder = find_criu(Path(home)), Path(images)
    with ExitStack() as exits:
        cell = Cell.create()
        exits.callback(cell.close)
        drop_page_cache()
        with Operation.measured("restore", [folder], only="criu"):
            control = _plain_restore(cell, criu, folder, snapshot["inode"])
            control.ask("ping")
        check(control, snapshot["expected"])


def compress(*, images: str, target: str, codec: str) -> None:
    """Compress the files of a dump, one after another, then (timed apart) make them durable."""
    source, folder = Path(images), Path(target)
    drop_page_cache_but_images(source)
    with Operation.measured("capture", [source, folder]):
        for path in sorted(source.glob("*.img")):
            with path.open("rb", buffering=0) as plain, (folder / path.name).open("wb") as packed:
                if codec == "lz4":
                    with lz4.frame.open(packed, "wb") as frame:
                        while block := plain.read(_COPY):
                            frame.write(block)
                else:
                    compressor = zstandard.ZstdCompressor(level=3, threads=2)
                    compressor.copy_stream(plain, packed, read_size=_COPY, write_size=_COPY)
    Operation.add("capture", sync_seconds=timed(lambda: sync_files(folder)), stored_bytes=allocated_bytes([folder]))


def drop_page_cache_but_images(folder: Path) -> None:
    """As it is right after a dump: the images in memory as far as there is room (and written back), nothing else."""
    drop_page_cache()
    for path in folder.glob("*.img"):
        with path.open("rb", buffering=0) as file:
            while file.read(_COPY):
                pass


def decompressed_restore(*, home: str, images: str, target: str, codec: str, snapshot: dict[str, Any]) -> None:
    """Decompress the files of a dump, then `criu restore`."""
    criu, packed, folder = find_criu(Path(home)), Path(images), Path(target)
    with ExitStack() as exits:
        cell = Cell.create()
        exits.callback(cell.close)
        drop_page_cache()
        with Operation.measured("restore", [packed, folder]) as facts:
            begin = time.perf_counter()
            for path in sorted(packed.glob("*.img")):
                _decompress(path, folder / path.name, codec)
            facts["decompress_seconds"] = time.perf_counter() - begin
            control = _plain_restore(cell, criu, folder, snapshot["inode"])
            control.ask("ping")
        check(control, snapshot["expected"])


def _decompress(path: Path, target: Path, codec: str) -> None:
    with path.open("rb", buffering=0) as source, target.open("wb", buffering=0) as plain:
        if codec == "lz4":
            with lz4.frame.open(source, "rb") as frame:
                while block := frame.read(_COPY):
                    plain.write(block)
        else:
            zstandard.ZstdDecompressor().copy_stream(source, plain, read_size=_COPY, write_size=_COPY)


def our_capture(*, home: str, words: list[str], store: str) -> None:
    """`dormouse.snapshot.capture`; what it returns is durable."""
    keep_freed_memory()
    criu, folder = find_criu(Path(home)), Path(store)
    with ExitStack() as exits:
        tree, control = start_subject(words, exits)
        expected = answers(control)
        opened = exits.enter_context(Store.open(folder))
        drop_page_cache()
        with Operation.measured("capture", [folder]):
            result = capture(
                *(tree, opened, criu),
                kind="process",
                name="subject",
                key={},
                now=time.time,
                still_wanted=lambda: True,
                timeout=_CRIU_TIMEOUT,
                digests=DigestCache(Path(home) / CACHE_NAME),
                folders=criu_folders(Path(home) / "run"),
            )
        Operation.add("capture", sync_seconds=0.0, phases=result.phases.seconds(), raw_bytes=result.raw_bytes)
        Operation.add("capture", stored_bytes=allocated_bytes([folder]))
        Operation.add("capture", snapshot={"id": result.snapshot_id, "expected": expected})


def our_restore(*, home: str, store: str, snapshot: dict[str, Any], fill: bool) -> None:
    """`dormouse.snapshot.restore`; with `fill` false all pages go through CRIU's pipe."""
    keep_freed_memory()
    criu, folder = find_criu(Path(home)), Path(store)
    with ExitStack() as exits:
        cell = Cell.create()
        exits.callback(cell.close)
        opened = exits.enter_context(Store.open(folder))
        drop_page_cache()
        with Operation.measured("restore", [folder]):
            made = restore(
                *(snapshot["id"], opened, criu),
                key={},
                take_home=lambda: cell,
                timeout=_CRIU_TIMEOUT,
                digests=DigestCache(Path(home) / CACHE_NAME),
                folders=criu_folders(Path(home) / "run"),
                inherit=(None,),
                fill=fill,
            )
            assert made.control is not None
            control = Control(made.control)
            control.ask("ping")
        Operation.add("restore", phases=made.phases.seconds())
        check(control, snapshot["expected"])


def plain_model(*, home: str, model: str, target: str) -> None:
    """The demo model as a folder that transformers loads by itself, made from the file that `dormouse import` reads."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder, imported = Path(target), DataDir(Path(home)).models / model
    with fetched(folder.parent, lambda _step, _done, _all: None) as gguf:
        made = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    folder.mkdir()
    weights = {name: value.contiguous() for name, value in made.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})  # lm_head is tied to the embeddings
    for path in imported.iterdir():
        if path.name.startswith(("config", "tokenizer", "generation", "chat_template")):
            shutil.copyfile(path, folder / path.name)


class Watch:
    """The node's observer: the latest start and capture; an error is one."""

    def __init__(self) -> None:
        self.start: Start | None = None
        self.phases = Phases()
        self.capture: CaptureResult | None = None

    def started(self, model: str, start: Start, phases: Phases) -> None:
        self.start, self.phases = start, phases.copy()

    def captured(self, model: str, result: CaptureResult, phases: Phases) -> None:
        self.capture, self.phases = result, phases.copy()

    def start_failed(self, model: str, error: DormouseError) -> None:
        raise error

    def fell_back(self, model: str, path: StartPath, error: DormouseError) -> None:
        raise error

    def retried(self, model: str, error: DormouseError) -> None:
        raise error

    def quarantined(self, model: str, error: DormouseError) -> None:
        raise error

    def capture_failed(self, model: str, error: DormouseError) -> None:
        raise error


def cooperative(*, home: str, model: str) -> None:
    """A worker of ours, as the node starts it, puts it to sleep and wakes it; `home` is a data folder of its own."""
    with Store.open(DataDir(Path(home)).store) as store:
        for row in store.manifests(kind=SNAPSHOT_KIND, name=model):
            store.remove(row.id)
    asyncio.run(_cooperative(Path(home), model))


async def _cooperative(home: Path, model: str) -> None:
    config = ServeConfig(data_dir=home, models={model: ModelConfig(keep_alive=float("inf"))}, templates=False)
    store = DataDir(home).store
    before = allocated_bytes([store])
    watch = Watch()
    async with await assemble_node(config) as node:
        node.observe(watch)
        async with node.replica(model):
            expected = await _answer(node, model)
        await asyncio.to_thread(drop_page_cache)
        with Operation.measured("capture", [store]):
            await node.sleep(model)
        assert watch.capture is not None
        Operation.add("capture", sync_seconds=0.0, phases=watch.phases.seconds(), raw_bytes=watch.capture.raw_bytes)
        Operation.add("capture", stored_bytes=allocated_bytes([store]) - before)
        await asyncio.to_thread(drop_page_cache)
        with Operation.measured("restore", [store]):
            await node.wake(model)
        begin = time.perf_counter()
        text = await _answer(node, model)
        Operation.add("restore", phases=watch.phases.seconds(), proof_seconds=time.perf_counter() - begin)
        if watch.start is None or watch.start.path != "snapshot" or text != expected:
            raise ValueError(f"the worker woke by {watch.start} and answers {text!r} instead of {expected!r}")


async def _answer(node: Node, model: str) -> str:
    messages = ChatPrompt(messages=[{"role": "user", "content": _PROMPT}])
    async with node.replica(model) as lease:
        events = [e async for e in lease.generate(messages, Sampling(max_tokens=_TOKENS, temperature=0.0))]
    return "".join(event.text for event in events if isinstance(event, Delta))


OPERATIONS: dict[str, Callable[..., None]] = {
    operation.__name__: operation
    for operation in (
        *(plain_capture, plain_restore, compress, decompressed_restore),
        *(our_capture, our_restore, plain_model, cooperative),
    )
}

if __name__ == "__main__":
    OPERATIONS[sys.argv[1]](**json.loads(sys.argv[2]))
