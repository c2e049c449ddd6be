"""Which releases exist and which one is active: rows in Postgres, changed by compare-and-set.

Why it exists: "active" must be one fact for a whole fleet, changeable conditionally, reversible by the
same call and auditable. A symlink is none of these. No torch, no faiss: the gateway uses this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, func, insert, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert as pg_insert

from byline.catalog.withdrawals import lock_receipts, purged_items, reopen_receipts
from byline.db.listen import RELEASES
from byline.db.models import Base
from byline.db.session import transaction
from byline.errors import ReleaseChanged, ReleaseNotEligible, ReleaseNotFound
from byline.releases.manifest import CATALOGUE, ReleaseManifest, verify_files
from byline.telemetry import get_logger

log = get_logger(__name__)

_releases = Base.metadata.tables["releases"]
_active = Base.metadata.tables["active_releases"]
_audit = Base.metadata.tables["audit_events"]
# A release for a changed corpus alone has its parent's head: ``answering`` leads to the one whose head that is.
_ROLLED_BACK_FROM = text("""
WITH RECURSIVE known AS (
    SELECT id, parent, state, created_at, manifest->'refresh'->>'start' = 'kept'
        AND NOT coalesce(manifest->'refresh'->'triggers' @> '[{"trigger": "operator"}]', false) AS kept
    FROM releases WHERE model_id = :model
), answering AS (
    SELECT k.* FROM known k JOIN active_releases a ON a.release_id = k.id WHERE a.model_id = :model
    UNION ALL
    SELECT k.* FROM known k JOIN answering a ON a.parent = k.id WHERE a.kept
)
SELECT id FROM known
WHERE state = 'RETIRED' AND kept IS NOT TRUE AND created_at > (SELECT min(created_at) FROM answering)
ORDER BY created_at DESC, id DESC LIMIT 1
""")


class ReleaseState(StrEnum):
    """Life of a release. BUILT: registered, not judged; VALIDATED: passed the gate."""

    BUILT = "BUILT"
    VALIDATED = "VALIDATED"
    ACTIVE = "ACTIVE"
    RETIRED = "RETIRED"
    REJECTED = "REJECTED"


@dataclass(frozen=True, slots=True)
class ActiveRelease:
    """The release that answers for a model. ``epoch`` rises by one with every change."""

    model_id: str
    release_id: str
    previous_release_id: str | None
    epoch: int
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class ReleaseRecord:
    """One registered release. ``reason`` says why it was rejected or last activated.

    ``collected_at`` set: its files were removed, it cannot be loaded or activated any more.
    """

    release_id: str
    model_id: str
    state: ReleaseState
    directory: Path
    manifest: ReleaseManifest
    metrics: Mapping[str, Any]
    parent: str | None
    reason: str | None
    created_at: datetime
    collected_at: datetime | None = None


class ReleaseRegistry:
    """The ``releases`` and ``active_releases`` tables. Every method is one transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def register(self, manifest: ReleaseManifest, directory: Path) -> ReleaseRecord:
        """Record a built release (state BUILT). Registering the same manifest again changes nothing.

        ReleaseNotEligible when another release has this id. Receipts of withdrawals that were closed while it was
        built, and whose items it holds, are opened again: the next purge removes it, or waits for its successor.
        """
        row = {
            "id": manifest.release_id, "model_id": manifest.model_id, "state": ReleaseState.BUILT.value,
            "directory": str(directory), "manifest": manifest.to_json(), "metrics": dict(manifest.metrics),
            "parent": manifest.parent, "created_at": manifest.created_at,
        }  # fmt: skip
        with transaction(self._engine) as connection:
            lock_receipts(connection, manifest.corpus_id)
            connection.execute(pg_insert(_releases).values(row).on_conflict_do_nothing(index_elements=["id"]))
            purged = purged_items(connection, manifest.corpus_id)
            if purged and (held := purged & _items_in(directory, manifest)):
                reopened = reopen_receipts(connection, manifest.corpus_id, sorted(held))
                log.warning("release_holds_purged_items", release_id=manifest.release_id, items=len(held),
                            receipts=reopened)  # fmt: skip
            record = _record(connection, manifest.release_id)
        if record.manifest.digest != manifest.digest:
            raise ReleaseNotEligible(
                f"another release is registered as {manifest.release_id}", release_id=manifest.release_id
            )
        return record

    def validate(self, release_id: str, metrics: Mapping[str, Any] | None = None) -> ReleaseRecord:
        """BUILT → VALIDATED: the gate let it pass; ``metrics`` are added to the recorded ones."""
        return self._judge(release_id, ReleaseState.VALIDATED, None, metrics)

    def reject(self, release_id: str, reason: str, metrics: Mapping[str, Any] | None = None) -> ReleaseRecord:
        """BUILT or VALIDATED → REJECTED with the reason. ReleaseNotEligible when it is or was active."""
        return self._judge(release_id, ReleaseState.REJECTED, reason, metrics)

    def activate(
        self,
        model_id: str,
        release_id: str,
        expected_epoch: int | None = None,
        reason: str = "",
        principal: str = "local",
    ) -> ActiveRelease:
        """Make a release the active one, in one transaction with its notification.

        ``expected_epoch`` makes it conditional: ReleaseChanged when another activation came first (0 stands
        for "none was active"). ReleaseNotFound; ReleaseNotEligible for a rejected release or another
        model's. Activating the active release changes nothing. A BUILT release that was not judged yet may
        be activated: that is the operator's decision, and the audit trail says so.
        """
        with transaction(self._engine) as connection:
            now = _lock(connection, model_id)
            return _switch(connection, model_id, release_id, now, expected_epoch, reason, principal)

    def rollback(
        self, model_id: str, expected_epoch: int | None = None, reason: str = "rollback", principal: str = "local"
    ) -> ActiveRelease:
        """Activate the release that was active before. ReleaseNotEligible when there is none."""
        with transaction(self._engine) as connection:
            now = _lock(connection, model_id)
            current = _current(connection, model_id)
            if current is None or current.previous_release_id is None:
                raise ReleaseNotEligible(f"model {model_id} has no earlier release to go back to", model_id=model_id)
            return _switch(connection, model_id, current.previous_release_id, now, expected_epoch, reason, principal)

    @staticmethod
    def get_within(connection: Connection, release_id: str) -> ReleaseRecord:
        """As ``get``, inside the caller's transaction."""
        return _record(connection, release_id)

    @staticmethod
    def list_within(connection: Connection, model_id: str) -> list[ReleaseRecord]:
        """Every release of a model, in no particular order, inside the caller's transaction."""
        query = select(_releases).where(_releases.c.model_id == model_id)
        return [_to_record(row) for row in connection.execute(query).mappings()]

    @staticmethod
    def lock_within(connection: Connection, model_id: str) -> datetime:
        """Keep activations of a model out until the caller's transaction ends; the database's time."""
        return _lock(connection, model_id)

    @staticmethod
    def active_within(connection: Connection, model_id: str) -> ActiveRelease | None:
        """As ``active``, inside the caller's transaction."""
        return _current(connection, model_id)

    def active(self, model_id: str) -> ActiveRelease | None:
        """The active release of a model, or None before the first activation."""
        with transaction(self._engine) as connection:
            return _current(connection, model_id)

    def rolled_back_from(self, model_id: str) -> str | None:
        """The newest release that an operator went back from, None unless one did: the head that answers is older than
        one that answered before it. A newer head lifts it, be it a refresh that was asked for or an activation."""
        with transaction(self._engine) as connection:
            found: str | None = connection.execute(_ROLLED_BACK_FROM, {"model": model_id}).scalar_one_or_none()
        return found

    def get(self, release_id: str) -> ReleaseRecord:
        """One release. ReleaseNotFound."""
        with transaction(self._engine) as connection:
            return _record(connection, release_id)

    def list(
        self, model_id: str | None = None, limit: int = 100, after: tuple[datetime, str] | None = None
    ) -> list[ReleaseRecord]:
        """Releases, newest first; ``after`` is (created_at, id) of the last one of the page before."""
        query = select(_releases).order_by(_releases.c.created_at.desc(), _releases.c.id.desc()).limit(limit)
        if after is not None:
            query = query.where(tuple_(_releases.c.created_at, _releases.c.id) < after)
        if model_id is not None:
            query = query.where(_releases.c.model_id == model_id)
        with transaction(self._engine) as connection:
            return [_to_record(row) for row in connection.execute(query).mappings()]

    def _judge(
        self, release_id: str, state: ReleaseState, reason: str | None, metrics: Mapping[str, Any] | None
    ) -> ReleaseRecord:
        with transaction(self._engine) as connection:
            record = _record(connection, release_id, lock=True)
            if record.state not in (ReleaseState.BUILT, ReleaseState.VALIDATED, state):
                raise ReleaseNotEligible(
                    f"release {release_id} is {record.state} and cannot become {state}",
                    release_id=release_id, state=record.state,
                )  # fmt: skip
            values: dict[str, Any] = {"state": state.value, "metrics": {**record.metrics, **(metrics or {})}}
            if reason is not None:
                values["reason"] = reason
            connection.execute(update(_releases).where(_releases.c.id == release_id).values(values))
            return _record(connection, release_id)


def _items_in(directory: Path, manifest: ReleaseManifest) -> frozenset[int]:
    """The items of a release that is being registered; ``manifest`` is what its builder made, and vouches for it."""
    from byline.releases.catalogue import catalogue_ids

    path = directory / CATALOGUE
    if not path.is_file():
        return frozenset()
    verify_files(directory, manifest, (CATALOGUE,))
    return frozenset(catalogue_ids(path).tolist())


def _lock(connection: Connection, model_id: str) -> datetime:
    """Serialise the changes of one model (also the very first, when there is no row yet); the database's time."""
    connection.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 0))"), {"key": f"release:{model_id}"})
    now: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
    return now


def _switch(
    connection: Connection, model_id: str, release_id: str, now: datetime,
    expected_epoch: int | None, reason: str, principal: str,
) -> ActiveRelease:  # fmt: skip
    current = _current(connection, model_id)
    epoch = current.epoch if current else 0
    if expected_epoch is not None and expected_epoch != epoch:
        raise ReleaseChanged(
            f"the active release of {model_id} changed meanwhile: its epoch is {epoch}, not {expected_epoch}",
            model_id=model_id, epoch=epoch, expected_epoch=expected_epoch,
        )  # fmt: skip
    record = _record(connection, release_id, lock=True)
    if record.model_id != model_id:
        raise ReleaseNotEligible(
            f"release {release_id} belongs to model {record.model_id}, not {model_id}", release_id=release_id
        )
    if record.state is ReleaseState.REJECTED:
        raise ReleaseNotEligible(f"release {release_id} was rejected: {record.reason}", release_id=release_id)
    if record.collected_at is not None:
        raise ReleaseNotEligible(
            f"the files of release {release_id} were removed on {record.collected_at:%Y-%m-%d}; refresh instead",
            release_id=release_id,
        )
    if current is not None and current.release_id == release_id:
        return current
    previous = current.release_id if current else None
    connection.execute(
        update(_releases).where(_releases.c.id == release_id).values(state="ACTIVE", reason=reason or record.reason)
    )
    values = {"release_id": release_id, "previous_release_id": previous, "epoch": epoch + 1, "updated_at": now}
    if current is None:
        connection.execute(insert(_active).values(model_id=model_id, **values))
    else:
        connection.execute(update(_releases).where(_releases.c.id == previous).values(state="RETIRED"))
        connection.execute(update(_active).where(_active.c.model_id == model_id).values(values))
    connection.execute(
        insert(_audit).values(
            at=now, principal=principal, action="ActivateRelease", resource=f"releases/{release_id}",
            decision="ALLOWED",
            detail={"model_id": model_id, "from": previous, "epoch": epoch + 1, "state": record.state, "why": reason},
        )
    )  # fmt: skip
    connection.execute(select(func.pg_notify(RELEASES, model_id)))
    return ActiveRelease(model_id, release_id, previous, epoch + 1, now)


def _current(connection: Connection, model_id: str) -> ActiveRelease | None:
    row = connection.execute(select(_active).where(_active.c.model_id == model_id)).mappings().one_or_none()
    if row is None:
        return None
    return ActiveRelease(
        row["model_id"], row["release_id"], row["previous_release_id"], row["epoch"], row["updated_at"]
    )


def _record(connection: Connection, release_id: str, lock: bool = False) -> ReleaseRecord:
    query = select(_releases).where(_releases.c.id == release_id)
    row = connection.execute(query.with_for_update() if lock else query).mappings().one_or_none()
    if row is None:
        raise ReleaseNotFound(f"no release is registered as {release_id}", release_id=release_id)
    return _to_record(row)


def _to_record(row: Mapping[Any, Any]) -> ReleaseRecord:
    return ReleaseRecord(
        release_id=row["id"], model_id=row["model_id"], state=ReleaseState(row["state"]),
        directory=Path(row["directory"]), manifest=ReleaseManifest.from_json(row["manifest"]),
        metrics=row["metrics"] or {}, parent=row["parent"], reason=row["reason"], created_at=row["created_at"],
        collected_at=row["collected_at"],
    )  # fmt: skip
