"""Drift: how far the student has come to differ from its teacher on what clients ask, and when that is an alarm.

Why it exists: gates judge a release on the labels of its time; prompts move on. Live lookups of clients that opted in
are ranked by the teacher in the background, each measured against the release that answered it, and summed up by time
window and prompt cluster. ``measure`` and ``windows`` are pure, ``store`` and ``alarms`` are rows.
"""

from byline.drift.alarms import DriftAlarm, close_alarm, open_alarm, raise_alarm

__all__ = ["DriftAlarm", "close_alarm", "open_alarm", "raise_alarm"]
