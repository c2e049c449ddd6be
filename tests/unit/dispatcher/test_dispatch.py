"""The dispatcher's decisions, with a fake store: nothing rung is forgotten, nothing unsent is marked."""

from __future__ import annotations

import threading
import uuid

import pytest

from byline.errors import BrokerUnavailable, DatabaseUnavailable
from byline.jobs import Stage
from byline.jobs.outbox import Doorbell
from services.dispatcher.dispatch import IN_FLIGHT, RING_AGAIN_S, Dispatch
from services.dispatcher.loop import Loop


class FakeStore:
    """Due doorbells and what was given back."""

    def __init__(self, due: list[Doorbell]) -> None:
        self.due = due
        self.forgotten: list[object] = []

    def take_due(self, in_flight, again_s, grace_s: object = None):
        assert set(in_flight) == set(again_s) == set(Stage)
        due, self.due = self.due, []
        return due

    def forget_dispatch(self, job_ids):
        self.forgotten.append(job_ids)
        return 3

    def expire_leases(self, limit):
        return []

    def expire_jobs(self, limit):
        return []

    def depths(self):
        return []


def doorbells(count: int) -> list[Doorbell]:
    return [Doorbell(uuid.uuid4(), Stage.LOOKUP) for _ in range(count)]


def test_every_due_doorbell_is_rung_in_order():
    due, rung = doorbells(3), []
    assert Dispatch(FakeStore(list(due)), rung.append, lambda: False).step() == 3
    assert rung == due


def test_doorbells_that_were_not_sent_are_due_again():
    due, rung = doorbells(3), []
    store = FakeStore(list(due))

    def ring(doorbell: Doorbell) -> None:
        if len(rung) == 1:
            raise BrokerUnavailable("away")
        rung.append(doorbell)

    with pytest.raises(BrokerUnavailable):
        Dispatch(store, ring, lambda: False).step()
    assert store.forgotten == [[doorbell.job_id for doorbell in due[1:]]]


def test_a_new_redis_makes_every_doorbell_due_again_and_an_old_one_none():
    store = FakeStore([])
    assert Dispatch(store, lambda doorbell: None, lambda: False).check_redis() == 0
    assert store.forgotten == []
    assert Dispatch(store, lambda doorbell: None, lambda: True).check_redis() == 3
    assert store.forgotten == [None]


def test_every_stage_has_its_bound_and_its_patience():
    assert set(IN_FLIGHT) == set(RING_AGAIN_S) == set(Stage)
    assert IN_FLIGHT[Stage.VERIFY] > IN_FLIGHT[Stage.RANK] > 0


@pytest.mark.parametrize("error", [BrokerUnavailable("away"), DatabaseUnavailable("away")])
def test_the_loop_outlives_a_server_that_is_away(error):
    stop, rung = threading.Event(), threading.Event()
    store = FakeStore(doorbells(1))
    failures = [error, error]

    def redis_is_new() -> bool:
        if failures:
            raise failures.pop()
        return False

    dispatch = Dispatch(store, lambda doorbell: rung.set(), redis_is_new)
    loop = Loop(store, dispatch, stop, iter(range(10_000)).__next__, poll_s=0.001)
    thread = threading.Thread(target=loop.run)
    thread.start()
    assert rung.wait(30)
    stop.set()
    loop.wake.set()
    thread.join(30)
    assert not thread.is_alive()
