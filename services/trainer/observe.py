"""What the trainer looks at every few seconds: labels, corpus, drift alarms and operators' requests.

Why it exists: the rule (``schedule``) is a pure function; this is where its facts come from, cheap enough to be asked
for as long as the system lives. Times are the database's, the present one too (``now``): machines need not agree on
theirs.
"""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from sqlalchemy import Engine, text

from byline.catalog.store import CatalogStore
from byline.db.session import database_time, transaction
from byline.errors import ModelNotFound
from byline.rankings.labelled import count_rankings
from byline.releases.manifest import ReleaseManifest
from byline.releases.registry import ReleaseRegistry, ReleaseState
from byline.releases.requests import RefreshRequests
from services.trainer.leftovers import ABANDONED
from services.trainer.record import left_out_items
from services.trainer.schedule import CorpusChange, DriftAlarm, LastRefresh, Observed, RefreshAsked


class Alarms(Protocol):
    """The drift monitor; ``services.trainer.alarms.DriftAlarms`` is one."""

    def open(self, model_id: str) -> DriftAlarm | None:
        """The open alarm of a model; None if there is none."""
        ...

    def answered(self, alarm: DriftAlarm, release_id: str) -> None:
        """A release was activated because of it."""
        ...


# Items that came and went between the snapshot and now concern no release.
_CHANGES = text("""
SELECT count(*) FILTER (WHERE withdrawn_at IS NULL) AS live,
    count(*) FILTER (WHERE withdrawn_at IS NULL AND created_at > :since) AS added,
    count(*) FILTER (WHERE withdrawn_at > :since AND created_at <= :since) AS withdrawn,
    max(GREATEST(created_at, withdrawn_at)) FILTER (
        WHERE (withdrawn_at IS NULL AND created_at > :since) OR (withdrawn_at > :since AND created_at <= :since)
    ) AS last_at
FROM items WHERE corpus_id = :corpus
""")


class Observer:
    """Looks at one model. Without ``alarms`` nobody watches for drift."""

    def __init__(
        self, engine: Engine, model_id: str, teacher_family: str, alarms: Alarms | None = None
    ) -> None:
        self._engine = engine
        self._model_id = model_id
        self._family = teacher_family
        self._alarms = alarms
        self._registry = ReleaseRegistry(engine)
        self._requests = RefreshRequests(engine)
        self._catalog = CatalogStore(engine)

    def look(self) -> Observed:
        """The facts of this moment. Raises DatabaseUnavailable."""
        asked = tuple(
            RefreshAsked(one.request_id, one.principal, one.reason) for one in self._requests.waiting(self._model_id)
        )
        alarm = self._alarms.open(self._model_id) if self._alarms is not None else None
        return Observed(count_rankings(self._engine, self._model_id, self._family), self._corpus(), alarm, asked,
                        self._registry.rolled_back_from(self._model_id))

    def now(self) -> datetime:
        """The database's time, which all others here are compared with. Raises DatabaseUnavailable."""
        return database_time(self._engine)

    def last(self) -> LastRefresh | None:
        """The newest candidate of the model that was published or refused."""
        return last_refresh(self._registry, self._model_id)

    def _corpus(self) -> CorpusChange | None:
        active = self._registry.active(self._model_id)
        if active is None:
            return None
        manifest = self._registry.get(active.release_id).manifest
        try:
            corpus_id = self._catalog.model(self._model_id).corpus_id
        except ModelNotFound:
            return None
        return corpus_change(self._engine, corpus_id, manifest)


def corpus_change(engine: Engine, corpus_id: str, manifest: ReleaseManifest) -> CorpusChange | None:
    """How the corpus differs from the one a release was built from; None if it does not."""
    since: datetime = manifest.refresh.snapshot_at if manifest.refresh is not None else manifest.created_at
    with transaction(engine) as connection:
        row = connection.execute(_CHANGES, {"since": since, "corpus": corpus_id}).mappings().one()
    added, withdrawn = int(row["added"]), int(row["withdrawn"])
    if added or withdrawn:
        return CorpusChange(added, withdrawn, row["last_at"])
    # Rows of a long transaction carry the time of its beginning: they show in the number alone.
    more = int(row["live"]) - manifest.items - left_out_items(manifest.metrics)
    return CorpusChange(max(more, 0), max(-more, 0), None) if more else None


def last_refresh(registry: ReleaseRegistry, model_id: str) -> LastRefresh | None:
    """The newest candidate of the model that was published or refused.

    One that is still BUILT or VALIDATED, or was given up, is the remains of a trainer that was killed before it had
    judged or activated it: its labels are to be learnt from again.
    """
    unfinished = (ReleaseState.BUILT, ReleaseState.VALIDATED)
    newest = next(
        (record for record in registry.list(model_id)
         if record.state not in unfinished and not (record.reason or "").startswith(ABANDONED)), None,
    )  # fmt: skip
    return LastRefresh(newest.manifest.labels.queries, newest.created_at) if newest else None
