"""The alarm that agreement fell: raised once, open until somebody has dealt with it.

Why it exists: curation sees the fall, the trainer refreshes because of it, an operator wants to be told; all three
may die and start again. So an alarm is a row, at most one is open for a model, and every change is notified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Table, func, select, text
from sqlalchemy.dialects.postgresql import insert

from byline.db.curation_models import DriftAlarmRow

#: The channel that hears of alarms and of changed curation controls; the payload is the model's id.
CHANNEL = "byline_curation"
ALARMS: Table = DriftAlarmRow.metadata.tables["drift_alarms"]


@dataclass(frozen=True)
class DriftAlarm:
    """One alarm. ``closed_at`` None: nobody has dealt with it yet."""

    id: int
    model_id: str
    raised_at: datetime
    reason: str
    detail: Mapping[str, Any]
    closed_at: datetime | None
    closed_by: str | None


def open_alarm(connection: Connection, model_id: str) -> DriftAlarm | None:
    """The alarm of this model that is open; None if there is none. For whoever decides whether to refresh."""
    statement = select(ALARMS).where(ALARMS.c.model_id == model_id, ALARMS.c.closed_at.is_(None))
    row = connection.execute(statement).mappings().first()
    return None if row is None else DriftAlarm(**row)


def raise_alarm(connection: Connection, model_id: str, reason: str, detail: Mapping[str, Any]) -> bool:
    """Open an alarm, in the caller's transaction; False, and nothing done, if one is open already."""
    statement = insert(ALARMS).values(model_id=model_id, reason=reason, detail=dict(detail))
    # The partial unique index decides, so two services that see the same fall raise one alarm.
    added = connection.execute(statement.on_conflict_do_nothing().returning(ALARMS.c.id)).scalar() is not None
    if added:
        notify(connection, model_id)
    return added


def close_alarm(connection: Connection, alarm_id: int, by: str) -> bool:
    """Close an alarm, in the caller's transaction; ``by`` says who or which release. False if it is not open."""
    statement = (
        ALARMS.update()
        .where(ALARMS.c.id == alarm_id, ALARMS.c.closed_at.is_(None))
        .values(closed_at=func.now(), closed_by=by)
        .returning(ALARMS.c.model_id)
    )
    model_id = connection.execute(statement).scalar()
    if model_id is not None:
        notify(connection, str(model_id))
    return model_id is not None


def alarm_of(connection: Connection, model_id: str, alarm_id: int) -> DriftAlarm | None:
    """The model's alarm with this id, open or closed."""
    statement = select(ALARMS).where(ALARMS.c.model_id == model_id, ALARMS.c.id == alarm_id)
    row = connection.execute(statement).mappings().first()
    return None if row is None else DriftAlarm(**row)


def recent_alarms(connection: Connection, model_id: str, limit: int = 20) -> list[DriftAlarm]:
    """The model's alarms, latest first."""
    statement = select(ALARMS).where(ALARMS.c.model_id == model_id).order_by(ALARMS.c.id.desc()).limit(limit)
    return [DriftAlarm(**row) for row in connection.execute(statement).mappings()]


def notify(connection: Connection, model_id: str) -> None:
    """Tell listeners, when the caller's transaction commits, that something of curation or drift has changed."""
    connection.execute(text("SELECT pg_notify(:channel, :model)"), {"channel": CHANNEL, "model": model_id})
