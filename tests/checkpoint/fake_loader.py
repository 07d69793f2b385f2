"""A loader whose GPUs are this machine's memory: the real process, messages, pools and load plans, above a driver made
of memfds. `python -m tests.checkpoint.fake_loader --fd N --data-dir DIR --dram-tier BYTES [--limit BYTES] [--slow]`."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch

from dormouse.checkpoint import loader_messages as messages
from dormouse.checkpoint.device_blocks import DeviceBlocks
from dormouse.checkpoint.loader_main import serve
from dormouse.store.store import Store
from dormouse.transfer import load_device
from dormouse.transfer.device_segment import DeviceSegment
from dormouse.transfer.dram import DramTier
from dormouse.transfer.plan import LoadPlan
from dormouse.transfer.report import LoadReport
from tests.transfer.fake_driver import FakeDriver
from tests.transfer.fake_gpu import FakeGpu, FakePinner


class FakeGpus:
    """`slow`: a load goes on for a minute unless it is cancelled. `reports`: of the loads so far."""

    have_kernels = True

    def __init__(self, driver: FakeDriver, *, slow: bool = False) -> None:
        self.driver = driver
        self.slow = slow
        self.reports: list[LoadReport] = []

    def warm(self, ordinal: int) -> None:
        self.driver.device(ordinal)

    def tensor(self, segment: DeviceSegment) -> torch.Tensor:
        memory = (ctypes.c_ubyte * segment.size).from_address(segment.address)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def load(self, plan: LoadPlan, target: torch.Tensor, *, cancelled: Any, **options: Any) -> LoadReport:
        if self.slow:
            cancelled.wait(60)
        gpus = [FakeGpu(late=True)]
        report = load_device.carry_out(
            plan, [target], gpus, FakePinner(), kernels=True, cancelled=cancelled, threads=2, **options
        )
        self.reports.append(report)
        return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--dram-tier", type=int, default=0)
    parser.add_argument("--limit", type=int, default=1 << 40)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--mute", action="store_true", help="answer nothing")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    with socket.socket(fileno=arguments.fd) as sock:
        gpus = FakeGpus(FakeDriver(limit=arguments.limit), slow=arguments.slow)
        tier = DramTier(arguments.dram_tier, pin=False, slab_bytes=8 << 20) if arguments.dram_tier else None
        blocks = DeviceBlocks(Store.open(arguments.data_dir / "store"), gpus, tier)
        sock.send(messages.encode(messages.Done(call=0)))
        while arguments.mute:
            time.sleep(1)
        serve(sock, blocks)
    os._exit(0)


if __name__ == "__main__":
    main()
