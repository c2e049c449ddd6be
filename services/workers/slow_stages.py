"""How the stages of the verification queue are put together, model by model.

Why it exists: each stage knows only what it is given; what one model's stages share (its generator, its corpus, its
releases) is decided here once, and built for a further model when its first job comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from sqlalchemy import Engine

from byline.catalog.blobs import BlobStore
from byline.catalog.store import CatalogStore
from byline.config import Settings
from byline.db.session import transaction
from byline.jobs import Claim, Stage
from byline.jobs.runner import Beat, Outcome, Work
from byline.jobs.store import JobStore
from byline.rankings.controls import is_paused
from byline.rankings.store import RankingStore
from byline.releases.registry import ReleaseRegistry
from byline.security.signing import Keyring
from services.workers.estimation import EstimateStage, OpenReleases
from services.workers.models import ALL, settings_of
from services.workers.ranking import RankStage
from services.workers.scratch import Scratch
from services.workers.teacher_bench import TeacherBench
from services.workers.verification import VerifyStage

#: A client's job that waits so long for the slow queue, though its doorbell was rung, finds no idle worker.
WAITED_S = 1.0


class SlowStages:
    """The stages of every model this worker is asked about. Used by the child's main thread only.

    Each model's generator and curvature stay loaded: run workers with ``BYLINE_SERVE_MODELS`` of their own where the
    sum does not fit.
    """

    def __init__(
        self, settings: Settings, engine: Engine, store: JobStore, catalog: CatalogStore, blobs: BlobStore
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._store = store
        self._catalog = catalog
        self._blobs = blobs
        self.bench, own = self._of(settings)
        self._by_model: dict[str, Mapping[Stage, Work]] = {settings.model_id: own}

    def works(self) -> Mapping[Stage, Work]:
        """The work of each stage, for jobs of any model."""
        return {stage: self._work(stage) for stage in (Stage.ESTIMATE, Stage.VERIFY, Stage.RANK)}

    def pins(self) -> Mapping[str, None] | None:
        """Which models' jobs to take; None: all."""
        names = {name.strip() for name in self._settings.serve_models.split(",") if name.strip()}
        return None if ALL in names else dict.fromkeys(names | {self._settings.model_id})

    def _work(self, stage: Stage) -> Work:
        def work(claim: Claim, beat: Beat) -> Outcome | Mapping[str, object]:
            model_id = claim.job.model_id
            if model_id not in self._by_model:
                _, self._by_model[model_id] = self._of(settings_of(self._settings, self._catalog.model(model_id)))
            return self._by_model[model_id][stage](claim, beat)

        return work

    def _of(self, settings: Settings) -> tuple[TeacherBench, Mapping[Stage, Work]]:
        withdrawn: Callable[[], frozenset[int]] = lambda: self._catalog.withdrawn(settings.corpus_id)  # noqa: E731
        bench = TeacherBench(
            model_directory=settings.model_directory, cache_dir=settings.cache_dir, corpus_id=settings.corpus_id,
            catalog=self._catalog, blobs=self._blobs, device=settings.device, seed=settings.seed,
        )  # fmt: skip
        estimate = EstimateStage(
            store=self._store,
            releases=OpenReleases(
                ReleaseRegistry(self._engine), settings.model_id, settings.device, Keyring.parse(settings.signing_key)
            ),
            bench=bench, blobs=self._blobs, withdrawn=withdrawn, draws=settings.estimate_draws,
            clock=time.perf_counter,
        )  # fmt: skip
        verify = VerifyStage(
            store=self._store, bench=bench, blobs=self._blobs, withdrawn=withdrawn, teacher=settings.verify_teacher,
            draws=settings.verify_draws, teacher_settings=settings.verify_teacher_settings,
            racing=settings.verify_racing, clock=time.perf_counter,
        )  # fmt: skip
        rank = RankStage(
            rankings=RankingStore(self._engine), catalog=self._catalog, bench=bench, blobs=self._blobs,
            scratch=Scratch(settings.cache_dir / "ranking-jobs"), corpus_id=settings.corpus_id, withdrawn=withdrawn,
            teacher=settings.curation_teacher, draws=settings.curation_draws, clock=time.perf_counter,
            clients_wait=lambda: self._ranking_gives_way(settings.model_id),
        )  # fmt: skip
        return bench, {Stage.ESTIMATE: estimate, Stage.VERIFY: verify, Stage.RANK: rank}

    def _ranking_gives_way(self, model_id: str) -> bool:
        """Whether a client waits, or an operator has paused the model's curation."""
        if self._store.anybody_waits((Stage.ESTIMATE, Stage.VERIFY), WAITED_S):
            return True
        with transaction(self._engine) as connection:
            return is_paused(connection, model_id)
