"""Weights on GPUs: a pool of segments per GPU, filled through the DRAM tier. What the loader process does.

    take -> pool of the GPU -> DeviceSegment -> plan of all chunks --load_device--> segment
                                                      |  what the tier holds comes from there, worked out before
    when nothing is being loaded: chunks of what was  -> tier (disk, most likely the page cache)

So the first load goes past the tier, at the speed of the disk, and the tier is filled while nobody waits: a load that
begins meanwhile interrupts it, and it goes on after that.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from dormouse.checkpoint.loader_messages import GpuMemory
from dormouse.checkpoint.pool import SegmentPool
from dormouse.checkpoint.tensors import decode_body
from dormouse.errors import DormouseError, HostError, StoreError
from dormouse.store.codec import FLOATS
from dormouse.store.key import Key
from dormouse.store.store import Manifest, Store
from dormouse.transfer import load_device as load_device_module
from dormouse.transfer.cuda_driver import Cuda, Driver, ordinal_of
from dormouse.transfer.device_segment import DeviceSegment
from dormouse.transfer.dram import DramTier, HoldReport
from dormouse.transfer.gpus import have_kernels, translated
from dormouse.transfer.handles import SegmentHandle
from dormouse.transfer.plan import LoadPlan
from dormouse.transfer.prepared import Prepared, prepare
from dormouse.transfer.report import LoadReport
from dormouse.transfer.segment import plan_in_row

log = logging.getLogger(__name__)

_FEW = 64  # more gaps take longer to fill one by one


class Gpus(Protocol):
    """The GPUs of this machine; tests put others in their place."""

    @property
    def driver(self) -> Driver: ...

    @property
    def have_kernels(self) -> bool:
        """Whether they check and decode chunks themselves."""

    def warm(self, ordinal: int) -> None:
        """Have torch use one."""

    def tensor(self, segment: DeviceSegment) -> torch.Tensor:
        """The bytes of a segment."""

    def load(
        self,
        plan: LoadPlan,
        target: torch.Tensor,
        *,
        key: Key | None,
        cancelled: threading.Event,
        tier: DramTier | None,
        prepared: Prepared | None,
    ) -> LoadReport:
        """`load_device`."""


class CudaGpus:
    """Those of NVIDIA, through torch. `broken` is called when a GPU has failed in a way that this process can't go on
    from: all further calls of CUDA would fail, too."""

    def __init__(self, broken: Callable[[], None] = lambda: None) -> None:
        self.driver: Driver = Cuda()
        self._broken = broken
        self._warmed: set[int] = set()

    @property
    def have_kernels(self) -> bool:
        return have_kernels()

    def warm(self, ordinal: int) -> None:
        self.driver.device(ordinal)
        device = torch.device("cuda", ordinal)
        torch.zeros(1, device=device)
        if ordinal not in self._warmed and have_kernels():
            self._warmed.add(ordinal)
            threading.Thread(target=_warm_kernels, args=(device,), name="warm kernels", daemon=True).start()

    def tensor(self, segment: DeviceSegment) -> torch.Tensor:
        return segment.tensor()

    def load(
        self,
        plan: LoadPlan,
        target: torch.Tensor,
        *,
        key: Key | None,
        cancelled: threading.Event,
        tier: DramTier | None,
        prepared: Prepared | None,
    ) -> LoadReport:
        try:
            return load_device_module.load_device(
                plan, [target], key=key, cancelled=cancelled, tier=tier, prepared=prepared
            )
        finally:  # zeros that were asked for before, when nothing was loaded after them
            self._settle(target.device)

    def _settle(self, device: torch.device) -> None:
        try:
            with translated():
                torch.cuda.current_stream(device).synchronize()
        except HostError:
            self._broken()
            raise


def _warm_kernels(device: torch.device) -> None:
    """Compile, or load, what checks and decodes, which else the first load would wait for. Beside all else: nobody
    waits for this, and a load that comes earlier does it itself."""
    try:
        from dormouse.transfer.blake3_kernel import SignatureCheck
        from dormouse.transfer.float_kernels import FloatDecoder

        with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            FloatDecoder(device).warm(FLOATS)
            SignatureCheck(device, bytes(32)).warm()
            torch.cuda.current_stream(device).synchronize()
    except Exception:
        log.exception("the kernels for %s could not be made ready; the first load will tell", device)


class DeviceBlocks:
    """All weights on GPUs of one machine. Every method may be called from any thread."""

    def __init__(self, store: Store, gpus: Gpus, tier: DramTier | None) -> None:
        self._store = store
        self._gpus = gpus
        self._tier = tier
        self._pools: dict[str, SegmentPool] = {}
        self._taken: dict[str, int] = {}
        self._lock = threading.Lock()
        self._holder = None if tier is None else _Holder(self._hold)

    def warm(self, device: str) -> None:
        """Get ready to load onto a GPU. Raises HostError."""
        self._gpus.warm(ordinal_of(device))
        self._pool(device)

    def take(self, checkpoint: str, user: str, device: str) -> SegmentHandle:
        """`SegmentPool.take` on a GPU."""
        return self._pool(device).take(checkpoint, user)

    def release(self, user: str, checkpoint: str | None = None) -> None:
        """`SegmentPool.release` on all GPUs."""
        with self._lock:
            pools = list(self._pools.values())
        for pool in pools:
            pool.release(user, checkpoint)

    def hold(self, checkpoint: str) -> HoldReport:
        """Bring the chunks of a checkpoint into the tier now. Raises what `DramTier.hold` does, StoreError where there
        is no tier."""
        return self._hold(checkpoint, threading.Event())

    def forget(self, checkpoint: str) -> None:
        """Its chunks need not be in the tier any more."""
        if self._tier is None:
            return
        manifest = self._store.manifest(checkpoint)
        with self._planned(manifest, _size(manifest)) as plan:
            for extent in plan.extents:
                self._tier.forget(extent)

    def gpus(self) -> list[GpuMemory]:
        """The GPUs that were asked for so far."""
        with self._lock:
            taken = {device: self._taken.get(device, 0) for device in self._pools}
        return [self._memory(device, size) for device, size in taken.items()]

    def tier_bytes(self) -> tuple[int, int, int, int]:
        """Budget, taken and held bytes of the tier, and how often a checkpoint did not go into it."""
        if self._tier is None or self._holder is None:
            return 0, 0, 0, 0
        return self._tier.budget_bytes, self._tier.taken_bytes, self._tier.held_bytes, self._holder.refused

    def _memory(self, device: str, segments: int) -> GpuMemory:
        ordinal = ordinal_of(device)
        free, total = self._gpus.driver.free_and_total(ordinal)
        return GpuMemory(device, self._gpus.driver.device(ordinal).uuid, total, free, segments)

    def _pool(self, device: str) -> SegmentPool:
        device = f"cuda:{ordinal_of(device)}"
        with self._lock:
            if device not in self._pools:
                self._pools[device] = SegmentPool(
                    self._store, make=lambda manifest, size: _OnGpu(self, manifest, device, size)
                )
            return self._pools[device]

    def count(self, device: str, change: int) -> None:
        """Segments on a GPU take so many bytes more, or less."""
        with self._lock:
            self._taken[device] = self._taken.get(device, 0) + change

    def segment(self, device: str, size: int) -> DeviceSegment:
        """New memory of a GPU. Raises HostError."""
        return DeviceSegment(self._gpus.driver, ordinal_of(device), size)

    def load(self, manifest: Manifest, segment: DeviceSegment, cancelled: threading.Event) -> int:
        """Bring all chunks of a checkpoint into a segment. Raises what `load_device` does."""
        busy = contextlib.nullcontext() if self._holder is None else self._holder.interrupted()
        with busy, self._ready(manifest, segment.size) as (plan, key, prepared):
            target = self._gpus.tensor(segment)
            gaps = plan.gaps(0) if prepared is None else prepared.gaps[0]
            for begin, end in gaps if len(gaps) <= _FEW else [(0, segment.size)]:
                target[begin:end].zero_()
            report = self._gpus.load(plan, target, key=key, cancelled=cancelled, tier=self._tier, prepared=prepared)
        log.info("%s", _line(manifest.name, report))
        if self._holder is not None and prepared is None:
            self._holder.want(manifest.id)
        return report.stored_bytes

    @contextlib.contextmanager
    def _ready(self, manifest: Manifest, size: int) -> Iterator[tuple[LoadPlan, Key | None, Prepared | None]]:
        """The load, as the tier has kept it if it holds all of it; else as the store says."""
        with contextlib.ExitStack() as stack:
            kept: Prepared | None = None
            if self._tier is not None:
                kept = stack.enter_context(self._tier.kept(manifest.id))
            if kept is not None:
                yield kept.plan, None, kept
            else:
                yield stack.enter_context(self._planned(manifest, size)), self._store.key, None

    @contextlib.contextmanager
    def _planned(self, manifest: Manifest, size: int) -> Iterator[LoadPlan]:
        """Within, nothing of the store is deleted."""
        with self._store.reader() as reader:
            yield plan_in_row(reader, manifest.refs, size)

    def _hold(self, checkpoint: str, cancelled: threading.Event) -> HoldReport:
        if self._tier is None:
            raise StoreError("there is no DRAM tier", remedy="Give it memory: dram_tier in the configuration")
        manifest = self._store.manifest(checkpoint)
        with self._planned(manifest, _size(manifest)) as plan:
            report = self._tier.hold(plan, self._store.key, cancelled=cancelled)
            if self._gpus.have_kernels:
                with self._tier.lend(plan.extents) as lent:
                    ready = prepare(plan, lent.found, self._store.key)
                    if ready is not None:
                        self._tier.keep(checkpoint, ready, lent)
        log.info("%s: %d bytes are held in the DRAM tier", manifest.name, report.stored_bytes)
        return report


def _size(manifest: Manifest) -> int:
    return decode_body(manifest.body, f"the checkpoint of {manifest.name}").size


def _line(name: str, report: LoadReport) -> str:
    rate = report.plain_bytes / max(report.seconds, 1e-9) / 1e9
    reached = ", ".join(f"{step} at {seconds * 1e3:.1f} ms" for step, seconds in report.reached.items())
    return (
        f"{name}: {report.plain_bytes} bytes on the GPU in {report.seconds:.3f} s ({rate:.1f} GB/s),"
        f" {report.tier_bytes} stored bytes from the DRAM tier, {report.direct_bytes} from the disk,"
        f" {report.cached_bytes} through the page cache, decoded on the {report.decoded_on} ({reached})"
    )


class _OnGpu:
    """A block of a GPU's memory for one checkpoint."""

    def __init__(self, blocks: DeviceBlocks, manifest: Manifest, device: str, size: int) -> None:
        self._blocks = blocks
        self._manifest = manifest
        self._device = device
        self._segment = blocks.segment(device, size)
        self._closed = False
        self.size = size
        self.handle = self._segment.handle
        blocks.count(device, self._segment.taken)

    def fill(self, cancelled: threading.Event) -> int:
        return self._blocks.load(self._manifest, self._segment, cancelled)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._blocks.count(self._device, -self._segment.taken)
        try:
            self._segment.close()
        except DormouseError as error:  # whoever let go of it has nothing to do with that
            log.error("memory of %s is not given back: %s", self._device, error)


class _Hold(Protocol):
    def __call__(self, checkpoint: str, cancelled: threading.Event, /) -> HoldReport: ...


class _Holder:
    """A thread that brings checkpoints into the tier while nothing is being loaded."""

    def __init__(self, hold: _Hold) -> None:
        self.refused = 0
        self._hold = hold
        self._wanted: dict[str, None] = {}
        self._loads = 0
        self._now = threading.Event()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="hold", daemon=True).start()

    def want(self, checkpoint: str) -> None:
        """Bring it in, when there is time."""
        with self._changed:
            self._wanted[checkpoint] = None
            self._changed.notify()

    @contextlib.contextmanager
    def interrupted(self) -> Iterator[None]:
        """Within, nothing is brought in."""
        with self._changed:
            self._loads += 1
            self._now.set()
        try:
            yield
        finally:
            with self._changed:
                self._loads -= 1
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted and not self._loads)
                checkpoint = next(iter(self._wanted))
                self._now = threading.Event()
            if self._bring(checkpoint, self._now):
                with self._changed:
                    self._wanted.pop(checkpoint, None)

    def _bring(self, checkpoint: str, now: threading.Event) -> bool:
        """Whether that is settled; what came in before an interruption stays."""
        try:
            self._hold(checkpoint, now)
        except DormouseError as error:
            if now.is_set():
                return False
            self.refused += 1
            log.warning("checkpoint %s is not held in the DRAM tier: %s", checkpoint, error)
        except Exception:
            self.refused += 1
            log.exception("checkpoint %s is not held in the DRAM tier", checkpoint)
        return True
