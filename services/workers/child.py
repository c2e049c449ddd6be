"""The child process of a worker: everything that computes, imported and loaded after the fork.

Why it exists: it is the one place that knows how a worker is put together: engine, store, runner, release or
teacher, report. The stages themselves know only what they are given.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from byline.catalog.blobs import BlobStore
from byline.catalog.store import CatalogStore
from byline.config import Settings
from byline.db import make_engine
from byline.db.listen import DELTAS, QUEUED, WITHDRAWALS, Listener
from byline.errors import DatabaseUnavailable, TierNotAvailable
from byline.jobs import Claim, Stage
from byline.jobs.batch import BatchRunner
from byline.jobs.rows import Pins
from byline.jobs.runner import Beat, Work
from byline.jobs.store import JobStore
from byline.span_export import start_span_export
from byline.telemetry import GPU_MEMORY, WORKER_BUSY, get_logger, start_metrics
from services.workers.drain import DrainWatch
from services.workers.pump import LookupPump, Turns
from services.workers.report import WorkerReports, WorkerState

if TYPE_CHECKING:
    from services.workers.models import ServedModels
    from services.workers.teacher_bench import TeacherBench

log = get_logger(__name__)

#: One for the stage, one for its heartbeat, one for the report, one for the drain watch, one for new models, three for
#: release watches, each of which needs one for a moment. (Listeners have their own.)
_POOL_SIZE = 8
#: Seconds a thread may hold the interpreter when others wait: a lookup does not wait 5 ms for one that loads a release.
_SWITCH_S = 0.0005


class WorkerChild:
    """What one child holds from its first doorbell to its last. ``handle`` runs on its main thread only.

    A lookup worker also takes what waits without a doorbell, on a thread of its own; the two take turns.
    """

    def __init__(
        self, queue: str, settings: Settings, worker_id: str, stopping: threading.Event, *, metrics_port: int = 0,
        consume: Callable[[bool], None] = lambda consuming: None,
    ) -> None:  # fmt: skip
        """``consume`` tells the parent whether to take doorbells: not while an operator drains this worker."""
        self._queue = queue
        self._settings = settings
        self._metrics_port = metrics_port
        self._stopping = stopping
        self._engine = make_engine(settings.database_url, _POOL_SIZE, application=f"byline-{queue}")
        self._store = JobStore(self._engine, {})
        self._catalog = CatalogStore(self._engine)
        self._blobs = BlobStore(settings.blob_dir)
        self._runner = BatchRunner(
            self._store,
            worker_id,
            settings.lease_seconds,
            time.monotonic,
            heartbeat_s=settings.heartbeat_seconds,
            stop=stopping,
        )
        self._turn = Turns()
        self._models: ServedModels | None = None
        self._pump: LookupPump | None = None
        self._listener: Listener | None = None
        self._bench: TeacherBench | None = None
        self._slow_pins: Pins = None
        self._stages: Mapping[Stage, Work] = {}
        self._stop_export: Callable[[], None] = lambda: None
        self._drain = DrainWatch(
            self._engine, worker_id.rpartition(":")[0], stopping, idle=lambda: not len(self._turn), consume=consume
        )
        self._reports = WorkerReports(self._engine, worker_id, queue=queue, pid=os.getpid(), state=self._state)

    def start(self) -> None:
        """Put the stages together, then load what they need.

        What cannot be loaded is reported and tried again; raises only if the stages cannot be put together.
        """
        torch.set_num_threads(self._settings.torch_threads)
        sys.setswitchinterval(_SWITCH_S)
        try:
            start_metrics(self._metrics_port)
        except OSError as error:
            log.error("metrics_not_served", port=self._metrics_port, error=str(error))
        WORKER_BUSY.labels(self._queue).set_function(self._runner.busy.ratio)
        if self._settings.device.startswith("cuda"):
            GPU_MEMORY.labels("allocated").set_function(torch.cuda.memory_allocated)
            GPU_MEMORY.labels("reserved").set_function(torch.cuda.memory_reserved)
        self._stop_export = start_span_export(self._queue, self._settings)
        self._stages = self._lookup_stages() if self._queue == "lookup" else self._verification_stages()
        if self._models is not None:
            self._models.start()
        if self._bench is not None:
            self._bench.try_to_load()
        self._reports.start(self._settings.heartbeat_seconds)
        self._drain.start()
        if self._pump is not None and self._listener is not None:
            self._listener.start()
            self._pump.start()
        state = self._state()
        log.info("worker_ready", queue=self._queue, release_id=state.release_id, error=state.error)

    def handle(self, job_id: str, stage: str) -> None:
        """Answer one doorbell. Never raises for what happens to the job; a lost database is left to the lease.

        A child that cannot compute claims nothing: the job stays QUEUED and its doorbell is rung again.
        """
        with self._turn:  # should the pump hang, this waits with it, and the queue's time limit ends the process
            self._handle(job_id, stage)

    def _handle(self, job_id: str, stage: str) -> None:
        if not self._usable():
            log.warning("doorbell_left", job_id=job_id, stage=stage, error=self._state().error)
            return
        wanted = Stage(stage)
        work = self._stages.get(wanted, _refuse)
        pins: Pins = self._models.pins() if self._models is not None else self._slow_pins
        try:
            self._runner.run(job_id, wanted, work, pins)
        except DatabaseUnavailable as error:
            log.warning("doorbell_dropped", job_id=job_id, stage=stage, reason=error.reason)

    def _usable(self) -> bool:
        """Whether this child can compute; what could not be loaded is tried again here."""
        if self._models is not None and not self._models.pins():
            return False
        if self._bench is not None and not self._bench.try_to_load():
            return False
        return bool(self._stages)

    def close(self) -> None:
        """Leave the fleet: stop the threads, take the report away, close the connections."""
        self._stopping.set()
        if self._pump is not None:
            self._pump.join(timeout_s=5.0)
        self._reports.stop()
        if self._models is not None:
            self._models.close()
        self._stop_export()
        self._engine.dispose()

    # -- how a worker is put together -----------------------------------------------------------

    def _lookup_stages(self) -> Mapping[Stage, Work]:
        from byline.releases.delta import DeltaStore
        from byline.releases.delta_view import Deltas
        from byline.releases.registry import ReleaseRegistry
        from services.workers.lookup import LookupStage
        from services.workers.models import ServedModel, ServedModels
        from services.workers.serving import EncoderShelf, Serving
        from services.workers.withdrawal import WithdrawnItems

        settings = self._settings
        encoders = EncoderShelf()

        def make(of_model: Settings) -> ServedModel:
            withdrawn = WithdrawnItems(lambda: self._catalog.withdrawn(of_model.corpus_id), time.monotonic)
            serving = Serving(
                registry=ReleaseRegistry(self._engine),
                settings=of_model,
                stop=self._stopping,
                changed=self._reports.changed,
                encoders=encoders,
            )
            deltas = Deltas(DeltaStore(self._engine), time.monotonic)  # a model's own: others do not push them out
            stage = LookupStage(
                serving=serving,
                blobs=self._blobs,
                withdrawn=withdrawn,
                max_image_bytes=settings.max_image_bytes,
                max_image_pixels=settings.max_image_pixels,
                clock=time.perf_counter,
                deltas=deltas,
            )
            return ServedModel(serving, stage, withdrawn, deltas)

        models = self._models = ServedModels(settings, self._catalog, make, self._stopping)
        pump = self._pump = LookupPump(
            self._take_waiting, self._turn, self._stopping,
            begin=lambda: torch.set_num_threads(settings.torch_threads),  # the count belongs to each thread
        )  # fmt: skip

        def heard(channel: str, payload: str) -> None:
            if channel == WITHDRAWALS:
                models.withdrawn_changed()
            elif channel == DELTAS:
                models.deltas_changed()
            elif payload == Stage.LOOKUP.value:
                pump.wake()

        def connected() -> None:
            models.withdrawn_changed()
            models.deltas_changed()
            pump.wake()

        channels = [QUEUED, WITHDRAWALS, DELTAS]
        self._listener = Listener(settings.database_url, channels, self._stopping, heard, connected)
        return {Stage.LOOKUP: models}

    def _take_waiting(self) -> bool:
        """Take lookups that wait, without a doorbell; returns whether more may wait (or another word of them comes)."""
        if self._models is None or self._drain.draining:
            return False
        pins = self._models.pins()
        if not pins:
            return False
        self._runner.run_waiting(Stage.LOOKUP, self._models, pins)
        return self._runner.more_may_wait

    def _verification_stages(self) -> Mapping[Stage, Work]:
        from services.workers.slow_stages import SlowStages

        slow = SlowStages(self._settings, self._engine, self._store, self._catalog, self._blobs)
        self._bench = slow.bench
        self._slow_pins = slow.pins()
        return slow.works()

    def _state(self) -> WorkerState:
        if self._models is not None:
            return self._models.state()
        return WorkerState(error=self._bench.error if self._bench is not None else None)


def _refuse(claim: Claim, _beat: Beat) -> Mapping[str, object]:
    """The work of a stage this worker's queue has nothing to do with."""
    raise TierNotAvailable("options.tier", f"stage {claim.stage} is not served by this worker")
