"""Puts the parts of curation together: which plan, which chooser, which measures, over which rows.

Why it exists: the loop and its parts know only what they are given; here it is decided what that is. Loads torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime

import torch
from sqlalchemy import Engine

from byline.catalog.blobs import BlobStore
from byline.catalog.store import CatalogStore
from byline.config import Settings
from byline.db.session import transaction
from byline.diffusion.model import DiffusionModel
from byline.drift.windows import DriftRule
from byline.features.extractor import load_extractor
from byline.jobs.states import Stage
from byline.jobs.store import JobStore
from byline.rankings.controls import (
    CurationControl,
    allowance,
    hold_rankings,
    is_paused,
    read_control,
    spent,
    window_of,
)
from byline.rankings.curated import (
    asked_prompts,
    choices_made,
    labels_made,
    rankings_made,
    repeatable,
    stored_places,
)
from byline.rankings.features import Asked, LabelFeatures
from byline.rankings.store import RankingStore
from byline.releases.registry import ReleaseRegistry
from byline.security.signing import Keyring
from byline.teachers.ranking import ignore_progress
from byline.telemetry import CURATION_FULL
from services.curation.chooser import Chooser, Labelled
from services.curation.generate import Generator, Prefilter, PromptRows, text_encoder
from services.curation.head import Heads
from services.curation.intake import Intake
from services.curation.loop import Curator
from services.curation.measuring import FloatArray, Measurer
from services.curation.plan import PlannedQuery, by_chance, group_splits, plan_queries, prompt_groups
from services.curation.produce import Labelling, Producer
from services.curation.prompts import PromptGroups, interleaved, plan_of_file, read_prompts, without_leaks

#: Prompts that the planner keeps its distance from, at most; the latest of them.
_ASKED = 20_000
#: Live queries in the pool, at most.
_LIVE = 200


class Wiring:
    """Everything one curation service holds. ``stop`` ends the generation of a batch."""

    def __init__(self, engine: Engine, settings: Settings, stop: threading.Event) -> None:
        torch.set_num_threads(settings.torch_threads)
        self._engine, self._settings = engine, settings
        self._catalog, self._rankings = CatalogStore(engine), RankingStore(engine)
        self._blobs = BlobStore(settings.blob_dir)
        self._store = JobStore(engine, {Stage.RANK: settings.verification_queue_bound})
        model = DiffusionModel.load(settings.model_directory, settings.device)
        extractor = load_extractor(settings.feature_spec, device=settings.device, model=model, cache=settings.cache_dir)
        self._features = LabelFeatures(extractor, self._blobs, settings.cache_dir, settings.corpus_id)
        self._prompt_rows = PromptRows(
            text_encoder(settings.feature_spec, settings.device), settings.cache_dir / "features", settings.corpus_id
        )
        self._file = read_prompts(settings.curation_prompt_file) if settings.curation_prompt_file else []
        heads = Heads(
            ReleaseRegistry(engine), settings.model_id, extractor.preprocessing_hash,
            keyring=Keyring.parse(settings.signing_key),
        )  # fmt: skip
        self._producer = Producer(
            engine, self._store, self._rankings, self._blobs, settings.model_id,
            Labelling(settings.curation_teacher, settings.curation_draws, settings.curation_teacher_settings),
            Generator(model, settings.curation_sampling_steps, settings.curation_guidance),
            None if settings.curation_candidates == 0 else Prefilter(
                self._catalog, self._features, extractor, settings.corpus_id, count=settings.curation_candidates,
                explore_share=settings.curation_explore_share, heads=heads,
            ),
            lambda: stop.is_set() or self._paused(),
        )  # fmt: skip
        self._intake = Intake(
            engine, self._rankings, self._blobs, settings.model_id, self._groups,
            lambda: self._catalog.withdrawn(settings.corpus_id),
        )
        self._measurer = Measurer(
            engine, settings.model_id,
            lambda: self._features.readable(self._catalog.items(settings.corpus_id), ignore_progress),
            lambda items: self._features.of_items(items, ignore_progress), self._query_rows, heads.of,
            self._prompt_rows, self._prompt_rows.encoder, settings.gate_map_at, DriftRule(),
            lambda: datetime.now(UTC), settings.seed,
        )  # fmt: skip

    def curator(self) -> Curator:
        """The loop over all of it."""
        settings = self._settings
        return Curator(
            self._producer, self._plan, self._open_jobs, self._count_rankings,
            target_open=settings.curation_target_open, max_rankings=settings.curation_max_rankings,
            batch=settings.curation_batch,
            choose=Chooser(self._prompt_rows, self._labelled, self._chosen, settings.seed), by_chance=self._by_chance,
            usable=self._usable,
            control=self._control, allowance=self._allowance, samples=self._intake.samples, repeat=self._repeat,
            aside=self._beside, full=CURATION_FULL.labels(settings.model_id).set,
        )  # fmt: skip

    def _plan(self) -> Iterator[PlannedQuery]:
        return interleaved(*self._sources(self._settings.seed), self._intake.possible(_LIVE))

    def _by_chance(self) -> Iterator[PlannedQuery]:
        """Captions and the file in another order. What clients ask is drawn by chance as samples of drift."""
        return by_chance(interleaved(*self._sources(self._settings.seed + 1)))

    def _sources(self, seed: int) -> tuple[Iterable[PlannedQuery], Iterable[PlannedQuery]]:
        settings = self._settings
        from_file = plan_of_file(self._file, self._groups(), seed) if self._file else ()
        return live_plan(self._catalog, self._rankings, settings.corpus_id, settings.model_id, seed), from_file

    def _usable(self, plan: Iterable[PlannedQuery]) -> Iterator[PlannedQuery]:
        return without_leaks(plan, self._prompt_rows, self._rankings.splits_of_prompts(self._settings.model_id))

    def _groups(self) -> PromptGroups:
        """Group and split of the corpus's captions and of every stored query."""
        settings = self._settings
        groups = prompt_groups(self._catalog.items(settings.corpus_id, include_withdrawn=True))
        splits = group_splits(groups, self._rankings.splits_of_prompts(settings.model_id))
        known = {caption: (group, split) for caption, group in groups.items() if (split := splits[group]) is not None}
        with transaction(self._engine) as connection:
            return PromptGroups(self._prompt_rows, known | stored_places(connection, settings.model_id))

    def _labelled(self) -> Labelled:
        with transaction(self._engine) as connection:
            return Labelled(*asked_prompts(connection, self._settings.model_id, _ASKED))

    def _chosen(self) -> int:
        with transaction(self._engine) as connection:
            return choices_made(connection, self._settings.model_id)

    def _control(self) -> CurationControl:
        with transaction(self._engine) as connection:
            control = read_control(connection, self._settings.model_id)
            if control.paused:  # also those that a worker gave back since the pause
                hold_rankings(connection, self._settings.model_id)
            return control

    def _paused(self) -> bool:
        with transaction(self._engine) as connection:
            return is_paused(connection, self._settings.model_id)

    def _allowance(self, control: CurationControl, count: int) -> int:
        with transaction(self._engine) as connection:
            used = spent(connection, self._settings.model_id, window_of(control, count))
        return allowance(control, used, count)

    def _repeat(self, control: CurationControl, most: int) -> bool:
        model_id = self._settings.model_id
        with transaction(self._engine) as connection:
            labelled, repeated = labels_made(connection, model_id)
            due = min(most, int(control.repeat_share * labelled) - repeated)
            found = [] if due <= 0 else repeatable(
                connection, model_id, self._settings.curation_family, due, f"{self._settings.seed}/{repeated}"
            )
        if found:
            self._producer.repeat(found)
        return bool(found)

    def _beside(self, control: CurationControl) -> None:
        if not control.paused:
            self._intake.step(control)
        if self._measurer.step():
            self._measurer.watch()

    def _query_rows(self, queries: Sequence[Asked]) -> FloatArray:
        return self._features.of_queries(queries, ignore_progress)

    def _open_jobs(self) -> int:
        return sum(depth.queued + depth.running for depth in self._store.depths() if depth.stage is Stage.RANK)

    def _count_rankings(self) -> int:
        with transaction(self._engine) as connection:
            return rankings_made(connection, self._settings.model_id)


def live_plan(
    catalog: CatalogStore, rankings: RankingStore, corpus_id: str, model_id: str, seed: int
) -> Iterator[PlannedQuery]:
    """The corpus's plan from its start, by the corpus and the stored queries of this moment."""
    # Withdrawn items stay in it: without them groups would fall apart and splits be drawn again.
    items = catalog.items(corpus_id, include_withdrawn=True)
    withdrawn = {item.item_id for item in items} - {item.item_id for item in catalog.items(corpus_id)}
    return plan_queries(items, seed, rankings.splits_of_prompts(model_id), withdrawn)
