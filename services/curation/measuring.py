"""Measures every new ranking once: the student against it, its shortlists, or the label that it repeats.

Why it exists: a label is a test of the head that was there before it, and only before a head has learnt from it. So
measuring belongs to curation, which sees labels first; the rows are what drift, planning and the API are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, RowMapping, text
from sqlalchemy.dialects.postgresql import insert

from byline.catalog.items import Item
from byline.db.session import transaction
from byline.drift import measure
from byline.drift.alarms import raise_alarm, recent_alarms
from byline.drift.clusters import PromptClusters, fit_clusters, store_clusters, stored_clusters
from byline.drift.report import LIVE, drift_report, label_report, publish
from byline.drift.windows import DriftRule, Fall, falls
from byline.errors import BylineError
from byline.failpoints import failpoint
from byline.rankings.curated import (
    MEASURES,
    StoredShortlist,
    active_release_id,
    asked_prompts,
    measured_rows,
    shortlist_of,
)
from byline.rankings.features import Asked
from byline.rankings.store import REPEAT_PREFIX
from byline.telemetry import get_logger
from services.curation.head import HeadView

log = get_logger(__name__)
FloatArray = NDArray[np.float32]
_NEW = text("""
    SELECT r.id, r.query_id, r.item_ids, r.tau, r.candidate_set, r.created_at, r.teacher_id, q.prompt, q.image_sha256,
        c.chosen_for, c.release_id, coalesce(i.at, c.at) AS at
    FROM rankings r JOIN queries q ON q.id = r.query_id JOIN query_choices c ON c.query_id = q.id
    LEFT JOIN live_intake i ON i.query_id = q.id AND i.purpose = c.chosen_for
    WHERE r.model_id = :model AND r.job_id IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM label_measures m WHERE m.ranking_id = r.id)
    ORDER BY r.created_at, r.id LIMIT :most
""")
_REPEATED = text("""
    SELECT item_ids, tau FROM rankings WHERE query_id = :query AND id <> :ranking
        AND split_part(teacher_id, '/', 1) = split_part(:teacher, '/', 1) AND candidate_set NOT LIKE 'repeat-%'
    ORDER BY created_at DESC, id LIMIT 1
""")


@dataclass(frozen=True)
class _Query:
    image_sha256: str
    prompt: str


@dataclass(frozen=True)
class Measurer:
    """``items`` and ``item_rows``: the corpus now and its features; ``query_rows``: those of queries; ``head_of`` a
    release id; ``prompt_rows``: unit rows of prompts, by the encoder named. ``top`` is L."""

    engine: Engine
    model_id: str
    items: Callable[[], Sequence[Item]]
    item_rows: Callable[[Sequence[Item]], FloatArray]
    query_rows: Callable[[Sequence[Asked]], FloatArray]
    head_of: Callable[[str], HeadView | None]
    prompt_rows: Callable[[Sequence[str]], FloatArray]
    encoder: str
    top: int
    rule: DriftRule
    now: Callable[[], datetime]
    seed: int = 0

    def step(self, most: int = 16) -> int:
        """Measure up to ``most`` rankings, oldest first; returns how many."""
        with transaction(self.engine) as connection:
            rows = connection.execute(_NEW, {"model": self.model_id, "most": most}).mappings().all()
            clusters = self._clusters(connection) if rows else None
        for row in rows:
            values = self._measured(row, clusters)
            with transaction(self.engine) as connection:
                connection.execute(insert(MEASURES).values(values).on_conflict_do_nothing())
                failpoint("curation.measure_before_commit")
            failpoint("curation.measure_after_commit")
        return len(rows)

    def watch(self) -> list[Fall]:
        """Publish the figures, and raise an alarm if agreement on live queries fell; returns the falls."""
        now = self.now()
        since = now - self.rule.window * (self.rule.reference_windows + 1)
        with transaction(self.engine) as connection:
            active = active_release_id(connection, self.model_id)
            rows = measured_rows(connection, self.model_id, LIVE, since)
            found = falls(rows, now, self.rule, release_id=active)
            if found and not self._lately_closed(connection, now):
                worst = max(found, key=lambda fall: fall.at_least)
                if raise_alarm(connection, self.model_id, _sentence(worst), _detail(worst, active)):
                    log.warning("drift_alarm", reason=_sentence(worst))
            drift = drift_report(connection, self.model_id, now, self.rule.window, self.rule.reference_windows)
            labels = label_report(connection, self.model_id, now)
        publish(self.model_id, drift, labels)
        return found

    def _lately_closed(self, connection: Connection, now: datetime) -> bool:
        """Whoever closed an alarm has one window to see what came of it, before the same queries alarm again."""
        closed = [alarm.closed_at for alarm in recent_alarms(connection, self.model_id, 1)]
        return bool(closed) and closed[0] is not None and now - closed[0] < self.rule.window

    def _measured(self, row: RowMapping, clusters: PromptClusters | None) -> dict[str, Any]:
        item_ids, tau = np.frombuffer(row["item_ids"], dtype="<i8"), np.frombuffer(row["tau"], dtype="<f4")
        repeat = str(row["candidate_set"]).startswith(REPEAT_PREFIX)
        values: dict[str, Any] = {
            "ranking_id": row["id"], "model_id": self.model_id, "query_id": row["query_id"], "n": len(item_ids),
            "k": 0, "kind": "repeat" if repeat else "student", "purpose": row["chosen_for"],
            "release_id": row["release_id"], "at": row["at"], "cluster": None,
        }  # fmt: skip
        try:
            if clusters is not None:
                values["cluster"] = clusters.of(self.prompt_rows([row["prompt"]]))[0]
            if repeat:
                return values | self._against_itself(row, item_ids, tau)
            return values | self._against_student(row, item_ids, tau)
        except BylineError as error:  # its picture or its release is gone: said once, and never tried again
            log.warning("label_not_measured", ranking_id=str(row["id"]), reason=error.reason, error=error.message)
            return values

    def _against_itself(self, row: RowMapping, item_ids: NDArray[np.int64], tau: FloatArray) -> dict[str, Any]:
        parameters = {"query": row["query_id"], "ranking": row["id"], "teacher": row["teacher_id"]}
        with transaction(self.engine) as connection:
            first = connection.execute(_REPEATED, parameters).mappings().first()
        if first is None:
            return {}
        known = dict(zip(np.frombuffer(first["item_ids"], dtype="<i8").tolist(),
                         np.frombuffer(first["tau"], dtype="<f4").tolist(), strict=True))  # fmt: skip
        both = np.array([item_id in known for item_id in item_ids.tolist()], dtype=bool)
        other = np.array([known[item_id] for item_id in item_ids[both].tolist()], dtype=np.float32)
        return _agreement(measure.agree(other, tau[both]))

    def _against_student(self, row: RowMapping, item_ids: NDArray[np.int64], tau: FloatArray) -> dict[str, Any]:
        with transaction(self.engine) as connection:
            lists = shortlist_of(connection, row["query_id"], row["candidate_set"])
        items = self.items()
        ids = np.array([item.item_id for item in items], dtype=np.int64)
        values: dict[str, Any] = {}
        if lists is not None:
            top = min(self.top, (len(item_ids) - int(np.isin(item_ids, lists.explored).sum())) // 2)
            found = measure.pruning(item_ids, tau, lists.explored, lists.outside, top) if top else None
            values |= {} if found is None else {"lost": found.lost, "missed": found.missed}
        head = None if row["release_id"] is None else self.head_of(row["release_id"])
        if head is None:
            return values
        query = self.query_rows([_Query(row["image_sha256"], row["prompt"])])[0]
        scores = head.scores(query, ids, self.item_rows(items))
        place = {item_id: number for number, item_id in enumerate(ids.tolist())}
        there = np.array([item_id in place for item_id in item_ids.tolist()], dtype=bool)  # some are withdrawn since
        student = scores[[place[item_id] for item_id in item_ids[there].tolist()]]
        values |= _agreement(measure.agree(student, tau[there]))
        return values | self._calibration(head, ids, scores, item_ids[there], tau[there], lists)

    def _calibration(self, head: HeadView, ids: NDArray[np.int64], scores: FloatArray, ranked: NDArray[np.int64],
                     tau: FloatArray, lists: StoredShortlist | None) -> dict[str, Any]:
        """Only where the ranking tells what the corpus's top is: it is of all items, or says what it was drawn from."""
        if lists is None and len(ranked) < len(ids):
            return {}
        explored, outside = (np.zeros(0, np.int64), 0) if lists is None else (lists.explored, lists.outside)
        threshold = measure.top_threshold(ranked, tau, explored, outside, head.calibrator.top or self.top)
        said = head.probabilities(ids, scores, measure.OVERLAP_AT)
        found = None if threshold is None else measure.calibrated(ranked, said, tau, threshold)
        return {} if found is None else {"predicted": found.predicted, "observed": found.observed}

    def _clusters(self, connection: Connection) -> PromptClusters | None:
        stored = stored_clusters(connection, self.model_id)
        if stored is not None:
            return stored if stored.encoder == self.encoder else None
        prompts, _ = asked_prompts(connection, self.model_id, 4096)
        fitted = fit_clusters(self.prompt_rows(prompts), prompts, self.encoder, self.seed) if prompts else None
        return None if fitted is None else store_clusters(connection, self.model_id, fitted)


def _agreement(found: measure.Agreement) -> dict[str, Any]:
    return {"k": found.k, "overlap": _maybe(found.overlap), "spearman": _maybe(found.spearman)}


def _maybe(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _sentence(fall: Fall) -> str:
    where = "all live queries" if fall.cluster is None else f"live queries of cluster {fall.cluster}"
    return (f"overlap on {where} fell from {fall.before.value:.3f} ({fall.before.n} queries) to {fall.now.value:.3f} "
            f"({fall.now.n}), by {fall.at_least:.3f} at least")


def _detail(fall: Fall, release_id: str | None) -> dict[str, Any]:
    return {"cluster": fall.cluster, "before": fall.before.value, "now": fall.now.value, "at_least": fall.at_least,
            "queries": fall.now.n, "release_id": release_id}
