"""Weights in segments, through the real service, cells and CRIU: shared, in no snapshot, and never silently wrong."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from tests.models import lend, quiet
from tests.snapshot.conftest import make_null_model
from tests.snapshot.test_service import kill_children

from dormouse.checkpoint.importer import import_model
from dormouse.checkpoint.models import ImportedModel
from dormouse.data_dir import DataDir
from dormouse.engine.messages import Delta, Load, Loaded, Prepare, Sampling, TextPrompt
from dormouse.errors import DamagedError, DormouseError, EngineError, HostError, WeightsError
from dormouse.node.link import WorkerLink
from dormouse.snapshot.service import HostService, WorkerHandle
from dormouse.store.store import Store
from dormouse.transfer.handles import await_report
from dormouse.transfer.segment import Segment

pytestmark = pytest.mark.root

KEY = {"kernel": "this one"}
WEIGHTS_MB = 64
PATIENCE = 60


class Stage:
    """A service, and a model with 64 MiB of weights whose every byte its answers depend on."""

    def __init__(self, service: HostService, data: DataDir, model: ImportedModel, log: Path) -> None:
        self.service, self.data, self.model, self.log = service, data, model, log
        self.links: list[WorkerLink] = []
        self.handles: list[WorkerHandle] = []

    @property
    def load(self) -> Load:
        return Load(engine="null", path=str(self.model.path))

    async def cold(self, *, checkpoint: bool = True) -> tuple[WorkerHandle, WorkerLink]:
        """A fresh worker, without a model yet."""
        named = self.model.checkpoint if checkpoint else None
        return await self._linked(await self.service.start_worker(log_path=self.log, checkpoint=named), fresh=True)

    async def loaded(self) -> tuple[WorkerHandle, WorkerLink]:
        handle, link = await self.cold()
        await link.load(self.load)
        return handle, link

    async def restored(self, snapshot: str) -> tuple[WorkerHandle, WorkerLink]:
        """A restored worker that goes on."""
        handle = await self.service.restore(snapshot, key=KEY, checkpoint=self.model.checkpoint)
        _handle, link = await self._linked(handle, fresh=False)
        await link.resume(str(self.log))
        return handle, link

    async def capture(self, handle: WorkerHandle, link: WorkerLink) -> tuple[str, int]:
        """The snapshot's id and the plain bytes of its images."""
        await link.quiesce()
        result = await self.service.capture(handle, model=self.model.name, key=KEY)
        return result.snapshot_id, result.raw_bytes

    async def _linked(self, handle: WorkerHandle, *, fresh: bool) -> tuple[WorkerHandle, WorkerLink]:
        link = await WorkerLink.open(
            "m", handle.control, fresh=fresh, on_lost=lambda error: None, segments=handle.segments
        )
        self.links.append(link)
        self.handles.append(handle)
        return handle, link


async def answer(link: WorkerLink, text: str = "what does a dormouse do in winter") -> str:
    events = link.generate(TextPrompt(text), Sampling(max_tokens=12, temperature=0.0))
    return "".join([event.text async for event in events if isinstance(event, Delta)])


@asynccontextmanager
async def staged(data: DataDir, model: ImportedModel, log: Path, patience: float = PATIENCE) -> AsyncIterator[Stage]:
    service = await HostService.start(data.root)
    stage = Stage(service, data, model, log)
    try:
        async with asyncio.timeout(patience):
            yield stage
    finally:
        for link in stage.links:
            await link.close()
        await service.close()


@pytest.fixture
def model(data_dir: DataDir, tmp_path: Path) -> ImportedModel:
    source = make_null_model(tmp_path / "source", weights_mb=WEIGHTS_MB, memory_mb=3)
    return import_model(str(source), "heavy", data_dir, progress=quiet)


def on_stage(test: Callable[[Stage], Coroutine[Any, Any, None]]) -> Callable[[DataDir, ImportedModel, Path], None]:
    @wraps(test, assigned=("__name__", "__doc__", "__module__"))
    def run(data_dir: DataDir, model: ImportedModel, tmp_path: Path) -> None:
        async def body() -> None:
            async with staged(data_dir, model, tmp_path / "log") as stage:
                await test(stage)

        asyncio.run(body())

    del run.__wrapped__  # type: ignore[attr-defined]  # pytest would look at its parameters
    return run


def of_segment(pid: int, field: str) -> int:
    """Bytes that smaps tells about the segment's mapping in a worker; 0 when it has none."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    found = re.search(rf"r--s [^\n]*/memfd:dormouse heavy.*?\n{field}:\s+(\d+) kB", text, re.DOTALL)
    return int(found[1]) << 10 if found else 0


@on_stage
async def test_two_replicas_share_one_copy_of_the_weights_and_the_snapshot_has_none(stage: Stage) -> None:
    handle, link = await stage.loaded()
    text = await answer(link)
    snapshot, raw = await stage.capture(handle, link)
    assert raw < (WEIGHTS_MB << 20) // 2
    (one, first), (two, second) = await asyncio.gather(stage.restored(snapshot), stage.restored(snapshot))
    assert await answer(first) == await answer(second) == text
    size = WEIGHTS_MB << 20
    assert of_segment(one.pid, "Rss") == of_segment(two.pid, "Rss") == size
    assert of_segment(one.pid, "Pss") + of_segment(two.pid, "Pss") == pytest.approx(size, rel=0.01)
    await stage.service.stop_worker(one)
    assert await answer(second) == text
    assert of_segment(two.pid, "Pss") == pytest.approx(size, rel=0.01)


@on_stage
async def test_a_snapshot_taken_right_after_the_load_answers_as_a_cold_worker(stage: Stage) -> None:
    handle, link = await stage.loaded()
    snapshot, _raw = await stage.capture(handle, link)
    _handle, restored = await stage.restored(snapshot)
    _cold, fresh = await stage.loaded()
    assert await answer(restored) == await answer(fresh)


@on_stage
async def test_answers_depend_on_the_weights(stage: Stage) -> None:
    """Else the tests here would prove nothing."""
    _handle, link = await stage.loaded()
    source = make_null_model(stage.data.root / "other", weights_mb=WEIGHTS_MB - 1)
    other = import_model(str(source), "heavy", stage.data, progress=quiet, replace=True)
    before = await answer(link)  # its worker keeps the old weights
    stage.model = other
    _handle, link = await stage.loaded()
    assert await answer(link) != before


@on_stage
async def test_a_worker_that_was_parked_for_nothing_goes_on(stage: Stage) -> None:
    handle, link = await stage.loaded()
    text = await answer(link)
    for _ in range(3):
        await link.quiesce()
        assert of_segment(handle.pid, "Rss") == 0
        await link.resume(str(stage.log))
        assert await answer(link) == text
    assert of_segment(handle.pid, "Rss") == WEIGHTS_MB << 20


@on_stage
async def test_a_template_loads_a_model_that_it_never_saw(stage: Stage) -> None:
    handle, link = await stage.cold(checkpoint=False)
    await link.prepare(Prepare(engine="null"))
    template, _raw = await stage.capture(handle, link)
    _handle, link = await stage.restored(template)
    await link.load(stage.load)
    _cold, fresh = await stage.loaded()
    assert await answer(link) == await answer(fresh)
    handle, link = await stage.restored(template)
    await link.load(stage.load)
    snapshot, _raw = await stage.capture(handle, link)
    _handle, again = await stage.restored(snapshot)
    assert await answer(again) == await answer(fresh)


@on_stage
async def test_a_reservation_of_any_size_costs_a_snapshot_nothing(stage: Stage) -> None:
    sizes = []
    for huge in (False, True):
        handle = await stage.service.start_worker(log_path=stage.log)
        if huge:
            segment = Segment.create("huge", 64 << 30)
            handle = WorkerHandle(handle.cell_id, handle.pid, handle.control, segments=[segment.handle(None)])
        _handle, link = await stage._linked(handle, fresh=True)
        await link.prepare(Prepare(engine="null"))
        snapshot, raw = await stage.capture(handle, link)
        sizes.append(raw)
    assert abs(sizes[1] - sizes[0]) < 1 << 20
    again = await stage.service.restore(snapshot, key=KEY)
    again = WorkerHandle(again.cell_id, again.pid, again.control, segments=[segment.handle(None)])
    _handle, link = await stage._linked(again, fresh=False)
    await link.resume(str(stage.log))
    segment.close()


def damage(data: DataDir, model: ImportedModel, number: int) -> None:
    """Flip a bit in one chunk of a model's weights."""
    assert model.checkpoint is not None
    with Store.open(data.store) as store:
        (chunk,) = store.locate([store.manifest(model.checkpoint).refs[number]])
    with next((data.store / "packs").glob(f"*{chunk.pack}.pack")).open("r+b") as pack:
        pack.seek(chunk.offset + 1000)
        byte = pack.read(1)
        pack.seek(chunk.offset + 1000)
        pack.write(bytes([byte[0] ^ 1]))


@on_stage
async def test_damaged_weights_fail_a_start_and_a_restore_with_the_chunk_and_the_remedy(stage: Stage) -> None:
    handle, link = await stage.loaded()
    snapshot, _raw = await stage.capture(handle, link)
    damage(stage.data, stage.model, 3)
    for attempt in (stage.loaded, lambda: stage.restored(snapshot)):
        with pytest.raises(DamagedError, match=r"the weights of heavy can't be read: chunk .* is damaged") as caught:
            await attempt()
        assert "--replace" in caught.value.remedy
    source = stage.data.root.parent / "source"
    stage.model = import_model(str(source), "heavy", stage.data, progress=quiet, replace=True)
    _handle, restored = await stage.restored(snapshot)  # the same weights, healed
    _cold, fresh = await stage.loaded()
    assert await answer(restored) == await answer(fresh)


@on_stage
async def test_weights_that_are_gone_are_an_error_at_once(stage: Stage) -> None:
    assert stage.model.checkpoint is not None
    with Store.open(stage.data.store) as store:
        store.remove(stage.model.checkpoint)
    with pytest.raises(WeightsError, match="the weights are gone"):
        await stage.cold()


@on_stage
async def test_a_service_that_dies_while_it_fills_ends_every_wait(stage: Stage) -> None:
    for delay in (0, 0.005, 0.02, 0.1):
        _handle, link = await stage.cold()
        load = asyncio.create_task(link.load(stage.load))
        await asyncio.sleep(delay)
        kill_children("service_main")
        (outcome,) = await asyncio.gather(load, return_exceptions=True)
        assert isinstance(outcome, EngineError | Loaded) and (delay or isinstance(outcome, EngineError)), outcome
    with contextlib.suppress(HostError):  # it may be this call that notices the last death
        await stage.cold()
    _handle, link = await stage.loaded()
    assert await answer(link)


@on_stage
async def test_a_snapshot_resumed_without_its_weights_says_so(stage: Stage) -> None:
    handle, link = await stage.loaded()
    snapshot, _raw = await stage.capture(handle, link)
    bare = await stage.service.restore(snapshot, key=KEY)
    _handle, link = await stage._linked(bare, fresh=False)
    with pytest.raises(DormouseError, match="resumed without its weights"):
        await link.resume(str(stage.log))


@pytest.mark.model
def test_a_template_of_transformers_wakes_and_answers_as_a_cold_worker(
    data_dir: DataDir, smollm2: ImportedModel, tmp_path: Path
) -> None:
    lend(smollm2, data_dir)
    load = Load(engine="transformers", path=str(smollm2.path), kv_tokens=512)

    async def body() -> None:
        async with staged(data_dir, smollm2, tmp_path / "log", patience=280) as stage:
            handle, link = await stage.cold(checkpoint=False)
            prepared = await link.prepare(Prepare(engine="transformers"))
            template, _raw = await stage.capture(handle, link)
            handle, link = await stage.restored(template)
            loaded = await link.load(load)
            assert sum(loaded.phases.seconds().values()) < sum(prepared.phases.seconds().values())
            text = await answer(link)
            snapshot, raw = await stage.capture(handle, link)
            assert raw < smollm2.weight_bytes * 2
            _handle, again = await stage.restored(snapshot)
            assert await answer(again) == text
            _cold, fresh = await stage.cold()
            await fresh.load(load)
            assert await answer(fresh) == text

    asyncio.run(body())


def test_a_segment_to_keep_outlives_its_worker_and_a_worker_that_is_gone_gets_none(
    data_dir: DataDir, model: ImportedModel, tmp_path: Path
) -> None:
    """How adapters stay in memory while their model sleeps."""
    checkpoint = model.checkpoint
    assert checkpoint is not None

    async def body() -> None:
        service = await HostService.start(data_dir.root, keep_bytes=WEIGHTS_MB << 20)
        try:
            async with asyncio.timeout(PATIENCE):
                first = await service.start_worker(log_path=tmp_path / "log")
                assert not await in_memory(service, first)
                await service.stop_worker(first)
                with pytest.raises(EngineError, match="is gone"):
                    await service.take_segment(first, checkpoint)
                second = await service.start_worker(log_path=tmp_path / "log")
                assert await in_memory(service, second), "it was kept"
                await service.drop_segment(second, checkpoint, keep=True)
                assert await in_memory(service, second), "a worker with a copy of its own gives it back, to be kept"
                await service.drop_segment(second, checkpoint)
                assert not await in_memory(service, second), "who drops it does not want it kept"
                with pytest.raises(WeightsError, match="no checkpoint nothing"):
                    await service.take_segment(second, "nothing")
                await service.drop_segment(None, "nothing")
                first.control.close()
                second.control.close()
        finally:
            await service.close()

    async def in_memory(service: HostService, worker: WorkerHandle) -> bool:
        handle = await service.take_segment(worker, checkpoint)
        there = handle.report is None
        if handle.report is not None:
            await asyncio.to_thread(await_report, handle.report)
        handle.close()
        return there

    asyncio.run(body())
