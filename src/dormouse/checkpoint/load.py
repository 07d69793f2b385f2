"""`load_file`, `load` and `hold`: tensors of safetensors files and of imported checkpoints, on the CPU or on GPUs, or
their chunks in a tier on the way there.

    load_file, CPU    the file mapped privately, its pages brought in by many threads --> tensors that are the mapping
    load_file, GPU    plan of plain bytes  --load_device--> one block of the GPU --> tensors that are views of it
    load              manifest, table --Placement--> plan of the chunks needed --load_host | load_device--> views
                      what a tier holds as a whole: the same, as the tier kept it -----> views

Nothing here reads, checks or decodes; the plans' runners in `transfer` do.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Container, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch

from dormouse import host_memory
from dormouse.checkpoint import load_plans
from dormouse.checkpoint.mapped_file import map_file, populate
from dormouse.checkpoint.models import ImportedModel, open_model
from dormouse.checkpoint.pool import note_damage
from dormouse.checkpoint.safetensors_file import header_of, open_source
from dormouse.checkpoint.shards import Placement, Shard, cuts, place, select
from dormouse.checkpoint.tensors import Tensor, decode_body
from dormouse.checkpoint.torch_tensors import WIDE_FLOATS, find_device, torch_type, typed, views
from dormouse.checkpoint.writer import CHECKPOINT_KIND
from dormouse.data_dir import DataDir, default_data_dir
from dormouse.errors import ConfigError, DamagedError, HostError, NotFoundError
from dormouse.store.store import Manifest, Reader, Store
from dormouse.transfer import gpus, prepared
from dormouse.transfer.crew import clear_frames
from dormouse.transfer.load_host import load_host
from dormouse.transfer.memory import anonymous
from dormouse.transfer.plan import LoadPlan
from dormouse.transfer.report import LoadReport, Progress

if TYPE_CHECKING:
    from dormouse.store.key import Key
    from dormouse.transfer.dram import DramTier, HoldReport
    from dormouse.transfer.prepared import Prepared

_FEW = 64  # more gaps take longer to fill one by one
Device = str | int | torch.device
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Loaded:
    """`tensors`: of each device. `plain_bytes`: what they take in memory."""

    tensors: list[Tensors]
    plain_bytes: int
    report: LoadReport


def load_file(
    filename: str | os.PathLike[str],
    device: Device = "cpu",
    *,
    progress: Progress | None = None,
    cancelled: threading.Event | None = None,
) -> Tensors:
    """All tensors of a safetensors file, by name: what `safetensors.torch.load_file` returns.

    On the CPU they are the file itself, mapped privately: writing to them changes them and never the file. On a GPU
    they are views of one block. `progress(done, total)` is told bytes, by one thread at a time; when `cancelled` is
    set, the load ends with StoreError. Raises NotFoundError, ConfigError for a file that is not sound, DamagedError for
    one that can't be read, HostError when there is no memory or no such GPU.
    """
    return tensors_of_file(Path(filename), find_device(device), None, progress, cancelled)


def tensors_of_file(
    path: Path,
    where: torch.device,
    names: Container[str] | None,
    progress: Progress | None,
    cancelled: threading.Event | None,
) -> Tensors:
    """Those of the named tensors that are in a file; all for None."""
    with open_source(path) as file:
        version = _version(os.fstat(file.fileno()))
        found = [each for name, each in header_of(file, path).items() if names is None or name in names]
        tensors = [Tensor(each.name, each.dtype, each.shape, each.offset, each.length) for each in found]
        for tensor in tensors:
            torch_type(tensor)  # what torch does not know is told before anything is read
        if where.type == "cpu":
            return _mapped(file.fileno(), path, tensors, progress, cancelled)
    placement = place(tensors, 1, {})
    blocks, _report = _run(load_plans.of_file(path, placement), [where], None, None, progress, cancelled)
    # The bytes were read through a descriptor of their own: were they those that the header is of?
    try:
        unchanged = _version(path.stat()) == version
    except OSError:
        unchanged = False
    if not unchanged:
        raise _changed(path)
    return views(blocks[0], placement.tensors[0])


def _version(status: os.stat_result) -> tuple[int, ...]:
    """What differs when a file was replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _changed(path: Path) -> DamagedError:
    return DamagedError(f"{path} changed while it was read", remedy="Load it again")


def _mapped(
    descriptor: int,
    path: Path,
    tensors: Sequence[Tensor],
    progress: Progress | None,
    cancelled: threading.Event | None,
) -> Tensors:
    mapping = map_file(descriptor, path)
    if tensors and len(mapping) < tensors[-1].offset + tensors[-1].length:
        raise _changed(path)
    populate(mapping, descriptor, path, progress=progress, cancelled=cancelled)
    return {tensor.name: typed(_bytes_of(mapping, tensor), tensor) for tensor in tensors}


def _bytes_of(mapping: mmap.mmap, tensor: Tensor) -> torch.Tensor:
    """A storage of its own, as far as torch can see: a tensor that is saved or sent takes only itself along."""
    if not tensor.length:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=tensor.length, offset=tensor.offset)


@overload
def load(
    name: str,
    *,
    device: Device = "cpu",
    dtype: torch.dtype | None = None,
    tensors: Iterable[str] | None = None,
    shard: None = None,
    data_dir: str | os.PathLike[str] | None = None,
    tier: DramTier | None = None,
    progress: Progress | None = None,
    cancelled: threading.Event | None = None,
) -> Tensors: ...


@overload
def load(
    name: str,
    *,
    device: list[Device] | tuple[Device, ...],
    dtype: torch.dtype | None = None,
    tensors: Iterable[str] | None = None,
    shard: Shard | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    tier: DramTier | None = None,
    progress: Progress | None = None,
    cancelled: threading.Event | None = None,
) -> list[Tensors]: ...


def load(
    name: str,
    *,
    device: Device | list[Device] | tuple[Device, ...] = "cpu",
    dtype: torch.dtype | None = None,
    tensors: Iterable[str] | None = None,
    shard: Shard | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    tier: DramTier | None = None,
    progress: Progress | None = None,
    cancelled: threading.Event | None = None,
) -> Tensors | list[Tensors]:
    """The tensors of the imported model `name`, by name; for a list of devices a list, one dictionary for each.

    Tensors are views of one block per device. `tensors` are names or patterns (`*`, `?`); only chunks that are needed
    are read. `shard` cuts tensors over the devices, all others go to each of them. `dtype`: floating-point tensors of
    16 bits and more are cast to it once they are there. `data_dir` defaults to $DORMOUSE_HOME; `tier` is a pool of
    coded chunks in memory, for GPUs; what it holds as a whole comes from there without a look at the store, even if
    its weights are gone from that and only the model's record is left. `progress(done, total)` is told bytes, by one
    thread at a time; when `cancelled` is set, the load ends with StoreError.

    Raises NotFoundError, ConfigError (a pattern that nothing matches, a device that can't be loaded to), DamagedError
    and UntrustedError for stored bytes, HostError when there is no memory or no such GPU.
    """
    several = isinstance(device, list | tuple)
    devices = device if isinstance(device, list | tuple) else [device]
    if shard is not None and not several:
        raise ConfigError("one device holds whole tensors, there is nothing to cut", remedy="Give a list of devices")
    loaded = load_measured(
        name,
        [find_device(each) for each in devices],
        dtype=dtype,
        tensors=tensors,
        shard=shard,
        data_dir=data_dir_of(data_dir),
        tier=tier,
        progress=progress,
        cancelled=cancelled,
    )
    return loaded.tensors if several else loaded.tensors[0]


def load_measured(
    name: str,
    devices: Sequence[torch.device],
    *,
    dtype: torch.dtype | None,
    tensors: Iterable[str] | None,
    shard: Shard | None,
    data_dir: DataDir,
    tier: DramTier | None,
    progress: Progress | None,
    cancelled: threading.Event | None,
) -> Loaded:
    """What `load` does, with figures of it."""
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(f"nothing can be cast to {dtype}", remedy="Give a floating-point type")
    if not devices:
        raise ConfigError("there is no device to load to", remedy="Give at least one")
    _check_devices(devices, tier)
    with _ready(_wanted(name, len(devices), tensors, shard, data_dir), tier) as found:
        blocks, report = _run(found.plan, devices, found.key, tier, progress, cancelled, found.prepared)
    placed = zip(blocks, found.placement.tensors, strict=True)
    try:
        cast = [_cast(views(block, parts), dtype) for block, parts in placed]
    except torch.OutOfMemoryError as error:
        clear_frames(error)
        blocks.clear()
        raise HostError(
            f"the weights of {name} were loaded, and the GPU has no memory for them as {dtype} beside that",
            remedy="Free some of its memory, load without dtype, or spread the model over several GPUs",
        ) from None
    return Loaded(cast, sum(found.placement.sizes), report)


def hold(
    name: str,
    tier: DramTier,
    *,
    tensors: Iterable[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    cancelled: threading.Event | None = None,
) -> HoldReport:
    """Bring the coded chunks of the imported model `name`, or those its `tensors` are in, into a tier, each checked
    once; `load(name, tier=tier)` then takes them from there.

    Raises what `load` raises for names and stored bytes, BusyError when what is in use leaves no room, StoreError when
    they are more than the tier's budget or `cancelled` is set.
    """
    wanted = _wanted(name, 1, tensors, None, data_dir_of(data_dir))
    with _found(wanted) as found:
        assert found.key is not None
        report = tier.hold(found.plan, found.key, cancelled=cancelled)
        _keep(wanted, found, tier)
        return report


class _Wanted(NamedTuple):
    """What is to be loaded, of which checkpoint."""

    name: str
    checkpoint: str
    devices: int
    tensors: tuple[str, ...] | None
    shard: Shard | None
    data_dir: DataDir

    @property
    def known_as(self) -> Hashable:
        """The same for all that make the same plan."""
        cut = () if self.shard is None else tuple(self.shard.dimensions.items())
        return self.data_dir.root.absolute(), self.checkpoint, self.devices, self.tensors, cut


def _wanted(name: str, devices: int, tensors: Iterable[str] | None, shard: Shard | None, data_dir: DataDir) -> _Wanted:
    """The model's record is read each time: another model may have its name by now."""
    checkpoint = checkpoint_of(open_model(data_dir.models, name))
    return _Wanted(name, checkpoint, devices, None if tensors is None else tuple(tensors), shard, data_dir)


class _Found(NamedTuple):
    """A model's weights in an open store, and what of them goes where. Without a `key`, all of them are `prepared` and
    in a tier."""

    key: Key | None
    placement: Placement
    plan: LoadPlan
    prepared: Prepared | None = None


@contextlib.contextmanager
def _ready(wanted: _Wanted, tier: DramTier | None) -> Iterator[_Found]:
    """What the tier has kept, if it holds all that is wanted; else what the store says."""
    with contextlib.ExitStack() as stack:
        kept = None if tier is None else stack.enter_context(tier.kept(wanted.known_as))
        if kept is None:
            found = stack.enter_context(_found(wanted))
            if tier is not None:
                _keep(wanted, found, tier)
                kept = stack.enter_context(tier.kept(wanted.known_as))
        yield kept or found


def _keep(wanted: _Wanted, found: _Found, tier: DramTier) -> None:
    """If the tier holds all of it, and devices decode it, have the tier keep what is known of it."""
    if not gpus.have_kernels():
        return
    with tier.lend(found.plan.extents) as lent:
        ready = prepared.prepare(found.plan, lent.found, found.key)
        if ready is not None:
            tier.keep(wanted.known_as, _Found(None, found.placement, ready.plan, ready), lent)


@contextlib.contextmanager
def _found(wanted: _Wanted) -> Iterator[_Found]:
    """Within, nothing of the store is deleted, and damage is noted in it."""
    name, checkpoint, devices, tensors, shard, data_dir = wanted
    with contextlib.ExitStack() as stack:

        def planned(store: Store) -> tuple[Reader, Manifest, _Found]:
            reader = stack.enter_context(stack.enter_context(store).reader())
            manifest = _manifest(store, checkpoint, name)
            return reader, manifest, _Found(store.key, *_planned(manifest, reader, devices, tensors, shard))

        try:
            reader, manifest, found = planned(Store.open_to_read(data_dir.store))
        except DamagedError:  # perhaps the index is, which a full opening builds anew
            stack.close()
            reader, manifest, found = planned(Store.open(data_dir.store))
        with _noting_damage(reader, manifest):
            yield found


def _planned(
    manifest: Manifest, reader: Reader, devices: int, tensors: Iterable[str] | None, shard: Shard | None
) -> tuple[Placement, LoadPlan]:
    """What of a checkpoint goes where, and the plan for it."""
    what = f"the checkpoint of {manifest.name}"
    body = decode_body(manifest.body, what)
    chosen = select(body.tensors, tensors, what)
    for tensor in chosen:
        torch_type(tensor)
    placement = place(chosen, devices, cuts(chosen, shard, what))
    return placement, load_plans.of_checkpoint(body, manifest, placement, reader, what)


def measured(
    name: str, devices: Sequence[str], tensors: Iterable[str] | None, data_dir: DataDir, progress: Progress
) -> dict[str, Any]:
    """Load and let go again: the figures, as `dormouse load --json` prints them. Seconds begin with the first read."""
    loaded = load_measured(
        name,
        [find_device(device) for device in devices],
        dtype=None,
        tensors=tensors,
        shard=None,
        data_dir=data_dir,
        tier=None,
        progress=progress,
        cancelled=None,
    )
    report = loaded.report
    return asdict(report) | {
        "name": name,
        "devices": list(devices),
        "tensors": len(loaded.tensors[0]),
        "plain_bytes": loaded.plain_bytes,
        "gb_per_second": loaded.plain_bytes / max(report.seconds, 1e-9) / 1e9,
    }


def checkpoint_of(model: ImportedModel) -> str:
    """The id of a model's checkpoint. Raises ConfigError when it has no weights."""
    if model.checkpoint is None:
        raise ConfigError(f"model {model.name} has no weights", remedy="`dormouse ls` shows which models have")
    return model.checkpoint


def data_dir_of(folder: str | os.PathLike[str] | None) -> DataDir:
    """The data folder that was given, or that of the environment."""
    return DataDir(Path(folder) if folder is not None else default_data_dir(os.environ))


def _manifest(store: Store, checkpoint: str, name: str) -> Manifest:
    remedy = f"Import it again: dormouse import SOURCE --name {name} --replace"
    try:
        manifest = store.manifest(checkpoint)
    except NotFoundError as error:
        raise NotFoundError(f"the weights of {name} are gone: {error.message}", remedy=remedy) from error
    if manifest.kind != CHECKPOINT_KIND:
        raise DamagedError(f"{checkpoint} is no checkpoint but a {manifest.kind}", remedy=remedy)
    return manifest


@contextlib.contextmanager
def _noting_damage(reader: Reader, manifest: Manifest) -> Iterator[None]:
    """On damage, every chunk is checked: one seldom comes alone, and the next import stores anew what is noted."""
    try:
        yield
    except DamagedError as error:
        note_damage(reader, manifest)
        raise DamagedError(
            f"the weights of {manifest.name} can't be read: {error.message}",
            remedy=f"Import it again: dormouse import SOURCE --name {manifest.name} --replace",
        ) from error


def _run(
    plan: LoadPlan,
    devices: Sequence[torch.device],
    key: Key | None,
    tier: DramTier | None,
    progress: Progress | None,
    cancelled: threading.Event | None,
    ready: Prepared | None = None,
) -> tuple[list[torch.Tensor], LoadReport]:
    """Carry out a plan: one new block of memory for each device. A failure frees all of them."""
    if devices[0].type == "cpu":
        return _to_host(plan, key, progress, cancelled)
    return _to_gpus(plan, devices, key, tier, progress, cancelled, ready)


def _check_devices(devices: Sequence[torch.device], tier: DramTier | None) -> None:
    kinds = {device.type for device in devices}
    if len(kinds) > 1:
        raise ConfigError("one load goes to the CPU or to GPUs, not to both", remedy="Load twice")
    if kinds == {"cpu"} and tier is not None:
        raise ConfigError("a tier serves loads to GPUs, this one goes to the CPU", remedy="Leave tier out")


def _to_host(
    plan: LoadPlan, key: Key | None, progress: Progress | None, cancelled: threading.Event | None
) -> tuple[list[torch.Tensor], LoadReport]:
    needed, free = sum(plan.sizes), host_memory.available()
    if needed > free:
        raise HostError(f"{needed} bytes of weights don't fit into the {free} that are free", remedy="Free some memory")
    maps = [anonymous(max(size, 1)) for size in plan.sizes]
    destinations = [memoryview(memory)[:size] for memory, size in zip(maps, plan.sizes, strict=True)]
    report = load_host(plan, destinations, key=key, progress=progress, cancelled=cancelled)
    return [torch.frombuffer(memory, dtype=torch.uint8) for memory in maps], report


def _to_gpus(
    plan: LoadPlan,
    devices: Sequence[torch.device],
    key: Key | None,
    tier: DramTier | None,
    progress: Progress | None,
    cancelled: threading.Event | None,
    ready: Prepared | None,
) -> tuple[list[torch.Tensor], LoadReport]:
    from dormouse.transfer.load_device import load_device

    blocks: list[torch.Tensor] = []
    try:
        for number, device in enumerate(devices):
            gaps = plan.gaps(number) if ready is None else ready.gaps[number]
            blocks.append(_block(plan.sizes[number], gaps, device))
        report = load_device(plan, blocks, key=key, progress=progress, cancelled=cancelled, tier=tier, prepared=ready)
    except torch.OutOfMemoryError as error:
        blocks.clear()
        raise HostError(
            f"{sum(plan.sizes)} bytes of weights don't fit into the GPU: {str(error).splitlines()[0]}",
            remedy="Free some of its memory, or spread the model over several GPUs",
        ) from None
    except BaseException:
        blocks.clear()  # an error that is kept must not keep memory of the GPU
        raise
    return blocks, report


def _block(size: int, gaps: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """New memory, zeros where nothing is written. Zeros everywhere would hold up the first bytes by milliseconds."""
    block = _gpu_block(size, device)
    for begin, end in gaps if len(gaps) <= _FEW else [(0, len(block))]:
        block[begin:end].zero_()
    return block


def _gpu_block(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _cast(tensors: Tensors, dtype: torch.dtype | None) -> Tensors:
    """The tensors, of another type. A few that stay as they are would keep the whole block in memory, so they are
    copied out of it."""
    if dtype is None:
        return tensors
    staying = {name for name, tensor in tensors.items() if tensor.dtype == dtype or tensor.dtype not in WIDE_FLOATS}
    few = sum(tensors[name].nbytes for name in staying) * 2 <= sum(tensor.nbytes for tensor in tensors.values())
    return {
        name: tensor.to(dtype) if name not in staying else tensor.clone() if few else tensor
        for name, tensor in tensors.items()
    }
