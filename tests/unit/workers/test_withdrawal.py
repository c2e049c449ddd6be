"""The withdrawn ids a search leaves out: read when they changed or grew old, and not otherwise."""

from __future__ import annotations

from services.workers.withdrawal import WithdrawnItems


class Reader:
    def __init__(self) -> None:
        self.gone: set[int] = set()
        self.reads = 0
        self.now = 0.0

    def __call__(self) -> set[int]:
        self.reads += 1
        return set(self.gone)

    def clock(self) -> float:
        return self.now


def test_they_are_read_once_until_told_that_they_changed() -> None:
    reader = Reader()
    withdrawn = WithdrawnItems(reader, reader.clock)
    assert withdrawn.ids().tolist() == withdrawn.ids().tolist() == []
    assert reader.reads == 1
    reader.gone = {7, 3}
    withdrawn.changed()
    assert withdrawn.ids().tolist() == [3, 7]


def test_a_notification_that_was_lost_costs_no_more_than_their_age() -> None:
    reader = Reader()
    withdrawn = WithdrawnItems(reader, reader.clock, keep_s=5.0)
    withdrawn.ids()
    reader.gone = {1}
    reader.now = 4.9
    assert withdrawn.ids().tolist() == []
    reader.now = 5.1
    assert withdrawn.ids().tolist() == [1]


def test_a_change_during_the_reading_is_read_again() -> None:
    reader = Reader()
    told: list[WithdrawnItems] = []

    def read() -> set[int]:
        before = reader()
        if reader.reads == 1:
            reader.gone = {5}
            told[0].changed()
        return before

    told.append(WithdrawnItems(read, reader.clock))
    assert told[0].ids().tolist() == []
    assert told[0].ids().tolist() == [5]
