"""The loader: the process that owns the weights on GPUs and the DRAM tier, apart from the host service because a GPU
that fails takes down the process that uses it, and because torch is large.

    host service (loader.py)  --requests-->  main thread  -->  one pool thread per call  --reply-->  host service

Started as `python -m dormouse.checkpoint.loader_main --fd N --data-dir DIR …`. When the host service's end of the
socket closes, in whatever way it died, this process exits; what workers have mapped stays theirs.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from dormouse.checkpoint import loader_messages as messages
from dormouse.errors import DormouseError, HostError, StoreError
from dormouse.transfer.memory import keep_freed_memory

if TYPE_CHECKING:
    from dormouse.checkpoint.device_blocks import DeviceBlocks

log = logging.getLogger(__name__)

_MAX_CALLS = 16

Answer = tuple[messages.Reply, list[int]]


def answer(request: messages.Request, blocks: DeviceBlocks) -> Answer:
    """Carry out one request: a reply and the descriptors that go with it. Raises DormouseError."""
    call = request.call
    match request:
        case messages.Warm():
            blocks.warm(request.device)
        case messages.Take():
            handle = blocks.take(request.checkpoint, request.user, request.device)
            return messages.Taken(call=call, segment=handle.info), handle.descriptors()
        case messages.Release():
            blocks.release(request.user, request.checkpoint)
        case messages.Hold():
            held = blocks.hold(request.checkpoint)
            return messages.Held(call=call, stored_bytes=held.stored_bytes, read_bytes=held.read_bytes), []
        case messages.Forget():
            blocks.forget(request.checkpoint)
        case messages.Describe():
            budget, taken, held_bytes, refused = blocks.tier_bytes()
            return messages.Statistics(
                call=call,
                gpus=blocks.gpus(),
                tier_budget=budget,
                tier_taken=taken,
                tier_held=held_bytes,
                refused=refused,
            ), []
    return messages.Done(call=call), []


def serve(sock: socket.socket, blocks: DeviceBlocks) -> None:
    """Answer until the host service's end closes."""
    sending = threading.Lock()

    def run(request: messages.Request) -> None:
        descriptors: list[int] = []
        try:
            try:
                reply, descriptors = answer(request, blocks)
            except DormouseError as error:
                reply = messages.refused(request.call, error)
            except Exception as error:
                log.exception("%s failed", type(request).__name__)
                kind = HostError if isinstance(error, OSError) else StoreError
                reply = messages.refused(request.call, kind(f"unexpected {type(error).__name__}: {error}"))
            with sending:
                socket.send_fds(sock, [messages.encode(reply)], descriptors)
        except OSError as error:
            log.warning("an answer could not be sent, the host service is gone: %s", error)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    calls = ThreadPoolExecutor(_MAX_CALLS, thread_name_prefix="call")
    while packet := sock.recv(messages.MAX_PACKET):
        calls.submit(run, messages.decode_request(packet))


def make_blocks(data_dir: Path, tier_bytes: int) -> DeviceBlocks:
    """What all calls work on. Raises HostError, StoreError."""
    try:
        from dormouse.checkpoint.device_blocks import CudaGpus, DeviceBlocks
        from dormouse.transfer.dram import DramTier
    except ImportError as error:
        raise HostError(
            f"models can't be loaded onto a GPU here: {error}",
            remedy="Install what is missing: pip install dormouse[gpu]",
        ) from error
    from dormouse.store.store import Store

    gpus = CudaGpus(broken=_give_up)
    tier = DramTier(tier_bytes, pin=True) if tier_bytes else None
    return DeviceBlocks(Store.open(data_dir / "store"), gpus, tier)


def _give_up() -> None:
    """End at once: a CUDA context that has failed stays so, and the next need starts a new loader. What workers have
    mapped stays theirs; who waits for weights sees its pipe end."""
    log.critical("a GPU has failed in this process; the loader ends, the next need starts a new one")
    os._exit(1)


def run(sock: socket.socket, data_dir: Path, tier_bytes: int) -> None:
    """All that the process does."""
    keep_freed_memory()
    try:
        blocks = make_blocks(data_dir, tier_bytes)
    except DormouseError as error:
        sock.send(messages.encode(messages.refused(0, error)))
        return
    sock.send(messages.encode(messages.Done(call=0)))
    serve(sock, blocks)


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--dram-tier", type=int, default=0, help="bytes of memory for coded chunks")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with socket.socket(fileno=arguments.fd) as sock:
        sock.set_inheritable(False)
        run(sock, arguments.data_dir, arguments.dram_tier)
    # Fills may still be running; nobody waits for them, and the kernel takes all memory back, pinned and GPU's too.
    os._exit(0)


if __name__ == "__main__":
    main()
