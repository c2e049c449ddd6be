"""The drift monitor's alarm as the trainer sees it: open, and closed by a release that was activated because of it.

Why it exists: the trainer's rule needs a time and a line of text, whatever the monitor measures; and an alarm that a
refresh has answered must not ring on.
"""

from __future__ import annotations

from sqlalchemy import Engine

from byline.db.session import transaction
from byline.drift import alarms
from services.trainer.schedule import DriftAlarm


class DriftAlarms:
    """The alarms of one database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def open(self, model_id: str) -> DriftAlarm | None:
        """The open alarm of a model; None if there is none. Raises DatabaseUnavailable."""
        with transaction(self._engine) as connection:
            found = alarms.open_alarm(connection, model_id)
        return None if found is None else DriftAlarm(found.raised_at, found.reason, found.id)

    def answered(self, alarm: DriftAlarm, release_id: str) -> None:
        """A release was activated because of it."""
        if alarm.alarm_id is None:
            return
        with transaction(self._engine) as connection:
            alarms.close_alarm(connection, alarm.alarm_id, f"release {release_id}")
