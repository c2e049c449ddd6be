"""The child process of a worker: everything that computes, imported and loaded after the fork.

Why it exists: it is the one place that knows how a worker is put together: engine, store, runner, release or
teacher, report. The stages themselves know only what they are given.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from byline.catalog.blobs import BlobStore
from byline.catalog.store import CatalogStore
from byline.config import Settings
from byline.db import make_engine
from byline.errors import DatabaseUnavailable, TierNotAvailable
from byline.jobs import Claim, Stage
from byline.jobs.runner import Beat, StageRunner, Work
from byline.jobs.store import JobStore
from byline.telemetry import get_logger, start_metrics
from services.workers.report import WorkerReports, WorkerState

if TYPE_CHECKING:
    from services.workers.serving import Serving
    from services.workers.teacher_bench import TeacherBench

log = get_logger(__name__)

#: One for the stage, one for its heartbeat, one for the report, one for the release watch.
_POOL_SIZE = 4
#: A client's job that waits so long for the slow queue, though its doorbell was rung, finds no idle worker.
_WAITED_S = 1.0


class WorkerChild:
    """What one child holds from its first doorbell to its last. ``handle`` runs on its main thread only."""

    def __init__(
        self, queue: str, settings: Settings, worker_id: str, stopping: threading.Event, *, metrics_port: int = 0
    ) -> None:
        self._queue = queue
        self._settings = settings
        self._metrics_port = metrics_port
        self._stopping = stopping
        self._engine = make_engine(settings.database_url, _POOL_SIZE, application=f"byline-{queue}")
        self._store = JobStore(self._engine, {})
        self._catalog = CatalogStore(self._engine)
        self._blobs = BlobStore(settings.blob_dir)
        self._runner = StageRunner(
            self._store,
            worker_id,
            settings.lease_seconds,
            time.monotonic,
            heartbeat_s=settings.heartbeat_seconds,
            stop=stopping,
        )
        self._serving: Serving | None = None
        self._bench: TeacherBench | None = None
        self._stages: Mapping[Stage, Work] = {}
        self._reports = WorkerReports(self._engine, worker_id, queue=queue, pid=os.getpid(), state=self._state)

    def start(self) -> None:
        """Put the stages together, then load what they need.

        What cannot be loaded is reported and tried again; raises only if the stages cannot be put together.
        """
        torch.set_num_threads(self._settings.torch_threads)
        try:
            start_metrics(self._metrics_port)
        except OSError as error:
            log.error("metrics_not_served", port=self._metrics_port, error=str(error))
        self._stages = self._lookup_stages() if self._queue == "lookup" else self._verification_stages()
        if self._serving is not None:
            self._serving.start()
        if self._bench is not None:
            self._bench.try_to_load()
        self._reports.start(self._settings.heartbeat_seconds)
        state = self._state()
        log.info("worker_ready", queue=self._queue, release_id=state.release_id, error=state.error)

    def handle(self, job_id: str, stage: str) -> None:
        """Answer one doorbell. Never raises for what happens to the job; a lost database is left to the lease.

        A child that cannot compute claims nothing: the job stays QUEUED and its doorbell is rung again.
        """
        if not self._usable():
            log.warning("doorbell_left", job_id=job_id, stage=stage, error=self._state().error)
            return
        wanted = Stage(stage)
        work = self._stages.get(wanted, _refuse)
        release_id = self._serving.current_id() if self._serving is not None else None
        try:
            self._runner.run(job_id, wanted, work, release_id)
        except DatabaseUnavailable as error:
            log.warning("doorbell_dropped", job_id=job_id, stage=stage, reason=error.reason)

    def _usable(self) -> bool:
        """Whether this child can compute; what could not be loaded is tried again here."""
        if self._serving is not None and self._serving.current_id() is None and self._serving.state().error is not None:
            return False
        if self._bench is not None and not self._bench.try_to_load():
            return False
        return bool(self._stages)

    def close(self) -> None:
        """Leave the fleet: stop the threads, take the report away, close the connections."""
        self._stopping.set()
        self._reports.stop()
        if self._serving is not None:
            self._serving.close()
        self._engine.dispose()

    # -- how a worker is put together -----------------------------------------------------------

    def _lookup_stages(self) -> Mapping[Stage, Work]:
        from byline.releases.registry import ReleaseRegistry
        from services.workers.lookup import LookupStage
        from services.workers.serving import Serving

        settings = self._settings
        self._serving = Serving(
            registry=ReleaseRegistry(self._engine),
            settings=settings,
            stop=self._stopping,
            changed=self._reports.changed,
        )
        lookup = LookupStage(
            serving=self._serving,
            blobs=self._blobs,
            withdrawn=self._withdrawn,
            max_image_bytes=settings.max_image_bytes,
            max_image_pixels=settings.max_image_pixels,
            clock=time.perf_counter,
        )
        return {Stage.LOOKUP: lookup}

    def _verification_stages(self) -> Mapping[Stage, Work]:
        from byline.rankings.store import RankingStore
        from byline.releases.registry import ReleaseRegistry
        from services.workers.estimation import EstimateStage, OpenReleases
        from services.workers.ranking import RankStage
        from services.workers.scratch import Scratch
        from services.workers.teacher_bench import TeacherBench
        from services.workers.verification import VerifyStage

        settings = self._settings
        bench = self._bench = TeacherBench(
            model_directory=settings.model_directory,
            cache_dir=settings.cache_dir,
            corpus_id=settings.corpus_id,
            catalog=self._catalog,
            blobs=self._blobs,
            device=settings.device,
            seed=settings.seed,
        )
        estimate = EstimateStage(
            store=self._store,
            releases=OpenReleases(ReleaseRegistry(self._engine), settings.model_id),
            bench=bench,
            blobs=self._blobs,
            withdrawn=self._withdrawn,
            draws=settings.estimate_draws,
            clock=time.perf_counter,
        )
        verify = VerifyStage(
            store=self._store,
            bench=bench,
            blobs=self._blobs,
            withdrawn=self._withdrawn,
            teacher=settings.verify_teacher,
            draws=settings.verify_draws,
            teacher_settings=settings.verify_teacher_settings,
            racing=settings.verify_racing,
            clock=time.perf_counter,
        )
        rank = RankStage(
            rankings=RankingStore(self._engine),
            catalog=self._catalog,
            bench=bench,
            blobs=self._blobs,
            scratch=Scratch(settings.cache_dir / "ranking-jobs"),
            corpus_id=settings.corpus_id,
            withdrawn=self._withdrawn,
            teacher=settings.curation_teacher,
            draws=settings.curation_draws,
            clock=time.perf_counter,
            clients_wait=lambda: self._store.anybody_waits((Stage.ESTIMATE, Stage.VERIFY), _WAITED_S),
        )
        return {Stage.ESTIMATE: estimate, Stage.VERIFY: verify, Stage.RANK: rank}

    def _withdrawn(self) -> frozenset[int]:
        return self._catalog.withdrawn(self._settings.corpus_id)

    def _state(self) -> WorkerState:
        if self._serving is not None:
            return self._serving.state()
        return WorkerState(error=self._bench.error if self._bench is not None else None)


def _refuse(claim: Claim, _beat: Beat) -> Mapping[str, object]:
    """The work of a stage this worker's queue has nothing to do with."""
    raise TierNotAvailable("options.tier", f"stage {claim.stage} is not served by this worker")
