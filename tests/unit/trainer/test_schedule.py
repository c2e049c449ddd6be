"""When to refresh, and for which reasons."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta

from services.trainer.schedule import (
    CorpusChange,
    DriftAlarm,
    Due,
    LastRefresh,
    Observed,
    RefreshAsked,
    RefreshRule,
    Trigger,
    keeps_head,
    needs_fit,
    refresh_due,
)

RULE = RefreshRule(min_new=8, interval=timedelta(hours=1), settle=timedelta(minutes=1))
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
LONG_AGO = LastRefresh(100, NOW - timedelta(days=1))


def triggers(seen: Observed, last: LastRefresh | None, now: datetime = NOW) -> list[Trigger]:
    return [due.trigger for due in refresh_due(seen, last, now, RULE)]


def ago(**delta: float) -> datetime:
    return NOW - timedelta(**delta)


def test_the_first_refresh_waits_for_enough_rankings():
    assert triggers(Observed(7), None) == []
    assert triggers(Observed(8), None) == [Trigger.RANKINGS]


def test_enough_new_rankings_trigger_at_once_and_few_only_after_the_interval():
    last = LastRefresh(rankings=100, at=ago(minutes=5))
    assert triggers(Observed(108), last) == [Trigger.RANKINGS]
    assert triggers(Observed(107), last) == []
    assert triggers(Observed(101), last, NOW + timedelta(hours=1)) == [Trigger.INTERVAL]


def test_without_news_nothing_happens_however_long_it_was():
    assert triggers(Observed(100), LONG_AGO) == []


def test_a_changed_corpus_triggers_once_it_has_been_still():
    last = LastRefresh(100, ago(minutes=10))
    assert triggers(Observed(100, CorpusChange(5, 0, ago(seconds=20))), last) == []
    assert triggers(Observed(100, CorpusChange(0, 2, ago(minutes=2))), last) == [Trigger.CORPUS]


def test_a_corpus_that_was_tried_is_tried_again_when_it_changes_again_or_after_the_interval():
    change = CorpusChange(5, 0, ago(minutes=20))
    tried = LastRefresh(100, ago(minutes=10))
    assert triggers(Observed(100, change), tried) == []
    assert triggers(Observed(100, CorpusChange(6, 0, ago(minutes=5))), tried) == [Trigger.CORPUS]
    assert triggers(Observed(100, change), tried, NOW + timedelta(hours=1)) == [Trigger.CORPUS]


def test_a_change_known_only_by_its_number_waits_for_the_interval():
    change = CorpusChange(1, 0, None)
    assert triggers(Observed(100, change), LastRefresh(100, ago(minutes=10))) == []
    assert triggers(Observed(100, change), LONG_AGO) == [Trigger.CORPUS]


def test_an_alarm_triggers_once_and_again_after_the_interval_while_it_is_open():
    alarm = DriftAlarm(ago(minutes=20), "overlap fell to 0.3")
    assert triggers(Observed(100, alarm=alarm), LastRefresh(100, ago(minutes=30))) == [Trigger.DRIFT]
    tried = LastRefresh(100, ago(minutes=10))
    assert triggers(Observed(100, alarm=alarm), tried) == []
    assert triggers(Observed(100, alarm=alarm), tried, NOW + timedelta(hours=1)) == [Trigger.DRIFT]


def test_an_operator_is_served_at_once_and_every_reason_that_holds_is_named():
    asked = RefreshAsked(uuid.UUID(int=1), "ann", "cats look wrong")
    alarm = DriftAlarm(ago(minutes=1), "overlap fell to 0.3")
    seen = Observed(110, CorpusChange(5, 1, ago(minutes=2)), alarm, (asked,))
    due = refresh_due(seen, LastRefresh(100, ago(minutes=5)), NOW, RULE)
    assert [one.trigger for one in due] == [Trigger.OPERATOR, Trigger.DRIFT, Trigger.CORPUS, Trigger.RANKINGS]
    assert [one.detail for one in due] == [
        "ann: cats look wrong", "overlap fell to 0.3", "5 items added, 1 withdrawn since the active release",
        "10 new rankings",
    ]  # fmt: skip


def test_only_a_changed_corpus_needs_no_new_head():
    corpus, asked = Due(Trigger.CORPUS, ""), Due(Trigger.OPERATOR, "")
    assert not needs_fit([corpus], labels_changed=False)
    assert needs_fit([corpus], labels_changed=True)
    assert needs_fit([corpus, asked], labels_changed=False)


def test_after_a_rollback_only_an_operator_brings_a_new_head_and_a_changed_corpus_the_old_one():
    alarm = DriftAlarm(ago(minutes=1), "overlap fell to 0.3")
    held = Observed(200, CorpusChange(0, 1, ago(minutes=2)), alarm, rolled_back_from="r3")
    (corpus,) = refresh_due(held, LONG_AGO, NOW, RULE)
    assert corpus.trigger is Trigger.CORPUS and keeps_head(held, [corpus])
    assert triggers(Observed(200, None, alarm, rolled_back_from="r3"), LONG_AGO) == []
    asked = Observed(200, held.corpus, alarm, (RefreshAsked(uuid.UUID(int=1), "ann", ""),), "r3")
    due = refresh_due(asked, LONG_AGO, NOW, RULE)
    assert [one.trigger for one in due] == [Trigger.OPERATOR, Trigger.CORPUS] and not keeps_head(asked, due)
    assert not keeps_head(Observed(200), due[1:])
