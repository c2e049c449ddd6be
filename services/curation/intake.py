"""Takes from clients' jobs, if their client opted in: verifications become labels, a share of lookups drift samples.

Why it exists: what people ask in earnest is the best sample of what they will ask, and a verified answer has been paid
for already. Every step is one transaction that may be repeated; a crash leaves a job taken, or not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Engine

from byline.catalog.blobs import BlobStore
from byline.db.session import transaction
from byline.drift.report import SAMPLES_DROPPED
from byline.drift.windows import DriftRule
from byline.failpoints import failpoint
from byline.rankings import live
from byline.rankings.controls import CurationControl
from byline.rankings.curated import add_choice
from byline.rankings.store import RankingStore
from byline.telemetry import RANKINGS_ADDED, get_logger
from services.curation.plan import PlannedQuery
from services.curation.prompts import PromptGroups, live_seed

log = get_logger(__name__)
#: Jobs looked at in one step.
_MOST = 64


@dataclass(frozen=True)
class Intake:
    """``groups``: group and split of prompts, as known now; ``withdrawn``: items that no label may name any more."""

    engine: Engine
    rankings: RankingStore
    blobs: BlobStore
    model_id: str
    groups: Callable[[], PromptGroups]
    withdrawn: Callable[[], frozenset[int]]

    def step(self, control: CurationControl) -> int:
        """Sample lookups, and turn verifications into labels; returns how many labels were added."""
        with transaction(self.engine) as connection:
            dropped = live.drop_stale_samples(connection, self.model_id, DriftRule().window)
            live.forget_void(connection, self.model_id)
            live.sample_lookups(connection, self.model_id, control.drift_share)
            verified = live.verified_jobs(connection, self.model_id, _MOST)
        if dropped:
            SAMPLES_DROPPED.labels(self.model_id).inc(dropped)
            log.warning("drift_samples_dropped", samples=dropped, why="they waited longer than a window")
        if not verified:
            return 0
        groups, gone = self.groups(), self.withdrawn()
        return sum(self._label(one, groups, gone) for one in verified)

    def samples(self, most: int, known: frozenset[tuple[str, int]]) -> list[PlannedQuery]:
        """Drift samples to ask the teacher about, newest first. Those that cannot be asked are voided."""
        if most <= 0:
            return []
        with transaction(self.engine) as connection:
            waiting = live.waiting_samples(connection, self.model_id, most)
        if not waiting:
            return []
        groups = self.groups()
        found: dict[tuple[str, int], PlannedQuery] = {}
        for query in waiting:
            planned = self._planned(query, groups, "drift")
            key = (query.prompt, live_seed(query.image_sha256))
            why = ""
            if planned is None:
                why = "its picture is gone, or its prompt repeats prompts of two splits"
            elif key in known or key in found:
                why = "its query has a label, or waits for one"
            if why or planned is None:
                with transaction(self.engine) as connection:
                    live.void_sample(connection, query.job_id, why)
            else:
                found[key] = planned
        return list(found.values())

    def possible(self, most: int) -> list[PlannedQuery]:
        """Opted-in queries that might be labelled like any caption, for the planner to choose from."""
        with transaction(self.engine) as connection:
            recent = live.recent_queries(connection, self.model_id, most)
        groups = self.groups() if recent else None
        found = [] if groups is None else [self._planned(query, groups, "live") for query in recent]
        return [planned for planned in found if planned is not None]

    def _planned(self, query: live.LiveQuery, groups: PromptGroups, purpose: str) -> PlannedQuery | None:
        place = groups.of(query.prompt)
        if place is None or not self.blobs.exists(query.image_sha256):
            return None
        # Only a drift sample is a test of the release that answered it: it was drawn, not chosen.
        drawn = purpose == "drift"
        return PlannedQuery(
            query.prompt, live_seed(query.image_sha256), *place, source="live", image_sha256=query.image_sha256,
            asked_by=query.job_id if drawn else None, release_id=query.release_id if drawn else None,
            chosen_for=purpose,
        )  # fmt: skip

    def _label(self, one: live.Verified, groups: PromptGroups, gone: frozenset[int]) -> int:
        query = one.query
        ranking = None if one.result is None else live.ranking_of(one.result, gone)
        place = groups.of(query.prompt)
        why = "" if ranking else "it holds no verified answer"
        why = why if place else "its prompt repeats prompts of two splits"
        with transaction(self.engine) as connection:
            if ranking is None or place is None:
                live.intake_labelled(connection, self.model_id, query, None, why)
                return 0
            query_id = self.rankings.add_query(
                connection, model_id=self.model_id, prompt=query.prompt, seed=live_seed(query.image_sha256),
                split=place[1], near_duplicate_group=place[0], image_sha256=query.image_sha256, source="live",
            )  # fmt: skip
            add_choice(connection, query_id, self.model_id, "live", query.release_id)
            if not live.intake_labelled(connection, self.model_id, query, query_id, ""):
                return 0
            added = self.rankings.add_ranking(connection, query_id, ranking, job_id=query.job_id)
            failpoint("curation.intake_before_commit")
        failpoint("curation.intake_after_commit")
        if added:
            RANKINGS_ADDED.labels("client").inc()
            log.info("label_from_client", job_id=str(query.job_id), items=len(ranking.item_ids), split=place[1])
        return int(added)
