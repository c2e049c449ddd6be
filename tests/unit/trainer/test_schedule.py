"""When to refresh."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from services.trainer.schedule import LastRefresh, RefreshRule, refresh_due, start_warm

RULE = RefreshRule(min_new=8, interval=timedelta(hours=1))
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_the_first_refresh_waits_for_enough_rankings():
    assert not refresh_due(7, None, NOW, RULE)
    assert refresh_due(8, None, NOW, RULE)


def test_enough_new_rankings_trigger_at_once_and_few_only_after_the_interval():
    last = LastRefresh(rankings=100, at=NOW - timedelta(minutes=5))
    assert refresh_due(108, last, NOW, RULE)
    assert not refresh_due(107, last, NOW, RULE)
    assert refresh_due(101, last, NOW + timedelta(hours=1), RULE)


def test_without_new_rankings_nothing_happens_however_long_it_was():
    assert not refresh_due(100, LastRefresh(100, NOW - timedelta(days=9)), NOW, RULE)


def test_a_head_is_continued_while_labels_grow_little():
    assert start_warm(110, 100)
    assert not start_warm(130, 100)
    assert not start_warm(130, 0)
