"""Templates: snapshots of workers that have imported their engine and have no model yet.

A model without a snapshot of its own starts from the template of its engine: everything that takes long before the
weights is done already. Templates are made in a quiet time, after a model has fallen asleep, one at a time:

    quiet for a moment -> start a worker -> Prepare -> Quiesce -> capture -> offered to all models of that engine

As soon as anybody asks for anything, the work is given up and its worker ended; the next quiet time begins it again.
What is fixed by the import is fixed by the template: engine, device and number of threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dormouse.config import ModelConfig
from dormouse.engine.messages import Prepare
from dormouse.errors import DeadlineError, DormouseError
from dormouse.node.link import WorkerLink
from dormouse.node.parts import Catalog, Host, Model, Observer
from dormouse.phases import Phases
from dormouse.snapshot.capture import TEMPLATE_KIND
from dormouse.snapshot.service import CaptureResult

log = logging.getLogger(__name__)

QUIET_SECONDS = 2.0
MAX_FAILURES = 3
_CLOSE_TIMEOUT = 10.0

# The null engine imports nothing, and workers on a GPU can't be captured.
_ENGINES = ("transformers",)


@dataclass(frozen=True)
class TemplateSpec:
    """What a template fixes."""

    engine: str
    device: str
    threads: int | None

    @property
    def name(self) -> str:
        """The name of its manifest."""
        return f"{self.engine} {self.device} threads={self.threads or 'all'}"


def spec_of(model: Model, settings: ModelConfig) -> TemplateSpec | None:
    """The template that a model could start from; None where there can't be one."""
    engine = settings.engine or model.engine
    if not settings.snapshot or engine not in _ENGINES or settings.device != "cpu":
        return None
    return TemplateSpec(engine, settings.device, settings.threads)


@dataclass
class _Template:
    key: dict[str, str]
    id: str | None = None
    failures: int = 0


class Templates:
    """The templates of one node. Lives on its event loop; `consider` is called after every change of anything."""

    def __init__(
        self,
        keys: Mapping[TemplateSpec, dict[str, str]],
        *,
        host: Host,
        catalog: Catalog,
        observers: list[Observer],
        log_path: Path,
        step_timeout: float,
        may_begin: Callable[[TemplateSpec], bool],
        quiet: Callable[[], bool],
        offer: Callable[[TemplateSpec, str | None], None],
        captured: Callable[[str, str, str], None],
    ) -> None:
        self._templates = {spec: _Template(key) for spec, key in keys.items()}
        self._host = host
        self._catalog = catalog
        self._observers = observers
        self._log_path = log_path
        self._step_timeout = step_timeout
        self._may_begin = may_begin
        self._quiet = quiet
        self._offer = offer
        self._captured = captured
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def find(self) -> None:
        """Look for those made by earlier nodes and offer them."""
        for spec, template in self._templates.items():
            template.id = await asyncio.to_thread(self._catalog.latest, spec.name, kind=TEMPLATE_KIND)
            self._offer(spec, template.id)

    def key(self, spec: TemplateSpec) -> dict[str, str]:
        """The compatibility key of a template."""
        return self._templates[spec].key

    def withdraw(self, template_id: str) -> None:
        """That one must not be used any more; unknown ones never were."""
        for spec, template in self._templates.items():
            if template.id == template_id:
                template.id = None
                self._offer(spec, None)

    def consider(self) -> None:
        """Begin with what is missing when it is quiet, give it up when it is not."""
        if self._closed:
            return
        if not self._quiet():
            self._give_up()
        elif self._task is None and (spec := self._missing()) is not None:
            self._task = asyncio.create_task(self._make_in_quiet(spec), name=f"template {spec.name}")
            self._task.add_done_callback(partial(self._made, spec))

    async def close(self) -> None:
        """Give up what is under way and wait for its end, but not for ever: its cell ends with the host service."""
        self._closed = True
        self._give_up()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_CLOSE_TIMEOUT)

    def _give_up(self) -> None:
        if self._task is not None and not self._task.cancelling():  # its clean-up must not be cancelled, too
            self._task.cancel()

    def _missing(self) -> TemplateSpec | None:
        for spec, template in self._templates.items():
            if template.id is None and template.failures < MAX_FAILURES and self._may_begin(spec):
                return spec
        return None

    def _made(self, spec: TemplateSpec, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._templates[spec].failures += 1
            log.error("making a template failed", exc_info=error)
        self.consider()

    async def _make_in_quiet(self, spec: TemplateSpec) -> None:
        await asyncio.sleep(QUIET_SECONDS)
        template = self._templates[spec]
        phases = Phases()
        try:
            async with asyncio.timeout(self._step_timeout):
                result = await self._make(spec, template.key, phases)
        except (DormouseError, TimeoutError) as error:
            template.failures += 1
            reason = error if isinstance(error, DormouseError) else DeadlineError("it took too long")
            log.warning("no template for %s was made: %s", spec.name, reason)
            for observer in self._observers:
                observer.capture_failed(spec.name, reason)
            return
        log.info("template %s is captured as %s: %d bytes stored", spec.name, result.snapshot_id, result.stored_bytes)
        template.id = result.snapshot_id
        template.failures = 0
        for observer in self._observers:
            observer.captured(spec.name, result, phases)
        self._captured(TEMPLATE_KIND, spec.name, result.snapshot_id)
        self._offer(spec, result.snapshot_id)

    async def _make(self, spec: TemplateSpec, key: dict[str, str], phases: Phases) -> CaptureResult:
        with phases.time("host"):
            handle = await self._host.start_worker(log_path=self._log_path)
        try:
            link = await WorkerLink.open(spec.name, handle.control, fresh=True, on_lost=_is_told)
            try:
                with phases.time("prepare"):
                    prepared = await link.prepare(Prepare(engine=spec.engine, device=spec.device, threads=spec.threads))
                with phases.time("quiesce"):
                    quiesced = await link.quiesce()
                with phases.time("capture"):
                    result = await self._host.capture(handle, model=spec.name, key=key, kind=TEMPLATE_KIND)
                phases.nest("prepare", prepared.phases, track="worker")
                phases.nest("quiesce", quiesced.phases, track="worker")
                phases.nest("capture", result.phases, track="host")
                return result
            finally:
                await link.close()
        finally:
            await _to_the_end(self._host.stop_worker(handle))


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await it even if this task is cancelled meanwhile: a worker must not be left over."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _is_told(_error: DormouseError) -> None:
    """Whoever waits for the worker gets the error; there is nobody else to tell."""
